"""Low-rank adapters (LoRA, arXiv 2106.09685): a small update beside frozen kernels.

    y = x W + (α / r) (x A) B,   A random, B zero at the start

A lies beside its kernel as 'lora_down' [N, in, r], B as 'lora_up' [N, r, out].
"""

import dataclasses
import re
from typing import Any

import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict, unflatten_dict

Params = dict[str, Any]
_DOWN, _UP = "lora_down", "lora_up"


@dataclasses.dataclass(frozen=True)
class Lora:
    """Which linear maps get an adapter, and its size.

    Args:
      rank: r.
      alpha: α; the update is scaled by α / r.
      targets: regular expression, searched in names such as 'attention/query' and
        'mlp/down'.
    """

    rank: int
    alpha: float
    targets: str

    @property
    def scale(self) -> float:
        return self.alpha / self.rank

    def adapts(self, name: str) -> bool:
        return re.search(self.targets, name) is not None


def attach(lora: Lora, params: Params, key: jax.Array) -> Params:
    """`params` with fresh adapters, which change nothing yet.

    Raises:
      ValueError: `lora.targets` matches no linear map.
    """
    layers = flatten_dict(params["layers"], sep="/")
    kernels = {
        name.removesuffix("/kernel"): leaf
        for name, leaf in layers.items()
        if name.endswith("/kernel")
    }
    chosen = sorted(filter(lora.adapts, kernels))
    if not chosen:
        raise ValueError(
            f"model.lora_targets={lora.targets!r} matches none of the linear maps: "
            + ", ".join(sorted(kernels))
        )
    for name, part in zip(chosen, jax.random.split(key, len(chosen))):
        count, inputs, outputs = kernels[name].shape
        down = jax.random.normal(part, (count, inputs, lora.rank)) * inputs**-0.5
        layers[f"{name}/{_DOWN}"] = down
        layers[f"{name}/{_UP}"] = jnp.zeros((count, lora.rank, outputs))
    return params | {"layers": unflatten_dict(layers, sep="/")}


def split(params: Params) -> tuple[Params, Params]:
    """(the adapters, the base), each a tree of its own."""
    flat = flatten_dict(params)
    adapters = {path: leaf for path, leaf in flat.items() if path[-1] in (_DOWN, _UP)}
    base = {path: leaf for path, leaf in flat.items() if path not in adapters}
    return unflatten_dict(adapters), unflatten_dict(base)


def join(adapters: Params, base: Params) -> Params:
    """What `split` took apart."""
    return unflatten_dict(flatten_dict(base) | flatten_dict(adapters))


def merge(lora: Lora, params: Params) -> Params:
    """The base with every adapter's update added to its kernel, in float32."""
    flat = flatten_dict(params)
    out = {path: leaf for path, leaf in flat.items() if path[-1] not in (_DOWN, _UP)}
    for path, down in flat.items():
        if path[-1] == _DOWN:
            kernel, up = (*path[:-1], "kernel"), flat[(*path[:-1], _UP)]
            update = jnp.einsum("nir,nro->nio", down, up, precision="highest")
            out[kernel] = jnp.asarray(out[kernel], jnp.float32) + lora.scale * update
    return unflatten_dict(out)
