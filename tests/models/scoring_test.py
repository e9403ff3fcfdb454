"""Scores against the whole logits."""

import dataclasses
import pathlib

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


score = jax.jit(scoring.score, static_argnums=0)


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
    scores = score(CONFIG, PARAMS, view, 0.7, mask)
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
    scores = score(CONFIG, PARAMS, view, 1.0, mask)
    assert (np.asarray(scores.logprob)[mask == 0] == 0).all()
    assert (np.asarray(scores.entropy)[mask == 0] == 0).all()
    assert scores.logprob.dtype == scores.entropy.dtype == jnp.float32


def test_masked_tokens_have_no_gradient_and_the_rest_a_finite_one():
    view, mask = make_view()

    def total(params, mask):
        scores = score(CONFIG, params, view, 1.0, mask)
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
        np.testing.assert_allclose(a, b, atol=1e-5)
    assert not np.asarray(diverging(PARAMS, chunk, view, mask))[mask == 0].any()


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
    found = scoring.scores(voice, view, 1.0, np.ones((rows, scored)))
    for value, wanted in ((found.logprob, "logprob"), (found.entropy, "entropy")):
        np.testing.assert_allclose(value, data[wanted], rtol=2e-4, atol=1e-6)
