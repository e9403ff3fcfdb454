"""Hugging Face folders of Qwen2, Qwen2.5 and Qwen3: check, read, write."""

import json
import pathlib
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import ml_dtypes  # noqa: F401  numpy reads bfloat16 once this is imported
import numpy as np
import safetensors
import safetensors.numpy

from skillsd_jax.models import qwen, tokenizer

_MODEL_TYPES = {"Qwen2ForCausalLM": "qwen2", "Qwen3ForCausalLM": "qwen3"}
_DTYPES = ("BF16", "F16", "F32")
_INDEX, _SINGLE = "model.safetensors.index.json", "model.safetensors"
_HEAD = "lm_head.weight"
_TOP = {
    "embed": "model.embed_tokens.weight",
    "norm": "model.norm.weight",
    "head": _HEAD,
}
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


def check(folder: str | pathlib.Path) -> None:
    """Raises unless `folder` holds a model we can run, with tokenizer and weights.

    Of the weights only names and headers are read; the chat template is rendered.
    """
    folder = pathlib.Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(
            f"{folder} is not a folder; model.path must name a Hugging Face folder"
        )
    if not (folder / "tokenizer.json").is_file():
        raise FileNotFoundError(f"{folder} has no tokenizer.json")
    with _Tensors(folder) as tensors:
        _expected(_read_config(folder, tensors), tensors)
    tokenizer.load(folder).default_system  # noqa: B018  raises on its template


def load(folder: str | pathlib.Path) -> tuple[qwen.ModelConfig, qwen.Params]:
    """Reads config.json and the safetensors next to it, as float32.

    Raises:
      FileNotFoundError: a file is missing.
      ValueError: an architecture, a dtype or a tensor is not what is expected.
    """
    folder = pathlib.Path(folder)
    with _Tensors(folder) as tensors:
        config = _read_config(folder, tensors)
        shapes = _expected(config, tensors)
        return config, jax.tree_util.tree_map_with_path(
            lambda path, leaf: jnp.asarray(_read(path, leaf, tensors)), shapes
        )


def save(
    folder: str | pathlib.Path, config: qwen.ModelConfig, params: qwen.Params
) -> None:
    """Writes config.json and model.safetensors, in float32, as transformers reads them.

    The tokenizer is written by its own `save`.
    """
    if config.qk_norm == config.qkv_bias:
        raise ValueError(
            f"qk_norm={config.qk_norm} with qkv_bias={config.qkv_bias} is neither "
            "Qwen2 (bias) nor Qwen3 (norm)"
        )
    folder = pathlib.Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    arrays = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        array = np.asarray(leaf, np.float32)
        for n, name in _names(path, config.layers):
            part = array if n is None else array[n]
            arrays[name] = np.ascontiguousarray(part.T if _turned(path) else part)
    safetensors.numpy.save_file(arrays, folder / _SINGLE, metadata={"format": "pt"})
    text = json.dumps(_written_config(config), indent=2)
    (folder / "config.json").write_text(text, encoding="utf-8")


class _Tensors:
    """The tensors of a folder by name; nothing is read before it is asked for."""

    def __init__(self, folder: pathlib.Path):
        self.folder = folder
        if (folder / _INDEX).is_file():
            index = json.loads((folder / _INDEX).read_text(encoding="utf-8"))
            paths = sorted({folder / name for name in index["weight_map"].values()})
        else:
            paths = [folder / _SINGLE]
        missing = [path.name for path in paths if not path.is_file()]
        if missing:
            raise FileNotFoundError(
                f"{folder} has no weights: {', '.join(missing)} is missing; only "
                "safetensors are read"
            )
        self._files = [_open(path) for path in paths]
        self._where = {
            name: file for file in self._files for name in sorted(file.keys())
        }

    def __enter__(self):
        return self

    def __exit__(self, *_):
        for file in self._files:
            file.__exit__(None, None, None)

    @property
    def names(self) -> set[str]:
        return set(self._where)

    def shape(self, name: str) -> tuple[int, ...]:
        """Its shape, once its dtype is known to be one we read."""
        header = self._where[name].get_slice(name)
        if header.get_dtype() not in _DTYPES:
            raise ValueError(
                f"{self.folder}: {name} is {header.get_dtype()}; only "
                f"{', '.join(_DTYPES)} are read, so convert the checkpoint first"
            )
        return tuple(header.get_shape())

    def read(self, name: str) -> np.ndarray:
        return self._where[name].get_tensor(name)


def _open(path: pathlib.Path):
    try:
        return safetensors.safe_open(path, framework="np").__enter__()
    except safetensors.SafetensorError as error:
        raise ValueError(f"{path} is damaged or cut short: {error}") from error


def _expected(config: qwen.ModelConfig, tensors: _Tensors):
    """The shapes of our parameters, once the folder is known to hold them."""
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
        if tensors.shape(name) != shape:
            raise ValueError(
                f"{tensors.folder}: {name} has shape {tensors.shape(name)}, "
                f"config.json asks for {shape}"
            )
    return shapes


def _some(names: set[str]) -> str:
    listed = ", ".join(sorted(names)[:4]) or "nothing"
    return listed + (f" and {len(names) - 4} more" if len(names) > 4 else "")


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


def _read(path, leaf: jax.ShapeDtypeStruct, tensors: _Tensors) -> np.ndarray:
    array = np.empty(leaf.shape, np.float32)
    for n, name in _names(path, leaf.shape[0]):
        part = tensors.read(name)
        array[... if n is None else n] = part.T if _turned(path) else part
    return array


def _read_config(folder: pathlib.Path, tensors: _Tensors) -> qwen.ModelConfig:
    path = folder / "config.json"
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing")
    try:
        text = json.loads(path.read_text(encoding="utf-8"))
        _refuse(path, text)
        # transformers 5 keeps RoPE in rope_parameters, older files at the top.
        rope = text.get("rope_parameters") or text
        qwen3 = text["model_type"] == "qwen3"
        size = (
            text.get("head_dim") or text["hidden_size"] // text["num_attention_heads"]
        )
        return qwen.ModelConfig(
            vocab=text["vocab_size"],
            width=text["hidden_size"],
            layers=text["num_hidden_layers"],
            heads=text["num_attention_heads"],
            kv_heads=text["num_key_value_heads"],
            head_size=size,
            hidden=text["intermediate_size"],
            rope_theta=float(rope["rope_theta"]),
            tie_embeddings=text.get("tie_word_embeddings", _HEAD not in tensors.names),
            norm_eps=text["rms_norm_eps"],
            qkv_bias=not qwen3,
            qk_norm=qwen3,
            dtype="float32",
        )
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is not JSON: {error}") from error
    except KeyError as error:
        raise ValueError(f"{path} lacks {error}") from error


def _refuse(path: pathlib.Path, text: dict) -> None:
    """Raises on what the decoder would silently compute wrongly."""
    architecture = (text.get("architectures") or ["none"])[0]
    if _MODEL_TYPES.get(architecture) != text.get("model_type"):
        raise ValueError(
            f"{path}: {architecture} of type {text.get('model_type')} is not known; "
            f"supported: {', '.join(_MODEL_TYPES)}"
        )
    rope = text.get("rope_parameters") or text.get("rope_scaling") or {}
    kind = rope.get("rope_type", rope.get("type", "default"))
    layers = set(text.get("layer_types") or ()) - {"full_attention"}
    faults = {
        f"rope type {kind!r}": kind != "default",
        f"layer types {sorted(layers)}": layers,
        "sliding window": text.get("use_sliding_window"),
        "quantization_config": text.get("quantization_config"),
        "attention_bias": text.get("attention_bias"),
        f"hidden_act {text.get('hidden_act')!r}": text.get("hidden_act") != "silu",
    }
    if any(faults.values()):
        named = ", ".join(name for name, present in faults.items() if present)
        raise ValueError(f"{path}: not supported: {named}")


def _written_config(config: qwen.ModelConfig) -> dict:
    architecture = "Qwen3ForCausalLM" if config.qk_norm else "Qwen2ForCausalLM"
    return {
        "architectures": [architecture],
        "model_type": _MODEL_TYPES[architecture],
        "vocab_size": config.vocab,
        "hidden_size": config.width,
        "num_hidden_layers": config.layers,
        "num_attention_heads": config.heads,
        "num_key_value_heads": config.kv_heads,
        "head_dim": config.head_size,
        "intermediate_size": config.hidden,
        "hidden_act": "silu",
        "rms_norm_eps": config.norm_eps,
        "rope_theta": config.rope_theta,
        "rope_parameters": {"rope_type": "default", "rope_theta": config.rope_theta},
        "max_position_embeddings": 32768,
        "tie_word_embeddings": config.tie_embeddings,
        "torch_dtype": "float32",
    }
