"""Adapters: attached they change nothing, split and joined they are the same."""

import dataclasses

import jax
import numpy as np
import pytest

from skillsd_jax.models import lora, qwen

BASE = qwen.ModelConfig(
    vocab=29, width=16, layers=3, heads=2, kv_heads=1, head_size=8, hidden=24
)
ADAPTERS = lora.Lora(rank=2, alpha=5.0, targets="query|mlp")
CONFIG = dataclasses.replace(BASE, lora=ADAPTERS)
TOKENS = np.arange(12, dtype=np.int32).reshape(2, 6)


@pytest.fixture(scope="module")
def base():
    return qwen.init(BASE, jax.random.key(0))


@pytest.fixture(scope="module")
def moved(base):
    """With adapters away from where they start."""
    params = lora.attach(ADAPTERS, base, jax.random.key(1))
    rng = np.random.default_rng(0)
    adapters, rest = lora.split(params)
    away = jax.tree.map(
        lambda leaf: rng.standard_normal(leaf.shape).astype(np.float32), adapters
    )
    return lora.join(away, rest)


def names(tree):
    return {
        jax.tree_util.keystr(path, simple=True, separator="/")
        for path, _ in jax.tree_util.tree_leaves_with_path(tree)
    }


def test_fresh_adapters_change_no_logit(base):
    params = lora.attach(ADAPTERS, base, jax.random.key(1))
    assert jax.tree.structure(params) == jax.tree.structure(
        qwen.init(CONFIG, jax.random.key(2))
    )
    found = qwen.apply(CONFIG, params, TOKENS)
    np.testing.assert_allclose(found, qwen.apply(BASE, base, TOKENS), atol=1e-5)
    down = params["layers"]["mlp"]["gate"]["lora_down"]
    assert np.abs(down).min() > 0 and 0.15 < down.std() < 0.35  # 16^-½ = 0.25


def test_split_takes_the_adapters_and_join_puts_them_back(moved):
    adapters, rest = lora.split(moved)
    assert names(adapters) == {
        f"layers/{name}/lora_{part}"
        for name in ("attention/query", "mlp/gate", "mlp/up", "mlp/down")
        for part in ("down", "up")
    }
    assert names(rest) == names(moved) - names(adapters)
    again = lora.join(adapters, rest)
    assert jax.tree.structure(again) == jax.tree.structure(moved)
    jax.tree.map(np.testing.assert_array_equal, again, moved)


def test_merged_weights_say_what_the_adapted_ones_say(moved, base):
    merged = lora.merge(ADAPTERS, moved)
    assert jax.tree.structure(merged) == jax.tree.structure(base)
    wanted = qwen.apply(CONFIG, moved, TOKENS)
    np.testing.assert_allclose(qwen.apply(BASE, merged, TOKENS), wanted, atol=2e-4)
    part = moved["layers"]["mlp"]["down"]
    by_hand = part["kernel"][1] + 2.5 * part["lora_down"][1] @ part["lora_up"][1]
    kernel = merged["layers"]["mlp"]["down"]["kernel"]
    np.testing.assert_allclose(kernel[1], by_hand, atol=1e-5)


def test_targets_that_match_nothing_are_refused_with_the_names(base):
    with pytest.raises(ValueError, match="'q_proj' matches none.*attention/key.*mlp"):
        lora.attach(lora.Lora(2, 1.0, "q_proj"), base, jax.random.key(0))
