"""Our own contenders of benchmarks/rollout.py: the engine, and the whole history anew."""

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from script import CHECKED_ROWS, CHECKED_TURNS, Script, spoken

from skillsd_jax import sampler, slots
from skillsd_jax.models import huggingface, qwen

BUCKET = 64  # contexts read anew are padded to multiples of it


class _Own:
    """Args:
    folder: of Hugging Face.
    script: what will be played.
    """

    def __init__(self, folder: str, script: Script):
        self.model, params = huggingface.load(folder)
        apart = jax.jit(qwen.unstack, static_argnums=0)
        self.params = jax.block_until_ready(apart(self.model, params))
        self.key, self.max_new = jax.random.key(0), int(script.limits.max())
        self.folder, self.logprobs = folder, ()

    def difference(self, script: Script) -> float:
        """Of log-probs, to qwen.apply on each row's own tokens."""
        self.forget()
        model, params = huggingface.load(self.folder)
        apply, worst = jax.jit(qwen.apply, static_argnums=0), 0.0
        for contexts, replies in spoken(script.cut(CHECKED_TURNS), self):
            for b in range(min(CHECKED_ROWS, len(contexts))):
                first, total = len(contexts[b]), len(contexts[b]) + len(replies[b])
                ids = np.zeros((1, _bucket(total)), np.int32)
                ids[0, :total] = [*contexts[b], *replies[b]]
                logits = apply(model, params, ids)[0, first - 1 : total - 1]
                expected = jax.nn.log_softmax(logits)
                expected = expected[np.arange(len(replies[b])), replies[b]]
                apart = jnp.abs(expected - self.logprobs[b]).max()
                worst = max(worst, float(apart))
        return worst


class Ours(_Own):
    """slots.Slots: a turn reads only what is new."""

    def ready(self, script: Script) -> None:
        self.room = slots.Room(script.rows, script.longest)
        how = sampler.Decoding(self.max_new, shrink=self.room.shrink)
        self.voice = slots.Voice(self.model, self.params, how, self.key, 1.0)
        slots.Slots(self.voice, self.room).warm_up()
        self.forget()

    def forget(self) -> None:
        self.slots = slots.Slots(self.voice, self.room)

    def say(
        self, contexts: Sequence[np.ndarray], limits: np.ndarray, turn: int
    ) -> list[np.ndarray]:
        asks = [
            slots.Ask(row, context, episode=row, turn=turn, limit=int(limit))
            for row, (context, limit) in enumerate(zip(contexts, limits))
        ]
        heard = self.slots.ask(asks).result()
        self.logprobs = [logprobs for _, logprobs in heard]
        return [ids for ids, _ in heard]


class Reprefill(_Own):
    """Every turn all rows read their whole history, and nothing is kept."""

    def ready(self, script: Script) -> None:
        rows = np.zeros(script.rows, np.int32)
        turn, self.turns = np.int32(0), {}
        how = sampler.Decoding(self.max_new)
        for length in sorted({_bucket(n) for n in script.lengths().max(0).tolist()}):
            ids = np.zeros((script.rows, length), np.int32)
            lowered = _turn.lower(
                self.model, how, self.params, self.key, turn, ids, rows, rows
            )
            self.turns[length] = lowered.compile()

    def forget(self) -> None:
        """It keeps nothing."""

    def say(
        self, contexts: Sequence[np.ndarray], limits: np.ndarray, turn: int
    ) -> list[np.ndarray]:
        length = np.array([len(context) for context in contexts], np.int32)
        ids = np.zeros((len(contexts), _bucket(length.max())), np.int32)
        for row, context in zip(ids, contexts):
            row[: len(context)] = context
        given = np.int32(turn), ids, length, limits.astype(np.int32)
        reply = self.turns[ids.shape[1]](self.params, self.key, *given)
        tokens, self.logprobs, count = jax.device_get(
            (reply.tokens, reply.logprob, reply.count)
        )
        self.logprobs = [row[:n] for row, n in zip(self.logprobs, count)]
        return [row[:n] for row, n in zip(tokens, count)]


@functools.partial(jax.jit, static_argnums=(0, 1))
def _turn(model, how, params, key, turn, ids, length, limit) -> sampler.Reply:
    rows, longest = ids.shape
    keys = jax.random.split(jax.random.fold_in(key, turn), rows)
    state = sampler.start(model, rows, longest + how.max_new)
    state = sampler.extend(model, params, state, ids, length)
    ask = sampler.Ask(keys, limit > 0, limit)
    return sampler.generate(model, params, state, ask, 1.0, how)[1]


def _bucket(length: int) -> int:
    return -(-int(length) // BUCKET) * BUCKET
