"""Tiny models of transformers, and the logits that are committed of some of them.

  python tests/models/golden.py        # with torch; writes tests/reference/golden_*

Each folder is what `save_pretrained` leaves, in bfloat16, with logits.npz beside it:
`tokens` [B L] and `logits` [B L V] of the float32 model with those weights.
"""

import json
import shutil
from pathlib import Path

import numpy as np

REFERENCE = Path(__file__).parent.parent / "reference"
SIZES = {
    "vocab_size": 37,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 24,
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": 32,
}
THETA = {"rope_type": "default", "rope_theta": 500.0}
YARN = {
    "rope_type": "yarn",
    "rope_theta": 500.0,
    "factor": 4.0,
    "original_max_position_embeddings": 8,  # the tokens below are three times as many
}
# name → family and what its configuration has beside SIZES.
VARIANTS = {
    "qwen2": ("Qwen2", {}),
    "qwen2_tied": ("Qwen2", {"tie_word_embeddings": True}),
    "qwen3": ("Qwen3", {"head_dim": 8}),
    "qwen3_tied": ("Qwen3", {"head_dim": 8, "tie_word_embeddings": True}),
    "theta": ("Qwen3", {"head_dim": 8, "rope_parameters": THETA}),
    "linear": (
        "Qwen2",
        {"rope_parameters": THETA | {"rope_type": "linear", "factor": 3.0}},
    ),
    "yarn": ("Qwen3", {"head_dim": 16, "rope_parameters": YARN}),
    "yarn_in_full": (
        "Qwen2",
        {
            "num_attention_heads": 2,
            "rope_parameters": YARN
            | {"beta_fast": 8.0, "beta_slow": 0.5, "truncate": False}
            | {"mscale": 1.5, "mscale_all_dim": 0.5},
        },
    ),
    "yarn_of_the_length": (
        "Qwen3",
        {"head_dim": 16, "rope_parameters": YARN | {"factor": None}},
    ),
    "sliding": (
        "Qwen2",
        {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1},
    ),
    "sliding_mixed": (
        "Qwen3",
        {
            "head_dim": 8,
            "num_hidden_layers": 3,
            "use_sliding_window": True,
            "sliding_window": 4,
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
        },
    ),
}


def tokens() -> np.ndarray:
    return np.random.default_rng(0).integers(0, SIZES["vocab_size"], (2, 24))


def model(name: str):
    """The variant with seeded weights: norms away from 1, biases away from 0."""
    import torch
    import transformers

    family, options = VARIANTS[name]
    config = getattr(transformers, f"{family}Config")(**SIZES | options)
    made = getattr(transformers, f"{family}ForCausalLM")(config).eval()
    rng = np.random.default_rng(1)
    with torch.no_grad():
        for parameter in made.parameters():
            noise = rng.standard_normal(tuple(parameter.shape)).astype(np.float32)
            start = float(parameter.ndim == 1 and parameter.mean() > 0.5)
            parameter.copy_(torch.from_numpy(start + 0.3 * noise))
    return made


def logits(made) -> np.ndarray:
    import torch

    with torch.no_grad():
        return made(torch.from_numpy(tokens())).logits.float().numpy()


def logits_of(folder: Path) -> np.ndarray:
    """Those of a folder, read by transformers in float32.

    A model that was cast down and up again has rounded frequencies as well.
    """
    import torch
    import transformers

    load = transformers.AutoModelForCausalLM.from_pretrained
    return logits(load(folder, dtype=torch.float32).eval())


def old_style(folder: Path) -> None:
    """Rewrites config.json as transformers 4 did: rotary fields at the top."""
    path = folder / "config.json"
    text = json.loads(path.read_text(encoding="utf-8"))
    rope = text.pop("rope_parameters")
    text["rope_theta"] = rope.pop("rope_theta")
    text["rope_scaling"] = None
    if rope["rope_type"] != "default":
        text["rope_scaling"] = {"type": rope.pop("rope_type"), **rope}
    text.pop("layer_types")
    text["torch_dtype"] = text.pop("dtype")
    path.write_text(json.dumps(text, indent=2) + "\n", encoding="utf-8")


def write(name: str, old: bool = False, **options) -> None:
    import torch

    folder = REFERENCE / f"golden_{name}"
    shutil.rmtree(folder, ignore_errors=True)
    model(name).to(torch.bfloat16).save_pretrained(folder, **options)
    (folder / "generation_config.json").unlink()
    if old:
        old_style(folder)
    arrays = {"tokens": tokens(), "logits": logits_of(folder)}
    np.savez_compressed(folder / "logits.npz", **arrays)


if __name__ == "__main__":
    write("qwen2")
    write("qwen3_tied", max_shard_size="5KB")
    write("yarn")
    write("sliding")
    write("theta", old=True)
