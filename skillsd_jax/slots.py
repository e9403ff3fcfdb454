"""Rows on the device and what each has read, so that a turn reads only what is new."""

import dataclasses
import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from skillsd_jax import sampler, tokens
from skillsd_jax.models import kv_cache, qwen
from skillsd_jax.models.automaton import Automaton
from skillsd_jax.models.kv_cache import KVCache
from skillsd_jax.sampler import Decoding, Reply

SHORTEST, LONGEST = 16, 256  # tokens of a piece
FEWEST = 256  # slots of a row, if its window is not smaller


@dataclasses.dataclass(frozen=True)
class Ask:
    """A row's turn to speak.

    Args:
      slot: which row.
      context: ids [n] of all that it is to have read.
      episode, turn: with the key of the batch they make the key of the reply.
      limit: the most tokens of the reply.
      begin: state of the automaton it begins in.
    """

    slot: int
    context: np.ndarray
    episode: int
    turn: int
    limit: int
    begin: int = 0


@dataclasses.dataclass(frozen=True)
class Voice:
    """Who speaks and how.

    Args:
      model: shape of the network.
      params: its weights, in layers apart (qwen.unstack) for speed.
      how: static settings of decoding.
      key: of all sampling. The random numbers of a reply depend on (key, episode,
        turn) alone; its logits are the same up to rounding whoever shares the batch.
      temperature: 0 is greedy.
      guide: ends replies at texts, or rules tokens out; None: neither.
    """

    model: qwen.ModelConfig
    params: qwen.Params
    how: Decoding
    key: jax.Array
    temperature: float
    guide: Automaton | None = None


@dataclasses.dataclass(frozen=True)
class Room:
    """How much is held at once; its buckets are the shapes that get compiled.

    Args:
      rows: B.
      window: the most tokens of a context with its reply.
      fine: many sizes, so that little is computed for nothing, as a CPU wants it.
        Few of them compile faster, and copy less of the cache.
      still: no row leaves its place, as on a mesh, where it would change devices: all
        read at once, and decoding goes on with all.
    """

    rows: int
    window: int
    fine: bool = True
    still: bool = False

    @property
    def slots(self) -> tuple[int, ...]:
        """Sizes the cache grows through: two an octave, or one."""
        return _octaves(min(FEWEST, self.window), self.window, self.fine)

    @property
    def pieces(self) -> tuple[int, ...]:
        """Lengths that new tokens are padded to; what is longer takes several."""
        longest = max(SHORTEST, min(LONGEST, self.window))
        sizes = _octaves(SHORTEST, longest, self.fine)
        return sizes if self.fine else (*sizes[:-1:2], longest)

    @property
    def piece_rows(self) -> int:
        """Rows of a piece: rows of like length are read together."""
        return self.rows if self.still else max(1, self.rows // 4)

    @property
    def shrink(self) -> tuple[int, ...]:
        """Row counts that decoding shrinks to."""
        parts = () if self.still else (3, 2, 1) if self.fine else (1,)
        return tuple(n * self.rows // 4 for n in parts if n * self.rows // 4 > 3)


class Heard:
    """A reply that the device may still be at work on."""

    def __init__(self, slots: "Slots | None", asks: Sequence[Ask], reply: Reply, rows):
        self._slots, self._asks, self._reply, self._rows = slots, asks, reply, rows

    def ready(self) -> bool:
        """Whether `result` need not wait."""
        return self._reply.count.is_ready()

    def result(self) -> list[tuple[np.ndarray, np.ndarray]]:
        """Sampled ids and their log-probs, in the order of the asks."""
        reply = jax.device_get(self._reply)
        out = []
        for ask, row in zip(self._asks, self._rows):
            count = reply.count[row]
            ids, logprobs = reply.tokens[row, :count], reply.logprob[row, :count]
            if self._slots is not None:
                # The last token was drawn and not read.
                self._slots.known[ask.slot] = np.append(ask.context, ids[:-1])
            out.append((ids, logprobs))
        return out


class Slots:
    """Rows that keep what they have read from turn to turn.

    A row asked to read a context goes on from where it differs from what it holds:
    after its last reply in a whole history, behind the shared beginning of a windowed
    prompt, behind the instructions where the slot was another episode's. Equal
    contexts (a group's first prompt) are read once and copied.

    Args:
      voice: who speaks.
      room: shapes.
    """

    def __init__(self, voice: Voice, room: Room):
        self.voice, self.room = voice, room
        self.state = _started(voice.model, room.rows, room.slots[0])
        self.spare = self._spare()
        self.known = [np.zeros(0, np.int32)] * room.rows
        self.read = 0  # tokens read, padding not counted

    def ask(self, asks: Sequence[Ask]) -> Heard:
        """Sets the rows to work and returns at once.

        Raises:
          ValueError: a context does not leave room for its reply.
        """
        longest = max(len(ask.context) + ask.limit for ask in asks)
        if longest > self.room.window:
            raise ValueError(
                f"a context with its reply takes {longest} tokens, the window is "
                f"{self.room.window}; cut the context first"
            )
        self._grow(longest)
        leaders, copies = asks, []
        if not self.room.still:  # there it would change devices, and save nothing
            leaders, copies = _leaders(asks, self.known)
        self._read(leaders)
        if copies:
            self._copy(copies)
        rows = self.room.rows
        episode, turn = np.full(rows, -1, np.int32), np.zeros(rows, np.int32)
        limit, begin = np.zeros(rows, np.int32), np.zeros(rows, np.int32)
        for ask in asks:
            episode[ask.slot], turn[ask.slot] = ask.episode, ask.turn
            limit[ask.slot], begin[ask.slot] = ask.limit, ask.begin
        reply = self._speak((episode, turn, limit, begin))
        return Heard(self, asks, reply, [ask.slot for ask in asks])

    def _speak(self, asked) -> Reply:
        self.state, self.spare, reply = _speak(
            self.voice.model,
            self.voice.how,
            self.voice.params,
            self.state,
            self.spare,
            (self.voice.key, *asked),
            np.float32(self.voice.temperature),
            self.voice.guide,
        )
        return reply

    def _spare(self) -> tuple[KVCache, ...]:
        """Where decoding keeps fewer rows; only a CPU takes memory slowly."""
        if not self.state.cache.turned:
            return ()
        slots = self.state.cache.slots
        fewer = self.voice.how.loops(self.room.rows)[1:]
        return tuple(kv_cache.empty(self.voice.model, n, slots) for n in fewer)

    def _grow(self, longest: int) -> None:
        """Makes room, size after size: a leap would be a shape of its own."""
        for slots in self.room.slots:
            if self.state.cache.slots < slots and self.state.cache.slots < longest:
                self.state, self.spare = _grown(self.state, slots), ()
        self.spare = self.spare or self._spare()

    def _read(self, asks: Sequence[Ask]) -> None:
        """Reads what is new, in pieces of rows of like length."""
        new = []
        for ask in asks:
            first = _common(ask.context, self.known[ask.slot])
            self.read += len(ask.context) - first
            new.append((ask, first))
        new.sort(key=lambda pair: pair[1] - len(pair[0].context))
        many, longest = self.room.piece_rows, self.room.pieces[-1]
        for start in range(0, len(new), many):
            part = new[start : start + many]
            while part:
                length = min(longest, max(len(a.context) - at for a, at in part))
                self._piece(part, tokens.bucket(length, self.room.pieces))
                part = [(a, at + longest) for a, at in part]
                part = [(a, at) for a, at in part if at < len(a.context)]

    def _piece(self, part: Sequence[tuple[Ask, int]], length: int) -> None:
        many = self.room.piece_rows
        ids, count = np.zeros((many, length), np.int32), np.zeros(many, np.int32)
        row = np.full(many, self.room.rows, np.int32)  # past the last: nowhere
        at = np.zeros(many, np.int32)
        for i, (ask, first) in enumerate(part):
            new = ask.context[first : first + length]
            i = ask.slot if self.room.still else i
            ids[i, : len(new)], count[i] = new, len(new)
            row[i], at[i] = ask.slot, first
        where = (ids, count, None if self.room.still else row, at)
        self.state = _read(self.voice.model, self.voice.params, self.state, where)

    def _copy(self, copies: Sequence[tuple[int, int]]) -> None:
        many = self.room.piece_rows
        for first in range(0, len(copies), many):
            part = copies[first : first + many]
            source, target = np.zeros(many, np.int32), np.full(many, self.room.rows)
            for i, pair in enumerate(part):
                source[i], target[i] = pair
            self.state = _copied(self.state, source, target.astype(np.int32))

    def warm_up(self) -> None:
        """Compiles every shape that `ask` may use, and runs every loop once."""
        nought = np.zeros(self.room.rows, np.int32)
        row = np.arange(self.room.rows, dtype=np.int32)  # each draws its own word
        for slots in self.room.slots:
            self._grow(slots)
            for length in self.room.pieces:
                self._piece([], length)
            if not self.room.still:
                self._copy([(0, 0)])
            for limit in self.voice.how.rehearsals(self.room.rows):
                reply = self._speak((row, nought, limit, nought))
        jax.block_until_ready(reply)


class Fresh:
    """Rows that read their whole context every turn and keep nothing.

    Nothing is moved, and few shapes are compiled.

    Args:
      voice: who speaks.
      rows: row counts that get compiled.
      length: tokens that contexts are padded to.
    """

    def __init__(self, voice: Voice, rows: Sequence[int], length: int):
        self.voice, self.rows, self.length = voice, rows, length
        self.read = 0

    def ask(self, asks: Sequence[Ask]) -> Heard:
        """Sets the rows to work and returns at once."""
        rows = tokens.bucket(len(asks), self.rows)
        ids, length = np.zeros((rows, self.length), np.int32), np.zeros(rows, np.int32)
        episode, turn = np.full(rows, -1, np.int32), np.zeros(rows, np.int32)
        limit, begin = np.zeros(rows, np.int32), np.zeros(rows, np.int32)
        for b, ask in enumerate(asks):
            length[b] = len(ask.context)
            ids[b, : length[b]] = ask.context
            episode[b], turn[b] = ask.episode, ask.turn
            limit[b], begin[b] = ask.limit, ask.begin
        self.read += int(length.sum())
        reply = self._reply((ids, length), (episode, turn, limit, begin))
        return Heard(None, asks, reply, range(len(asks)))

    def _reply(self, prompt, asked) -> Reply:
        voice = self.voice
        return _fresh(
            voice.model,
            voice.how,
            voice.params,
            prompt,
            (voice.key, *asked),
            np.float32(voice.temperature),
            voice.guide,
        )

    def warm_up(self) -> None:
        """Compiles every shape that `ask` may use, and runs every loop once."""
        for rows in self.rows:
            nought, row = np.zeros(rows, np.int32), np.arange(rows, dtype=np.int32)
            prompt = np.zeros((rows, self.length), np.int32), nought
            for limit in self.voice.how.rehearsals(rows):
                asked = row, nought, limit, nought
                jax.block_until_ready(self._reply(prompt, asked))


def _octaves(first: int, last: int, fine: bool) -> tuple[int, ...]:
    """first, 2 first, 4 first, … and `last`; fine: with 1.5 times each as well."""
    sizes = []
    while first < last:
        sizes += [first, first * 3 // 2] if fine else [first]
        first *= 2
    return (*(size for size in sizes if size < last), last)


def _common(context: np.ndarray, known: np.ndarray) -> int:
    """Tokens of `context` that are known already; the last is always read anew."""
    most = min(len(context) - 1, len(known))
    differs = np.flatnonzero(context[:most] != known[:most])
    return int(differs[0]) if len(differs) else most


def _leaders(asks: Sequence[Ask], known: Sequence[np.ndarray]):
    """Those who read, and (source, target) slots of those who copy.

    A context is copied where reading it would take longer: where less than half of it
    is known.
    """
    first: dict[bytes, Ask] = {}
    leaders, copies = [], []
    for ask in asks:
        fresh = 2 * _common(ask.context, known[ask.slot]) < len(ask.context)
        leader = first.setdefault(ask.context.tobytes(), ask) if fresh else ask
        if leader is ask:
            leaders.append(ask)
        else:
            copies.append((leader.slot, ask.slot))
    return leaders, copies


@functools.partial(jax.jit, static_argnums=0, donate_argnums=2)
def _read(model, params, state, where):
    """Rows row[c] read ids[c] from position at[c] on; row=None: each row its own."""
    ids, count, row, at = where
    if row is None:
        length = jnp.where(count > 0, at, state.cache.length)
    else:
        length = state.cache.length.at[row].set(at, mode="drop")
    cache = dataclasses.replace(state.cache, length=length)
    state = dataclasses.replace(state, cache=cache)
    return sampler.extend(model, params, state, ids, count, row)


# What is spare is not read: without keep_unused it would not be handed over.
@functools.partial(
    jax.jit, static_argnums=(0, 1), donate_argnums=(3, 4), keep_unused=True
)
def _speak(model, how, params, state, spare, asked, temperature, guide):
    key, episode, turn, limit, begin = asked
    keys, live = row_keys(key, episode, turn)
    ask = sampler.Ask(keys, live, limit, begin)
    state = dataclasses.replace(state, spare=spare)
    state, reply = sampler.generate(model, params, state, ask, temperature, how, guide)
    return dataclasses.replace(state, spare=()), state.spare, reply


@functools.partial(jax.jit, static_argnums=(0, 1))
def _fresh(model, how, params, prompt, asked, temperature, guide):
    ids, length = prompt
    key, episode, turn, limit, begin = asked
    keys, live = row_keys(key, episode, turn)
    state = sampler.start(model, ids.shape[0], ids.shape[1] + how.max_new)
    state = sampler.extend(model, params, state, ids, length)
    ask = sampler.Ask(keys, live, limit, begin)
    return sampler.generate(model, params, state, ask, temperature, how, guide)[1]


@functools.partial(jax.jit, donate_argnums=0)
def _copied(state, source, target):
    return sampler.scatter(state, target, sampler.gather(state, source))


_grown = jax.jit(sampler.grow, static_argnums=1)
_started = jax.jit(sampler.start, static_argnums=(0, 1, 2))


def row_keys(key, episode, turn):
    """Keys [B] that depend on (key, episode, turn) alone; −1 marks an empty row."""

    def one(episode, turn):
        return jax.random.fold_in(jax.random.fold_in(key, episode), turn)

    return jax.vmap(one)(episode, turn), episode >= 0
