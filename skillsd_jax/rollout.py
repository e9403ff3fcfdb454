"""Plays many episodes at once: environments on the host, the sampler on the device."""

import dataclasses
import functools
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from skillsd_jax import config as settings
from skillsd_jax import prompts, sampler, tokens
from skillsd_jax.environments import ENVIRONMENTS, base
from skillsd_jax.episode import Episode, begin
from skillsd_jax.models import qwen
from skillsd_jax.trajectory import Segment, Task, Trajectory


@dataclasses.dataclass(frozen=True)
class Player:
    """How the model plays: static settings of every rollout.

    Args:
      model: shape of the network.
      encoder: text to ids and back.
      prompt: how an episode is shown; lengths are the shapes that get compiled.
      rows: episodes on the device at once; smaller batches use rows/2, rows/4, …
    """

    model: qwen.ModelConfig
    encoder: prompts.Encoder
    prompt: settings.Prompt
    rows: int

    @property
    def prompter(self) -> prompts.Prompter:
        return prompts.Prompter(self.encoder, self.prompt)

    @property
    def length(self) -> int:
        """Tokens of the longest context a plain view may have."""
        prompt = self.prompt
        if prompt.context == "whole":
            return prompt.max_length
        return prompt.max_prompt_length + prompt.max_response_length

    @property
    def skilled_length(self) -> int:
        """The same for the teacher's view, which has room for a skill."""
        return self.length + self.prompt.max_skill_length

    def scored(self, turns: int) -> int:
        """Scored tokens of a row, at most, in episodes of up to `turns` turns."""
        whole = self.prompt.context == "whole"
        return self.prompt.max_response_length * (turns if whole else 1)

    @property
    def row_buckets(self) -> tuple[int, ...]:
        return tuple(sorted({max(1, self.rows // n) for n in (1, 2, 4, 8)}))

    def window(self, hinted: bool) -> int:
        """Tokens a whole history may hold; a player shown a skill has room for it."""
        prompt = self.prompt
        return prompt.max_length + hinted * prompt.max_skill_length

    @property
    def turn_buckets(self) -> tuple[int, ...]:
        """Whole history: lengths a turn's new tokens are padded to."""
        prompt = self.prompt
        longest = prompt.max_prompt_length + prompt.max_skill_length
        return tuple(sorted({max(8, longest // 4), longest}))


def environments(
    config: settings.Environment, split: str, count: int = 1
) -> list[base.Environment]:
    """Instances of the configured environment.

    Raises:
      ImportError: its engine is missing; names the pip extra.
    """
    options = dataclasses.asdict(getattr(config, config.name))
    make = ENVIRONMENTS[config.name]
    return [
        make(split=split, require_think=config.require_think, **options)
        for _ in range(count)
    ]


def collect(
    player: Player,
    params,
    environments: Sequence[base.Environment],
    seeds: Sequence[int],
    key: jax.Array,
    temperature: float,
    hint: Callable[[Task], str | None] | None = None,
) -> list[Trajectory]:
    """Plays one episode per seed and returns the trajectories in that order.

    Args:
      player: static settings.
      params: weights of the acting policy.
      environments: at least `player.rows` instances; reused.
      seeds: indices into the environments' split; a group repeats its seed.
      key: source of all sampling. Each reply depends on (key, episode, turn) alone,
        not on which other episodes share the batch.
      temperature: 0 is greedy.
      hint: skill text shown to the acting policy itself. None: plain prompts.
    """
    wanted = min(player.rows, len(seeds))
    if len(environments) < wanted:
        raise ValueError(
            f"{len(environments)} environments for {wanted} episodes at once; "
            f"make as many as player.rows={player.rows}"
        )
    if hint is not None:
        hint = _that_fits(player, hint)
    context = _Whole if player.prompt.context == "whole" else _Windowed
    finished: list[Trajectory] = []
    for first in range(0, len(seeds), player.rows):
        chunk = seeds[first : first + player.rows]
        episodes = [
            begin(first + offset, environment, int(seed), hint)
            for offset, (seed, environment) in enumerate(zip(chunk, environments))
        ]
        ask = context(player, params, key, temperature)
        live = [episode for episode in episodes if not episode.ending]
        while live:
            for episode, reply in zip(live, ask(live)):
                episode.take(reply)
            live = [episode for episode in live if not episode.ending]
        finished += [episode.finish() for episode in episodes]
    return finished


def _that_fits(player: Player, hint: Callable[[Task], str | None]):
    """The same hints, without those that cannot be shown whole."""

    def fitting(task: Task) -> str | None:
        text = hint(task)
        return text if text is not None and player.prompter.fits(text) else None

    return fitting


def warm_up(player: Player, params, hinted: bool = False) -> None:
    """Compiles every shape that rollouts may use, so that none is met later.

    Args:
      player, params: who plays.
      hinted: prompts with a skill too.
    """
    longest = player.prompt.max_prompt_length
    lengths = [longest, longest + player.prompt.max_skill_length][: 1 + hinted]
    for rows in player.row_buckets:
        keyed = (jax.random.key(0), *np.full((2, rows), -1, np.int32))
        if player.prompt.context == "windowed":
            for length in lengths:
                _fresh(player, params, _ragged([], rows, length), keyed, 1.0)
            continue
        for length in player.turn_buckets:
            state = sampler.start(player.model, rows, player.window(hinted=True))
            prompt = (*_ragged([], rows, length), np.zeros(rows, bool))
            state, _ = _kept(player, params, state, prompt, keyed, 1.0)
        for fewer in player.row_buckets:
            if fewer <= rows:
                _gather(state, np.zeros(fewer, np.int32))


class _Windowed:
    """A fresh prompt every turn; nothing is kept on the device between turns."""

    def __init__(self, player: Player, params, key, temperature: float):
        self.player, self.params = player, params
        self.key, self.temperature = key, temperature

    def __call__(self, live: Sequence[Episode]) -> list[str]:
        player, prompter = self.player, self.player.prompter
        contexts = []
        for episode in live:
            segments, cut = prompter.opening(
                episode.task, episode.step, episode.turns, episode.hint
            )
            episode.cut += cut
            contexts.append(list(segments))
        length = player.prompt.max_prompt_length
        if any(episode.hint is not None for episode in live):
            length += player.prompt.max_skill_length
        rows = tokens.bucket(len(live), player.row_buckets)
        ids, lengths = _ragged([_ids(c) for c in contexts], rows, length)
        keyed = _keyed(self.key, live, rows)
        reply = _fresh(player, self.params, (ids, lengths), keyed, self.temperature)
        return _record(player, live, contexts, reply)


class _Whole:
    """One growing context per episode; the cache is kept, a turn adds its new tokens.

    A context that would outgrow the window is closed and a new one is opened from the
    present observation, which is counted as a cut.
    """

    def __init__(self, player: Player, params, key, temperature: float):
        self.player, self.params = player, params
        self.key, self.temperature = key, temperature
        self.state, self.slots = None, ()

    def __call__(self, live: Sequence[Episode]) -> list[str]:
        player, prompter = self.player, self.player.prompter
        reserve = player.prompt.max_response_length
        fresh, new = [], []
        for episode in live:
            start = not episode.contexts
            if not start:
                context = episode.contexts[-1]
                stopped = context[-1].tokens[-1] == player.encoder.stop_id
                segment = prompter.following(episode.step, stopped)
                total = len(_ids(context)) + len(segment.tokens)
                hinted = episode.hint is not None
                start = total + reserve > player.window(hinted)
                start |= len(segment.tokens) >= player.turn_buckets[-1]
                episode.cut += int(start)
            if start:
                segments, cut = prompter.opening(
                    episode.task, episode.step, (), episode.hint
                )
                episode.cut += cut
                episode.contexts.append(list(segments))
                new.append(_ids(segments))
            else:
                context.append(segment)
                # The last sampled token is not in the cache yet.
                new.append(np.append(context[-2].tokens[-1:], segment.tokens))
            fresh.append(start)
        rows = self._place(live)
        widest = tokens.bucket(max(map(len, new)), player.turn_buckets)
        ids, lengths = _ragged(new, rows, widest)
        restart = np.zeros(rows, bool)
        restart[: len(live)] = fresh
        prompt, keyed = (ids, lengths, restart), _keyed(self.key, live, rows)
        self.state, reply = _kept(
            player, self.params, self.state, prompt, keyed, self.temperature
        )
        contexts = [episode.contexts.pop() for episode in live]
        return _record(player, live, contexts, reply)

    def _place(self, live: Sequence[Episode]) -> int:
        """Moves the live episodes' cache rows together; returns the row bucket."""
        rows = tokens.bucket(len(live), self.player.row_buckets)
        slots = tuple(episode.index for episode in live)
        if self.state is None:
            window = self.player.window(hinted=True)
            self.state = sampler.start(self.player.model, rows, window)
        elif slots != self.slots:
            where = {index: slot for slot, index in enumerate(self.slots)}
            index = np.zeros(rows, np.int32)
            index[: len(slots)] = [where[slot] for slot in slots]
            self.state = _gather(self.state, index)
        self.slots = slots
        return rows


_gather = jax.jit(sampler.gather)


def _fresh(player: Player, params, prompt, keyed, temperature: float):
    return _fresh_turn(
        player.model,
        player.prompt.max_response_length,
        player.encoder.stop_id,
        params,
        prompt,
        keyed,
        np.float32(temperature),
    )


def _kept(player: Player, params, state, prompt, keyed, temperature: float):
    return _kept_turn(
        player.model,
        player.prompt.max_response_length,
        player.encoder.stop_id,
        params,
        state,
        prompt,
        keyed,
        np.float32(temperature),
    )


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _fresh_turn(model, max_new, stop_id, params, prompt, keyed, temperature):
    """Prefill and decode of rows that share nothing with the turn before."""
    ids, lengths = prompt
    keys, live = _row_keys(*keyed)
    state = sampler.start(model, ids.shape[0], ids.shape[1] + max_new)
    state = sampler.extend(model, params, state, ids, lengths)
    _, reply = sampler.generate(
        model, params, state, keys, live, max_new, temperature, stop_id
    )
    return reply


@functools.partial(jax.jit, static_argnums=(0, 1, 2), donate_argnums=(4,))
def _kept_turn(model, max_new, stop_id, params, state, prompt, keyed, temperature):
    """Prefill of what is new and decode, on top of the cache of earlier turns."""
    ids, lengths, restart = prompt
    keys, live = _row_keys(*keyed)
    length = jnp.where(restart, 0, state.cache.length)
    cache = dataclasses.replace(state.cache, length=length)
    state = dataclasses.replace(state, cache=cache)
    state = sampler.extend(model, params, state, ids, lengths)
    return sampler.generate(
        model, params, state, keys, live, max_new, temperature, stop_id
    )


def _row_keys(key, episode, turn):
    """Keys [B] that depend on (key, episode, turn) alone; −1 marks an empty row."""

    def one(episode, turn):
        return jax.random.fold_in(jax.random.fold_in(key, episode), turn)

    return jax.vmap(one)(episode, turn), episode >= 0


def _keyed(key, live: Sequence[Episode], rows: int):
    episode = np.full(rows, -1, np.int32)
    turn = np.zeros(rows, np.int32)
    episode[: len(live)] = [e.index for e in live]
    turn[: len(live)] = [len(e.turns) for e in live]
    return key, episode, turn


def _record(player: Player, live, contexts, reply) -> list[str]:
    """Appends each reply to its context; returns the replies as text."""
    ids, logprobs, counts = jax.device_get((reply.tokens, reply.logprob, reply.count))
    texts = []
    for b, (episode, context) in enumerate(zip(live, contexts)):
        sampled = ids[b, : counts[b]]
        context.append(player.prompter.reply(sampled, logprobs[b, : counts[b]]))
        episode.contexts.append(context)
        spoken = sampled[sampled != player.encoder.stop_id]
        texts.append(player.encoder.decode(spoken.tolist()))
    return texts


def _ids(segments: Sequence[Segment]) -> np.ndarray:
    return np.concatenate([segment.tokens for segment in segments])


def _ragged(rows: Sequence[np.ndarray], size: int, length: int):
    """Right-pads rows to [size, length]; an empty row has length 0."""
    ids, lengths = np.zeros((size, length), np.int32), np.zeros(size, np.int32)
    for b, row in enumerate(rows):
        ids[b, : len(row)], lengths[b] = row, len(row)
    return ids, lengths
