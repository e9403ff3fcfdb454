import jax
import jax.numpy as jnp
import numpy as np
import pytest

from skillsd_jax.losses import masking
from skillsd_jax.losses import policy_gradient as pg

KIND_NAMES = {"k1": "kl", "k2": "mse", "k3_clamped": "low_var_kl", "abs": "abs"}


def ids(names):
    return np.unique(names, return_inverse=True)[1]


def test_advantage_as_derived_by_hand():
    # Group 3: mean 2, unbiased std √((4 + 0 + 4) / 2) = 2. Group 1: mean ½, std √½.
    reward = np.array([0.0, 1, 2, 4, 0], np.float32)
    group = np.array([3, 1, 3, 3, 1])
    with_std = pg.group_advantage(reward, group, normalize_std=True)
    np.testing.assert_allclose(
        with_std, [-1, 0.5**0.5, 0, 1, -(0.5**0.5)], rtol=1e-5, atol=1e-6
    )
    without = pg.group_advantage(reward, group, normalize_std=False)
    np.testing.assert_allclose(without, [-2, 0.5, 0, 2, -0.5], atol=1e-6)


@pytest.mark.parametrize("name", ["default", "nostd", "degenerate"])
def test_advantage_agrees_with_the_released_code(name, released, close):
    data = released(f"grpo_adv_{name}")
    advantage = pg.group_advantage(
        data["scores"], ids(data["uid"]), normalize_std=bool(data["norm_by_std"])
    )
    close(advantage[:, None] * data["response_mask"], data["advantages"])


def test_a_small_deviation_is_held_off_zero():
    # Unbiased std of 0 and 2e-6: √2 · 1e-6.
    advantage = pg.group_advantage(np.array([0, 2e-6]), np.array([0, 0]), True)
    wanted = 1 / (1 + 2**0.5)
    np.testing.assert_allclose(advantage, [-wanted, wanted], rtol=1e-3)


def test_equal_rewards_give_exactly_zero():
    # The float32 mean of seven 0.1 is not 0.1; the difference over 1e-6 is visible.
    reward = np.full(13, 0.1, np.float32)
    group = np.array([0] * 7 + [1] * 6)
    trajectory = np.array([0, 0, 0, 1, 1, 2, 3, 4, 4, 5, 5, 5, 6])
    for episode in (None, trajectory):
        assert not pg.group_advantage(reward, group, True, episode).any()


def test_with_trajectories_every_episode_counts_once():
    # Episodes worth 1 (three rows) and 0 (one row): mean ½, std √½ whatever the rows.
    reward = np.array([1, 0, 1, 1], np.float32)
    episodes = np.array([7, 2, 7, 7])
    once = pg.group_advantage(reward, np.zeros(4, int), True, trajectory=episodes)
    np.testing.assert_allclose(once, (reward - 0.5) / 0.5**0.5, rtol=1e-5)
    rows = pg.group_advantage(reward, np.zeros(4, int), True)
    np.testing.assert_allclose(rows, (reward - 0.75) / 0.5, rtol=1e-5)


def test_an_episode_with_unequal_rows_counts_with_their_mean():
    # Episodes worth (1 + 0.5) / 2 and 0.25: mean ½, std √⅛. A row keeps its own reward.
    reward = np.array([1, 0.5, 0.25], np.float32)
    advantage = pg.group_advantage(
        reward, np.zeros(3, int), True, trajectory=np.array([0, 0, 1])
    )
    np.testing.assert_allclose(advantage, (reward - 0.5) * 8**0.5, rtol=1e-5, atol=1e-6)


def test_a_trajectory_id_shared_by_two_groups_does_not_join_them():
    reward = np.array([1, 0, 5, 3], np.float32)
    group, trajectory = np.array([0, 0, 1, 1]), np.array([0, 1, 0, 1])
    advantage = pg.group_advantage(reward, group, False, trajectory=trajectory)
    np.testing.assert_allclose(advantage, [0.5, -0.5, 1, -1], atol=1e-6)


@pytest.mark.parametrize("single, expected", [("released", 7.5), ("zero", 0.0)])
def test_a_group_of_one(single, expected):
    reward, group = np.array([7.5, 7.5], np.float32), np.zeros(2, int)
    advantage = pg.group_advantage(
        reward, group, True, trajectory=np.array([4, 4]), single=single
    )
    np.testing.assert_allclose(advantage, expected, rtol=1e-5)


def test_padding_counts_nowhere():
    reward = np.array([1, 0, 9, 9], np.float32)
    pad_group = pg.group_advantage(reward, np.array([0, 0, -1, -1]), True)
    pad_trajectory = pg.group_advantage(
        reward, np.zeros(4, int), True, trajectory=np.array([0, 1, -1, -1])
    )
    expected = [0.5**0.5, -(0.5**0.5), 0, 0]
    np.testing.assert_allclose(pad_group, expected, rtol=1e-5)
    np.testing.assert_allclose(pad_trajectory, expected, rtol=1e-5)


def test_an_advantage_is_detached():
    gradient = jax.grad(lambda r: pg.group_advantage(r, jnp.zeros(3, int), True)[0])
    assert not gradient(jnp.array([1.0, 2.0, 4.0])).any()


# r = 2, ½ against [0.8, 1.3], c = 3: the pessimistic of the two, gradient −A r or 0.
@pytest.mark.parametrize(
    "r, advantage, loss, gradient",
    [
        (2.0, 1.0, -1.3, 0.0),
        (0.5, 1.0, -0.5, -0.5),
        (2.0, -1.0, 2.0, 2.0),
        (0.5, -1.0, 0.8, 0.0),
        (4.0, -1.0, 3.0, 0.0),  # held by the dual clip
        (4.0, 1.0, -1.3, 0.0),
        (1.1, 2.0, -2.2, -2.2),
    ],
)
def test_surrogate_as_derived_by_hand(r, advantage, loss, gradient):
    value, slope = jax.value_and_grad(pg.clipped_surrogate)(
        np.log(r) - 1, -1.0, advantage, clip_low=0.2, clip_high=0.3, dual_clip=3.0
    )
    np.testing.assert_allclose(value, loss, rtol=1e-5)
    np.testing.assert_allclose(slope, gradient, rtol=1e-5)


def test_without_dual_clip_a_bad_token_costs_its_full_ratio():
    loss = pg.clipped_surrogate(np.log(4.0), 0.0, -1.0, 0.2, 0.2)
    np.testing.assert_allclose(loss, 4.0, rtol=1e-5)


@pytest.mark.parametrize("name", ["grpo_policy_loss", "grpo_policy_loss_cliphigher"])
@pytest.mark.parametrize("mode", masking.COUNTS)
def test_surrogate_agrees_with_the_released_code(name, mode, released, close):
    data = released(name)
    mask, suffix = data["response_mask"], mode.replace("-", "_")
    low, high = float(data["clip_low"]), float(data["clip_high"])

    def loss(student):
        values = pg.clipped_surrogate(
            student, data["old_log_prob"], data["advantages"], low, high, 3.0
        )
        return masking.aggregate(values, mask, mode)

    value, gradient = jax.value_and_grad(loss)(data["log_prob"])
    close(value, data[f"loss_{suffix}"])
    close(gradient, data[f"grad_{suffix}"])


def test_clip_fractions_agree_with_the_released_code(released, close):
    data = released("grpo_policy_loss")
    views = data["log_prob"], data["old_log_prob"], data["advantages"]
    mask = data["response_mask"]
    close(masking.token_mean(pg.clipped(*views, 0.2, 0.2), mask), data["clipfrac"])
    close(
        masking.token_mean(pg.dual_clipped(*views, 3.0), mask), data["clipfrac_lower"]
    )


def test_the_clip_holds_what_gains_beyond_it():
    ratio = np.log([1.5, 1.5, 1.1, 0.5, 0.5, 0.9])
    advantage = np.array([1.0, -1, 1, -1, 1, -1])
    held = pg.clipped(ratio, np.zeros(6), advantage, 0.2, 0.3)
    np.testing.assert_array_equal(held, [True, False, False, True, False, False])


def test_the_dual_clip_holds_bad_tokens_alone():
    ratio, advantage = np.array([5.0, 5, 5, 2]), np.array([-0.5, 0, 0.5, -0.5])
    held = pg.dual_clipped(np.log(ratio), np.zeros(4), advantage, 3.0)
    np.testing.assert_array_equal(held, [True, False, False, False])


def test_on_policy_the_surrogate_is_the_policy_gradient():
    advantage = np.array([2.0, -3.0], np.float32)
    gradient = jax.grad(
        lambda s: pg.clipped_surrogate(
            s, np.array([-1.0, -2]), advantage, 0.2, 0.2, 3
        ).sum()
    )(np.array([-1.0, -2.0], np.float32))
    np.testing.assert_allclose(gradient, -advantage, rtol=1e-6)


def test_surrogate_moves_the_student_alone():
    args = jnp.array(-1.0), jnp.array(-1.1), jnp.array(0.7)
    _, old, advantage = jax.grad(pg.clipped_surrogate, (0, 1, 2))(*args, 0.2, 0.2)
    assert old == 0 and advantage == 0


@pytest.mark.parametrize("advantage", [1.0, -1.0, 0.0])
@pytest.mark.parametrize("student, old", [(0.0, -200.0), (-200.0, 0.0)])
def test_surrogate_stays_finite_at_extreme_ratios(student, old, advantage):
    for dual_clip in (None, 3.0):
        value, gradient = jax.value_and_grad(pg.clipped_surrogate)(
            student, old, advantage, 0.2, 0.2, dual_clip
        )
        assert np.isfinite(value) and np.isfinite(gradient)


def test_a_ratio_is_held_at_e_to_the_20():
    np.testing.assert_allclose(pg.ratio(19.5, 0.0), np.exp(19.5), rtol=1e-5)
    np.testing.assert_allclose(pg.ratio(25.0, 0.0), np.exp(20.0), rtol=1e-5)


def test_sequence_log_ratio_is_the_mean_over_a_rows_tokens():
    student = np.array([[-1.0, -2.0, np.nan], [-1.0] * 3, [-1.0] * 3], np.float32)
    old = np.array([[-2.0, -2.5, 0.0], [0.0] * 3, [-1.5, 0, 0]], np.float32)
    mask = np.array([[1, 1, 0], [0, 0, 0], [1, 0, 0]], np.float32)
    s = pg.sequence_log_ratio(student, old, mask)
    np.testing.assert_allclose(s, [0.75, 0, 0.5])  # (1 + 0.5) / 2; an empty row
    gradient, still = jax.grad(
        lambda x, y: pg.sequence_log_ratio(x, y, mask).sum(), (0, 1)
    )(student, old)
    np.testing.assert_allclose(gradient, [[0.5, 0.5, 0], [0, 0, 0], [1, 0, 0]])
    assert not still.any()


@pytest.mark.parametrize("kind", KIND_NAMES)
def test_reference_kl_agrees_with_the_released_code(kind, released, close):
    data, name = released("kl_penalty"), KIND_NAMES[kind]
    value, pullback = jax.vjp(
        lambda s: pg.reference_kl(s, data["ref_logprob"], kind), data["logprob"]
    )
    close(value, data[name])
    close(pullback(jnp.ones_like(value))[0], data[f"{name}_grad"])


def test_k3_is_k3_clamped_without_the_clamp():
    student, reference = np.array([-1.0, -4.0]), np.array([-1.5, 0.0])
    k3 = pg.reference_kl(student, reference, "k3")
    # e^-½ + ½ − 1 and e⁴ − 4 − 1; the clamp holds the second at 10.
    np.testing.assert_allclose(k3, [0.10653, 49.59815], rtol=1e-4)
    clamped = pg.reference_kl(student, reference, "k3_clamped")
    np.testing.assert_allclose(clamped, [0.10653, 10], rtol=1e-4)


@pytest.mark.parametrize("student", [-300.0, -3.0, 0.0])
def test_the_clamp_stops_the_gradient_and_keeps_it_finite(student):
    slope = jax.grad(pg.reference_kl)(student, 0.0 if student else -300.0, "k3_clamped")
    assert slope == 0


@pytest.mark.parametrize("kind", pg.KINDS)
def test_reference_kl_is_zero_at_the_reference_which_does_not_move(kind):
    assert pg.reference_kl(-2.0, -2.0, kind) == 0
    assert jax.grad(pg.reference_kl, 1)(-2.0, -1.0, kind) == 0


def test_unknown_names_are_refused_with_the_known_ones():
    with pytest.raises(ValueError, match="kl_kind='kl' is unknown; choose k1, k2, k3,"):
        pg.reference_kl(-1.0, -1.0, "kl")
    with pytest.raises(ValueError, match="single='one' is unknown; choose released, "):
        pg.group_advantage(np.ones(1), np.zeros(1, int), True, single="one")


def test_bfloat16_is_computed_in_float32():
    student = jnp.array([-1.0, -2.0], jnp.bfloat16)
    old = jnp.array([-1.5, -1.0], jnp.bfloat16)
    exact = pg.clipped_surrogate(
        student.astype(jnp.float32), old.astype(jnp.float32), 1.0, 0.9, 0.9
    )
    loss = pg.clipped_surrogate(student, old, 1.0, 0.9, 0.9)
    np.testing.assert_array_equal(loss, exact)
    assert pg.reference_kl(student, old, "k2").dtype == jnp.float32
    assert pg.group_advantage(student, jnp.zeros(2, int), True).dtype == jnp.float32
