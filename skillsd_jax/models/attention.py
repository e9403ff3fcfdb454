"""Attention over whole sequences and over a cache, by the name of its kernel."""

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from skillsd_jax import sharding
from skillsd_jax.models import flash_decoding

if TYPE_CHECKING:
    from skillsd_jax.models.kv_cache import KVCache

LANES = 128  # splash: head size and length come in multiples of it


def causal(
    kind: str,
    q: Float[Array, "B L H E"],
    k: Float[Array, "B L K E"],
    v: Float[Array, "B L K E"],
    window: int | None = None,
) -> Float[Array, "B L H E"]:
    """softmax(q kᵀ / √E) v, every query over itself and what stands before it.

    Padding on the right needs no mask: no earlier query sees it.

    Args:
      kind: a name in ATTENTION; what it asks for is checked by `refuse`.
      window: how many tokens, itself included, a query sees; None: all.
    """
    return ATTENTION[kind](q, k, v, window)


def refuse(kind: str, head_size: int, dtype: str, backend: str) -> str | None:
    """Why the kernel cannot run here, or None. Nothing else is taken instead.

    Args:
      head_size: E.
      dtype: of the matmuls.
      backend: jax.default_backend().
    """
    if kind not in ATTENTION:
        return f"model.attention={kind!r} is not known: {', '.join(ATTENTION)}"
    wants: list[str] = []
    if kind == "cudnn":
        wants += ["a GPU"] * (backend != "gpu")
        wants += ["model.dtype=bfloat16"] * (dtype != "bfloat16")
        wants += ["a head size ≤ 128 that 8 divides"] * (
            head_size > 128 or head_size % 8 > 0
        )
    if kind == "splash":
        wants += ["a TPU"] * (backend != "tpu")
        wants += [f"a head size that {LANES} divides"] * (head_size % LANES > 0)
    if not wants:
        return None
    return (
        f"model.attention={kind} wants {' and '.join(wants)}; here: {backend}, "
        f"{dtype}, head size {head_size}. Take plain, which runs everywhere"
    )


def masked(
    q: Float[Array, "B L H E"],
    k: Float[Array, "B S K E"],
    v: Float[Array, "B S K E"],
    allowed: Bool[Array, "#B L S"],
) -> Float[Array, "B L H E"]:
    """softmax(q kᵀ / √E) v; every query is allowed at least one slot."""
    return cached(q, k.transpose(0, 2, 1, 3), v.transpose(0, 2, 1, 3), allowed)


def cached(
    q: Float[Array, "B L H E"],
    k: Float[Array, "B K ..."],
    v: Float[Array, "B K S E"],
    allowed: Bool[Array, "#B L S"],
    turned: bool = False,
) -> Float[Array, "B L H E"]:
    """`masked` over keys and values as a cache keeps them.

    The H / K query heads that share a key head are laid out as further queries.

    Args:
      turned: k is [B K E S] and not [B K S E]; without a gradient.
    """
    rows, length, heads, size = q.shape
    group = heads // k.shape[1]
    q = (q * size**-0.5).reshape(rows, length, -1, group, size)
    q = q.transpose(0, 2, 3, 1, 4).reshape(rows, -1, group * length, size)
    bias = jnp.where(allowed, 0.0, -1e30)[:, None]
    bias = jnp.tile(bias, (1, 1, group, 1))
    mixed = (_mix_turned if turned else _mix)(q, k, v, bias)
    mixed = mixed.reshape(rows, -1, group, length, size).transpose(0, 3, 1, 2, 4)
    return mixed.reshape(rows, length, heads, size)


def over(
    position: Int[Array, "B L"],
    length: Int[Array, "B"],
    cache: "KVCache",
    flash: bool,
    window: int | None,
) -> Callable:
    """How L new tokens of every row read what a layer keeps of the cache: f(q, k, v).

    Args:
      position: of each new token, whose keys are written already.
      length: how many of them are real; a row with none may be given anything.
      flash: flash_decoding serves here; it reads one token a row.
      window: how many tokens, itself included, a query sees; None: all.
    """
    if flash and position.shape[1] == 1:
        # A token past the last slot is lost; the kernel must not read beyond it.
        end = jnp.minimum(position[:, 0] + 1, cache.slots)
        end = jnp.where(length > 0, end, 0)
        begin = jnp.zeros_like(end) if window is None else jnp.maximum(end - window, 0)

        def one(q, k, v):
            return flash_decoding.attend(q[:, 0], k, v, begin, end)[:, None]

        return one
    allowed = visible(position, jnp.arange(cache.slots), window)
    return lambda q, k, v: cached(q, k, v, allowed, cache.turned)


def _plain(q, k, v, window):
    place = jnp.arange(q.shape[1])
    return masked(q, k, v, visible(place[None], place, window))


def visible(position: Array, slot: Array, window: int | None) -> Bool[Array, "B L S"]:
    """Which slots [S] the queries at `position` [B L] may see."""
    allowed = position[..., None] >= slot
    if window is not None:
        allowed &= position[..., None] - slot < window
    return allowed


def _xla(q, k, v, window):
    """jax's own, with scores in memory."""
    return _dot_product(q, k, v, window, "xla")


def _cudnn(q, k, v, window):
    """Flash attention of cuDNN: no scores in memory."""
    attend = functools.partial(_dot_product, window=window, implementation="cudnn")
    return sharding.by_heads(attend, q, k, v)


def _dot_product(q, k, v, window, implementation):
    # A window without is_causal would leak the future through cudnn.
    local = None if window is None else (window - 1, 0)
    return jax.nn.dot_product_attention(
        q,
        k,
        v,
        is_causal=True,
        local_window_size=local,
        implementation=implementation,
    )


def _splash(q, k, v, window, interpret: bool = False):
    """Flash attention of TPUs; lengths are padded to what its blocks divide."""
    attend = functools.partial(_splashed, window=window, interpret=interpret)
    return sharding.by_heads(attend, q, k, v)


def _splashed(q, k, v, window, interpret: bool):
    from jax.experimental.pallas.ops.tpu import splash_attention

    _, length, heads, size = q.shape
    extra = -length % LANES
    shape = (length + extra, length + extra)
    if window is None:
        mask = splash_attention.CausalMask(shape)
    else:
        mask = splash_attention.LocalMask(shape, (window - 1, 0), offset=0)
    kernel = splash_attention.make_splash_mha(
        splash_attention.MultiHeadMask([mask] * heads),
        head_shards=1,
        q_seq_shards=1,
        interpret=interpret,
    )
    pad = ((0, 0), (0, extra), (0, 0), (0, 0))
    q, k, v = (jnp.pad(x, pad).transpose(0, 2, 1, 3) for x in (q, k, v))
    out = jax.vmap(kernel)(q * size**-0.5, k, v)
    return out.transpose(0, 2, 1, 3)[:, :length]


ATTENTION: dict[str, Callable] = {
    "plain": _plain,
    "xla": _xla,
    "cudnn": _cudnn,
    "splash": _splash,
}


@jax.custom_vjp
def _mix(
    q: Float[Array, "B K M E"],
    k: Float[Array, "B K S E"],
    v: Float[Array, "B K S E"],
    bias: Float[Array, "#B 1 M S"],
) -> Float[Array, "B K M E"]:
    """softmax(q kᵀ + bias) v; the backward pass makes the weights anew.

    Hence no [M, S] array outlives a layer. With the explicit layout: 11 ms for value
    and gradient against 18 of the plain equation and 31 of
    jax.nn.dot_product_attention (128 rows of 64 tokens, 4 heads of 16, two cores).
    """
    return _mix_fwd(q, k, v, bias)[0]


def _mix_turned(
    q: Float[Array, "B K M E"],
    k: Float[Array, "B K E S"],
    v: Float[Array, "B K S E"],
    bias: Float[Array, "#B 1 M S"],
) -> Float[Array, "B K M E"]:
    """The same for keys that lie the other way; see KVCache."""
    score = jnp.einsum("bkme,bkes->bkms", q, k, preferred_element_type=jnp.float32)
    return _mixed(*_softened(score + bias), v)


def _weights(q, k, bias) -> tuple[Float[Array, "B K M S"], Float[Array, "B K M 1"]]:
    score = jnp.einsum("bkme,bkse->bkms", q, k, preferred_element_type=jnp.float32)
    return _softened(score + bias)


def _softened(score):
    weight = jnp.exp(score - jnp.max(score, -1, keepdims=True))
    return weight, jnp.sum(weight, -1, keepdims=True)


def _mix_fwd(q, k, v, bias):
    mixed = _mixed(*_weights(q, k, bias), v)
    return mixed, (q, k, v, bias, mixed)


def _mixed(weight, total, v) -> Float[Array, "B K M E"]:
    mixed = jnp.einsum(
        "bkms,bkse->bkme",
        weight.astype(v.dtype),
        v,
        preferred_element_type=jnp.float32,
    )
    return (mixed / total).astype(v.dtype)


def _mix_bwd(saved, g):
    q, k, v, bias, mixed = saved
    weight, total = _weights(q, k, bias)
    weight = weight / total
    # Σ_s weight · ∂weight = mixed · g: a sum over E instead of over S
    shared = jnp.sum(mixed.astype(jnp.float32) * g, -1, keepdims=True)
    d_weight = jnp.einsum("bkme,bkse->bkms", g, v, preferred_element_type=jnp.float32)
    d_score = (weight * (d_weight - shared)).astype(q.dtype)
    return (
        jnp.einsum("bkms,bkse->bkme", d_score, k),
        jnp.einsum("bkms,bkme->bkse", d_score, q),
        jnp.einsum("bkms,bkme->bkse", weight.astype(g.dtype), g),
        None,
    )


_mix.defvjp(_mix_fwd, _mix_bwd)
