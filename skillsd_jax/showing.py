"""Skills as a prompt can show them: whole, as many as fit, and to whole groups."""

import dataclasses
import zlib
from collections.abc import Sequence

import numpy as np

from skillsd_jax import config as settings
from skillsd_jax import prompts
from skillsd_jax.skills import bank as skill_bank
from skillsd_jax.skills import retrieval, summarizer
from skillsd_jax.skills.skill import Skill
from skillsd_jax.trajectory import Task

SEAM = 4  # tokens that two texts may take more or less when they meet


class Fitting:
    """Which skills a prompt can show whole together; each is measured once.

    The length of several is taken for the sum of theirs, give or take SEAM tokens
    where two meet. Only what that leaves open is measured together.

    Args:
      prompter: measures, and says how much room there is.
    """

    def __init__(self, prompter: prompts.Prompter):
        self._prompter = prompter
        self._frame = prompter.size("") - 1  # of a text, whatever it says
        self._sizes: dict[Skill, int] = {}

    def __call__(self, skills: Sequence[Skill]) -> tuple[Skill, ...]:
        """Those that fit: each in turn, if there is room for it."""
        room = self._prompter.config.max_skill_length
        chosen: list[Skill] = []
        taken, doubt = self._frame, -SEAM  # nothing meets the first
        for skill in skills:
            own = self._size(skill) - self._frame
            if doubt > 0 and _open(taken + own, doubt + SEAM, room):
                taken, doubt = self._measured(*chosen), 0
            with_it, unsure = taken + own, doubt + SEAM
            if _open(with_it, unsure, room):
                with_it, unsure = self._measured(*chosen, skill), 0
            if with_it + unsure <= room:
                chosen.append(skill)
                taken, doubt = with_it, unsure
        return tuple(chosen)

    def _size(self, skill: Skill) -> int:
        if skill not in self._sizes:
            self._sizes[skill] = self._measured(skill)
        return self._sizes[skill]

    def _measured(self, *skills: Skill) -> int:
        return self._prompter.size(summarizer.render(*skills))


def _open(size: int, doubt: int, room: int) -> bool:
    return size - doubt <= room < size + doubt


@dataclasses.dataclass(frozen=True)
class Hint:
    """What a task's players are shown.

    Args:
      skills: in the prompt, whole.
      found: how many the bank had for them; None: nobody looked.
    """

    skills: tuple[Skill, ...] = ()
    found: int | None = None


class Hints:
    """Skills of the bank for each task, chosen once: its whole group sees the same.

    Args:
      bank, config: see retrieval.retrieve.
      seed: of the choices; each task's is its own, in whatever order they are asked for.
      prompter: a skill that it cannot show whole is not shown.

    Attributes:
      given: hint of every task that was asked for, by its key.
    """

    def __init__(
        self,
        bank: skill_bank.Bank,
        config: settings.Skills,
        seed: Sequence[int],
        prompter: prompts.Prompter,
    ):
        self._bank, self._config, self._seed = bank, config, seed
        self._fitting = Fitting(prompter)
        self.given: dict[str, Hint] = {}

    def text(self, task: Task) -> str | None:
        """What the task's players are shown."""
        if task.key not in self.given:
            seed = [*self._seed, zlib.crc32(task.key.encode())]
            rng = np.random.default_rng(seed)
            found = retrieval.retrieve(self._bank, task, "", rng, self._config)
            self.given[task.key] = Hint(self._fitting(found), len(found))
        return text_of(self.given[task.key].skills)


def text_of(skills: Sequence[Skill]) -> str | None:
    """What a prompt shows of them; None: nothing."""
    return summarizer.render(*skills) if skills else None
