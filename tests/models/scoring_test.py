"""Scores against the whole logits."""

import dataclasses
import os
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from skillsd_jax.models import qwen, scoring
from skillsd_jax.tokens import TokenView

REFERENCE = pathlib.Path(__file__).parents[1] / "reference"
CONFIG = qwen.ModelConfig(
    vocab=29, width=16, layers=2, heads=2, kv_heads=1, head_size=8, hidden=24
)
PARAMS = qwen.init(CONFIG, jax.random.key(0))


score = jax.jit(scoring.score, static_argnums=(0, 5))


def make_view(seed=0):
    rng = np.random.default_rng(seed)
    view = TokenView(
        tokens=rng.integers(0, CONFIG.vocab, (3, 12)).astype(np.int32),
        length=np.array([12, 8, 3], np.int32),
        scored=np.array([[4, 5, 11, 1], [1, 6, 7, 1], [2, 1, 1, 1]], np.int32),
    )
    mask = np.array([[1, 1, 1, 0], [1, 1, 1, 0], [1, 0, 0, 0]], np.float32)
    return view, mask


def test_scores_are_those_of_the_whole_logits():
    view, mask = make_view()
    scores = score(CONFIG, PARAMS, view, 0.7, mask, True)
    logits = np.asarray(qwen.apply(CONFIG, PARAMS, view.tokens), np.float64) / 0.7
    logs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    for b, r in np.argwhere(mask):
        t = view.scored[b, r]
        before = logs[b, t - 1]
        np.testing.assert_allclose(
            scores.logprob[b, r], before[view.tokens[b, t]], atol=1e-5
        )
        entropy = -(np.exp(before) * before).sum()
        np.testing.assert_allclose(scores.entropy[b, r], entropy, atol=1e-5)


def test_scores_are_exactly_zero_outside_the_mask():
    view, mask = make_view()
    scores = score(CONFIG, PARAMS, view, 1.0, mask, True)
    assert (np.asarray(scores.logprob)[mask == 0] == 0).all()
    assert (np.asarray(scores.entropy)[mask == 0] == 0).all()
    assert scores.logprob.dtype == scores.entropy.dtype == jnp.float32


def test_masked_tokens_have_no_gradient_and_the_rest_a_finite_one():
    view, mask = make_view()

    def total(params, mask):
        scores = score(CONFIG, params, view, 1.0, mask, True)
        return jnp.sum(scores.logprob) + jnp.sum(scores.entropy)

    gradient = jax.jit(jax.grad(total))
    slope = gradient(PARAMS, mask)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(slope))
    none = gradient(PARAMS, np.zeros_like(mask))
    assert all((leaf == 0).all() for leaf in jax.tree.leaves(none))


def test_no_array_holds_logits_of_every_position():
    view, mask = make_view()
    program = jax.make_jaxpr(
        lambda p: scoring.score(CONFIG, p, view, 1.0, mask).logprob
    )(PARAMS)
    assert f"[3,4,{CONFIG.vocab}]" in str(program)
    assert f"[3,12,{CONFIG.vocab}]" not in str(program)


@pytest.fixture
def small_tiles(monkeypatch):
    """Three parts of eight words and one of five."""
    monkeypatch.setattr(scoring, "LANES", 4)
    monkeypatch.setattr(scoring, "TILE", 12 * 8)


def weighted(config, view, mask, temperature):
    """A loss in which every token's log-prob and entropy has a weight of its own."""
    rng = np.random.default_rng(4)
    g, f = rng.standard_normal((2, *mask.shape)).astype(np.float32)

    def loss(params):
        found = scoring.score(config, params, view, temperature, mask, entropy=True)
        return jnp.sum(g * found.logprob + f * found.entropy), found

    return jax.jit(jax.value_and_grad(loss, has_aux=True))


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("temperature", [1.0, 0.4])
def test_parts_of_the_vocabulary_change_nothing(tied, temperature, monkeypatch):
    config = dataclasses.replace(CONFIG, tie_embeddings=tied)
    params, (view, mask) = qwen.init(config, jax.random.key(2)), make_view()
    (_, kept), slope = weighted(config, view, mask, temperature)(params)
    monkeypatch.setattr(scoring, "LANES", 4)
    monkeypatch.setattr(scoring, "TILE", 12 * 8)
    (_, found), gradient = weighted(config, view, mask, temperature)(params)
    np.testing.assert_allclose(found.logprob, kept.logprob, atol=1e-5)
    np.testing.assert_allclose(found.entropy, kept.entropy, atol=1e-5)
    assert np.abs(found.entropy).max() > 1
    for a, b in zip(jax.tree.leaves(gradient), jax.tree.leaves(slope), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


def test_entropy_is_made_on_request_alone(small_tiles):
    view, mask = make_view()
    found = scoring.score(CONFIG, PARAMS, view, 1.0, mask)
    asked = scoring.score(CONFIG, PARAMS, view, 1.0, mask, entropy=True)
    assert not np.asarray(found.entropy).any() and np.asarray(asked.entropy).any()
    np.testing.assert_allclose(found.logprob, asked.logprob, atol=1e-6)

    def unasked(params):
        return scoring.score(CONFIG, params, view, 1.0, mask).entropy.sum()

    assert not any(leaf.any() for leaf in jax.tree.leaves(jax.grad(unasked)(PARAMS)))


def test_parts_survive_logits_of_any_size(small_tiles):
    """States of ±3000 make one word certain: log-prob 0, entropy 0, no NaN."""
    config = dataclasses.replace(CONFIG, width=CONFIG.vocab, tie_embeddings=False)
    token = np.arange(12, dtype=np.int32).reshape(3, 4) + 17
    view = TokenView(
        tokens=np.concatenate([token, token], 1),
        length=np.full(3, 8, np.int32),
        scored=np.tile(np.arange(4, 8, dtype=np.int32), (3, 1)),
    )
    states = 6000 * np.eye(config.vocab, dtype=np.float32)[token] - 3000

    def loss(states, kernel):
        voice = scoring.Voice(config, {"head": kernel}, states)
        found = scoring.scores(voice, view, 1.0, np.ones((3, 4)), entropy=True)
        return found.logprob.sum() + found.entropy.sum(), found

    slope, found = jax.grad(loss, (0, 1), has_aux=True)(states, np.eye(config.vocab))
    np.testing.assert_allclose(found.logprob, 0, atol=1e-3)
    np.testing.assert_allclose(found.entropy, 0, atol=1e-3)
    assert all(np.isfinite(leaf).all() for leaf in slope)


def test_no_array_holds_the_logits_of_the_batch(small_tiles):
    view, mask = make_view()
    program = str(jax.make_jaxpr(weighted(CONFIG, view, mask, 1.0))(PARAMS))
    assert "f32[12,8]" in program and "f32[12,5]" in program
    assert f"[12,{CONFIG.vocab}]" not in program
    assert f"[3,4,{CONFIG.vocab}]" not in program


def test_parts_multiply_in_the_type_of_the_network(monkeypatch):
    config = dataclasses.replace(CONFIG, dtype="bfloat16")
    view, mask = make_view()
    (_, kept), slope = weighted(config, view, mask, 1.0)(PARAMS)
    monkeypatch.setattr(scoring, "LANES", 4)
    monkeypatch.setattr(scoring, "TILE", 12 * 8)
    run = weighted(config, view, mask, 1.0)
    (_, found), gradient = run(PARAMS)
    assert "bf16[12,16]" in str(jax.make_jaxpr(run)(PARAMS))
    assert found.logprob.dtype == jnp.float32
    assert {leaf.dtype for leaf in jax.tree.leaves(gradient)} == {jnp.dtype("float32")}
    np.testing.assert_allclose(found.logprob, kept.logprob, atol=1e-5)
    error = np.linalg.norm(gradient["embed"] - slope["embed"])
    assert error < 0.02 * np.linalg.norm(slope["embed"])


def test_a_certain_token_keeps_its_small_slope_in_bfloat16(monkeypatch):
    """1 − p of 0.02 and less; as a difference of rounded numbers it would be lost."""
    monkeypatch.setattr(scoring, "LANES", 4)
    monkeypatch.setattr(scoring, "TILE", 12 * 8)
    rng = np.random.default_rng(6)
    head = rng.standard_normal((CONFIG.vocab, 64)).astype(jnp.bfloat16)
    head = head.astype(np.float32)  # what the matmul sees
    token = rng.integers(0, CONFIG.vocab, (3, 4))
    states = (0.16 * head[token]).astype(jnp.bfloat16)
    view = TokenView(
        tokens=np.concatenate([token, token], 1).astype(np.int32),
        length=np.full(3, 8, np.int32),
        scored=np.tile(np.arange(4, 8, dtype=np.int32), (3, 1)),
    )
    config = dataclasses.replace(CONFIG, width=64, dtype="bfloat16")

    def loss(states, kernel):
        voice = scoring.Voice(config, {"embed": kernel}, states)
        return scoring.scores(voice, view, 1.0, np.ones((3, 4))).logprob.sum()

    found = jax.grad(loss, (0, 1))(states, head)
    x, w = np.asarray(states, np.float64).reshape(12, 64), head.astype(np.float64)
    p = np.exp(x @ w.T)
    p /= p.sum(-1, keepdims=True)
    missing = np.eye(CONFIG.vocab)[token.reshape(-1)] - p
    assert np.median(p[np.arange(12), token.reshape(-1)]) > 0.98
    for a, b in zip(found, (missing @ w, missing.T @ x)):
        a = np.asarray(a, np.float64).reshape(b.shape)
        assert np.linalg.norm(a - b) < 0.01 * np.linalg.norm(b)


@pytest.mark.parametrize("tile", [12 * 8, 1 << 21])
def test_the_temperature_has_no_gradient(tile, monkeypatch):
    monkeypatch.setattr(scoring, "LANES", 4)
    monkeypatch.setattr(scoring, "TILE", tile)
    view, mask = make_view()

    def loss(temperature):
        return scoring.score(CONFIG, PARAMS, view, temperature, mask).logprob.sum()

    assert jax.grad(loss)(0.7) == 0


@pytest.mark.parametrize("k", [1, 6, 29])
def test_the_likeliest_words_are_those_of_the_whole_logits(k, small_tiles):
    view, _ = make_view()
    voice = scoring.read(CONFIG, PARAMS, view)
    logs = jax.nn.log_softmax(voice.logits(voice.states) / 0.7)
    wanted, words = jax.lax.top_k(logs, k)
    found, ids = scoring.likeliest(voice, k, 0.7)
    np.testing.assert_allclose(found, wanted, atol=1e-5)
    np.testing.assert_array_equal(ids, words)


def kl(student, teacher):
    s, t = jax.nn.log_softmax(student), jax.nn.log_softmax(teacher)
    return jnp.sum(jnp.exp(t) * (t - s), -1)


def diverging(params, chunk, view, mask):
    teacher = dataclasses.replace(CONFIG, layers=1, width=8)
    weights = qwen.init(teacher, jax.random.key(1))
    voices = (
        scoring.read(CONFIG, params, view),
        scoring.read(teacher, weights, view),
    )
    return scoring.divergence(kl, *voices, 0.7, mask, chunk)


@pytest.mark.parametrize("chunk", [1, 5, 12, 64])
def test_a_divergence_in_chunks_is_that_of_the_whole_logits(chunk):
    view, mask = make_view()
    teacher = dataclasses.replace(CONFIG, layers=1, width=8)
    weights = qwen.init(teacher, jax.random.key(1))

    def whole(params):
        states = (
            scoring.read(CONFIG, params, view),
            scoring.read(teacher, weights, view),
        )
        values = kl(*(v.logits(v.states) / 0.7 for v in states))
        return jnp.where(mask > 0, values, 0)

    wanted, slope = jax.value_and_grad(lambda p: whole(p).sum())(PARAMS)
    value, gradient = jax.value_and_grad(
        lambda p: diverging(p, chunk, view, mask).sum()
    )(PARAMS)
    np.testing.assert_allclose(value, wanted, rtol=1e-5)
    for a, b in zip(jax.tree.leaves(gradient), jax.tree.leaves(slope)):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)
    assert not np.asarray(diverging(PARAMS, chunk, view, mask))[mask == 0].any()


@pytest.mark.parametrize("student, teacher", [(29, 40), (40, 29)])
def test_words_that_pad_one_vocabulary_are_left_out_of_a_divergence(student, teacher):
    _, mask = make_view()
    rng = np.random.default_rng(5)
    states = rng.standard_normal((2, 3, 4, CONFIG.width)).astype(np.float32)
    heads = [rng.standard_normal((n, CONFIG.width)) for n in (student, teacher)]

    def voices(kernel):
        return [
            scoring.Voice(dataclasses.replace(CONFIG, vocab=len(k)), {"embed": k}, x)
            for k, x in zip((kernel, heads[1]), states)
        ]

    def whole(kernel):
        s, t = (v.logits(v.states)[..., :29] / 0.7 for v in voices(kernel))
        return jnp.sum(kl(s, t) * mask)

    def chunked(kernel):
        return scoring.divergence(kl, *voices(kernel), 0.7, mask, 5).sum()

    wanted, slope = jax.value_and_grad(whole)(jnp.asarray(heads[0]))
    found, gradient = jax.value_and_grad(chunked)(jnp.asarray(heads[0]))
    np.testing.assert_allclose(found, wanted, rtol=1e-5)
    np.testing.assert_allclose(gradient, slope, atol=1e-4)
    assert not np.asarray(gradient)[29:].any()


def test_a_divergence_never_holds_the_logits_of_the_batch():
    view, mask = make_view()
    program = jax.make_jaxpr(jax.grad(lambda p: diverging(p, 4, view, mask).sum()))(
        PARAMS
    )
    assert f"[4,{CONFIG.vocab}]" in str(program)
    assert f"[12,{CONFIG.vocab}]" not in str(program)
    assert f"[3,4,{CONFIG.vocab}]" not in str(program)


def test_scores_agree_with_the_released_code():
    with np.load(REFERENCE / "prim_logprob_entropy.npz") as file:
        data = dict(file)
    rows, scored, vocabulary = data["logits"].shape
    config = dataclasses.replace(
        CONFIG, vocab=vocabulary, width=vocabulary, tie_embeddings=False
    )
    # The head is the identity: states are logits.
    voice = scoring.Voice(config, {"head": np.eye(vocabulary)}, data["logits"])
    view = TokenView(
        tokens=data["labels"].astype(np.int32),
        length=np.full(rows, scored, np.int32),
        scored=np.tile(np.arange(scored, dtype=np.int32), (rows, 1)),
    )
    found = scoring.scores(voice, view, 1.0, np.ones((rows, scored)), entropy=True)
    for value, wanted in ((found.logprob, "logprob"), (found.entropy, "entropy")):
        np.testing.assert_allclose(value, data[wanted], rtol=2e-4, atol=1e-6)


SHARDED = """
import sys; sys.path.insert(0, {folder!r})
import dataclasses, jax, numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P
import scoring_test as t
assert jax.device_count() == 8
t.scoring.LANES, t.scoring.TILE = 4, 12 * 8
config = dataclasses.replace(t.CONFIG, vocab=40, tie_embeddings=False)
params, (view, mask) = t.qwen.init(config, jax.random.key(0)), t.make_view()
(wanted, _), slope = t.weighted(config, view, mask, 0.7)(params)
mesh = Mesh(np.array(jax.devices()), ("tp",))
placed = jax.device_put(params, NamedSharding(mesh, P()))
placed["head"] = jax.device_put(params["head"], NamedSharding(mesh, P("tp", None)))
(value, _), gradient = t.weighted(config, view, mask, 0.7)(placed)
np.testing.assert_allclose(value, wanted, rtol=1e-5)
jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), gradient, slope)
def apart(head):
    voice = t.scoring.read(config, placed | {{"head": head}}, view)
    other = dataclasses.replace(voice, states=voice.states[::-1])
    return t.scoring.divergence(t.kl, voice, other, 0.7, mask, 4).sum()
found = jax.jit(jax.value_and_grad(apart))
for a, b in zip(found(placed["head"]), found(params["head"])):
    np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)
print("same")
"""


@pytest.mark.slow
def test_a_head_sharded_over_the_vocabulary_scores_the_same():
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": "--xla_force_host_platform_device_count=8 "
        "--xla_backend_optimization_level=0",
        "PYTHONPATH": os.pathsep.join(sys.path),
    }
    folder = str(pathlib.Path(__file__).parent)
    done = subprocess.run(
        [sys.executable, "-c", SHARDED.format(folder=folder)],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout.endswith("same\n"), done.stderr
