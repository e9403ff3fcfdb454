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


@pytest.fixture
def turns():
    """Seven rows, a turn each, of three episodes and a padded one; ragged tokens."""
    rng = np.random.default_rng(6)
    trajectory = np.array([0, 0, 1, 1, 1, 2, -1], np.int32)
    index = np.array([0, 1, 0, 1, 2, 0, -1], np.int32)
    mask = (np.arange(5) < rng.integers(1, 6, 7)[:, None]).astype(np.float32)
    mask[-1] = 0
    order = np.random.default_rng(1).permutation(7)  # rows are dealt in any order
    turn = np.where(mask > 0, index[:, None], -1).astype(np.int32)
    advantage = np.array([1, 1, -1, -1, -1, 0.5, 0], np.float32)[:, None] * mask
    return {
        "gap": rng.normal(size=(7, 5)).astype(np.float32)[order],
        "mask": mask[order],
        "turn": turn[order],
        "index": index[order],
        "trajectory": trajectory[order],
        "spread": np.repeat(trajectory[order][:, None], 5, 1),
        "advantage": advantage[order],
    }


@pytest.mark.parametrize("discount", [1.0, 0.9])
def test_a_belief_moves_as_the_plain_loop_says(turns, discount):
    value = credit.belief_multiplier(
        turns["advantage"],
        turns["gap"],
        turns["mask"],
        (turns["spread"], turns["turn"]),
        np.full((7, 5), 0.4),
        (discount, 0.2),
    )
    for episode in range(3):
        rows = np.flatnonzero(turns["trajectory"] == episode)
        rows = rows[np.argsort(turns["index"][rows])]
        c, believed = 0.0, [0.4]
        for b in rows:
            c = discount * c + np.sum(turns["gap"][b] * turns["mask"][b])
            believed.append(1 / (1 + np.exp(-(np.log(0.4 / 0.6) + c))))
        step = np.diff(believed)
        z = (step - step.mean()) / (step.std() + 1e-6)
        for b, score in zip(rows, z):
            own = turns["mask"][b] > 0
            wanted = np.clip(1 + 0.2 * np.sign(turns["advantage"][b]) * score, 0.8, 1.2)
            np.testing.assert_allclose(value[b][own], wanted[own], atol=1e-5)


def test_a_certain_prior_is_held_off_its_ends():
    # B_0 = 1 is taken as 1 − 1e-4: a gap of −9.2102404 = −logit moves it to about ½.
    gap = np.array([[-9.2102404], [0.0]])
    order = np.zeros((2, 1), int), np.array([[0], [1]])
    ones = np.ones((2, 1))
    value = credit.belief_multiplier(ones, gap, ones, order, ones, (1.0, 5.0))
    # ΔB = −½ and 0: standardised −1 and 1, times b = 5.
    np.testing.assert_allclose(value, [[-4.0], [6.0]], rtol=1e-3)


# One token a turn, nothing masked. The steps are of the size of 1e-6, the guard of the
# deviation and the distance of a belief from 0 and 1.
@pytest.mark.parametrize(
    "prior, gaps",
    [
        (1e-4, [0.02, -0.02, 0.0]),  # deviation ~ 1e-6
        (1.0, [6.0, -2.5, 1.0, -1.0]),  # logit 9.2 + 6: beyond 1 − 1e-6
        (0.0, [-6.0, 2.5, -1.0, 1.0]),  # beyond 1e-6
        (0.3, [1.0, -0.5, 0.2]),
    ],
)
def test_a_belief_is_standardised_and_held_off_its_ends(prior, gaps):
    gap = np.array(gaps)[:, None]
    order, ones = (np.zeros_like(gap, int), np.arange(len(gap))[:, None]), gap * 0 + 1
    value = credit.belief_multiplier(ones, gap, ones, order, prior * ones, (1.0, 9.0))
    safe = np.clip(prior, 1e-4, 1 - 1e-4)
    logit = np.log(safe / (1 - safe)) + np.cumsum([0.0, *gaps])
    step = np.diff(np.clip(1 / (1 + np.exp(-logit)), 1e-6, 1 - 1e-6))
    z = (step - step.mean()) / (step.std() + 1e-6)
    np.testing.assert_allclose((value[:, 0] - 1) / 9, np.clip(z, -1, 1), atol=3e-3)


def test_a_turn_is_weighed_by_its_surprise_within_the_group():
    # Turn means 0.1 (two tokens) and −0.2; the mean of |e| counts each turn once.
    gap = np.array([[0.3, -0.1], [-0.2, 9.0]])
    mask = np.array([[1.0, 1], [1, 0]])
    turn = np.array([[0, 0], [1, 2]])
    group = np.zeros((2, 2), int)
    e = np.expm1([0.1, -0.2])
    scale = np.abs(e).mean() + 1e-6
    for clip in (0.2, 3.0):
        value = credit.grsd_multiplier(mask, gap, mask, (turn, group), 0.5, clip)
        wanted = 1 + 0.5 * np.clip(e / scale, -clip, clip)
        np.testing.assert_allclose(value[:, 0], wanted, rtol=1e-5)
    down = credit.grsd_multiplier(-mask, gap, mask, (turn, group), 0.5, 3.0)
    e = np.expm1([-0.1, 0.2])
    np.testing.assert_allclose(
        down[:, 0], 1 + 0.5 * e / (np.abs(e).mean() + 1e-6), rtol=1e-5
    )


def test_surprises_beyond_e_to_the_20_are_equal():
    gap, turn = np.array([[20.5], [25.0]]), np.arange(2)[:, None]
    ones = np.ones((2, 1))
    value = credit.grsd_multiplier(ones, gap, ones, (turn, 0 * turn), 0.5, 3.0)
    np.testing.assert_allclose(value, 1.5, rtol=1e-5)


def test_the_multiplier_has_a_floor():
    gap = np.array([[-3.0], [0.0], [0.0]])
    turn = np.arange(3)[:, None]
    ones = np.ones((3, 1))
    value = credit.grsd_multiplier(ones, gap, ones, (turn, 0 * turn), 0.5, 3.0)
    np.testing.assert_allclose(value[:, 0], [0.1, 1, 1], rtol=1e-5)


def test_steps_are_compared_from_one_screen():
    # Screen 0 was met by turns of return 1, 1 and 0 (one of them two tokens long).
    returns = np.array([[1.0, 1.0], [1.0, 7.0], [0.0, 3.0]])
    mask = np.array([[1.0, 1], [1, 0], [1, 1]])
    turn = np.array([[0, 0], [1, 5], [2, 3]])
    state = np.array([[0, 0], [0, 0], [0, 5]])
    bare = credit.step_advantage(returns, mask, turn, state, False)
    third = 1 / 3
    wanted = [[third, third], [third, 0], [-2 * third, 0]]
    np.testing.assert_allclose(bare, wanted, atol=1e-6)
    # Unbiased std of 1, 1, 0: √⅓.
    divided = credit.step_advantage(returns, mask, turn, state, True)
    np.testing.assert_allclose(divided, np.array(wanted) / third**0.5, atol=1e-5)


def test_two_turns_from_one_screen_are_compared():
    returns, turn = np.array([[1.0], [0.0]]), np.arange(2)[:, None]
    value = credit.step_advantage(returns, np.ones((2, 1)), turn, 0 * turn, True)
    # Unbiased std of 1 and 0: √½.
    np.testing.assert_allclose(value, [[0.5**0.5], [-(0.5**0.5)]], rtol=1e-5)
    # A deviation of √2 · 1e-6 is held off 0 by 1e-6.
    value = credit.step_advantage(2e-6 * returns, np.ones((2, 1)), turn, 0 * turn, True)
    np.testing.assert_allclose(value[0, 0], 1 / (1 + 2**0.5), rtol=1e-3)


def test_a_mean_over_nothing_is_zero():
    values, ids = np.ones((1, 3)), np.array([[0, 0, 1]])
    mean = credit.mean_of(values, np.array([[1.0, 1, 0]]), ids)
    np.testing.assert_array_equal(mean, [[1, 1, 0]])


def test_weights_need_not_be_whole():
    values, ids = np.array([[2.0, 6.0, 5.0]]), np.array([[0, 0, 1]])
    weight = np.array([[0.25, 0.25, 0.5]])
    np.testing.assert_allclose(credit.mean_of(values, weight, ids), [[4, 4, 5]])
    np.testing.assert_allclose(credit.per_turn(weight, ids), [[0.5, 0.5, 1]])


def test_equal_returns_from_one_screen_are_exactly_zero():
    returns = np.full((7, 1), 0.1, np.float32)
    turn = np.arange(7)[:, None]
    value = credit.step_advantage(returns, np.ones((7, 1)), turn, 0 * turn, True)
    assert not value.any()


def test_ids_are_dense_and_equal_where_all_keys_are():
    a, b = np.array([[3, 3, -1], [3, 7, -1]]), np.array([[1, 2, 0], [1, 1, 0]])
    ids = np.asarray(credit.ranks(a, b))
    assert ids[0, 0] == ids[1, 0] and ids[0, 2] == ids[1, 2]
    assert sorted(set(ids.ravel().tolist())) == [0, 1, 2, 3]


def every_credit(turns, turn, gap, advantage, returns):
    """All three, on the same turns."""
    mask, unit = turns["mask"], credit.ranks(turns["spread"], turn)
    order, prior = (turns["spread"], turn), np.full((7, 5), 0.4)
    same = np.zeros((7, 5), int)
    return (
        credit.belief_multiplier(advantage, gap, mask, order, prior, (0.9, 0.2)),
        credit.grsd_multiplier(advantage, gap, mask, (unit, same), 0.5, 3.0),
        credit.step_advantage(returns, mask, unit, same, True),
    )


# Outside the mask a turn is −1, or that of its neighbours: a reply cut by the mask.
@pytest.mark.parametrize("cut", [False, True])
def test_nothing_outside_the_mask_reaches_a_credit(turns, cut):
    turn = np.tile(turns["index"][:, None], 5) if cut else turns["turn"]
    own, gap, advantage = turns["mask"] > 0, turns["gap"], turns["advantage"]
    spoilt = np.where(own, gap, np.nan)
    clean = every_credit(turns, turn, gap, advantage, gap)
    for a, b in zip(clean, every_credit(turns, turn, spoilt, advantage, spoilt)):
        np.testing.assert_array_equal(np.asarray(a)[own], np.asarray(b)[own])


def test_no_gradient_goes_into_a_credit(turns):
    def total(gap, advantage):
        values = every_credit(turns, turns["turn"], gap, advantage, gap)
        return sum(jnp.sum(value * turns["gap"]) for value in values)

    for slope in jax.grad(total, (0, 1))(turns["gap"], turns["advantage"]):
        assert not slope.any()
