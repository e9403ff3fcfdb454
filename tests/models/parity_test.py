"""Folders of transformers give its logits here, and ours give them there.

With torch: every variant of golden.py, made on the spot. Without: the committed ones.
"""

import functools
import importlib.util
import json
from pathlib import Path

import jax
import numpy as np
import pytest

from skillsd_jax.models import huggingface, qwen

# By its path: some packages install a `tests` of their own.
_spec = importlib.util.spec_from_file_location(
    "golden", Path(__file__).with_name("golden.py")
)
golden = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(golden)

apply = jax.jit(qwen.apply, static_argnums=0)
GOLDEN = sorted(folder.name for folder in golden.REFERENCE.glob("golden_*"))


def ours(folder) -> np.ndarray:
    config, params = huggingface.load(folder, dtype="float32")
    return np.asarray(apply(config, params, golden.tokens().astype(np.int32)))


@functools.cache
def made(name: str):
    """The variant of transformers and its logits."""
    pytest.importorskip("torch")
    model = golden.model(name)
    return model, golden.logits(model)


def test_five_kinds_of_folder_are_committed():
    assert len(GOLDEN) == 5


@pytest.mark.parametrize("name", GOLDEN)
def test_logits_are_the_committed_ones(name):
    folder = golden.REFERENCE / name
    with np.load(folder / "logits.npz") as file:
        np.testing.assert_array_equal(file["tokens"], golden.tokens())
        np.testing.assert_allclose(ours(folder), file["logits"], atol=1e-4)


@pytest.mark.parametrize("name", golden.VARIANTS)
def test_a_folder_of_transformers_gives_its_logits(name, tmp_path):
    model, expected = made(name)
    model.save_pretrained(tmp_path)
    np.testing.assert_allclose(ours(tmp_path), expected, atol=1e-4)


@pytest.mark.parametrize("name", ["theta", "linear", "yarn", "yarn_in_full", "sliding"])
def test_a_folder_in_the_style_of_transformers_4_gives_its_logits(name, tmp_path):
    model, expected = made(name)
    model.save_pretrained(tmp_path)
    golden.old_style(tmp_path)
    text = json.loads((tmp_path / "config.json").read_text())
    assert "rope_theta" in text and "rope_parameters" not in text
    np.testing.assert_allclose(ours(tmp_path), expected, atol=1e-4)
    np.testing.assert_allclose(golden.logits_of(tmp_path), expected, atol=1e-4)


@pytest.mark.parametrize("name", golden.VARIANTS)
def test_transformers_gives_the_same_logits_of_our_folder(name, tmp_path):
    model, expected = made(name)
    model.save_pretrained(tmp_path / "theirs")
    config, params = huggingface.load(tmp_path / "theirs")
    huggingface.save(tmp_path / "ours", config, params)
    np.testing.assert_allclose(golden.logits_of(tmp_path / "ours"), expected, atol=1e-4)
    again, params_again = huggingface.load(tmp_path / "ours")
    assert again == config
    jax.tree.map(np.testing.assert_array_equal, params, params_again)


@pytest.mark.parametrize("name", ["qwen2", "qwen3_tied"])
def test_shards_in_bfloat16_are_read_by_both(name, tmp_path):
    torch = pytest.importorskip("torch")
    half = golden.model(name).to(torch.bfloat16)
    half.save_pretrained(tmp_path / "theirs", max_shard_size="5KB")
    expected = golden.logits_of(tmp_path / "theirs")
    assert np.abs(expected - made(name)[1]).max() > 1e-3
    np.testing.assert_allclose(ours(tmp_path / "theirs"), expected, atol=1e-4)
    config, params = huggingface.load(tmp_path / "theirs")
    assert {str(leaf.dtype) for leaf in jax.tree.leaves(params)} == {"bfloat16"}
    huggingface.save(tmp_path / "ours", config, params, "bfloat16", shard_bytes=5000)
    assert len(list((tmp_path / "ours").glob("model-*-of-*.safetensors"))) > 2
    np.testing.assert_allclose(golden.logits_of(tmp_path / "ours"), expected, atol=1e-4)


def test_the_variants_differ_where_they_should():
    """Otherwise a scaling or a window that is ignored would pass above."""
    plain = made("qwen3")[1]
    assert np.abs(made("theta")[1] - plain).max() > 0.1
    for name, without in {
        "linear": {"rope_parameters": golden.THETA},
        "yarn": {"rope_parameters": golden.THETA},
        "yarn_in_full": {"rope_parameters": golden.YARN},
        "sliding": {"use_sliding_window": False},
        "sliding_mixed": {"use_sliding_window": False, "layer_types": None},
    }.items():
        family, options = golden.VARIANTS[name]
        with pytest.MonkeyPatch.context() as patch:
            patch.setitem(golden.VARIANTS, "other", (family, options | without))
            other = golden.logits(golden.model("other"))
        assert np.abs(made(name)[1] - other).max() > 0.01, name
