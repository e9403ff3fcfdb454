"""The episodes of an iteration: kept where they teach something."""

from types import SimpleNamespace

import jax
import numpy as np
import pytest

from skillsd_jax import config as settings
from skillsd_jax import practice, rollout
from skillsd_jax.losses import objective
from skillsd_jax.skills.bank import Bank
from skillsd_jax.trajectory import Role, Segment, Task, Trajectory

GROUP, PROMPTS = 2, 2


def won(seed: int, reward: float, ending: str = "limit", contexts=()) -> Trajectory:
    task = Task("household", seed, "train", "pick", "put some apple in shelf 1")
    return Trajectory(
        task=task,
        turns=(),
        contexts=contexts,
        reward=reward,
        success=bool(reward),
        ending=ending,
    )


@pytest.fixture
def practiced(monkeypatch):
    """Runs one iteration whose groups have the given rewards, in order."""

    def run(groups, draws, ending="limit", name="grpo", contexts=()):
        waiting, asked = list(groups), []

        def collect(player, params, environments, seeds, key, temperature, hint):
            asked.append((list(seeds), key))
            rewards = [waiting.pop(0) for _ in range(len(seeds) // GROUP)]
            flat = [r for group in rewards for r in group]
            shown = contexts if hint is not None else ()
            return [won(int(s), r, ending, shown) for s, r in zip(seeds, flat)]

        monkeypatch.setattr(rollout, "collect", collect)
        config = settings.Config()
        config.rollout.prompts, config.rollout.group_size = PROMPTS, GROUP
        config.rollout.draws = draws
        player = SimpleNamespace(prompter=SimpleNamespace(size=len))
        made = practice.Practice(
            config, objective.recipe(name), player, [], jax.random.key, None
        )
        return made.episodes(None, 3, Bank(2)), asked

    return run


def test_one_draw_keeps_every_group(practiced):
    found, asked = practiced([(0, 0), (0, 1)], draws=1)
    assert len(asked) == 1 and asked[0][1] == jax.random.key(3)
    assert [t.reward for t in found.kept.trajectories] == [0, 0, 0, 1]
    assert found.kept.groups == [0, 0, 1, 1] and found.dropped == 0


def test_groups_of_equal_rewards_are_dropped_and_others_drawn(practiced):
    found, asked = practiced([(0, 0), (0, 1), (1, 0), (1, 1)], draws=3)
    assert [key for _, key in asked] == [jax.random.key(9), jax.random.key(10)]
    assert [t.reward for t in found.kept.trajectories] == [0, 1, 1, 0]
    assert found.kept.groups == [0, 0, 1, 1]
    assert found.dropped == 2 and len(found.played) == 8


def test_groups_that_are_dropped_are_handed_over_with_what_they_were_shown(practiced):
    found, _ = practiced([(0, 0), (0, 1), (1, 0), (1, 1)], draws=3)
    assert [episode.reward for episode, _ in found.unkept] == [0, 0, 1, 1]
    kept = [*found.kept.trajectories, *(episode for episode, _ in found.unkept)]
    assert sorted(map(id, kept)) == sorted(map(id, found.played))


def test_what_is_short_after_the_last_draw_stays_short(practiced):
    found, asked = practiced([(0, 0), (0, 1), (1, 1), (0, 0)], draws=2)
    assert len(asked) == 2 and len(found.kept.trajectories) == 2
    assert found.kept.groups == [0, 0]


def test_an_episode_that_broke_makes_no_difference_within_its_group(practiced):
    broken = [(0, 1), (0, 1), (1, 0), (0, 1)]
    found, _ = practiced(broken, draws=2, ending="error")
    assert not found.kept.trajectories and found.dropped == 4


def test_a_failed_group_is_played_again_and_its_solved_episodes_kept(practiced):
    hinted = ((Segment(Role.SKILL, np.zeros(1, np.int32)),),)
    groups = [(0, 0), (0, 1), (1, 0)]  # the third is the first, with a skill
    found, asked = practiced(groups, draws=1, name="hdpo", contexts=hinted)
    assert asked[1][0] == [asked[0][0][0]] * GROUP
    assert [t.success for t in found.kept.trajectories] == [True, False, True]
    assert [t.reward for t in found.kept.trajectories] == [0, 0, 1]
    assert found.kept.groups == [0, 1, 1]
    assert len(found.played) == 4  # figures are of the plain episodes alone


def test_nothing_is_played_again_where_every_group_was_solved(practiced):
    _, asked = practiced([(1, 0), (0, 1)], draws=1, name="hdpo")
    assert len(asked) == 1
