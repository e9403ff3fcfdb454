"""The episodes that an iteration learns from: played, drawn again, or recorded."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from skillsd_jax import config as settings
from skillsd_jax import experience, imitate, rollout
from skillsd_jax.environments import base
from skillsd_jax.losses.objective import Recipe
from skillsd_jax.skills import bank as skill_bank
from skillsd_jax.trajectory import Trajectory

Keys = Callable[[int], jax.Array]


def drawn_tasks(seed: int, draw: int, count: int, tasks: int) -> list[int]:
    """Tasks of a draw: epochs of a seeded permutation, without state."""
    drawn = []
    for cursor in range(draw * count, (draw + 1) * count):
        epoch, place = divmod(cursor, tasks)
        order = np.random.default_rng([seed, epoch]).permutation(tasks)
        drawn.append(int(order[place]))
    return drawn


@dataclasses.dataclass(frozen=True)
class Practiced:
    """What was played in an iteration.

    Args:
      kept: the episodes to learn from.
      played: all of them.
      hints: the skill that each kept episode's player was shown.
      dropped: groups that were played and not kept.
    """

    kept: experience.Experience
    played: Sequence[Trajectory]
    hints: Sequence[skill_bank.Skill | None]
    dropped: int


@dataclasses.dataclass(frozen=True)
class Practice:
    """Where episodes come from.

    Args:
      config: the run's settings.
      recipe: whether the student sees skills, and what it learns from.
      player: who plays.
      environments: instances of the training split.
      keys: sampling key of a draw.
    """

    config: settings.Config
    recipe: Recipe
    player: rollout.Player
    environments: Sequence[base.Environment]
    keys: Keys

    def episodes(self, params: Any, iteration: int, bank: skill_bank.Bank) -> Practiced:
        """A group of episodes for each of `rollout.prompts` tasks.

        With rollout.draws > 1, groups whose rewards are all equal teach nothing: they
        are dropped and others drawn, so often at most (dynamic sampling, DAPO, arXiv
        2503.14476). What is short then stays short.
        """
        setting = self.config.rollout
        kept: list[Trajectory] = []
        hints: list[skill_bank.Skill | None] = []
        played: list[Trajectory] = []
        size, wanted = setting.group_size, setting.prompts * setting.group_size
        for draw in range(setting.draws):
            episodes, shown = self._draw(params, iteration * setting.draws + draw, bank)
            played += episodes
            for first in range(0, len(episodes), size):
                group = episodes[first : first + size]
                if len(kept) < wanted and (setting.draws == 1 or _informative(group)):
                    kept += group
                    hints += shown[first : first + size]
            if len(kept) == wanted:
                break
        groups = np.repeat(np.arange(len(kept) // size), size).tolist()
        found = experience.Experience(kept, groups, iteration)
        return Practiced(found, played, hints, (len(played) - len(kept)) // size)

    def _draw(self, params, draw: int, bank: skill_bank.Bank):
        config = self.config
        drawn = drawn_tasks(
            config.seed, draw, config.rollout.prompts, config.environment.train_tasks
        )
        seeds = np.repeat(drawn, config.rollout.group_size)
        if self.recipe.data == "expert":
            return self._recorded(seeds, draw), [None] * len(seeds)
        rng = np.random.default_rng([config.seed, draw, 3])
        hints = experience.Hints(bank, config.skills, rng, self.player.prompter)
        episodes = rollout.collect(
            self.player,
            params,
            self.environments,
            seeds,
            self.keys(draw),
            config.rollout.temperature,
            hints.text if self.recipe.student_skill else None,
        )
        return episodes, [hints.shown.get(e.task.key) for e in episodes]

    def _recorded(self, seeds: Sequence[int], draw: int) -> list[Trajectory]:
        """Episodes of the scripted expert, cut into the contexts a player would see."""
        rng = np.random.default_rng([self.config.seed, draw, 4])
        prompter, environment = self.player.prompter, self.environments[0]
        return [
            imitate.recorded(prompter, imitate.play(environment, int(seed), rng))
            for seed in seeds
        ]


def _informative(group: Sequence[Trajectory]) -> bool:
    usable = [t.reward for t in group if t.ending not in experience.FAULTS]
    return len(set(usable)) > 1
