"""config.json of Qwen2, Qwen2.5 and Qwen3, as transformers 4 and 5 write it.

What the decoder would silently compute wrongly is refused, with file and field.
"""

import math
import pathlib
from typing import Any

from skillsd_jax.models import qwen, rope, tensor_files

ARCHITECTURES = {"Qwen2ForCausalLM": "qwen2", "Qwen3ForCausalLM": "qwen3"}
_FULL, _SLIDING = "full_attention", "sliding_attention"
# Of a file that leaves them out, as in transformers' classes.
_HEAD_SIZE, _WINDOW, _WINDOW_FROM = 128, 4096, 28
_LENGTH = 32768  # written as max_position_embeddings; nothing is computed from it


def read(path: pathlib.Path, has_head: bool) -> qwen.ModelConfig:
    """The decoder's shape, with matmuls in float32.

    Args:
      path: of config.json.
      has_head: whether the weights have a head of their own: decides on tied
        embeddings where the file does not.

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: it is damaged, lacks something, or asks for what is not supported.
    """
    fields = Fields(path, tensor_files.json_object(path))
    qwen3 = _family(fields) == "qwen3"
    _refuse(fields)
    heads, layers = (
        fields.count(f"num_{part}") for part in ("attention_heads", "hidden_layers")
    )
    width = fields.count("hidden_size")
    # transformers' class of Qwen3 has a head size of its own, Qwen2's divides.
    divided = max(width // heads, 1)
    given = "head_dim" in fields.values
    size = fields.count("head_dim", _HEAD_SIZE if qwen3 and not given else divided)
    theta, scaling = _rope(fields)
    window, window_layers = _window(fields, layers)
    try:
        return qwen.ModelConfig(
            vocab=fields.count("vocab_size"),
            width=width,
            layers=layers,
            heads=heads,
            kv_heads=fields.count("num_key_value_heads", heads),
            head_size=size,
            hidden=fields.count("intermediate_size"),
            rope_theta=theta,
            tie_embeddings=fields.flag("tie_word_embeddings", not has_head),
            norm_eps=fields.number("rms_norm_eps", above=0),
            qkv_bias=not qwen3,
            qk_norm=qwen3,
            scaling=scaling,
            window=window,
            window_layers=window_layers,
            dtype="float32",
        )
    except ValueError as error:
        raise fields.named(error) from error


def written(config: qwen.ModelConfig, dtype: str) -> dict[str, Any]:
    """What config.json says of a decoder whose weights are written in `dtype`.

    Both styles of rotary fields, so that transformers 4 and 5 read the same.
    """
    if config.qk_norm == config.qkv_bias:
        raise ValueError(
            f"qk_norm={config.qk_norm} with qkv_bias={config.qkv_bias} is neither "
            "Qwen2 (bias) nor Qwen3 (norm)"
        )
    architecture = "Qwen3ForCausalLM" if config.qk_norm else "Qwen2ForCausalLM"
    slides = config.window_layers or ()
    scaling, length = _written_scaling(config.scaling)
    kinds = [_SLIDING if n in slides else _FULL for n in range(config.layers)]
    return {
        "architectures": [architecture],
        "model_type": ARCHITECTURES[architecture],
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
        "rope_scaling": scaling,
        "rope_parameters": {
            **(scaling or {"rope_type": "default"}),
            "rope_theta": config.rope_theta,
        },
        "max_position_embeddings": length,
        "use_sliding_window": config.window is not None,
        "sliding_window": config.window,
        "max_window_layers": config.layers - len(slides),
        "layer_types": kinds,
        "tie_word_embeddings": config.tie_embeddings,
        "torch_dtype": dtype,
        "dtype": dtype,
    }


class Fields:
    """Values of a JSON object by name, each refused unless it has the wanted type.

    A null counts as left out, except of a flag. A default of None: may be left out.
    """

    def __init__(self, path: pathlib.Path, values: dict, section: str = ""):
        self.path, self.values, self._section = path, values, section

    def fault(self, text: str) -> ValueError:
        return ValueError(f"{self.path}: {text}")

    def named(self, error: ValueError) -> ValueError:
        """The error of a value, with the file that gave it."""
        known = str(error).startswith(str(self.path))
        return error if known else self.fault(str(error))

    def count(self, name: str, default: Any = ..., least: int = 1) -> Any:
        value = self._given(name, default)
        if value is not default and (type(value) is not int or value < least):
            raise self._wrong(name, f"a whole number ≥ {least}")
        return value

    def number(self, name: str, default: Any = ..., above: float = -math.inf) -> Any:
        value = self._given(name, default)
        if value is default:
            return value
        if type(value) not in (int, float) or not above < value < math.inf:
            bound = f" > {above}" if math.isfinite(above) else ""
            raise self._wrong(name, f"a number{bound}")
        return float(value)

    def flag(self, name: str, default: bool) -> bool:
        value = self.values.get(name, default)
        if type(value) is not bool:
            raise self._wrong(name, "true or false")
        return value

    def text(self, name: str) -> str | None:
        value = self.values.get(name)
        if not isinstance(value, str | None):
            raise self._wrong(name, "a string")
        return value

    def texts(self, name: str) -> list[str] | None:
        value = self.values.get(name)
        if value is None:
            return None
        if not isinstance(value, list) or not all(isinstance(v, str) for v in value):
            raise self._wrong(name, "a list of strings")
        return value

    def section(self, name: str) -> "Fields":
        value = self.values.get(name)
        if not isinstance(value, dict | None):
            raise self._wrong(name, "an object")
        return Fields(self.path, value or {}, f"{name}.")

    def _given(self, name: str, default: Any) -> Any:
        value = self.values.get(name)
        if value is not None:
            return value
        if default is ...:
            raise self.fault(f"it lacks {self._section}{name}")
        return default

    def _wrong(self, name: str, wanted: str) -> ValueError:
        value = self.values[name]
        return self.fault(f"{self._section}{name}={value!r} must be {wanted}")


def _family(fields: Fields) -> str:
    architecture = (fields.texts("architectures") or ["none"])[0]
    kind = fields.text("model_type")
    if kind is None or ARCHITECTURES.get(architecture) != kind:
        raise fields.fault(
            f"{architecture} of type {kind} is not known; "
            f"supported: {', '.join(ARCHITECTURES)}"
        )
    return ARCHITECTURES[architecture]


def _refuse(fields: Fields) -> None:
    """Raises on what the decoder would silently compute wrongly."""
    act = fields.text("hidden_act")
    faults = {
        "quantization_config": fields.values.get("quantization_config"),
        "attention_bias": fields.flag("attention_bias", False),
        f"hidden_act {act!r}": act not in (None, "silu"),
        "is_causal false": not fields.flag("is_causal", True),
        "auto_map (code of its own)": fields.values.get("auto_map"),
        "partial_rotary_factor": fields.number("partial_rotary_factor", 1.0) != 1,
    }
    if any(faults.values()):
        named = ", ".join(name for name, present in faults.items() if present)
        raise fields.fault(f"not supported: {named}")


def _rope(fields: Fields) -> tuple[float, rope.Scaling | None]:
    """θ and scaling; transformers 5 keeps both in rope_parameters, 4 in two fields."""
    new, old = fields.section("rope_parameters"), fields.section("rope_scaling")
    thetas = {part.number("rope_theta", None, above=1) for part in (fields, new, old)}
    thetas -= {None}
    if not thetas:
        raise fields.fault("it lacks rope_theta, at the top and in rope_parameters")
    scalings = {_scaling(fields, part) for part in (new, old) if part.values}
    if len(thetas) > 1 or len(scalings) > 1:
        raise fields.fault(
            "rope_theta, rope_scaling and rope_parameters contradict each other; leave "
            "the right one"
        )
    return thetas.pop(), scalings.pop() if scalings else None


def _scaling(fields: Fields, part: Fields) -> rope.Scaling | None:
    nested = [name for name, value in part.values.items() if isinstance(value, dict)]
    if nested:
        raise part.fault(f"not supported: rope by layer type: {', '.join(nested)}")
    if part.number("partial_rotary_factor", 1.0) != 1:
        raise part.fault("not supported: partial_rotary_factor")
    kinds = {part.text("rope_type"), part.text("type")} - {None}
    kind = kinds.pop() if kinds else "default"
    if kinds or kind not in ("default", "linear", "yarn"):
        named = " and ".join(sorted(repr(k) for k in {kind, *kinds}))
        raise part.fault(
            f"not supported: rope type {named}; default, linear and yarn are"
        )
    try:
        if kind == "default":
            return None
        if kind == "linear":
            return rope.Scaling("linear", part.number("factor"))
        return _yarn(fields, part)
    except ValueError as error:
        raise part.named(error) from error


def _yarn(fields: Fields, part: Fields) -> rope.Scaling:
    """As transformers fills in what is left out; 0 counts as left out there too."""
    length = fields.count("max_position_embeddings", None)
    name = "original_max_position_embeddings"
    original = fields.count(name, None) or part.count(name, None) or length
    if original is None:
        raise part.fault(f"yarn lacks {name} and max_position_embeddings")
    factor = part.number("factor", None)
    if factor is None and length is None:
        raise part.fault("yarn lacks factor and max_position_embeddings")
    factor = length / original if factor is None else factor
    gain = part.number("attention_factor", None)
    scales = [part.number(name, 0.0) for name in ("mscale", "mscale_all_dim")]
    if gain is None and all(scales):
        over, under = (0.1 * scale * math.log(factor) + 1.0 for scale in scales)
        gain = over / under
    return rope.Scaling(
        kind="yarn",
        factor=factor,
        original_length=original,
        beta_fast=part.number("beta_fast", 0.0) or 32.0,
        beta_slow=part.number("beta_slow", 0.0) or 1.0,
        attention_factor=gain,
        truncate=part.flag("truncate", True),
    )


def _window(fields: Fields, layers: int):
    """(tokens, layers) of the sliding window, both None where no layer has one."""
    window = None
    if fields.flag("use_sliding_window", False):
        given = "sliding_window" in fields.values
        window = fields.count("sliding_window", None if given else _WINDOW)
    kinds = fields.texts("layer_types")
    first = fields.count("max_window_layers", _WINDOW_FROM, least=0)
    if kinds is None:
        slides = tuple(range(first, layers)) if window is not None else ()
        return (window, slides) if slides else (None, None)
    unknown = sorted(set(kinds) - {_FULL, _SLIDING})
    if unknown:
        raise fields.fault(f"not supported: layer types {unknown}")
    if len(kinds) != layers:
        raise fields.fault(
            f"layer_types has {len(kinds)} entries, num_hidden_layers is {layers}"
        )
    slides = tuple(n for n, kind in enumerate(kinds) if kind == _SLIDING)
    if slides and window is None:
        raise fields.fault(
            "layer_types asks for sliding_attention, but use_sliding_window and "
            "sliding_window give no window"
        )
    return (window, slides) if slides else (None, None)


def _written_scaling(scaling: rope.Scaling | None) -> tuple[dict | None, int]:
    """The rotary fields without θ, and the tokens the model is said to read."""
    if scaling is None:
        return None, _LENGTH
    fields = {"rope_type": scaling.kind, "factor": scaling.factor}
    if scaling.kind == "linear":
        return fields, _LENGTH
    fields |= {
        "original_max_position_embeddings": scaling.original_length,
        "beta_fast": scaling.beta_fast,
        "beta_slow": scaling.beta_slow,
        "truncate": scaling.truncate,
    }
    if scaling.attention_factor is not None:
        fields["attention_factor"] = scaling.attention_factor
    return fields, round(scaling.original_length * scaling.factor)
