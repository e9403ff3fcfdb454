"""What an environment says, fit to be shown: bounded in length, no control characters.

An environment is not trusted: it may return megabytes, or bytes that end a line of a
log. Stages bound every step before anything else sees it.
"""

import dataclasses
import re
from collections.abc import Sequence

from skillsd_jax.environments.base import TimeStep
from skillsd_jax.trajectory import Task

MAX_COMMANDS = 1000  # admissible commands of a step
_LISTS = 10  # they may be so many observations long together
# Category Cc without newline and tab, and surrogates, which no encoding can write.
_WRONG = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff]")


def bounded(step: TimeStep, limit: int) -> tuple[TimeStep, bool]:
    """Cuts the texts of a step and replaces control characters by U+FFFD.

    Args:
      step: as an environment returns it.
      limit: characters that the observation, the feedback, the action and each
        admissible command may have; all commands together ten times as many.

    Returns:
      The very same object and False where nothing is wrong; else a mended copy and
      True.

    Raises:
      TypeError: what should be text is none.
    """
    changes = _cleaned(step, ("observation", "feedback", "action"), limit)
    commands = _commands(step.admissible, limit)
    if commands is not step.admissible:
        changes["admissible"] = commands
    return (dataclasses.replace(step, **changes) if changes else step), bool(changes)


def bounded_task(task: Task, limit: int) -> tuple[Task, bool]:
    """The same for a task, whose instruction is the environment's own words too."""
    names = ("environment", "split", "family", "instruction")
    changes = _cleaned(task, names, limit)
    return (dataclasses.replace(task, **changes) if changes else task), bool(changes)


def clean(text: str, limit: int) -> str:
    """The text itself, or its first `limit` characters without control characters."""
    if len(text) <= limit and not _WRONG.search(text):
        return text
    return _WRONG.sub("\ufffd", text[:limit])


def _cleaned(value, names: Sequence[str], limit: int) -> dict[str, str]:
    """The attributes that have to change, by name."""
    changes = {}
    for name in names:
        text = getattr(value, name)
        kept = clean(text, limit)
        if kept is not text:
            changes[name] = kept
    return changes


def _commands(given: tuple[str, ...], limit: int) -> tuple[str, ...]:
    """The tuple itself, or its first commands, each cleaned."""
    fits = len(given) <= MAX_COMMANDS and max(map(len, given), default=0) <= limit
    fits = fits and sum(map(len, given)) <= _LISTS * limit
    # One search of all is much faster than one of each.
    if fits and not _WRONG.search("\n".join(given)):
        return given
    kept, room = [], _LISTS * limit
    for command in given[:MAX_COMMANDS]:
        command = clean(command, limit)
        room -= len(command)
        if room < 0:
            break
        kept.append(command)
    return tuple(kept)
