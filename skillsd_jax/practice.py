"""The episodes that an iteration learns from: played, drawn again, or recorded."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from skillsd_jax import config as settings
from skillsd_jax import experience, imitate, rollout, showing
from skillsd_jax.environments.stage import Stage
from skillsd_jax.losses.objective import Recipe
from skillsd_jax.skills import bank as skill_bank
from skillsd_jax.skills import summarizer
from skillsd_jax.trajectory import Task, Trajectory

Keys = Callable[[int], jax.Array]
NO_HINT = showing.Hint()


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
      hints: what each kept episode's player was shown.
      dropped: groups that were played and not kept.
      unkept: their episodes and what their players were shown: it earns credit too.
    """

    kept: experience.Experience
    played: Sequence[Trajectory]
    hints: Sequence[showing.Hint]
    dropped: int
    unkept: Sequence[tuple[Trajectory, showing.Hint]] = ()


@dataclasses.dataclass(frozen=True)
class Practice:
    """Where episodes come from.

    Args:
      config: the run's settings.
      recipe: whether the student sees skills, and what it learns from.
      player: who plays.
      stage: where the training split is played.
      keys: sampling key of a draw.
      expert: writes the skills that failed tasks are played again with.
    """

    config: settings.Config
    recipe: Recipe
    player: rollout.Player
    stage: Stage
    keys: Keys
    expert: imitate.Expert

    @property
    def hinted(self) -> bool:
        """Whether some episodes are played and learned with a skill of the bank."""
        return self.recipe.student_skill or self.config.rollout.hinted_groups > 0

    def episodes(self, params: Any, iteration: int, bank: skill_bank.Bank) -> Practiced:
        """A group of episodes for each of `rollout.prompts` tasks.

        With rollout.draws > 1, groups whose rewards are all equal teach nothing: they
        are dropped and others drawn, so often at most (dynamic sampling, DAPO, arXiv
        2503.14476). What is short then stays short.
        """
        setting, size = self.config.rollout, self.config.rollout.group_size
        kept: list[list[Trajectory]] = []
        hints: list[showing.Hint] = []
        played: list[Trajectory] = []
        unkept: list[tuple[Trajectory, showing.Hint]] = []
        for draw in range(setting.draws):
            episodes, shown = self._draw(params, iteration * setting.draws + draw, bank)
            played += episodes
            for first in range(0, len(episodes), size):
                group = episodes[first : first + size]
                useful = setting.draws == 1 or _informative(group)
                if len(kept) < setting.prompts and useful:
                    kept.append(group)
                    hints += shown[first : first + size]
                else:
                    unkept += zip(group, shown[first : first + size])
            if len(kept) == setting.prompts:
                break
        dropped = len(played) // size - len(kept)
        if self.recipe.shown == "rescued":
            kept = self._rescue(params, iteration, kept)
            hints = [NO_HINT] * sum(map(len, kept))
        groups = [index for index, group in enumerate(kept) for _ in group]
        found = experience.Experience([t for g in kept for t in g], groups, iteration)
        return Practiced(found, played, hints, dropped, unkept)

    def _rescue(
        self, params: Any, iteration: int, groups: list[list[Trajectory]]
    ) -> list[list[Trajectory]]:
        """Groups that nobody solved, played again with an expert's skill in the prompt.

        Where all rewards are equal the policy gradient is zero anyway; the solved
        episodes take their place, with a reward of 0 to leave it so.
        """
        failed = [i for i, g in enumerate(groups) if not any(t.success for t in g)]
        seeds = [t.task.seed for i in failed for t in groups[i]]
        if not seeds:
            return groups
        again = rollout.collect(
            self.player,
            params,
            self.stage,
            seeds,
            jax.random.fold_in(self.keys(iteration), 1),
            self.config.rollout.temperature,
            self._expert_text,
        )
        saved = iter(again)
        result = list(groups)
        for i in failed:
            replayed = [next(saved) for _ in groups[i]]
            solved = [t for t in replayed if t.success and experience.hinted(t)]
            result[i] = [dataclasses.replace(t, reward=0.0) for t in solved]
        return result

    def _expert_text(self, task: Task) -> str | None:
        skill = self.expert.skill(task.seed)
        return None if skill is None else summarizer.render(skill)

    def _draw(self, params, draw: int, bank: skill_bank.Bank):
        config = self.config
        drawn = drawn_tasks(
            config.seed, draw, config.rollout.prompts, config.environment.train_tasks
        )
        seeds = np.repeat(drawn, config.rollout.group_size)
        if self.recipe.data == "expert":
            return self._recorded(seeds, draw), [NO_HINT] * len(seeds)
        seed = [config.seed, draw, 3]
        hints = showing.Hints(bank, config.skills, seed, self.player.prompter)
        hint = self._hint(hints, drawn)
        episodes = rollout.collect(
            self.player,
            params,
            self.stage,
            seeds,
            self.keys(draw),
            config.rollout.temperature,
            hint,
        )
        for episode in episodes if hint else ():
            hint(episode.task)  # also of those that another process has played
        return episodes, [hints.given.get(e.task.key, NO_HINT) for e in episodes]

    def _hint(self, hints: showing.Hints, drawn: Sequence[int]):
        """Skills for all groups of a draw, for the first few of them, or for none."""
        if self.recipe.student_skill:
            return hints.text
        chosen = set(drawn[: self.config.rollout.hinted_groups])
        if not chosen:
            return None
        return lambda task: hints.text(task) if task.seed in chosen else None

    def _recorded(self, seeds: Sequence[int], draw: int) -> list[Trajectory]:
        """Episodes of the scripted expert, cut into the contexts a player would see."""
        rng = np.random.default_rng([self.config.seed, draw, 4])
        prompter, environment = self.player.prompter, self.stage.local
        return [
            imitate.recorded(prompter, imitate.play(environment, int(seed), rng))
            for seed in seeds
        ]


def _informative(group: Sequence[Trajectory]) -> bool:
    usable = [t.reward for t in group if t.ending not in experience.FAULTS]
    return len(set(usable)) > 1
