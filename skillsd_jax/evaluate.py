"""Fixed panels of held-out tasks, no learning: success with its interval."""

import collections
import dataclasses
from collections.abc import Callable, Sequence

import jax
import numpy as np

from skillsd_jax import artifacts, metrics, rollout
from skillsd_jax.environments import base
from skillsd_jax.environments.stage import Stage
from skillsd_jax.trajectory import Task, Trajectory


@dataclasses.dataclass(frozen=True)
class Panel:
    """Tasks 0 … size−1 of a split, and what their first screens hash to."""

    split: str
    size: int
    hash: str

    def record(self) -> dict:
        return {"split": self.split, "size": self.size, "hash": self.hash}


def make_panel(environment: base.Environment, split: str, size: int) -> Panel:
    """Names a panel by the content of its tasks, not by their numbers.

    Args:
      environment: an instance of the panel's split.
      split: its name.
      size: number of tasks.
    """
    seen = []
    for seed in range(size):
        step = environment.reset(seed)
        task = environment.task()
        seen.append((task.key, task.family, task.instruction, step.observation))
    return Panel(split, size, artifacts.content_hash(seen)[:16])


@dataclasses.dataclass(frozen=True)
class Result:
    """Outcome of a panel; successes as fractions with Wilson's 95 % interval.

    Several samples of a task are counted as independent.
    """

    success: float
    low: float
    high: float
    n: int
    families: dict[str, dict[str, float]]
    invalid_rate: float
    steps: float
    reward: float

    def record(self) -> dict[str, float]:
        """The four figures of summary.json."""
        return {k: getattr(self, k) for k in ("success", "low", "high", "n")}


def tally(trajectories: Sequence[Trajectory]) -> Result:
    """Counts episodes; those that ended in an environment's error are left out."""
    played = [t for t in trajectories if t.ending not in ("error", "timeout")]
    groups = collections.defaultdict(list)
    for trajectory in played:
        groups[trajectory.task.family].append(trajectory.success)
    turns = [turn for trajectory in played for turn in trajectory.turns]
    return Result(
        **_interval([t.success for t in played]),
        families={name: _interval(won) for name, won in sorted(groups.items())},
        invalid_rate=_mean([not turn.valid for turn in turns]),
        steps=_mean([len(t.turns) for t in played]),
        reward=_mean([t.reward for t in played]),
    )


def evaluate(
    player: rollout.Player,
    params,
    stage: Stage,
    panel: Panel,
    key: jax.Array,
    temperature: float,
    samples: int = 1,
    hint: Callable[[Task], str | None] | None = None,
) -> Result:
    """Plays a panel; prompts are plain unless `hint` writes a skill into them.

    Args:
      player, params: who plays.
      stage: where the panel's split is played.
      panel: what is played.
      key: of all sampling; the same key gives the same figures.
      temperature: 0 is greedy.
      samples: episodes per task.
      hint: skill text by task; only figures that say so use it.
    """
    seeds = np.repeat(np.arange(panel.size), samples)
    return tally(rollout.collect(player, params, stage, seeds, key, temperature, hint))


def _interval(won: Sequence[bool]) -> dict[str, float]:
    n, successes = len(won), int(sum(won))
    low, high = metrics.wilson(successes, n)
    return {"success": _mean(won), "low": low, "high": high, "n": n}


def _mean(values: Sequence[float]) -> float:
    return float(np.mean(values)) if len(values) else 0.0
