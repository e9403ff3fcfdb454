"""Attention of one new token a row over a cache, on a GPU: only live slots are read.

Pallas writes Triton for it. jax 0.11 and 0.12 say that they will drop that; setup.py
bounds jax below the version that does.
"""

import functools
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from skillsd_jax import sharding

if TYPE_CHECKING:
    from skillsd_jax.models.qwen import ModelConfig

BLOCK = 64  # slots read at once
QUERIES = 16  # of a key head, padded to what a matrix unit takes
WARPS, STAGES = 4, 3  # a fourth stage is more than the 99 KiB of 8.6 and 8.9 hold


def serves(config: "ModelConfig") -> bool:
    """Whether `attend` can be asked for this network on this machine.

    In float32 the matrix units would round; before Ampere (8.0) they lack bfloat16.
    """
    size, group = config.head_size, config.heads // config.kv_heads
    fits = size in (16, 32, 64, 128) and group <= QUERIES
    half = config.dtype in ("bfloat16", "float16")
    if not (fits and half and jax.default_backend() == "gpu"):
        return False
    return _capability() >= 8


def attend(
    q: Float[Array, "B H E"],
    k: Float[Array, "B K S E"],
    v: Float[Array, "B K S E"],
    begin: Int[Array, "B"],
    end: Int[Array, "B"],
    interpret: bool = False,
) -> Float[Array, "B H E"]:
    """softmax(q kᵀ / √E) v over slots begin ≤ s < end of each row; 0 where there are none.

    A program of its own for each key head of a row goes through the row's slots once,
    with a running maximum: neither scores nor dead slots are read or written. On an
    H100 it reads 2,535 to 2,962 GB/s of live slots (64 and 256 rows, 8 key heads of
    128), the mask over all slots 1,349 to 1,425 at half full.

    Args:
      interpret: run it by its own rules on any machine, for tests.

    Source: Milakov & Gimelshein 2018, arXiv 1805.02867 (the running maximum).
    """
    one = functools.partial(_attend, interpret=interpret)
    return sharding.by_heads(one, q, k, v, begin, end, axis=1)


def _capability() -> int:
    """The generation of NVIDIA's GPUs; 0: none of them."""
    said = jax.devices()[0].compute_capability  # "9.0"; of AMD's: "gfx942"
    major = said.split(".")[0]
    return int(major) if major.isdigit() else 0


def _attend(q, k, v, begin, end, interpret):
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import triton

    rows, heads, size = q.shape
    keys = k.shape[1]
    q = q.reshape(rows, keys, heads // keys, size)
    queries = pl.BlockSpec((None, None, QUERIES, size), lambda b, h: (b, h, 0, 0))
    memory = pl.BlockSpec((None, None, *k.shape[2:]), lambda b, h: (b, h, 0, 0))
    number = pl.BlockSpec((None,), lambda b, h: (b,))
    mixed = pl.pallas_call(
        functools.partial(_kernel, group=heads // keys),
        grid=(rows, keys),
        in_specs=[queries, memory, memory, number, number],
        out_specs=queries,
        out_shape=jax.ShapeDtypeStruct(q.shape, q.dtype),
        compiler_params=triton.CompilerParams(num_warps=WARPS, num_stages=STAGES),
        interpret=interpret,
        name="flash_decoding",
    )(q, k, v, begin, end)
    return mixed.reshape(rows, heads, size)


def _kernel(q_ref, k_ref, v_ref, begin_ref, end_ref, out_ref, *, group):
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import triton

    begin, end = begin_ref[()], end_ref[()]
    size = q_ref.shape[1]
    real = (jnp.arange(QUERIES) < group)[:, None]
    q = triton.load(q_ref, mask=real, other=0.0)

    def read(i, carried):
        mixed, top, total = carried
        slot = i * BLOCK + jnp.arange(BLOCK)
        live = (slot >= begin) & (slot < end)

        def block(ref):
            place = ref.at[pl.ds(i * BLOCK, BLOCK), :]
            return triton.load(place, mask=live[:, None], other=0.0)

        score = triton.dot(q, block(k_ref).T) * size**-0.5
        score = jnp.where(live[None], score, -1e30)
        highest = jnp.maximum(top, jnp.max(score, axis=1))
        weight = jnp.exp(score - highest[:, None])
        rest = jnp.exp(top - highest)
        v = block(v_ref)
        mixed = mixed * rest[:, None] + triton.dot(weight.astype(v.dtype), v)
        return mixed, highest, total * rest + jnp.sum(weight, axis=1)

    begun = (
        jnp.zeros((QUERIES, size), jnp.float32),
        jnp.full(QUERIES, -1e30, jnp.float32),
        jnp.zeros(QUERIES, jnp.float32),
    )
    blocks = begin // BLOCK, pl.cdiv(end, BLOCK)
    mixed, _, total = jax.lax.fori_loop(*blocks, read, begun)
    mixed = mixed / jnp.maximum(total, 1e-30)[:, None]
    triton.store(out_ref, mixed.astype(out_ref.dtype), mask=real)
