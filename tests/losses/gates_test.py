import jax
import jax.numpy as jnp
import numpy as np
import pytest

from skillsd_jax.losses import gates, masking


def test_gates_as_derived_by_hand():
    # σ(2 · ½) = 0.7310586; σ(2 · 0.3) = 0.6456563;
    # 1 − (1 − 0.3)(1 − 0.5) = 0.65 and σ(1.3) = 0.7858350.
    student, teacher, entropy = -1.5, -1.0, 0.3
    np.testing.assert_allclose(
        gates.gap_gate(student, teacher, beta=2), 0.7310586, rtol=1e-6
    )
    np.testing.assert_allclose(
        gates.entropy_gate(entropy, beta=2), 0.6456563, rtol=1e-6
    )
    np.testing.assert_allclose(
        gates.soft_or_gate(entropy, student, teacher, beta=2), 0.7858350, rtol=1e-6
    )


@pytest.mark.parametrize("beta", [0, 5])
def test_gap_gate_agrees_with_the_released_code(beta, released, close):
    data = released(f"sdar_loss_beta{beta}")
    mask = data["response_mask"]
    gate = gates.gap_gate(data["student_log_probs"], data["teacher_log_probs"], beta)
    close(masking.token_mean(gate, mask), data["metric_gate_mean"])
    close(masking.token_mean(gate > 0.5, mask), data["metric_gate_active_ratio"])


def test_an_endorsed_token_gets_more_than_half():
    gate = gates.gap_gate(np.array([-1.0, -1.0, -1.0]), np.array([-2.0, -1.0, -0.5]), 5)
    assert gate[0] < 0.5 and gate[1] == 0.5 and gate[2] > 0.5


def test_soft_or_opens_on_either_sign():
    # One factor 0 makes 1 − (1 − h)(1 − Δ) = 1, whatever the other.
    certain = gates.soft_or_gate(np.array([1.0, 0.2]), -1.0, np.array([-3.0, 0.0]), 4.0)
    np.testing.assert_allclose(certain, 1 / (1 + np.exp(-4)), rtol=1e-6)


def test_no_gradient_passes_a_gate():
    x = jnp.array(-0.7)
    assert jax.grad(lambda s: gates.gap_gate(s, -1.0, 5.0))(x) == 0
    assert jax.grad(lambda t: gates.gap_gate(-1.0, t, 5.0))(x) == 0
    assert jax.grad(lambda h: gates.entropy_gate(h, 5.0))(-x) == 0
    for argument in range(3):
        slope = jax.grad(gates.soft_or_gate, argument)(-x, x, x, 5.0)
        assert slope == 0


def test_gates_stay_in_the_unit_interval_and_float32():
    far = jnp.array([-1e4, 0.0], jnp.bfloat16)
    for gate in (
        gates.gap_gate(far, far[::-1], 5.0),
        gates.entropy_gate(far, 5.0),
        gates.soft_or_gate(-far, far, far[::-1], 5.0),
    ):
        assert gate.dtype == jnp.float32
        assert ((gate >= 0) & (gate <= 1)).all()


def test_bfloat16_gaps_are_taken_in_float32():
    # In bfloat16 the difference is itself rounded: −3.015625 + 1 has nine bits.
    student, teacher = jnp.bfloat16(-3.015625), jnp.bfloat16(-1.0)
    exact = 1 / (1 + np.exp(-0.1 * 2.015625))
    gate = gates.gap_gate(student, teacher, 0.1)
    np.testing.assert_allclose(gate, exact, rtol=1e-6)
