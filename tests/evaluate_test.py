"""Panels are named by their content, held out, and counted with their interval."""

import dataclasses
import subprocess
import sys

import jax
import numpy as np
import pytest

from skillsd_jax import evaluate, rollout
from skillsd_jax.environments import base, household, sokoban
from skillsd_jax.trajectory import Task, Trajectory, Turn


def episode(family="pick", success=False, ending="", turns=2, invalid=0):
    return Trajectory(
        task=Task("household", 0, "test", family),
        turns=tuple(
            Turn("at: middle", "", "look", i >= invalid, True, 0.0)
            for i in range(turns)
        ),
        contexts=(),
        reward=float(success),
        success=success,
        ending=ending or ("success" if success else "limit"),
    )


def test_success_is_counted_by_family_with_wilsons_interval():
    episodes = [episode("pick", i < 8) for i in range(10)]
    episodes += [episode("heat", False) for _ in range(10)]
    result = evaluate.tally(episodes)
    assert list(result.families) == ["heat", "pick"]
    pick, heat = result.families["pick"], result.families["heat"]
    # z = 1.96: 8 of 10 → (0.8 + z²/20 ± z √(0.016 + z²/400)) / (1 + z²/10);
    # 0 of 10 → (0, z²/10 / (1 + z²/10)).
    assert (pick["success"], pick["n"]) == (0.8, 10)
    assert (pick["low"], pick["high"]) == pytest.approx((0.4902, 0.9433), abs=1e-4)
    assert (heat["success"], heat["n"]) == (0.0, 10)
    assert (heat["low"], heat["high"]) == pytest.approx((0.0, 0.2775), abs=1e-4)
    assert (result.success, result.n) == (0.4, 20)
    assert (result.low, result.high) == pytest.approx((0.2188, 0.6134), abs=1e-4)
    assert result.record() == {
        "success": 0.4,
        "low": result.low,
        "high": result.high,
        "n": 20,
    }


@pytest.mark.parametrize("fault", ["error", "timeout"])
def test_episodes_that_the_environment_broke_are_left_out(fault):
    sound = [episode(success=True, turns=3), episode(turns=5, invalid=2)]
    broken = [episode("cool", ending=fault, turns=9, invalid=9)] * 3
    assert evaluate.tally([*broken, *sound]) == evaluate.tally(sound)
    assert evaluate.tally(sound).n == 2


def test_turns_and_rewards_are_means():
    result = evaluate.tally(
        [episode(success=True, turns=3), episode(turns=5, invalid=2)]
    )
    assert result.invalid_rate == 2 / 8
    assert result.steps == 4
    assert result.reward == 0.5


def test_a_panel_of_nothing_but_faults_says_nothing():
    result = evaluate.tally([episode(ending="error")])
    assert (result.n, result.low, result.high, result.families) == (0, 0, 1, {})


def panel(split="test", size=4, make=household.Household):
    return evaluate.make_panel(make(split), split, size)


def test_a_panel_is_the_same_in_every_instance_and_after_other_episodes():
    used = household.Household("test")
    used.reset(17)
    used.step("<action>go to fridge 1</action>")
    assert evaluate.make_panel(used, "test", 4) == panel()


def test_a_panel_is_the_same_in_every_process():
    code = (
        "from skillsd_jax import evaluate; from skillsd_jax.environments import *;"
        "print(evaluate.make_panel(Household('test'), 'test', 4).hash)"
    )
    told = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert told.stdout.split() == [panel().hash]


class Redrawn(household.Household):
    """One task of the panel looks different at first."""

    def reset(self, seed):
        step = super().reset(seed)
        return (
            dataclasses.replace(step, observation="at: fridge 1") if seed == 3 else step
        )


class Reworded(household.Household):
    """One task of the panel is put in other words."""

    def task(self):
        task = super().task()
        return (
            dataclasses.replace(task, instruction="tidy up") if task.seed == 3 else task
        )


def test_another_split_size_or_content_is_another_panel():
    panels = [
        panel(),
        panel(size=5),
        panel("validation"),
        panel("teacher"),
        panel(make=Redrawn),
        panel(make=Reworded),
        panel(make=sokoban.Sokoban),
    ]
    assert len({p.hash for p in panels}) == len(panels)
    assert panel(size=3, make=Redrawn) == panel(size=3, make=Reworded) == panel(size=3)
    assert panel().record() == {"split": "test", "size": 4, "hash": panel().hash}


def in_training_share(split, seed):
    level = household.draw_level(split, seed)
    return base.in_split("train", repr(dataclasses.astuple(level)))


def test_no_training_level_is_on_a_panel():
    """By share, not by comparing draws: those coincide too rarely to tell."""
    assert all(in_training_share("train", seed) for seed in range(64))
    for split in ("test", "validation", "teacher"):
        assert not any(in_training_share(split, seed) for seed in range(256))


def test_every_task_of_a_panel_is_played_as_often_as_asked(monkeypatch):
    asked = {}

    def collect(player, params, environments, seeds, key, temperature, hint):
        asked.update(seeds=list(seeds), temperature=temperature, hint=hint)
        return [episode(success=seed == 0) for seed in seeds]

    monkeypatch.setattr(rollout, "collect", collect)
    key = jax.random.key(0)
    result = evaluate.evaluate(None, None, [], panel(size=3), key, 0.4, samples=2)
    assert asked == {"seeds": [0, 0, 1, 1, 2, 2], "temperature": 0.4, "hint": None}
    assert (result.n, result.success) == (6, pytest.approx(1 / 3))
    assert np.isfinite(result.low)
