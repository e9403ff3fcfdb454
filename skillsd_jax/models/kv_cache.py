"""Keys and values of what each row has read, with a write position per row."""

import dataclasses
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

if TYPE_CHECKING:
    from skillsd_jax.models.qwen import ModelConfig


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class KVCache:
    """Slot s of a row holds its token at position s; slots ≥ length hold rubbish."""

    keys: Float[Array, "N B S K E"]
    values: Float[Array, "N B S K E"]
    length: Int[Array, "B"]

    @property
    def slots(self) -> int:
        return self.keys.shape[2]


def empty(
    config: "ModelConfig", rows: int, slots: int, dtype: str | None = None
) -> KVCache:
    """A cache in which nothing has been read; `dtype` defaults to config.dtype."""
    shape = (config.layers, rows, slots, config.kv_heads, config.head_size)
    dtype = dtype or config.dtype
    return KVCache(
        keys=jnp.zeros(shape, dtype),
        values=jnp.zeros(shape, dtype),
        length=jnp.zeros(rows, jnp.int32),
    )


def gather(cache: KVCache, index: Int[Array, "C"]) -> KVCache:
    """The rows named by `index`, which may repeat (a prompt shared by a group)."""
    return KVCache(
        keys=cache.keys[:, index],
        values=cache.values[:, index],
        length=cache.length[index],
    )
