"""A name for weights, by which a checkpoint knows what it was trained with."""

from typing import Any

import jax
import jax.numpy as jnp

from skillsd_jax import artifacts


def fingerprint(params: Any) -> str:
    """Tells weights apart by the shape and every bit of every leaf.

    Whole numbers add up the same in any order, so it is the same on every device and
    in every layout; no weights leave the device.
    """
    leaves = jax.tree_util.tree_leaves_with_path(params)
    seen = [
        (jax.tree_util.keystr(path), leaf.shape, str(leaf.dtype), int(_digest(leaf)))
        for path, leaf in leaves
    ]
    return artifacts.content_hash(*seen)


@jax.jit
def _digest(leaf: jax.Array) -> jax.Array:
    """Σ of every entry's bits mixed with its place, modulo 2^32."""
    bits = jax.lax.bitcast_convert_type(leaf.astype(jnp.float32), jnp.uint32)
    place = jnp.arange(leaf.size, dtype=jnp.uint32).reshape(leaf.shape)
    return jnp.sum(_mixed(bits ^ _mixed(place)), dtype=jnp.uint32)


def _mixed(x: jax.Array) -> jax.Array:
    """The last steps of MurmurHash3 (public domain): every bit moves every other."""
    x = (x ^ (x >> 16)) * jnp.uint32(0x85EBCA6B)
    x = (x ^ (x >> 13)) * jnp.uint32(0xC2B2AE35)
    return x ^ (x >> 16)
