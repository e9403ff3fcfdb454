"""Hugging Face folders of Qwen2, Qwen2.5 and Qwen3: check, read, write."""

import functools
import json
import pathlib
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from skillsd_jax.models import config_file, qwen, tensor_files, tokenizer

_WRITTEN = tuple(tensor_files.DTYPES.values())
_COMPARED_ROWS = 4096  # of two tensors at once
_HEAD = "lm_head.weight"
_EMBED = "model.embed_tokens.weight"
_TOP = {"embed": _EMBED, "norm": "model.norm.weight", "head": _HEAD}
_PARTS = {
    "attention_norm": "input_layernorm",
    "mlp_norm": "post_attention_layernorm",
    "attention/query": "self_attn.q_proj",
    "attention/key": "self_attn.k_proj",
    "attention/value": "self_attn.v_proj",
    "attention/output": "self_attn.o_proj",
    "attention/query_norm": "self_attn.q_norm",
    "attention/key_norm": "self_attn.k_norm",
    "mlp/gate": "mlp.gate_proj",
    "mlp/up": "mlp.up_proj",
    "mlp/down": "mlp.down_proj",
}


def check(folder: str | pathlib.Path) -> qwen.ModelConfig:
    """The shape; raises unless `folder` holds a model we can run, with tokenizer and weights.

    Of the weights only names and headers are read; the chat template is rendered.

    Raises:
      FileNotFoundError: a file is missing.
      ValueError: a file is damaged, or something is not supported or does not fit.
    """
    folder = pathlib.Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(
            f"{folder} is not a folder; name a Hugging Face folder with config.json, "
            "safetensors and tokenizer.json"
        )
    if not (folder / "tokenizer.json").is_file():
        raise FileNotFoundError(f"{folder} has no tokenizer.json")
    config, _ = _expected(tensor_files.Tensors(folder))
    for file in sorted(folder.glob("tokenizer*.json")):
        tensor_files.json_object(file)
    words = tokenizer.load(folder)
    words.manner  # noqa: B018  raises on its template
    # Fewer are fine: the published embeddings are padded.
    if words.max_id >= config.vocab:
        raise ValueError(
            f"{folder / 'tokenizer.json'} has ids up to {words.max_id}, but {_EMBED} has "
            f"{config.vocab} rows; take the tokenizer of these weights"
        )
    return config


def load(
    folder: str | pathlib.Path, dtype: str | None = None, sharding: Any = None
) -> tuple[qwen.ModelConfig, qwen.Params]:
    """Reads config.json and the safetensors next to it.

    Memory in use stays near that of the parameters, as tensors are read one by one:
    3.12 GB for the 3.09 GB of a Qwen2.5-1.5B in bfloat16, and 6.20 GB as float32
    (python benchmarks/loading.py).

    Args:
      folder: of Hugging Face.
      dtype: of the parameters; None: as in the file. Training wants 'float32' masters:
        an update of 1e-5 is lost in bfloat16.
      sharding: shardings, a tree like the parameters, or what makes it of their
        shapes; a process then reads only what its devices hold. None: everything on the
        first device.

    Returns:
      The shape, with matmuls in float32 whatever `dtype` is, and the parameters. Layers
      of different dtypes are stacked in one that holds them all.

    Raises:
      FileNotFoundError: a file is missing.
      ValueError: a file is damaged, or something is not supported or does not fit.
    """
    tensors = tensor_files.Tensors(pathlib.Path(folder))
    config, shapes = _expected(tensors)
    if config.tie_embeddings and _HEAD in tensors.names:
        _refuse_another_head(tensors)
    wanted = None if dtype is None else jnp.dtype(dtype)
    sharding = sharding(shapes) if callable(sharding) else sharding

    def leaf(path, shape, sharding=None):
        return _Leaf(path, shape.shape, tensors, wanted).array(sharding)

    trees = (shapes,) if sharding is None else (shapes, sharding)
    return config, jax.tree_util.tree_map_with_path(leaf, *trees)


def save(
    folder: str | pathlib.Path,
    config: qwen.ModelConfig,
    params: qwen.Params,
    dtype: str = "float32",
    shard_bytes: int = 5 * 2**30,
    tokens: Mapping[str, Any] | None = None,
) -> None:
    """Writes config.json and safetensors as transformers reads them.

    At most one shard is copied at a time. The tokenizer is written by its own `save`.

    Args:
      folder: made if need be; weights that lie in it are replaced.
      config: shape of the decoder, without adapters.
      params: of that shape.
      dtype: of the file: float32, bfloat16 or float16.
      shard_bytes: of one file, at most; more is numbered and gets an index.
      tokens: further fields of config.json, such as eos_token_id and pad_token_id.

    Raises:
      ValueError: adapters are not merged, or a value does not fit the dtype.
    """
    if dtype not in _WRITTEN:
        raise ValueError(f"dtype={dtype!r} is not written: {', '.join(_WRITTEN)}")
    leaves = jax.tree_util.tree_leaves_with_path(params)
    if config.lora or any(path[-1].key.startswith("lora_") for path, _ in leaves):
        raise ValueError("adapters have no place in a Qwen folder: merge first")
    fields = config_file.written(config, dtype) | dict(tokens or {})
    where = {
        name: (leaf, n, _turned(path))
        for path, leaf in leaves
        for n, name in _names(path, config.layers)
    }
    size = jnp.dtype(dtype).itemsize
    sizes = {
        name: size * (leaf.size if n is None else leaf.size // config.layers)
        for name, (leaf, n, _) in where.items()
    }

    def read(name: str) -> np.ndarray:
        return _cast(name, *where[name], jnp.dtype(dtype))

    folder = pathlib.Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    tensor_files.write(folder, sizes, read, shard_bytes)
    text = json.dumps(fields, indent=2) + "\n"
    (folder / "config.json").write_text(text, encoding="utf-8")


def _cast(name: str, leaf, n: int | None, turned: bool, dtype) -> np.ndarray:
    part = np.asarray(leaf if n is None else leaf[n])
    with np.errstate(over="ignore"):
        array = np.ascontiguousarray((part.T if turned else part).astype(dtype))
    if dtype == np.float16 and not np.array_equal(
        np.isfinite(array), np.isfinite(part.T if turned else part)
    ):
        raise ValueError(f"{name} has values beyond float16; write it as bfloat16")
    return array


def _expected(tensors: tensor_files.Tensors):
    """The shape of the decoder and of its parameters, which the folder does hold."""
    config = config_file.read(tensors.folder / "config.json", _HEAD in tensors.names)
    shapes = jax.eval_shape(lambda: qwen.init(config, jax.random.key(0)))
    wanted = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(shapes):
        for n, name in _names(path, config.layers):
            shape = leaf.shape if n is None else leaf.shape[1:]
            wanted[name] = shape[::-1] if _turned(path) else shape
    missing, extra = wanted.keys() - tensors.names, tensors.names - wanted.keys()
    extra -= {_HEAD} if config.tie_embeddings else set()
    if missing or extra:
        raise ValueError(
            f"{tensors.folder} does not match its config.json: "
            f"missing {_some(missing)}; not expected {_some(extra)}"
        )
    for name, shape in wanted.items():
        found = tensors.header(name)
        if found.shape != shape:
            raise ValueError(
                f"{found.path}: {name} has shape {found.shape}, "
                f"config.json asks for {shape}"
            )
    return config, shapes


def _some(names: set[str]) -> str:
    listed = ", ".join(sorted(names)[:4]) or "nothing"
    return listed + (f" and {len(names) - 4} more" if len(names) > 4 else "")


def _refuse_another_head(tensors: tensor_files.Tensors) -> None:
    """Raises unless the head that lies beside a tied embedding is the same."""
    head, embed = tensors.header(_HEAD), tensors.header(_EMBED)
    same, total = head.shape == embed.shape, embed.shape[0]
    for start in range(0, total if same else 0, _COMPARED_ROWS):
        rows = (slice(start, min(start + _COMPARED_ROWS, total)),)
        a, b = tensors.read(_HEAD, rows), tensors.read(_EMBED, rows)
        same &= np.array_equal(a, b)
    if not same:
        raise ValueError(
            f"{tensors.folder / 'config.json'} ties {_HEAD} to {_EMBED}, but "
            f"{head.path.name} holds another {_HEAD}; set tie_word_embeddings to what "
            "the model is"
        )


def _names(path, layers: int) -> Iterator[tuple[int | None, str]]:
    """(layer or None, name of the tensor) of everything in the leaf at `path`."""
    first, *rest = (entry.key for entry in path)
    if first != "layers":
        yield None, _TOP[first]
        return
    part, kind = _PARTS["/".join(rest[:-1])], rest[-1]
    suffix = "bias" if kind == "bias" else "weight"
    for n in range(layers):
        yield n, f"model.layers.{n}.{part}.{suffix}"


def _turned(path) -> bool:
    """A kernel is [inputs, outputs] here, [outputs, inputs] there."""
    return path[-1].key == "kernel"


class _Leaf:
    """One parameter, stacked from the tensors of its layers."""

    def __init__(self, path, shape: tuple[int, ...], tensors, dtype):
        self.shape, self.tensors, self.turned = shape, tensors, _turned(path)
        self.names = dict(_names(path, shape[0]))
        found = {tensors.dtype(name) for name in self.names.values()}
        self.dtype = dtype or functools.reduce(jnp.promote_types, found)

    def array(self, sharding: jax.sharding.Sharding | None) -> jax.Array:
        if sharding is None:
            return jax.device_put(self.read([(0, size) for size in self.shape]))
        read: dict[tuple, np.ndarray] = {}  # devices may hold the same part

        def part(index: tuple[slice, ...]) -> np.ndarray:
            bounds = tuple(
                span.indices(size)[:2] for span, size in zip(index, self.shape)
            )
            if bounds not in read:
                read[bounds] = self.read(bounds)
            return read[bounds]

        return jax.make_array_from_callback(self.shape, sharding, part)

    def read(self, bounds) -> np.ndarray:
        """The part between bounds (first, beyond the last), one for each dimension."""
        array = tensor_files.aligned(tuple(b - a for a, b in bounds), self.dtype)
        if None in self.names:
            self._fill(array, self.names[None], bounds)
            return array
        (start, stop), *rest = bounds
        for n in range(start, stop):
            self._fill(array[n - start], self.names[n], rest)
        return array

    def _fill(self, place: np.ndarray, name: str, bounds) -> None:
        part = tuple(slice(a, b) for a, b in bounds)
        if self.turned:
            place[...] = self.tensors.read(name, part[::-1]).T
        else:
            place[...] = self.tensors.read(name, part)
