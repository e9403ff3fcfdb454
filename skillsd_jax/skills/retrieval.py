"""Which skill of the bank the teacher is shown for an episode."""

import math
from collections.abc import Sequence

import numpy as np

from skillsd_jax import config as settings
from skillsd_jax.skills.bank import Bank, Skill
from skillsd_jax.trajectory import Task


def retrieve(
    bank: Bank,
    task: Task,
    source: str,
    rng: np.random.Generator,
    config: settings.Skills,
) -> Skill | None:
    """A skill for one row, from the task's skills; from its family's if it has none.

    Args:
      bank: where to look.
      task: the row's task.
      source: id of the row's own episode. A skill that only this episode summarised
        to is not shown to it unless `config.allow_own`: it would tell the teacher
        what the row itself did next. One that a sibling wrote as well is the sibling's.
      rng: source of every random choice.
      config: which rule, and its constants.

    Returns:
      None where the bank holds nothing for the row.

    Raises:
      ValueError: an unknown rule.
    """
    if config.retrieval not in RETRIEVAL:
        raise ValueError(
            f"skills.retrieval={config.retrieval!r}; set one of {', '.join(RETRIEVAL)}"
        )
    pool = bank.for_task(task.key) or bank.for_family(task.family)
    allowed = [
        skill
        for skill in pool
        if config.allow_own or any(told != source for told in bank.sources(skill.id))
    ]
    if not allowed:
        return None
    shows = sum(bank.stats(skill.id).uses for skill in pool)
    choose = RETRIEVAL[config.retrieval]
    return choose(bank, allowed, shows, rng, config.exploration)


def _none(bank, allowed, shows, rng, exploration) -> None:
    return None


def _random(bank, allowed: Sequence[Skill], shows, rng, exploration) -> Skill:
    return allowed[int(rng.integers(len(allowed)))]


def _ucb(
    bank: Bank, allowed: Sequence[Skill], shows: int, rng, exploration: float
) -> Skill:
    """Upper confidence bound: argmax of mean_reward + c √(ln N / n).

    n is how often the skill was shown, N how often any of the pool was. An untried
    skill goes first: of several the one from the best episode, then the newest.
    """
    untried = [skill for skill in allowed if not bank.stats(skill.id).uses]
    if untried:
        return max(reversed(untried), key=lambda skill: (skill.reward, skill.born))

    def bound(skill: Skill) -> float:
        stats = bank.stats(skill.id)
        bonus = math.sqrt(math.log(shows) / stats.uses)
        return stats.mean_reward + exploration * bonus

    return max(allowed, key=bound)


RETRIEVAL = {"none": _none, "random": _random, "ucb": _ucb}
