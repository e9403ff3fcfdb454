import jax
import jax.numpy as jnp
import numpy as np
import pytest

from skillsd_jax.losses import credit


def test_advantage_as_derived_by_hand():
    # e^0.1 = 1.1051709 lies within ±0.2; e^±1 is held at 1.2 and 0.8. l = ½.
    advantage = np.array([2.0, 2.0, 2.0, -2.0, -2.0])
    gap = np.array([0.1, 1.0, -1.0, 1.0, -0.1])
    value = credit.rlsd_advantage(advantage, gap - 1, -np.ones(5), mix=0.5, clip=0.2)
    # For A < 0 an endorsed token (gap 1) is blamed less: −2 (½ + ½ · 0.8).
    expected = [2.1051709, 2.2, 1.8, -1.8, -2.1051709]
    np.testing.assert_allclose(value, expected, rtol=1e-6)


@pytest.mark.parametrize("mix", ["0", "0.5"])
def test_advantage_agrees_with_the_released_code(mix, released, close):
    data = released(f"rlsd_adv_lam{mix}_eps0.2")
    value = credit.rlsd_advantage(
        data["seq_advantages"],
        data["teacher_log_probs"],
        data["student_log_probs"],
        mix=float(data["rlsd_lambda"]),
        clip=float(data["rlsd_clip_eps"]),
    )
    close(value, data["token_advantages"])


def test_without_mix_the_advantage_is_left_alone():
    advantage = np.array([1.5, -0.5, 0.0], np.float32)
    value = credit.rlsd_advantage(advantage, np.array([-9.0, -1, 0]), -np.ones(3), 0, 1)
    np.testing.assert_array_equal(value, advantage)


def test_the_sign_never_flips():
    rng = np.random.default_rng(4)
    advantage, teacher, old = rng.normal(size=(3, 1000)) * [[1], [100], [100]]
    value = credit.rlsd_advantage(advantage, teacher, old, mix=1.0, clip=0.9)
    np.testing.assert_array_equal(np.sign(value), np.sign(advantage))


def test_credit_is_detached_and_in_float32():
    args = [jnp.array(x, jnp.bfloat16) for x in (1.0, -1.0, -1.1)]
    assert credit.rlsd_advantage(*args, 0.5, 0.2).dtype == jnp.float32
    gradients = jax.grad(credit.rlsd_advantage, (0, 1, 2))(*args, 0.5, 0.2)
    assert not any(gradients)
