import jax
import jax.numpy as jnp
import numpy as np
import pytest

from skillsd_jax.losses import masking

MODES = list(masking.COUNTS)
VALUES = np.array([[1, 2, 3], [4, 5, 6], [7, 8, 9]], np.float32)
MASK = np.array([[1, 1, 0], [1, 0, 0], [0, 0, 0]], np.float32)


@pytest.mark.parametrize(
    "mode, expected",
    [
        ("token-mean", 7 / 3),  # (1 + 2 + 4) / 3 tokens
        ("seq-mean-token-sum", 3.5),  # (3 + 4) / 2 rows with a token
        ("seq-mean-token-mean", 2.75),  # (1.5 + 4) / 2 rows with a token
        ("seq-mean-token-sum-norm", 7 / 3),  # 7 / length 3
    ],
)
def test_modes_as_derived_by_hand(mode, expected):
    np.testing.assert_allclose(
        masking.aggregate(VALUES, MASK, mode), expected, rtol=1e-6
    )


def test_token_mean_is_over_the_mask_or_the_given_count():
    np.testing.assert_allclose(masking.token_mean(VALUES, MASK), 7 / 3, rtol=1e-6)
    np.testing.assert_allclose(masking.token_mean(VALUES, MASK, count=14), 0.5)


def test_a_fractional_mask_is_a_weight():
    mask = np.array([0.5, 0, 0.25], np.float32)
    values = np.array([1, np.nan, 3], np.float32)
    # (0.5 · 1 + 0.25 · 3) / 0.75
    np.testing.assert_allclose(masking.token_mean(values, mask), 5 / 3, rtol=1e-6)
    summed = masking.aggregate(values[None], mask[None], "seq-mean-token-sum")
    np.testing.assert_allclose(summed, 1.25, rtol=1e-6)


def test_norm_divides_by_the_given_length():
    value = masking.aggregate(VALUES, MASK, "seq-mean-token-sum-norm", max_length=14)
    np.testing.assert_allclose(value, 0.5)


@pytest.mark.parametrize("mode", MODES)
def test_modes_agree_with_the_released_code(mode, released, close):
    data = released("prim_masked")
    expected = data["agg_" + mode.replace("-", "_")]
    close(masking.aggregate(data["x"], data["mask"], mode), expected)
    close(masking.token_mean(data["x"], data["mask"]), data["masked_mean"])


@pytest.mark.parametrize("mode", MODES)
def test_parts_add_up_to_the_whole(mode):
    rng = np.random.default_rng(1)
    values = rng.normal(size=(7, 4)).astype(np.float32)
    mask = (rng.random((7, 4)) < 0.6).astype(np.float32)
    mask[2] = 0
    count = masking.count_of(mask, mode)
    parts = [slice(0, 1), slice(1, 2), slice(2, 3), slice(3, 7)]  # one is empty
    total = sum(masking.aggregate(values[p], mask[p], mode, count) for p in parts)
    np.testing.assert_allclose(
        total, masking.aggregate(values, mask, mode), rtol=1e-5, atol=1e-7
    )
    counts = sum(masking.count_of(mask[p], mode) for p in parts)
    if mode != "seq-mean-token-sum-norm":
        assert counts == count


@pytest.mark.parametrize("bad", [np.nan, -np.inf, np.inf])
@pytest.mark.parametrize("mode", MODES)
def test_what_stands_outside_the_mask_is_not_seen(mode, bad):
    values = np.where(MASK > 0, VALUES, bad)
    value, gradient = jax.value_and_grad(masking.aggregate)(values, MASK, mode)
    np.testing.assert_array_equal(value, masking.aggregate(VALUES, MASK, mode))
    assert np.isfinite(gradient).all() and not gradient[MASK == 0].any()


@pytest.mark.parametrize("mode", MODES)
def test_an_empty_mask_gives_zero(mode):
    value, gradient = jax.value_and_grad(masking.aggregate)(VALUES, 0 * MASK, mode)
    assert value == 0 and not gradient.any()
    assert masking.token_mean(VALUES, 0 * MASK) == 0


@pytest.mark.parametrize("mode", MODES)
def test_bfloat16_is_summed_in_float32(mode):
    values, mask = jnp.full((40, 100), 1.0, jnp.bfloat16), jnp.ones((40, 100), bool)
    value = masking.aggregate(values, mask.astype(jnp.bfloat16), mode)
    assert value.dtype == jnp.float32
    assert value == masking.aggregate(values.astype(jnp.float32), mask, mode)


def test_an_unknown_mode_is_refused_with_the_known_ones():
    with pytest.raises(ValueError, match="'mean' is unknown; choose token-mean, seq-"):
        masking.aggregate(VALUES, MASK, "mean")
