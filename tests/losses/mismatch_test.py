import jax
import jax.numpy as jnp
import numpy as np
import pytest

from skillsd_jax.losses import mismatch

MASK = np.array([[1, 1, 0], [1, 1, 0]], np.float32)
SAMPLED = np.array([[-1.0, -2, 0], [-3, -0.5, 0]], np.float32)


def figure(found, name):
    total, divisor = found[name]
    return total / divisor


@pytest.mark.parametrize("outside", [0.0, 9.0, np.nan, -np.inf])
def test_agreement_as_derived_by_hand(outside):
    # |Δ| = 0.3, 0, 0.0078125, 0.02: two of four above a hundredth.
    change = np.array([[0.3, 0, outside], [-0.0078125, -0.02, outside]], np.float32)
    found = mismatch.agreement(SAMPLED + change, SAMPLED, MASK)
    wanted = {"mean": 0.3278125 / 4, "max": 0.3, "share": 0.5}
    assert found.keys() == {f"old_difference_{name}" for name in wanted}
    for name, value in wanted.items():
        np.testing.assert_allclose(
            figure(found, f"old_difference_{name}"), value, rtol=1e-5, err_msg=name
        )


def test_equal_log_probs_agree_and_no_token_counts_for_nothing():
    same = mismatch.agreement(SAMPLED, SAMPLED, MASK)
    none = mismatch.agreement(SAMPLED + 1, SAMPLED, 0 * MASK)
    for found in (same, none):
        assert not any(total for total, _ in found.values())
    assert {float(divisor) for _, divisor in same.values()} == {4.0, 1.0}


def test_a_weight_is_the_ratio_up_to_the_cap():
    # π_scorer / π_sampler = ½, 1, 3, 100 and one beyond what exp holds.
    ratio = np.array([0.5, 1, 3, 100], np.float32)
    scored = np.append(np.log(ratio) - 2, 198.0)
    weight = mismatch.correction(scored, np.full(5, -2.0, np.float32), 2.5)
    np.testing.assert_allclose(weight, [0.5, 1, 2.5, 2.5, 2.5], rtol=1e-5)


def test_no_gradient_flows_through_a_weight():
    for argument in (0, 1):
        slope = jax.grad(lambda *x: mismatch.correction(*x, 2.0), argument)(-1.0, -1.5)
        assert slope == 0


def test_the_cap_holds_a_share_of_the_tokens():
    weight = np.array([[0.5, 2, np.nan], [2, 2, 2]], np.float32)
    found = mismatch.corrected(weight, MASK, 2.0)
    assert found.keys() == {"correction_mean", "correction_capped"}
    np.testing.assert_allclose(figure(found, "correction_mean"), 6.5 / 4)
    np.testing.assert_allclose(figure(found, "correction_capped"), 0.75)


def test_bfloat16_is_computed_in_float32():
    scored, sampled = (jnp.array(x, jnp.bfloat16) for x in ([-1.0, -2], [-1.5, -1]))
    exact = mismatch.correction(
        *(x.astype(jnp.float32) for x in (scored, sampled)), 9.0
    )
    np.testing.assert_array_equal(mismatch.correction(scored, sampled, 9.0), exact)
    for found in (
        mismatch.agreement(scored, sampled, jnp.ones(2, jnp.bfloat16)),
        mismatch.corrected(scored, jnp.ones(2, jnp.bfloat16), 9.0),
    ):
        assert {x.dtype for x in jax.tree.leaves(found)} == {np.dtype("float32")}
