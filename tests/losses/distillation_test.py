import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from skillsd_jax.losses import distillation, gates, masking

LOSSES = {
    "k1": lambda s, t, o: distillation.k1(s, t),
    "k1_reward": distillation.k1_reward,
    "k2": lambda s, t, o: distillation.k2(s, t),
    "k3": lambda s, t, o: distillation.k3(s, t),
    "weighted_reverse_kl": distillation.weighted_reverse_kl,
    "gated": lambda s, t, o: distillation.gated(s, t, gates.gap_gate(s, t, 5.0)),
}


def test_values_as_derived_by_hand():
    # ℓ = −1 + 1.5 = ½; e^−½ − 1 + ½ = 0.1065307; ρ = e^{−1 + 2} = e.
    student, teacher, old = -1.0, -1.5, -2.0
    np.testing.assert_allclose(distillation.k1(student, teacher), 0.5)
    np.testing.assert_allclose(distillation.k1_reward(student, teacher), -0.5)
    np.testing.assert_allclose(
        distillation.k1_reward(student, teacher, old), np.e / 2, rtol=1e-6
    )
    np.testing.assert_allclose(distillation.k2(student, teacher), 0.125)
    np.testing.assert_allclose(distillation.k3(student, teacher), 0.1065307, rtol=1e-6)
    np.testing.assert_allclose(
        distillation.weighted_reverse_kl(student, teacher, old), 0.2895804, rtol=1e-6
    )
    np.testing.assert_allclose(distillation.gated(student, teacher, 0.3), -0.15)


def test_k1_has_no_expected_gradient(words):
    gradient = words.expected_gradient(
        lambda s: distillation.k1(s, words.teacher), words.student
    )
    np.testing.assert_allclose(gradient, 0, atol=1e-12)


@pytest.mark.parametrize("on_policy", [True, False])
def test_k1_as_a_reward_follows_the_reverse_kl(words, on_policy):
    old = words.student if on_policy else words.old
    gradient = words.expected_gradient(
        lambda s: distillation.k1_reward(s, words.teacher, old), old
    )
    np.testing.assert_allclose(gradient, words.reverse_kl_gradient(), atol=1e-12)
    bare = words.expected_gradient(
        lambda s: distillation.k1_reward(s, words.teacher), words.student
    )
    np.testing.assert_allclose(bare, words.reverse_kl_gradient(), atol=1e-12)


def test_k2_follows_the_reverse_kl(words):
    gradient = words.expected_gradient(
        lambda s: distillation.k2(s, words.teacher), words.student
    )
    np.testing.assert_allclose(gradient, words.reverse_kl_gradient(), atol=1e-12)


def test_k3_follows_the_forward_kl(words):
    gradient = words.expected_gradient(
        lambda s: distillation.k3(s, words.teacher), words.student
    )
    np.testing.assert_allclose(gradient, words.forward_kl_gradient(), atol=1e-12)


@pytest.mark.parametrize("on_policy", [True, False])
def test_weighted_reverse_kl_follows_the_reverse_kl_for_any_sampler(words, on_policy):
    old = words.student if on_policy else words.old
    gradient = words.expected_gradient(
        lambda s: distillation.weighted_reverse_kl(s, words.teacher, old), old
    )
    np.testing.assert_allclose(gradient, words.reverse_kl_gradient(), atol=1e-12)


def test_a_constant_gate_has_no_expected_gradient(words):
    def sdar(student):
        gate = gates.gap_gate(student, words.teacher, beta=0.0)
        return distillation.gated(student, words.teacher, gate)

    gradient = words.expected_gradient(sdar, words.student)
    np.testing.assert_allclose(gradient, 0, atol=1e-12)


@pytest.mark.parametrize("beta", [1.0, 5.0])
def test_for_small_gaps_the_gap_gate_follows_the_reverse_kl(words, beta):
    teacher = words.log_softmax(words.student + 1e-3 * words.teacher)

    def sdar(student):
        gate = gates.gap_gate(student, teacher, beta)
        return distillation.gated(student, teacher, gate)

    gradient = words.expected_gradient(sdar, words.student)
    expected = beta / 4 * words.reverse_kl_gradient(teacher)
    np.testing.assert_allclose(gradient, expected, rtol=1e-3)


def test_expected_gradients_agree_with_the_released_code(words, released, close):
    data = released("expected_grad_small")
    teacher = words.log_softmax(data["teacher_logits"])
    sampler = words.log_softmax(data["student_logits"])

    def expected(loss):
        def expectation(logits):
            return (np.exp(sampler) * loss(jax.nn.log_softmax(logits))).sum()

        return jax.grad(expectation)(data["student_logits"])

    for beta in (0, 1, 5, 20):

        def sdar(student, beta=beta):
            gate = gates.gap_gate(student, teacher, beta)
            return distillation.gated(student, teacher, gate)

        close(expected(sdar), data[f"E_grad_sdar_beta{beta}"])
    skill_sd = functools.partial(
        distillation.weighted_reverse_kl, teacher=teacher, old=sampler
    )
    close(expected(skill_sd), data["E_grad_skillsd_onpolicy"])
    close(expected(skill_sd), data["grad_reverse_kl"])


@pytest.mark.parametrize("mode", masking.COUNTS)
@pytest.mark.parametrize("beta", [0, 5])
def test_sdar_agrees_with_the_released_code(beta, mode, released, close):
    data, suffix = released(f"sdar_loss_beta{beta}"), mode.replace("-", "_")
    teacher, mask = data["teacher_log_probs"], data["response_mask"]

    def loss(student):
        gate = gates.gap_gate(student, teacher, beta)
        values = distillation.gated(student, teacher, gate)
        return masking.aggregate(values, mask, mode)

    value, gradient = jax.value_and_grad(loss)(data["student_log_probs"])
    close(value, data[f"loss_{suffix}"])
    close(gradient, data[f"grad_{suffix}"])
    gap = -distillation.k1(data["student_log_probs"], teacher)
    close(masking.token_mean(gap, mask), data["metric_teacher_gap_mean"])


@pytest.mark.parametrize("mode", masking.COUNTS)
def test_skill_sd_agrees_with_the_released_code(mode, released, close):
    data, suffix = released("skillsd_sdl"), mode.replace("-", "_")

    def loss(student):
        values = distillation.weighted_reverse_kl(
            student,
            data["teacher_log_probs"],
            data["old_log_probs"],
            max_log_ratio=10.0,
            max_gap=20.0,
        )
        return masking.aggregate(values, data["response_mask"], mode)

    value, gradient = jax.value_and_grad(loss)(data["student_log_probs"])
    close(value, data[f"loss_{suffix}"])
    close(gradient, data[f"grad_{suffix}"])


def test_the_gap_is_capped_in_the_exponential_alone():
    # −ℓ = 3 against a cap of 2: e² − 1 − 3, slope 1 from the linear ℓ (ρ = 1 is held
    # by its own cap of 0, so that it adds no slope).
    value, slope = jax.value_and_grad(distillation.weighted_reverse_kl)(
        -4.0, -1.0, -4.5, max_log_ratio=0.0, max_gap=2.0
    )
    np.testing.assert_allclose(value, np.exp(2) - 4, rtol=1e-6)
    np.testing.assert_allclose(slope, 1, rtol=1e-6)


def test_the_caps_keep_the_loss_finite():
    def loss(student, teacher, old):
        return distillation.weighted_reverse_kl(student, teacher, old, 10.0, 20.0)

    for views in [(-300.0, -1.0, -1.0), (-1.0, -1.0, -300.0), (-1.0, -300.0, -1.0)]:
        value, slope = jax.value_and_grad(loss)(*views)
        assert np.isfinite(value) and np.isfinite(slope)


@pytest.mark.parametrize("name", LOSSES)
def test_the_student_alone_is_differentiated(name):
    _, teacher, old = jax.grad(LOSSES[name], (0, 1, 2))(-1.0, -1.5, -1.2)
    assert teacher == 0 and old == 0


def test_gated_pushes_every_token_up_by_its_gate():
    student = np.array([-1.0, -2.0, -0.1], np.float32)
    teacher = np.array([-0.2, -9.0, -0.1], np.float32)
    gate = gates.gap_gate(student, teacher, 5.0)
    gradient = jax.grad(
        lambda s: distillation.gated(s, teacher, gates.gap_gate(s, teacher, 5.0)).sum()
    )(student)
    np.testing.assert_array_equal(gradient, -gate)


def test_gated_detaches_a_gate_that_is_not():
    def attached(student):
        return distillation.gated(student, -1.0, jax.nn.sigmoid(5 * (-1.0 - student)))

    gate = gates.gap_gate(-1.5, -1.0, 5.0)
    np.testing.assert_allclose(jax.grad(attached)(-1.5), -gate, rtol=1e-6)


@pytest.mark.parametrize("name", LOSSES)
def test_two_equal_views_cost_nothing(name):
    assert LOSSES[name](-1.3, -1.3, -2.0) == 0


def test_small_gaps_keep_their_digits():
    # ℓ = 2⁻¹²: k3 ≈ ℓ²/2 = 2.98e-8, below the rounding of e^−ℓ − 1 + ℓ as written.
    value = distillation.k3(np.float32(2**-12), np.float32(0))
    np.testing.assert_allclose(value, 2.0**-25, rtol=1e-2)


@pytest.mark.parametrize("name", LOSSES)
def test_losses_are_elementwise_under_jit_vmap_and_bfloat16(name):
    views = np.random.default_rng(2).uniform(-4, -0.1, (3, 2, 4)).astype(np.float32)
    loss = LOSSES[name]
    whole = loss(*views)
    assert whole.shape == (2, 4)
    one_by_one = jax.jit(jax.vmap(jax.vmap(loss)))(*views)
    np.testing.assert_allclose(whole, one_by_one, rtol=1e-6, atol=1e-7)
    halves = jnp.asarray(views, jnp.bfloat16)
    np.testing.assert_array_equal(
        loss(*halves), loss(*halves.astype(jnp.float32)), strict=True
    )
