"""A skill with its history as one line of JSON, as the bank's files hold it."""

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path

from skillsd_jax.skills.skill import Skill, check_split

FIELDS = {field.name: field for field in dataclasses.fields(Skill)}
OPTIONAL = {"policy", "maker"}  # files of earlier runs are without
_ENCODE = json.JSONEncoder(ensure_ascii=False).encode
_TYPES = {"born": int, "policy": int, "reward": float, "golden_workflow": list}
_TYPES |= {"sources": list, "authors": list}


@dataclasses.dataclass(frozen=True)
class Record:
    """What a bank knows of a skill.

    Args:
      skill: the skill.
      sources: ids of every episode that summarised to it, or nearly so.
      authors: those of them that wrote this very text.
      uses: times shown.
      total: reward credited over all uses.
      last_shown: iteration of the latest use; -1 if none is known.
    """

    skill: Skill
    sources: tuple[str, ...]
    authors: tuple[str, ...]
    uses: int = 0
    total: float = 0.0
    last_shown: int = -1


def line(record: Record) -> str:
    """A record for a file; `mean_reward` is there to be read by people."""
    mean = record.total / record.uses if record.uses else 0.0
    # Not asdict: its deep copies take longer than all the rest.
    values = vars(record.skill) | {
        "sources": record.sources,
        "authors": record.authors,
        "uses": record.uses,
        "mean_reward": mean,
        "total_reward": record.total,
        "last_shown": record.last_shown,
    }
    return _ENCODE(values) + "\n"


def read(path: Path | str) -> str:
    """The text of a file; raises ValueError if there is none."""
    try:
        return Path(path).read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as fault:
        raise ValueError(f"no skills can be read from {path}: {fault}") from fault


def parse(path: Path | str) -> Iterator[tuple[str, Record]]:
    """The records of a file, each with where it stands.

    Raises:
      ValueError: there is no such file, or a line is no record or of a task that is not
        for training; it names the line.
    """
    text = read(path)
    # Not splitlines: a text may hold other line ends than that of a file.
    for number, words in enumerate(text.split("\n"), 1):
        if words.strip():
            where = f"{path}, line {number}"
            try:
                values = json.loads(words)
            except (ValueError, RecursionError) as fault:
                raise ValueError(f"{where} is no JSON: {fault}") from fault
            record = _record(values, where)
            try:
                check_split(record.skill)
            except ValueError as fault:
                raise ValueError(f"{where}: {fault}") from fault
            yield where, record


def _record(values, where: str) -> Record:
    values = values if isinstance(values, dict) else {}
    for name in FIELDS:
        if name not in values and name not in OPTIONAL:
            raise ValueError(f"{where} has no {name}; a skill has {', '.join(FIELDS)}")
    told = {name: _typed(values, name, where) for name in FIELDS if name in values}
    skill = Skill(**told | {"golden_workflow": tuple(told["golden_workflow"])})
    if not 0 <= skill.reward <= 1:
        raise ValueError(f"{where}: reward={skill.reward} must be between 0 and 1")
    lists = {"sources": [skill.source], "authors": [skill.source]} | values
    sources, authors = (_typed(lists, name, where) for name in ("sources", "authors"))
    uses = _number(values, "uses", 0, int, where)
    mean = _number(values, "mean_reward", 0.0, float, where)
    total = _number(values, "total_reward", uses * mean, float, where)
    if uses < 0:
        raise ValueError(f"{where}: uses={uses} must be at least 0")
    last = _number(values, "last_shown", -1, int, where)
    return Record(skill, tuple(sources), tuple(authors), uses, total, last)


def _typed(values: dict, name: str, where: str):
    kind = _TYPES.get(name, str)
    if kind in (int, float):
        return _number(values, name, None, kind, where)
    value = values[name]
    texts = value if kind is list else [value]
    if not isinstance(value, kind) or not all(isinstance(t, str) for t in texts):
        wanted = "a list of texts" if kind is list else "a text"
        raise ValueError(f"{where}: {name}={value!r:.60} must be {wanted}")
    return value


def _number(values: dict, name: str, default, kind: type, where: str):
    value = values.get(name, default)
    known = int if kind is int else int | float
    right = isinstance(value, known) and not isinstance(value, bool)
    if not right:
        wanted = "a whole number" if kind is int else "a number"
        raise ValueError(f"{where}: {name}={value!r:.60} must be {wanted}")
    if kind is float and not abs(value) < float("inf"):
        raise ValueError(f"{where}: {name}={value!r:.60} must be finite")
    return kind(value)
