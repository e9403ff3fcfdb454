"""Decoder of Qwen2, Qwen2.5 and Qwen3: modules in nnx, then pure functions on a dict.

    x ← x + Attention(RMSNorm(x));  x ← x + SwiGLU(RMSNorm(x))

Parameters are a nested dict of float32 arrays; those under 'layers' are stacked [N, …]
and scanned. Matmuls run in `config.dtype`; norms, logits and plain attention's softmax are float32.
"""

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from skillsd_jax import sharding
from skillsd_jax.models import attention, flash_decoding, kv_cache, rope
from skillsd_jax.models.kv_cache import KVCache
from skillsd_jax.models.lora import Lora

Params = dict

# What the backward pass keeps of a layer; the rest is computed again.
REMAT: dict[str, Callable] = {
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    "nothing": jax.checkpoint_policies.nothing_saveable,
    "everything": jax.checkpoint_policies.everything_saveable,
}


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """Shape of a decoder; hashable, a static argument of jit.

    Args:
      scaling: of the rotary positions; None: none.
      window: tokens, itself included, that a query of `window_layers` sees; None: all.
      window_layers: indices of the layers with a sliding window.
      dtype: of the matmuls and of the cache.
      attention: kernel of whole sequences, a name in attention.ATTENTION. A cache is
        read with a mask over its slots, or by flash_decoding where that serves.
      remat: what the backward pass keeps of a layer, a name in REMAT.
      lora: adapters beside the linear maps; None: none.
    """

    vocab: int
    width: int
    layers: int
    heads: int
    kv_heads: int
    head_size: int
    hidden: int  # of the gated MLP
    rope_theta: float = 10_000.0
    tie_embeddings: bool = True
    norm_eps: float = 1e-6
    qkv_bias: bool = False  # Qwen2, Qwen2.5
    qk_norm: bool = True  # Qwen3
    scaling: rope.Scaling | None = None
    window: int | None = None
    window_layers: tuple[int, ...] | None = None
    dtype: str = "float32"
    attention: str = "plain"
    remat: str = "dots"
    lora: Lora | None = None

    def __post_init__(self):
        if self.heads % self.kv_heads:
            raise ValueError(
                f"kv_heads={self.kv_heads} must divide heads={self.heads}; "
                "every key head serves the same number of query heads"
            )
        if self.head_size % 2:
            raise ValueError(f"head_size={self.head_size} must be even: RoPE pairs it")
        if (self.window is None) != (not self.window_layers):
            raise ValueError(
                f"window={self.window} and window_layers={self.window_layers} go "
                "together: give both or neither"
            )


BIASED = ("attention/query", "attention/key", "attention/value")


@jax.custom_vjp
def _matmul(x: Float[Array, "... D"], kernel: Float[Array, "D F"]):
    """x @ kernel, with a gradient that XLA:CPU computes without transposing x.

    The derived gradient copies a [tokens, F] array column by column: 65 against 29 ms
    for value and gradient of one MLP of 64 × 256 on 8192 tokens and two cores.
    """
    return x @ kernel


def _matmul_fwd(x, kernel):
    return x @ kernel, (x, kernel)


def _matmul_bwd(saved, g):
    x, kernel = saved
    flat = x.reshape(-1, x.shape[-1]), g.reshape(-1, g.shape[-1])
    return g @ kernel.T, jnp.einsum("nd,nf->df", *flat)


_matmul.defvjp(_matmul_fwd, _matmul_bwd)


class Linear(nnx.Module):
    """x W, with a bias and an adapter where the configuration has them."""

    def __init__(self, name: str, shape: tuple[int, int], config, rngs, *, gain=1.0):
        normal = jax.random.normal(rngs.params(), shape)
        self.kernel = nnx.Param(normal * (gain * shape[0] ** -0.5))
        biased = config.qkv_bias and name in BIASED
        self.bias = nnx.Param(jnp.zeros(shape[1])) if biased else None
        down = up = None
        if config.lora is not None and config.lora.adapts(name):
            normal = jax.random.normal(rngs.params(), (shape[0], config.lora.rank))
            down = nnx.Param(normal * shape[0] ** -0.5)
            up = nnx.Param(jnp.zeros((config.lora.rank, shape[1])))
        self.lora_down, self.lora_up = down, up
        self.dtype, self.lora = config.dtype, config.lora

    def __call__(self, x: Float[Array, "... D"]) -> Float[Array, "... F"]:
        def times(x, kernel):
            return _matmul(x, kernel[...].astype(self.dtype))

        x = x.astype(self.dtype)
        y = times(x, self.kernel)
        if self.bias is not None:
            y = y + self.bias[...].astype(self.dtype)
        if self.lora_down is not None:
            y = y + self.lora.scale * times(times(x, self.lora_down), self.lora_up)
        return y


class RMSNorm(nnx.Module):
    def __init__(self, size: int, config: ModelConfig):
        self.scale = nnx.Param(jnp.ones(size))
        self.config = config

    def __call__(self, x: Float[Array, "... D"]) -> Float[Array, "... D"]:
        return _rms_norm(self.config, x, self.scale[...])


class Attention(nnx.Module):
    """Grouped-query attention; the keys and values may come from a cache."""

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs):
        width, size = config.width, config.head_size
        queries, keys = config.heads * size, config.kv_heads * size
        self.query = Linear("attention/query", (width, queries), config, rngs)
        self.key = Linear("attention/key", (width, keys), config, rngs)
        self.value = Linear("attention/value", (width, keys), config, rngs)
        gain = (2 * config.layers) ** -0.5
        shape = (queries, width)
        self.output = Linear("attention/output", shape, config, rngs, gain=gain)
        self.query_norm = RMSNorm(size, config) if config.qk_norm else None
        self.key_norm = RMSNorm(size, config) if config.qk_norm else None
        self.size = size

    def project(self, x: Float[Array, "B L D"], rotation):
        """Queries [B L H E], keys and values [B L K E], rotated by position."""
        q, k, v = (
            linear(x).reshape(*x.shape[:2], -1, self.size)
            for linear in (self.query, self.key, self.value)
        )
        q, k, v = (sharding.rows(x, None, "tp") for x in (q, k, v))
        if self.query_norm is not None:
            q, k = self.query_norm(q), self.key_norm(k)
        return _rotate(q, rotation), _rotate(k, rotation), v


class MLP(nnx.Module):
    def __init__(self, config: ModelConfig, rngs: nnx.Rngs):
        shape = (config.width, config.hidden)
        self.gate = Linear("mlp/gate", shape, config, rngs)
        self.up = Linear("mlp/up", shape, config, rngs)
        gain = (2 * config.layers) ** -0.5
        self.down = Linear("mlp/down", shape[::-1], config, rngs, gain=gain)

    def __call__(self, x: Float[Array, "B L D"]) -> Float[Array, "B L D"]:
        return self.down(jax.nn.silu(self.gate(x)) * self.up(x))


class Block(nnx.Module):
    def __init__(self, config: ModelConfig, rngs: nnx.Rngs):
        self.attention_norm = RMSNorm(config.width, config)
        self.attention = Attention(config, rngs)
        self.mlp_norm = RMSNorm(config.width, config)
        self.mlp = MLP(config, rngs)

    def project(self, x: Float[Array, "B L D"], rotation):
        return self.attention.project(self.attention_norm(x), rotation)

    def finish(self, x: Float[Array, "B L D"], attended: Float[Array, "B L H E"]):
        x = x + self.attention.output(attended.reshape(*x.shape[:2], -1))
        return sharding.rows(x + self.mlp(self.mlp_norm(x)))


@functools.cache
def _block(config: ModelConfig) -> nnx.GraphDef:
    return nnx.graphdef(nnx.eval_shape(lambda: Block(config, nnx.Rngs(0))))


@functools.partial(jax.jit, static_argnums=0)
def init(config: ModelConfig, key: jax.Array) -> Params:
    """Random parameters: normal with variance 1 / inputs, norms 1, biases 0.

    What is added to the residual stream is scaled by a further (2 N)^-½.
    """
    embed, layers, head = jax.random.split(key, 3)
    shape = (config.vocab, config.width)

    def block(key):
        return nnx.to_pure_dict(nnx.state(Block(config, nnx.Rngs(key)), nnx.Param))

    params = {
        "embed": jax.random.normal(embed, shape) * config.width**-0.5,
        "layers": jax.vmap(block)(jax.random.split(layers, config.layers)),
        "norm": jnp.ones(config.width),
    }
    if not config.tie_embeddings:
        params["head"] = jax.random.normal(head, shape) * config.width**-0.5
    return sharding.laid(params)


def apply(
    config: ModelConfig, params: Params, tokens: Int[Array, "B L"]
) -> Float[Array, "B L V"]:
    """Logits of the next token at every position. Scoring and sampling avoid this."""
    return head(config, params, hidden(config, params, tokens))


def hidden(
    config: ModelConfig, params: Params, tokens: Int[Array, "B L"]
) -> Float[Array, "B L D"]:
    """The last layer's output after the final norm, over whole sequences.

    Rows start at position 0. Padding on the right needs no mask: no earlier token
    sees it. The backward pass keeps of each layer what `config.remat` says.
    """
    place = jnp.arange(tokens.shape[1])
    rotation = _rotation(config, place[None])
    attend = functools.partial(attention.causal, config.attention)

    @functools.partial(jax.checkpoint, prevent_cse=False, policy=REMAT[config.remat])
    def layer(x, scanned):
        block, slides = scanned
        block = nnx.merge(_block(config), block)
        q, k, v = block.project(x, rotation)
        if config.window is None:
            attended = attend(q, k, v)
        else:
            near = functools.partial(attend, window=config.window)
            attended = jax.lax.cond(slides, near, attend, q, k, v)
        return block.finish(x, attended), None

    scanned = params["layers"], _slides(config)
    x, _ = jax.lax.scan(layer, _embed(config, params, tokens), scanned)
    return _rms_norm(config, x, params["norm"])


def extend(
    config: ModelConfig,
    params: Params,
    cache: KVCache,
    tokens: Int[Array, "C n"],
    length: Int[Array, "C"],
    rows: Int[Array, "C"] | None = None,
) -> tuple[Float[Array, "C n D"], KVCache]:
    """Reads up to n more tokens per row; row c reads its first length[c].

    Row c writes them at positions cache.length[c] …; a row with length 0 is left as it
    is. Positions beyond the cache's slots are lost, so the caller sees to it that
    cache.length + length ≤ cache.slots.

    Args:
      rows: the rows of the cache that read; none twice, and past the last: nowhere.
        None: all of them.

    Returns:
      The hidden states after the final norm, rubbish at ≥ length[c], and the cache.
    """
    new = jnp.arange(tokens.shape[1])
    begun = cache.length if rows is None else cache.length[rows]
    position = begun[:, None] + new
    rotation = _rotation(config, position)
    flash = rows is None and flash_decoding.serves(config)
    read = functools.partial(attention.over, position, length, cache, flash)
    far, near = read(None), read(config.window)
    row = (jnp.arange(tokens.shape[0]) if rows is None else rows)[:, None]
    slot = jnp.where(new < length[:, None], position, cache.slots)  # beyond: dropped

    def written(memory, x, turned=False):
        if rows is None and sharding.sizes():
            # Row by row, which tells the compiler that no row leaves its device.
            return jax.vmap(functools.partial(_put, turned))(memory, x, slot)
        return kv_cache.write(memory, row, slot, x, turned)

    x, keys, values = _embed(config, params, tokens), [], []
    for n, block in enumerate(unstack(config, params)["layers"]):
        block = nnx.merge(_block(config), block)
        q, k, v = block.project(x, rotation)
        keys.append(written(cache.keys[n], k, cache.turned))
        values.append(written(cache.values[n], v))
        k, v = (x if rows is None else x[rows] for x in (keys[n], values[n]))
        k, v = k.astype(q.dtype), v.astype(q.dtype)
        attend = near if n in (config.window_layers or ()) else far
        x = block.finish(x, attend(q, k, v))
    total = cache.length.at[row[:, 0]].add(length, mode="drop")
    cache = KVCache(tuple(keys), tuple(values), total, cache.turned)
    return _rms_norm(config, x, params["norm"]), cache


def _put(
    turned: bool,
    memory: Float[Array, "K ..."],
    x: Float[Array, "n K E"],
    slot: Int[Array, " n"],
):
    """`kv_cache.write` of one row."""
    x = x.astype(memory.dtype)
    if turned:
        return memory.at[:, :, slot].set(x.transpose(1, 2, 0), mode="drop")
    return memory.at[:, slot].set(x.swapaxes(0, 1), mode="drop")


def unstack(config: ModelConfig, params: Params) -> Params:
    """The weights with a tuple of layers, as `extend` reads them, in config.dtype.

    A decoder reads every weight for every token, and a slice of a stack, or a number of
    another type, is copied before it is read: so rollouts take the stack apart once.
    """
    layers = params["layers"]
    if isinstance(layers, tuple):
        return params

    def cast(path, x):
        named = path[-1].key
        return x if named in ("scale", "norm") else x.astype(config.dtype)

    params = jax.tree_util.tree_map_with_path(cast, params)
    leaves, shape = jax.tree.flatten(params["layers"])
    apart = [jax.tree.unflatten(shape, part) for part in zip(*leaves)]
    return params | {"layers": tuple(apart)}


def head(
    config: ModelConfig, params: Params, hidden: Float[Array, "... D"]
) -> Float[Array, "... V"]:
    """Logits in float32."""
    return jnp.einsum(
        "...d,vd->...v",
        hidden.astype(config.dtype),
        head_kernel(config, params).astype(config.dtype),
        preferred_element_type=jnp.float32,
    )


def head_kernel(config: ModelConfig, params: Params) -> Float[Array, "V D"]:
    """What turns a hidden state into logits."""
    return params["embed"] if config.tie_embeddings else params["head"]


def _embed(config: ModelConfig, params: Params, tokens: Int[Array, "B L"]):
    return sharding.looked_up(params["embed"][tokens].astype(config.dtype))


def _rms_norm(
    config: ModelConfig, x: Float[Array, "... D"], scale: Float[Array, "D"]
) -> Float[Array, "... D"]:
    x = x.astype(jnp.float32)
    x = x * jax.lax.rsqrt(jnp.mean(x * x, -1, keepdims=True) + config.norm_eps)
    return (x * scale).astype(config.dtype)


def _rotation(config: ModelConfig, position: Int[Array, "B L"]):
    return rope.rotation(config.rope_theta, config.head_size, config.scaling, position)


def _slides(config: ModelConfig) -> Bool[Array, "N"]:
    """Which layers have a sliding window."""
    layers = config.window_layers or ()
    return jnp.array([n in layers for n in range(config.layers)])


def _rotate(x: Float[Array, "B L H E"], rotation) -> Float[Array, "B L H E"]:
    """Rotates dimension i against i + E/2 (the convention of Qwen's checkpoints)."""
    cos, sin = rotation
    a, b = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], -1).astype(x.dtype)
