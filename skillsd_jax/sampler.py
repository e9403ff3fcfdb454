"""Replies drawn on the device; what a row has read stays in its cache between turns."""

import dataclasses
import functools
import operator

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from skillsd_jax import sharding
from skillsd_jax.models import automaton, kv_cache, qwen
from skillsd_jax.models.automaton import Automaton
from skillsd_jax.models.kv_cache import KVCache
from skillsd_jax.models.scoring import pick

FEW_WORDS = 4096  # up to here every word is given a random number of its own
LANES = 128


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class SamplerState:
    """Args:
    cache: what each row has read.
    logits: of each row's next token; zeros in a row that has read nothing.
    spare: where the rows that decoding shrinks to are kept meanwhile, a cache for each
      entry of Decoding.shrink, or (): XLA takes that memory anew at every call. Only a
      program that is given the state to keep (donation) gains: a turn of 32 rows over
      1,437 slots spends 0.2 of 1.5 s of a core on faulting pages in.
    """

    cache: KVCache
    logits: Float[Array, "B V"]
    spare: tuple[KVCache, ...] = ()


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Reply:
    """Args:
    tokens: sampled ids, the stop token included; 0 from `count` on.
    logprob: of each under the distribution it was drawn from, nats; 0 from `count` on.
    count: how many were sampled; 0 in rows that are not live.
    """

    tokens: Int[Array, "B M"]
    logprob: Float[Array, "B M"]
    count: Int[Array, "B"]


@dataclasses.dataclass(frozen=True)
class Decoding:
    """How replies are drawn; hashable, a static argument of jit.

    Args:
      max_new: M, the most tokens of a reply.
      stop_ids: the first of them that is drawn ends a reply.
      top_k: only so many of the likeliest words can be drawn, and what ties with the
        last of them; 0: all.
      top_p: only the fewest likeliest words whose probabilities reach it, and what ties
        with the last; 1: all.
      shrink: row counts, falling: as soon as no more rows than that are live, only they
        are computed, in a cache of their own. Each is a further loop to compile.
    """

    max_new: int
    stop_ids: tuple[int, ...] = ()
    top_k: int = 0
    top_p: float = 1.0
    shrink: tuple[int, ...] = ()

    def __post_init__(self):
        if self.max_new < 1 or self.top_k < 0 or not 0 < self.top_p <= 1:
            raise ValueError(
                f"max_new={self.max_new} must be ≥ 1, top_k={self.top_k} ≥ 0 and "
                f"top_p={self.top_p} in (0, 1]"
            )
        if list(self.shrink) != sorted(set(self.shrink), reverse=True):
            raise ValueError(f"shrink={self.shrink} must fall from entry to entry")

    def loops(self, rows: int) -> tuple[int, ...]:
        """Row counts of the loops that a batch of so many rows goes through."""
        return (rows, *(size for size in self.shrink if size < rows))

    def rehearsals(self, rows: int) -> list[np.ndarray]:
        """Limits of replies, [rows] each, with which every loop runs for one token.

        XLA:CPU prepares a loop's matmuls when the loop first runs: 32 rows took 0.24 s
        for their first two tokens with a cache of a new size, for the next two 0.04
        (8 layers of width 256, two cores).
        """
        row = np.arange(rows)
        return [2 * (row < live).astype(np.int32) for live in self.loops(rows)]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Ask:
    """What the rows of a batch want.

    Args:
      keys: random keys; a row's reply depends, up to rounding of its logits, on its own
        key alone.
      live: rows that reply.
      limit: the most tokens of each reply; None: max_new.
      begin: state of the automaton in which each row begins; None: 0.
    """

    keys: Array
    live: Bool[Array, "B"]
    limit: Int[Array, "B"] | None = None
    begin: Int[Array, "B"] | None = None


def start(config: qwen.ModelConfig, rows: int, slots: int) -> SamplerState:
    """Rows that have read nothing, with room for `slots` tokens each."""
    state = SamplerState(
        cache=kv_cache.empty(config, rows, slots),
        logits=jnp.zeros((rows, config.vocab), jnp.float32),
    )
    return _laid(state)


def _laid(state: SamplerState) -> SamplerState:
    """Rows over the mesh, and key heads."""
    rows, cache = sharding.rows, state.cache
    keys, values = (
        tuple(rows(x, "tp") for x in memory) for memory in (cache.keys, cache.values)
    )
    return SamplerState(
        KVCache(keys, values, rows(cache.length), cache.turned), rows(state.logits)
    )


def gather(state: SamplerState, index: Int[Array, "C"]) -> SamplerState:
    """The rows named by `index`, which may repeat."""
    return jax.tree.map(lambda x: x[index], state)


def scatter(
    state: SamplerState, index: Int[Array, "C"], part: SamplerState
) -> SamplerState:
    """Puts row c of `part` in the place of row index[c]; past the last row: nowhere."""
    put = jax.tree.map(lambda x, y: x.at[index].set(y, mode="drop"), state, part)
    return _laid(put)


def grow(state: SamplerState, slots: int) -> SamplerState:
    """The same with room for `slots` tokens a row."""
    return _laid(dataclasses.replace(state, cache=kv_cache.grow(state.cache, slots)))


def extend(
    config: qwen.ModelConfig,
    params: qwen.Params,
    state: SamplerState,
    tokens: Int[Array, "C n"],
    length: Int[Array, "C"],
    rows: Int[Array, "C"] | None = None,
) -> SamplerState:
    """Reads the first length[c] tokens of row c; a row with length 0 stays as it is.

    The caller sees to it that no row outgrows its slots. `rows`: see qwen.extend.
    """
    states, cache = qwen.extend(config, params, state.cache, tokens, length, rows)
    last = jnp.maximum(length - 1, 0)[:, None, None]
    states = jnp.take_along_axis(states, last, axis=1)[:, 0]
    logits = qwen.head(config, params, states)
    before = state.logits if rows is None else state.logits[rows]
    logits = jnp.where(length[:, None] > 0, logits, before)
    if rows is not None:
        logits = state.logits.at[rows].set(logits, mode="drop")
    return _laid(SamplerState(cache, logits))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class _Speech:
    """What decoding changes: rows throughout."""

    state: SamplerState
    live: Bool[Array, "B"]
    at: Int[Array, "B"]  # state of the automaton
    reply: Reply


def generate(
    config: qwen.ModelConfig,
    params: qwen.Params,
    state: SamplerState,
    ask: Ask,
    temperature: float | Float[Array, ""],
    how: Decoding,
    guide: Automaton | None = None,
) -> tuple[SamplerState, Reply]:
    """Samples until every live row has stopped or reached its limit.

    A row's last token is not read yet: the next `extend` starts with it. A row must
    have read something before.

    Args:
      ask: keys, live rows and limits.
      temperature: of the distribution sampled from; 0 takes the most probable token and
        reports its log-prob at temperature 1.
      how: static settings.
      guide: follows the text as it is drawn: ends replies and rules out tokens. The
        log-probs are those of what it leaves.
    """
    rules = _Rules(config, qwen.unstack(config, params), temperature, how, guide)
    rows = ask.live.shape[0]
    limit = jnp.full(rows, how.max_new) if ask.limit is None else ask.limit
    limit = jnp.minimum(limit, how.max_new)
    begun = _Speech(
        state=dataclasses.replace(state, spare=()),
        live=ask.live & (limit > 0),
        at=jnp.zeros(rows, jnp.int32) if ask.begin is None else ask.begin,
        reply=Reply(
            tokens=jnp.zeros((rows, how.max_new), jnp.int32),
            logprob=jnp.zeros((rows, how.max_new), jnp.float32),
            count=jnp.zeros(rows, jnp.int32),
        ),
    )
    speech = _append(rules, 0, begun, ask.keys, limit)
    fewer = how.loops(rows)[1:]
    speech, few = _decode(rules, jnp.int32(1), speech, (ask.keys, limit), fewer)
    state = dataclasses.replace(speech.state, spare=few if state.spare else ())
    return state, sharding.replicated(speech.reply)


@dataclasses.dataclass(frozen=True)
class _Rules:
    """What decoding does not change."""

    config: qwen.ModelConfig
    params: qwen.Params
    temperature: float | Float[Array, ""]
    how: Decoding
    guide: Automaton | None


def _decode(
    rules: _Rules, i, speech: _Speech, drawn_by: tuple[Array, Array], sizes
) -> tuple[_Speech, tuple[KVCache, ...]]:
    """Goes on until at most sizes[0] rows are live, then with those alone.

    Returns:
      What was said, and the caches of the fewer rows: whoever returns them has them lie
      in the memory of SamplerState.spare.
    """
    fewest = sizes[0] if sizes else 0

    def unfinished(carry):
        i, speech = carry
        return (i < rules.how.max_new) & (jnp.sum(speech.live) > fewest)

    def step(carry):
        i, speech = carry
        last = jax.lax.dynamic_slice_in_dim(speech.reply.tokens, i - 1, 1, axis=1)
        read = speech.live.astype(jnp.int32)
        state = extend(rules.config, rules.params, speech.state, last, read)
        speech = dataclasses.replace(speech, state=state)
        return i + 1, _append(rules, i, speech, *drawn_by)

    i, speech = jax.lax.while_loop(unfinished, step, (i, speech))
    if not sizes:
        return speech, ()
    rows = speech.live.shape[0]
    index = jnp.nonzero(speech.live, size=fewest, fill_value=rows)[0]
    few, drawn_by = jax.tree.map(lambda x: x[index], (speech, drawn_by))
    few = dataclasses.replace(few, live=few.live & (index < rows))
    few, fewer = _decode(rules, i, few, drawn_by, sizes[1:])
    return _merge(speech, index, few), (few.state.cache, *fewer)


def _merge(speech: _Speech, index: Int[Array, "C"], few: _Speech) -> _Speech:
    """The rows named by `index` as they are in `few`."""

    def put(whole, part):
        return jax.tree.map(lambda x, y: x.at[index].set(y, mode="drop"), whole, part)

    most = speech.reply.tokens.shape[1]
    cache = kv_cache.merge(speech.state.cache, index, few.state.cache, most)
    return _Speech(
        state=SamplerState(cache, put(speech.state.logits, few.state.logits)),
        live=put(speech.live, few.live),
        at=put(speech.at, few.at),
        reply=put(speech.reply, few.reply),
    )


def _append(rules: _Rules, i, speech: _Speech, keys, limit) -> _Speech:
    """Draws token i of every live row."""
    how, guide = rules.how, rules.guide
    live, reply, logits = speech.live, speech.reply, speech.state.logits
    key = jax.vmap(jax.random.fold_in, (0, None))(keys, i)
    if guide is not None:
        logits = automaton.mask(guide, logits, speech.at)
    token, logprob = _draw(how, key, logits, rules.temperature)
    stop = functools.reduce(operator.or_, [token == s for s in how.stop_ids], False)
    stop |= i + 1 >= limit
    at = speech.at
    if guide is not None:
        at = jnp.where(live, automaton.advance(guide, at, token), at)
        stop |= automaton.ended(guide, at)
    reply = Reply(
        tokens=reply.tokens.at[:, i].set(jnp.where(live, token, 0)),
        logprob=reply.logprob.at[:, i].set(jnp.where(live, logprob, 0.0)),
        count=reply.count + live,
    )
    return _Speech(speech.state, live & ~stop, at, reply)


def _draw(how: Decoding, keys: Array, logits: Float[Array, "B V"], temperature):
    """A token per row and its log-prob."""
    greedy = jnp.asarray(temperature) == 0
    logits = logits / jnp.where(greedy, 1.0, temperature)
    if how.top_k:
        kth = jax.lax.top_k(logits, min(how.top_k, logits.shape[-1]))[0][:, -1:]
        logits = jnp.where(logits < kth, -jnp.inf, logits)
    if how.top_p < 1:
        logits = jnp.where(logits < _nucleus(logits, how.top_p), -jnp.inf, logits)
    if logits.shape[-1] > FEW_WORDS:
        return _invert(keys, logits, greedy)
    sampled = jax.vmap(jax.random.categorical)(keys, logits)
    token = jnp.where(greedy, jnp.argmax(logits, -1), sampled).astype(jnp.int32)
    return token, pick(jax.nn.log_softmax(logits), token)


def _invert(keys: Array, logits: Float[Array, "B V"], greedy):
    """The same with two random numbers a token instead of one a word.

    The vocabulary is laid out in LANES columns. One number picks a column by its
    weight, the other a word in it: the first whose cumulative weight exceeds the number
    times the total, among those that have a weight: a long cumulative sum can rise by
    rounding alone where nothing is added. Sums run down the columns, which
    every backend does in parallel; reductions along a row are slow on a CPU.
    """
    rows, words = logits.shape
    fill = ((0, 0), (0, -words % LANES))
    logits = jnp.pad(logits, fill, constant_values=-jnp.inf).reshape(rows, -1, LANES)
    top = jnp.max(jnp.max(logits, axis=1), axis=1)

    def weigh(logits, top):
        return jnp.where(greedy, logits == top, jnp.exp(logits - top))

    def first_beyond(u, weight):
        total = jnp.where(weight > 0, jnp.cumsum(weight, axis=1), 0.0)
        most = jnp.max(total, axis=1, keepdims=True)
        return jnp.argmax(total > u[:, None] * most, axis=1)

    u = jax.vmap(lambda key: jax.random.uniform(key, (2,)))(keys)
    u = jnp.where(greedy, 0.0, u)
    everywhere = top[:, None, None]
    column = first_beyond(u[:, 0], jnp.sum(weigh(logits, everywhere), axis=1))
    total = jnp.sum(jnp.sum(jnp.exp(logits - everywhere), axis=1), axis=1)
    below = jnp.take_along_axis(logits, column[:, None, None], axis=2)[..., 0]
    place = first_beyond(u[:, 1], weigh(below, top[:, None]))
    logit = jnp.take_along_axis(below, place[:, None], axis=1)[:, 0]
    token = (place * LANES + column).astype(jnp.int32)
    return token, logit - top - jnp.log(total)


def _nucleus(logits: Float[Array, "B V"], top_p: float) -> Float[Array, "B 1"]:
    """The smallest logit among the likeliest words that together reach `top_p`."""
    falling = jnp.sort(logits, axis=-1, descending=True)
    before = jnp.cumsum(jax.nn.softmax(falling), axis=-1) - jax.nn.softmax(falling)
    return jnp.min(jnp.where(before < top_p, falling, jnp.inf), -1, keepdims=True)
