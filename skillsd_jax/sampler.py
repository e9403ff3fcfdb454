"""Replies drawn on the device; what a row has read stays in its cache between turns."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from skillsd_jax.models import kv_cache, qwen
from skillsd_jax.models.kv_cache import KVCache
from skillsd_jax.models.scoring import pick


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class SamplerState:
    """Args:
    cache: what each row has read.
    logits: of each row's next token; zeros in a row that has read nothing.
    """

    cache: KVCache
    logits: Float[Array, "B V"]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Reply:
    """Args:
    tokens: sampled ids, the stop token included; 0 from `count` on.
    logprob: of each at the sampling temperature, nats; 0 from `count` on.
    count: how many were sampled; 0 in rows that are not live.
    """

    tokens: Int[Array, "B M"]
    logprob: Float[Array, "B M"]
    count: Int[Array, "B"]


def start(config: qwen.ModelConfig, rows: int, slots: int) -> SamplerState:
    """Rows that have read nothing, with room for `slots` tokens each."""
    return SamplerState(
        cache=kv_cache.empty(config, rows, slots),
        logits=jnp.zeros((rows, config.vocab), jnp.float32),
    )


def gather(state: SamplerState, index: Int[Array, "C"]) -> SamplerState:
    """The rows named by `index`, which may repeat."""
    return SamplerState(kv_cache.gather(state.cache, index), state.logits[index])


def extend(
    config: qwen.ModelConfig,
    params: qwen.Params,
    state: SamplerState,
    tokens: Int[Array, "B n"],
    length: Int[Array, "B"],
) -> SamplerState:
    """Reads the first length[b] tokens of row b; a row with length 0 stays as it is.

    The caller sees to it that no row outgrows its slots.
    """
    states, cache = qwen.extend(config, params, state.cache, tokens, length)
    last = jnp.maximum(length - 1, 0)[:, None, None]
    states = jnp.take_along_axis(states, last, axis=1)[:, 0]
    logits = qwen.head(config, params, states)
    logits = jnp.where(length[:, None] > 0, logits, state.logits)
    return SamplerState(cache, logits)


def generate(
    config: qwen.ModelConfig,
    params: qwen.Params,
    state: SamplerState,
    keys: Array,
    live: Bool[Array, "B"],
    max_new: int,
    temperature: float | Float[Array, ""],
    stop_id: int,
) -> tuple[SamplerState, Reply]:
    """Samples until every live row has drawn `stop_id` or max_new tokens.

    A row's last token is not read yet: the next `extend` starts with it. A row must
    have read something before.

    Args:
      keys: [B] random keys; a row's reply depends on its own key alone.
      live: rows that reply.
      max_new: M, static.
      temperature: of the distribution sampled from; 0 takes the most probable token and
        reports its log-prob at temperature 1.
      stop_id: id that ends a reply, static.
    """
    rows = live.shape[0]
    none = Reply(
        tokens=jnp.zeros((rows, max_new), jnp.int32),
        logprob=jnp.zeros((rows, max_new), jnp.float32),
        count=jnp.zeros(rows, jnp.int32),
    )

    def draw(i, logits, live, reply):
        key = jax.vmap(jax.random.fold_in, (0, None))(keys, i)
        token, logprob = _draw(key, logits, temperature)
        reply = Reply(
            tokens=reply.tokens.at[:, i].set(jnp.where(live, token, 0)),
            logprob=reply.logprob.at[:, i].set(jnp.where(live, logprob, 0.0)),
            count=reply.count + live,
        )
        return live & (token != stop_id), reply

    def unfinished(carry):
        i, _, live, _ = carry
        return (i < max_new) & jnp.any(live)

    def step(carry):
        i, state, live, reply = carry
        last = jax.lax.dynamic_slice_in_dim(reply.tokens, i - 1, 1, axis=1)
        state = extend(config, params, state, last, live.astype(jnp.int32))
        live, reply = draw(i, state.logits, live, reply)
        return i + 1, state, live, reply

    live, reply = draw(0, state.logits, live, none)
    carry = jax.lax.while_loop(unfinished, step, (jnp.int32(1), state, live, reply))
    return carry[1], carry[3]


def _draw(keys: Array, logits: Float[Array, "B V"], temperature):
    """A token per row and its log-prob."""
    greedy = jnp.asarray(temperature) == 0
    logits = logits / jnp.where(greedy, 1.0, temperature)
    sampled = jax.vmap(jax.random.categorical)(keys, logits)
    token = jnp.where(greedy, jnp.argmax(logits, -1), sampled).astype(jnp.int32)
    return token, pick(jax.nn.log_softmax(logits), token)


@functools.partial(
    jax.jit,
    static_argnames=("config", "max_new", "stop_id"),
    donate_argnames="state",
)
def turn(
    config: qwen.ModelConfig,
    params: qwen.Params,
    state: SamplerState,
    tokens: Int[Array, "B n"],
    length: Int[Array, "B"],
    keys: Array,
    live: Bool[Array, "B"],
    temperature: float | Float[Array, ""],
    max_new: int,
    stop_id: int,
) -> tuple[SamplerState, Reply]:
    """`extend`, then `generate`, in one call that consumes `state`."""
    state = extend(config, params, state, tokens, length)
    return generate(config, params, state, keys, live, max_new, temperature, stop_id)
