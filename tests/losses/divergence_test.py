import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from skillsd_jax.losses import divergence

WHOLE = {
    "forward_kl": divergence.forward_kl,
    "reverse_kl": divergence.reverse_kl,
    "jsd": divergence.jsd,
}
TOPK = {
    (kind, select): functools.partial(
        divergence.topk_tail, k=2, kind=kind, select=select
    )
    for kind in WHOLE
    for select in ("teacher", "student")
}
ALL = WHOLE | TOPK
STUDENT = np.log(np.array([0.5, 0.25, 0.25]))
TEACHER = np.log(np.array([0.25, 0.25, 0.5]))


def logits(shape=(), seed=3):
    return np.random.default_rng(seed).normal(size=(2, *shape, 5)).astype(np.float32)


@pytest.mark.parametrize(
    "name, expected",
    [
        # KL(T‖S) = ¼ log ½ + ½ log 2 = ¼ log 2; KL(S‖T) is the same by symmetry.
        ("forward_kl", 0.25 * np.log(2)),
        ("reverse_kl", 0.25 * np.log(2)),
        # M = (⅜, ¼, ⅜): both KLs are ½ log 4/3 + ¼ log 2/3.
        ("jsd", 0.5 * np.log(4 / 3) + 0.25 * np.log(2 / 3)),
    ],
)
def test_values_as_derived_by_hand(name, expected):
    np.testing.assert_allclose(WHOLE[name](STUDENT, TEACHER), expected, rtol=1e-5)


def test_the_direction_is_the_names():
    # Student (½, ½), teacher (¾, ¼).
    student, teacher = np.log([0.5, 0.5]), np.log([0.75, 0.25])
    forward = 0.75 * np.log(1.5) + 0.25 * np.log(0.5)
    reverse = 0.5 * np.log(2 / 3) + 0.5 * np.log(2)
    np.testing.assert_allclose(divergence.forward_kl(student, teacher), forward, 1e-5)
    np.testing.assert_allclose(divergence.reverse_kl(student, teacher), reverse, 1e-5)


def test_alpha_weighs_the_teacher():
    # α = ¼ on student (½, ½), teacher (1, 0): M = (⅝, ⅜).
    # ¼ log 8/5 + ¾ (½ log 4/5 + ½ log 4/3)
    student, teacher = np.zeros(2), np.array([0.0, -np.inf])
    value = divergence.jsd(student, teacher, alpha=0.25)
    expected = 0.25 * np.log(1.6) + 0.375 * np.log(0.8) + 0.375 * np.log(4 / 3)
    np.testing.assert_allclose(value, expected, rtol=1e-5)


def test_gradients_are_those_of_the_divergences(words):
    with jax.enable_x64(True):
        forward = jax.grad(divergence.forward_kl)(words.logits, words.teacher)
        reverse = jax.grad(divergence.reverse_kl)(words.logits, words.teacher)
    np.testing.assert_allclose(forward, words.forward_kl_gradient(), atol=1e-12)
    np.testing.assert_allclose(reverse, words.reverse_kl_gradient(), atol=1e-12)


def test_the_jsd_gradient_is_the_slope(words):
    def loss(x):
        return divergence.jsd(x, words.teacher, alpha=0.3)

    with jax.enable_x64(True):
        gradient = jax.grad(loss)(words.logits)
        steps = 1e-5 * np.eye(5)
        slope = [
            (loss(words.logits + h) - loss(words.logits - h)) / 2e-5 for h in steps
        ]
    np.testing.assert_allclose(gradient, slope, atol=1e-9)


def test_reverse_kl_agrees_with_the_released_code(released, close):
    data = released("expected_grad_small")
    value, gradient = jax.value_and_grad(divergence.reverse_kl)(
        data["student_logits"], data["teacher_logits"]
    )
    close(value, data["reverse_kl"])
    close(gradient, data["grad_reverse_kl"])


def test_topk_merges_the_rest_into_one_word():
    # Teacher's top two are words 2 and 0; student's, words 1 and 0.
    student, teacher = np.array([0.3, 0.4, 0.2, 0.1]), np.array([0.3, 0.1, 0.5, 0.1])

    def kl(p, q):
        return np.sum(p * np.log(p / q))

    s, t = np.array([0.2, 0.3, 0.5]), np.array([0.5, 0.3, 0.2])
    value = divergence.topk_tail(np.log(student), np.log(teacher), 2, "forward_kl")
    np.testing.assert_allclose(value, kl(t, s), rtol=1e-5)
    s, t = np.array([0.4, 0.3, 0.3]), np.array([0.1, 0.3, 0.6])
    value = divergence.topk_tail(
        np.log(student), np.log(teacher), 2, "reverse_kl", select="student"
    )
    np.testing.assert_allclose(value, kl(s, t), rtol=1e-5)


@pytest.mark.parametrize("kind", WHOLE)
@pytest.mark.parametrize("k", [5, 9])
def test_topk_is_exact_when_it_keeps_every_word(kind, k):
    student, teacher = logits((3,))
    np.testing.assert_allclose(
        divergence.topk_tail(student, teacher, k, kind),
        WHOLE[kind](student, teacher),
        rtol=1e-6,
    )


@pytest.mark.parametrize("kind", WHOLE)
def test_topk_never_exceeds_the_whole_and_grows_with_k(kind):
    student, teacher = logits((50,))
    values = [divergence.topk_tail(student, teacher, k, kind) for k in (1, 2, 3, 4, 5)]
    assert all((a <= b + 1e-6).all() for a, b in itertools.pairwise(values))
    assert (values[0] >= -1e-6).all()


@pytest.mark.parametrize("name", ALL)
def test_the_teacher_does_not_move(name):
    student, teacher = logits()
    gradient = jax.grad(ALL[name], 1)(student, teacher)
    assert not gradient.any()


@pytest.mark.parametrize("name", ALL)
def test_equal_views_are_a_minimum_of_zero(name):
    student, _ = logits()
    value, gradient = jax.value_and_grad(ALL[name])(student, student)
    np.testing.assert_allclose(value, 0, atol=1e-6)
    np.testing.assert_allclose(gradient, 0, atol=1e-6)


@pytest.mark.parametrize("name", ALL)
def test_a_word_both_exclude_changes_nothing(name):
    student, teacher = logits()
    value, gradient = jax.value_and_grad(ALL[name])(student, teacher)
    wide = np.append(student, -np.inf), np.append(teacher, -np.inf)
    wide_value, wide_gradient = jax.value_and_grad(ALL[name])(*wide)
    np.testing.assert_allclose(wide_value, value, rtol=1e-6)
    np.testing.assert_allclose(wide_gradient, np.append(gradient, 0), atol=1e-6)


@pytest.mark.parametrize("excludes", ["student", "teacher"])
def test_jsd_is_smooth_where_one_side_excludes_a_word(excludes):
    student, teacher = logits()
    (student if excludes == "student" else teacher)[1] = -np.inf
    value, gradient = jax.value_and_grad(divergence.jsd)(student, teacher)
    assert 0 <= value + 1e-6 < np.log(2) and np.isfinite(gradient).all()


@pytest.mark.parametrize("name", TOPK)
def test_an_empty_tail_has_a_finite_gradient(name):
    student = np.array([0.3, -0.2, -np.inf, -np.inf], np.float32)
    teacher = np.array([-0.4, 0.5, -np.inf, -np.inf], np.float32)
    value, gradient = jax.value_and_grad(TOPK[name])(student, teacher)
    np.testing.assert_allclose(value, WHOLE[name[0]](student[:2], teacher[:2]), 1e-5)
    assert np.isfinite(gradient).all()


@pytest.mark.parametrize("name", ALL)
def test_divergences_reduce_the_last_axis_under_jit_vmap_and_bfloat16(name):
    views = jnp.asarray(logits((3, 2)), jnp.bfloat16)
    whole = ALL[name](*views)
    assert whole.shape == (3, 2) and whole.dtype == jnp.float32
    one_by_one = jax.jit(jax.vmap(jax.vmap(ALL[name])))(*views)
    np.testing.assert_allclose(whole, one_by_one, rtol=1e-5, atol=1e-6)
    exact = ALL[name](*views.astype(jnp.float32))
    np.testing.assert_array_equal(whole, exact)


def test_unknown_names_are_refused_with_the_known_ones():
    with pytest.raises(ValueError, match="kind='kl' is unknown; choose forward_kl, "):
        divergence.topk_tail(*logits(), 2, "kl")
    with pytest.raises(ValueError, match="select='both' is unknown; choose teacher, "):
        divergence.topk_tail(*logits(), 2, "jsd", select="both")
