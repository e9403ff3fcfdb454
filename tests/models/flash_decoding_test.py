"""Decoding's attention kernel, run by its own rules without a GPU."""

import dataclasses
import functools
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from skillsd_jax.models import flash_decoding, kv_cache, qwen

SLOTS = 150  # two blocks and a part of one
CONFIG = qwen.ModelConfig(
    vocab=31,
    width=32,
    layers=2,
    heads=6,
    kv_heads=2,
    head_size=16,
    hidden=48,
    window=5,
    window_layers=(1,),
    dtype="bfloat16",
)


@pytest.fixture
def interpreted(monkeypatch):
    attend, calls = flash_decoding.attend, []

    def counted(*given):
        calls.append(given)
        return attend(*given, interpret=True)

    monkeypatch.setattr(flash_decoding, "attend", counted)
    monkeypatch.setattr(flash_decoding, "serves", lambda config: True)
    return calls


def memory(rows, heads, size, seed=0):
    keys = jax.random.split(jax.random.key(seed), 2)
    shape = (rows, heads, SLOTS, size)
    return (jax.random.normal(key, shape, jnp.bfloat16) for key in keys)


def equation(q, k, v, allowed):
    rows, heads, size = q.shape
    q, k, v = (x.astype(jnp.float32) for x in (q, k, v))
    q = q.reshape(rows, k.shape[1], -1, size)
    score = jnp.einsum("bkge,bkse->bkgs", q, k) * size**-0.5
    weight = jax.nn.softmax(jnp.where(allowed[:, None, None], score, -1e30))
    return jnp.einsum("bkgs,bkse->bkge", weight, v).reshape(rows, heads, size)


@pytest.mark.parametrize("group", [1, 2, 7])
@pytest.mark.parametrize("size", [16, 64])
def test_ragged_rows_get_what_the_equation_says(group, size):
    k, v = memory(6, 2, size)
    q = jax.random.normal(jax.random.key(9), (6, 2 * group, size), jnp.bfloat16)
    begin, end = (
        jnp.array([0, 0, 0, 30, 63, 149]),
        jnp.array([1, 64, 150, 31, 130, 150]),
    )
    found = flash_decoding.attend(q, k, v, begin, end, interpret=True)
    slot = jnp.arange(SLOTS)
    want = equation(q, k, v, (slot >= begin[:, None]) & (slot < end[:, None]))
    assert found.dtype == jnp.bfloat16
    # Weights and the result are rounded to 8 bits.
    np.testing.assert_allclose(found.astype(np.float32), want, atol=0.02)


def test_dead_slots_are_not_read_and_a_row_without_slots_gets_zeros():
    k, v = memory(2, 2, 16)
    end = jnp.array([70, 0])
    dead = (jnp.arange(SLOTS) >= end[:, None])[:, None, :, None]
    q = jax.random.normal(jax.random.key(9), (2, 2, 16), jnp.bfloat16)
    attend = functools.partial(flash_decoding.attend, interpret=True)
    want = attend(q, k, v, jnp.zeros_like(end), end)
    k, v = (jnp.where(dead, jnp.nan, x) for x in (k, v))
    found = attend(q, k, v, jnp.zeros_like(end), end)
    np.testing.assert_array_equal(found, want)
    np.testing.assert_array_equal(found[1], 0)


def read(params, pieces):
    """Hidden states of the last piece, and the cache."""
    cache = kv_cache.empty(CONFIG, 3, 40)
    for tokens, length in pieces:
        states, cache = qwen.extend(CONFIG, params, cache, tokens, length)
    return states.astype(jnp.float32), cache


def test_a_token_read_by_the_kernel_is_a_token_read_by_the_mask(interpreted):
    params = qwen.unstack(CONFIG, qwen.init(CONFIG, jax.random.key(0)))
    tokens = jax.random.randint(jax.random.key(1), (3, 14), 0, CONFIG.vocab)
    prompt = tokens[:, :13], jnp.array([13, 7, 2])
    one = tokens[:, 13:], jnp.array([1, 0, 1])
    states, cache = read(params, (prompt, one))
    assert len(interpreted) == CONFIG.layers
    # The same token in front of a padding: the mask reads two at once.
    padded = jnp.pad(one[0], ((0, 0), (0, 1))), one[1]
    want, held = read(params, (prompt, padded))
    assert len(interpreted) == CONFIG.layers
    live = np.array([0, 2])
    np.testing.assert_allclose(states[live, 0], want[live, 0], atol=0.05)
    np.testing.assert_array_equal(cache.length, held.length)
    assert jnp.isfinite(states).all()
    first = [x.astype(jnp.float32) for x in (cache.keys[0], held.keys[0])]
    np.testing.assert_array_equal(*first)


def test_a_row_past_its_slots_reads_none_beyond_them(interpreted):
    params = qwen.unstack(CONFIG, qwen.init(CONFIG, jax.random.key(0)))
    cache = kv_cache.empty(CONFIG, 3, 40)
    cache = dataclasses.replace(cache, length=jnp.array([39, 40, 47]))
    tokens, length = jnp.ones((3, 1), jnp.int32), jnp.array([1, 1, 1])
    qwen.extend(CONFIG, params, cache, tokens, length)
    for _, _, _, _, end in interpreted:
        np.testing.assert_array_equal(end, [40, 40, 40])


@pytest.mark.parametrize("group", [2, 7])
def test_the_kernel_is_lowered_for_a_gpu(group):
    k, v = memory(2, 2, 128)
    q = jax.random.normal(jax.random.key(9), (2, 2 * group, 128), jnp.bfloat16)
    given = q, k, v, jnp.zeros(2, jnp.int32), jnp.array([1, SLOTS])
    traced = jax.jit(flash_decoding.attend).trace(*given)
    try:
        lowered = traced.lower(lowering_platforms=("cuda",))
    except RuntimeError as error:
        if "No supported GPU devices" not in str(error):
            raise
        pytest.skip("jax 0.11 and later want a GPU to lower for one")
    assert "triton" in lowered.as_text()


@pytest.mark.parametrize(
    "change, capability, served",
    [
        ({}, "8.0", True),
        ({}, "9.0", True),
        ({}, "12.0", True),
        ({}, "10.0a", True),
        ({"dtype": "float16"}, "9.0", True),
        ({}, "7.5", False),
        ({}, "gfx942", False),
        ({"dtype": "float32"}, "9.0", False),
        ({"head_size": 20}, "9.0", False),
        ({"head_size": 256}, "9.0", False),
        ({"heads": 34}, "9.0", False),
    ],
)
def test_only_what_the_kernel_can_do_is_asked_of_it(
    monkeypatch, change, capability, served
):
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    device = types.SimpleNamespace(compute_capability=capability)
    monkeypatch.setattr(jax, "devices", lambda: [device])
    config = dataclasses.replace(CONFIG, **change)
    assert flash_decoding.serves(config) == served


def test_a_cpu_is_not_asked(monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: "cpu")
    assert not flash_decoding.serves(CONFIG)
