import numpy as np
import pytest

from skillsd_jax.environments import sokoban_levels as levels
from skillsd_jax.environments.sokoban import Sokoban


def best_workflow(environment, seed):
    """A shortest plan keyed by state, read off the observations."""
    step = environment.reset(seed)
    entries = []
    for action in levels.solve(environment._board, environment._state):
        squares = step.observation.rpartition("player ")[2].partition(" target")[0]
        entries.append(f"{squares.replace(' box', '')} {levels.MOVES[action]}")
        step = environment.step(f"<action>{levels.MOVES[action]}</action>")
    assert step.success
    return tuple(entries)


def win_rate(environment, episodes, noise=0.0, advised=False):
    rng, won = np.random.default_rng(0), 0
    for seed in range(episodes):
        advice = best_workflow(environment, seed) if advised else ()
        step = environment.reset(seed)
        while not step.done:
            step = environment.step(environment.demonstrate(rng, advice, noise))
        won += step.success
    return won / episodes


def test_observation_is_the_grid_and_the_squares_of_what_matters():
    environment = Sokoban("validation", boxes=2)
    for seed in range(5):
        *grid, last = environment.reset(seed).observation.split("\n")
        assert grid == levels.draw(environment._board, environment._state)
        words = last.split()
        assert [words[0], words[2], words[5]] == ["player", "box", "target"]
        found = {
            f"r{r}c{c}": symbol
            for r, row in enumerate(grid)
            for c, symbol in enumerate(row)
        }
        assert found[words[1]] in "PS"
        assert {found[word] for word in words[3:5]} == {"X"}
        assert all(found[word] in "OS" for word in words[6:8])


def test_rewards_sum_to_the_share_of_boxes_on_targets():
    environment, rng = (
        Sokoban(boxes=2, max_steps=60, min_moves=2),
        np.random.default_rng(0),
    )
    shares = set()
    for seed in range(30):
        step, total = environment.reset(seed), 0.0
        while not step.done:
            step = environment.step(environment.demonstrate(rng, noise=0.3))
            total += step.reward
        share = step.observation.count("√") / 2
        assert total == pytest.approx(share)
        assert step.success == (share == 1)
        shares.add(share)
    assert shares == {0, 0.5, 1}


def test_leaving_a_target_takes_the_reward_back():
    environment = Sokoban(boxes=2)
    environment.reset(0)
    floor = frozenset(r * 6 + c for r in range(1, 5) for c in range(1, 5))
    environment._board = levels.Board(6, floor, frozenset({9, 28}))
    environment._state = levels.State(7, frozenset({8, 14}))
    rewards = [environment.step("<action>right</action>").reward for _ in range(2)]
    assert rewards == [0.5, -0.5]


def test_move_into_a_wall_is_valid_and_changes_nothing():
    environment = Sokoban()
    for seed in range(20):
        environment.reset(seed)
        for name in levels.MOVES:
            environment.reset(seed)
            state = environment._state
            step = environment.step(f"<action>{name}</action>")
            assert step.valid
            assert step.effective == (environment._state != state)


def test_player_without_advice_wins_less_than_half_and_with_advice_always():
    environment = Sokoban()
    assert 0.25 < win_rate(environment, 300, noise=0.1) < 0.5
    assert win_rate(environment, 100, advised=True) == 1
    assert win_rate(environment, 200, noise=0.1, advised=True) > 0.95


def test_advice_that_names_another_state_or_no_move_is_ignored():
    environment, other = Sokoban(), Sokoban()
    environment.reset(3)
    other.reset(3)
    advice = (
        "r9c9 r8c8 up",
        "up",
        "",
        f"{environment._key(environment._state)} sideways",
    )
    first, second = np.random.default_rng(1), np.random.default_rng(1)
    for _ in range(5):
        assert environment.demonstrate(first, advice) == other.demonstrate(second)


def test_player_does_not_fail_in_a_position_without_a_solution():
    environment = Sokoban()
    environment.reset(0)
    corner = min(environment._board.floor - environment._board.targets)
    free = environment._board.floor - {corner}
    environment._state = levels.State(max(free), frozenset({corner}))
    environment._board = levels.Board(
        6, environment._board.floor, frozenset({max(free)})
    )
    rng = np.random.default_rng(0)
    replies = {environment.demonstrate(rng) for _ in range(20)}
    assert replies <= {f"<action>{name}</action>" for name in levels.MOVES}


def test_lexicon_spells_the_observation_in_few_tokens():
    phrases = sorted([*Sokoban.lexicon(), "\n"], key=len, reverse=True)
    text, count = Sokoban().reset(0).observation, 0
    while text:
        phrase = next(p for p in phrases if text.startswith(p))
        text, count = text[len(phrase) :], count + 1
    assert count == 6 * 6 + 6 + 6


def test_filters_that_no_episode_could_meet_are_refused():
    with pytest.raises(ValueError, match="min_moves=16 leaves no level"):
        Sokoban(min_moves=16)


def test_step_after_the_end_is_refused():
    environment = Sokoban()
    with pytest.raises(RuntimeError, match="call reset"):
        environment.step("<action>up</action>")
