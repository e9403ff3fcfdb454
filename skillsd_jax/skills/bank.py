"""The skill bank: what was learned about each task, and how often it was shown."""

import dataclasses
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Protocol

import numpy as np

from skillsd_jax import artifacts
from skillsd_jax.skills import records
from skillsd_jax.skills.columns import Columns, Rows
from skillsd_jax.skills.ownership import Ownership
from skillsd_jax.skills.records import Record
from skillsd_jax.skills.similarity import Likeness
from skillsd_jax.skills.skill import Skill, Stats, check_split

SPARE = 64  # rows that went before the rest is renumbered
# Whom a skill is for → the setting that bounds its shelf.
ROOM = {"task": "capacity", "family": "family_capacity", "global": "global_capacity"}
_NONE = np.zeros(0, np.int64)


class Index(Protocol):
    """What retrieval derives from the texts of a bank, kept between questions."""

    def keep(self, rows: np.ndarray) -> None:
        """Drops all rows but these, which are renumbered in order."""


class _Shelf:
    """Skills that share a capacity."""

    def __init__(self, capacity: int, similarity: float):
        self.capacity = capacity
        self.rows = Rows()
        self.likeness = Likeness() if similarity < 1 else None


class Bank:
    """Skills on a shelf per task, one per family and a global one; starts empty.

    Args:
      capacity: skills per task.
      family_capacity: skills per family that are of no task.
      global_capacity: skills that are of no family.
      similarity: Jaccard index of word trigrams in (0, 1] from which two skills of one
        shelf are taken for the same; 1 merges equal texts alone.

    Attributes:
      columns: numbers of every skill, by row.
      indices: what retrieval keeps about the texts, by name; no part of the state.
    """

    def __init__(
        self,
        capacity: int,
        family_capacity: int = 64,
        global_capacity: int = 64,
        similarity: float = 1.0,
    ):
        self._settings = {
            "capacity": capacity,
            "family_capacity": family_capacity,
            "global_capacity": global_capacity,
        }
        for name, room in self._settings.items():
            if room < 1:
                raise ValueError(f"skills.{name}={room} must be at least 1")
        if not 0 < similarity <= 1:
            raise ValueError(f"skills.similarity={similarity} must be in (0, 1]")
        self._settings["similarity"] = similarity
        self.columns = Columns()
        self.indices: dict[str, Index] = {}
        self._skills: list[Skill | None] = []  # by row; None: it went
        self._sources: list[list[str]] = []  # all episodes that summarised to it
        self._row: dict[str, int] = {}  # by id
        self._shelves: dict[tuple[str, str], _Shelf] = {}  # by task and family
        self._families: dict[str, Rows] = {}  # with the family's tasks
        self._all = Rows()
        self._ownership = Ownership()
        self._became: dict[str, str] = {}  # ids of texts that the last absorb replaced
        self._absorbed = self._merged = self._evicted = 0

    def __len__(self) -> int:
        return len(self._row)

    def __contains__(self, id: str) -> bool:
        return id in self._row

    @property
    def counts(self) -> dict[str, int]:
        """Skills held now; taken in, merged into an equal one and evicted so far."""
        return {
            "held": len(self),
            "absorbed": self._absorbed,
            "merged": self._merged,
            "evicted": self._evicted,
        }

    def absorb(self, skills: Iterable[Skill]) -> None:
        """Takes skills in, in order.

        A skill that its shelf already has, or with `similarity` one that says nearly the
        same, is merged: the text of the better reward stays, of equal ones the older,
        with the sources, uses and rewards of both, and is the own of whoever wrote it. A
        shelf over capacity loses the skill of least value, of equal ones the oldest; that
        may be the new one.

        Raises:
          ValueError: a skill is of a task that is not for training; none is taken in.
        """
        skills = list(skills)
        for skill in skills:
            check_split(skill)
        self._became.clear()
        for skill in skills:
            self._take(Record(skill, (skill.source,), (skill.source,)))
            self._evict(self._shelves[_name(skill)])

    def credit(self, rewards: Iterable[tuple[str, float]], iteration: int = -1) -> None:
        """Counts one use per (skill id, reward in [0, 1] of the row's episode).

        A skill that was evicted since it was shown is passed over; a use of one whose
        text was replaced in the last `absorb` is the replacement's.

        Args:
          rewards: what was shown and what came of it.
          iteration: when it was shown; -1 leaves `last_shown` as it is.
        """
        columns = self.columns
        for id, reward in rewards:
            while id in self._became:
                id = self._became[id]
            row = self._row.get(id)
            if row is not None:
                columns.uses[row] += 1
                columns.total[row] += float(reward)
                columns.last_shown[row] = max(iteration, columns.last_shown[row])

    def for_task(self, key: str) -> tuple[Skill, ...]:
        """The task's skills, oldest first."""
        return self.skills(self.task_rows(key))

    def for_family(self, name: str) -> tuple[Skill, ...]:
        """The skills of a kind and of all its tasks, oldest first."""
        return self.skills(self.family_rows(name))

    def for_all(self) -> tuple[Skill, ...]:
        """The global skills, oldest first."""
        return self.skills(self.global_rows())

    def skills(self, rows: Iterable[int]) -> tuple[Skill, ...]:
        """The skills of these rows, in this order."""
        rows = rows.tolist() if isinstance(rows, np.ndarray) else rows
        return tuple([self._skills[row] for row in rows])

    def task_rows(self, key: str) -> np.ndarray:
        """Rows of the task's skills; this and the next three are views, oldest first."""
        return self._rows((key, "")) if key else _NONE

    def family_rows(self, name: str) -> np.ndarray:
        """Rows of the skills of a kind and of all its tasks."""
        rows = self._families.get(name)
        return _NONE if rows is None else rows.array

    def global_rows(self) -> np.ndarray:
        """Rows of the skills that are for every task."""
        return self._rows(("", ""))

    def all_rows(self) -> np.ndarray:
        """Rows of all skills held."""
        return self._all.array

    def only_rows(self, source: str) -> np.ndarray:
        """Rows of the skills whose text this episode alone wrote, ascending."""
        ids = self._ownership.only(source)
        return np.array(sorted(self._row[id] for id in ids)) if ids else _NONE

    def stats(self, id: str) -> Stats:
        """Raises KeyError for a skill that is not held."""
        row, columns = self._row[id], self.columns
        uses, total = int(columns.uses[row]), float(columns.total[row])
        last = int(columns.last_shown[row])
        return Stats(uses, total / uses if uses else 0.0, last)

    def sources(self, id: str) -> tuple[str, ...]:
        """Ids of every episode that summarised to the skill, or nearly so."""
        return tuple(self._sources[self._row[id]])

    def authors(self, id: str) -> tuple[str, ...]:
        """Those of the sources that wrote the text that is held."""
        return self._ownership.of(id)

    def state(self) -> dict:
        """Everything, as plain values that survive JSON."""
        return {
            **self._settings,
            "absorbed": self._absorbed,
            "merged": self._merged,
            "evicted": self._evicted,
            "entries": [dataclasses.asdict(record) for record in self._records()],
        }

    @classmethod
    def from_state(cls, state: dict) -> "Bank":
        """The bank that `state` is of; what an older run did not write is as new."""
        known = ("capacity", "family_capacity", "global_capacity", "similarity")
        bank = cls(**{name: state[name] for name in known if name in state})
        for entry in state["entries"]:
            steps = tuple(entry["skill"]["golden_workflow"])
            skill = Skill(**entry["skill"] | {"golden_workflow": steps})
            check_split(skill)
            told = {"skill": skill, "sources": tuple(entry["sources"])}
            told["authors"] = tuple(entry.get("authors", [skill.source]))
            bank._add(Record(**entry | told))
        bank._absorbed, bank._merged = state["absorbed"], state["merged"]
        bank._evicted = state["evicted"]
        return bank

    def save(self, path: Path | str) -> None:
        """Writes one JSON line per skill, with its use and mean reward, atomically."""
        text = "".join(map(records.line, self._records()))
        # A lone surrogate, which no encoding can write, becomes a question mark.
        artifacts.write_atomic(path, text.encode("utf-8", "replace"))

    @classmethod
    def load(cls, path: Path | str, capacity: int, **options) -> "Bank":
        """The skills of a file that `save` wrote, with their uses and rewards.

        What is alike is merged, and a shelf over capacity loses what it would have lost.
        Counts begin with the file.

        Args:
          path: of the file.
          capacity: skills per task.
          **options: the bank's other arguments.

        Raises:
          ValueError: there is no such file, or a line is not right; it names the line.
        """
        bank, known = cls(capacity, **options), set()
        for where, record in records.parse(path):
            if record.skill.id in known:
                raise ValueError(f"{where}: {record.skill.id} was there before")
            known.add(record.skill.id)
            bank._take(record)
        for shelf in bank._shelves.values():
            while len(shelf.rows) > shelf.capacity:
                bank._evict(shelf)
        return bank

    def _records(self) -> Iterator[Record]:
        rows, columns = self.all_rows(), self.columns
        uses, total = columns.uses[rows].tolist(), columns.total[rows].tolist()
        last = columns.last_shown[rows].tolist()
        for i, row in enumerate(rows.tolist()):
            skill, sources = self._skills[row], tuple(self._sources[row])
            authors = self.authors(skill.id)
            yield Record(skill, sources, authors, uses[i], total[i], last[i])

    def _take(self, record: Record) -> None:
        """Adds a skill, or merges it into one that says the same."""
        row = self._held(record.skill)
        if row is None:
            self._add(record)
            self._absorbed += 1
        else:
            self._merge(row, record)
            self._merged += 1

    def _rows(self, name: tuple[str, str]) -> np.ndarray:
        shelf = self._shelves.get(name)
        return _NONE if shelf is None else shelf.rows.array

    def _held(self, skill: Skill) -> int | None:
        """Row of the skill of the same shelf that says the same."""
        row, name = self._row.get(skill.id), _name(skill)
        if row is not None:
            if _name(self._skills[row]) != name:
                raise ValueError(
                    f"skill id {skill.id} is held for another task or family; make ids "
                    "with skill_id, given both"
                )
            return row
        shelf = self._shelves.get(name)
        if shelf is None or shelf.likeness is None:
            return None
        alike = shelf.likeness.nearest(skill.text, self._settings["similarity"])
        return None if alike is None else self._row[alike]

    def _add(self, record: Record) -> int:
        skill = record.skill
        row = self.columns.append(
            uses=record.uses,
            total=record.total,
            reward=skill.reward,
            born=skill.born,
            last_shown=record.last_shown,
        )
        self._skills.append(skill)
        self._sources.append(list(record.sources))
        self._row[skill.id] = row
        name = _name(skill)
        if name not in self._shelves:
            room = self._settings[ROOM[skill.scope]]
            self._shelves[name] = _Shelf(room, self._settings["similarity"])
        shelf = self._shelves[name]
        shelf.rows.append(row)
        if shelf.likeness is not None:
            shelf.likeness.add(skill.id, skill.text)
        self._all.append(row)
        if skill.scope != "global":
            self._families.setdefault(skill.family, Rows()).append(row)
        self._ownership.add(skill.id, record.authors)
        return row

    def _merge(self, row: int, new: Record) -> None:
        held, columns = self._skills[row], self.columns
        sources = list(dict.fromkeys([*self._sources[row], *new.sources]))
        replaced = new.skill.id != held.id and new.skill.reward > held.reward
        merged = dataclasses.replace(
            new.skill if replaced else held,
            born=max(held.born, new.skill.born),
            reward=max(held.reward, new.skill.reward),
            policy=max(held.policy, new.skill.policy),
        )
        if replaced:
            # A row of its own: what was derived from the old text goes with the old row.
            self._became.pop(merged.id, None)
            self._became[held.id] = merged.id
            use = columns.uses[row], columns.total[row], columns.last_shown[row]
            self._remove(row)
            row = self._add(Record(merged, tuple(sources), new.authors, *use))
        else:
            self._sources[row] = sources
            if new.skill.id == held.id:
                self._ownership.add(held.id, new.authors)
        self._skills[row] = merged
        columns.born[row], columns.reward[row] = merged.born, merged.reward
        columns.uses[row] += new.uses
        columns.total[row] += new.total
        columns.last_shown[row] = max(columns.last_shown[row], new.last_shown)

    def _evict(self, shelf: _Shelf) -> None:
        """Drops the least value of a shelf over capacity."""
        if len(shelf.rows) <= shelf.capacity:
            return
        rows = shelf.rows.array
        self._remove(int(rows[np.argmin(self.columns.value(rows))]))
        self._evicted += 1

    def _remove(self, row: int) -> None:
        skill = self._skills[row]
        shelf = self._shelves[_name(skill)]
        shelf.rows.remove(row)
        if shelf.likeness is not None:
            shelf.likeness.remove(skill.id)
        self._all.remove(row)
        if skill.scope != "global":
            self._families[skill.family].remove(row)
        self._ownership.remove(skill.id)
        del self._row[skill.id]
        self._skills[row] = None
        self.columns.alive[row] = False
        if len(self.columns) > 2 * len(self) + SPARE:
            self._compact()

    def _compact(self) -> None:
        """Forgets the rows that went: the cost is that of what went since."""
        kept = self.all_rows().copy()
        new = np.full(len(self.columns), -1)
        new[kept] = np.arange(len(kept))
        shelves = [shelf.rows for shelf in self._shelves.values()]
        for rows in (*shelves, *self._families.values(), self._all):
            rows.renumber(new)
        self.columns.keep(kept)
        for index in self.indices.values():
            index.keep(kept)
        self._skills = [self._skills[row] for row in kept.tolist()]
        self._sources = [self._sources[row] for row in kept.tolist()]
        self._row = {skill.id: row for row, skill in enumerate(self._skills)}


def _name(skill: Skill) -> tuple[str, str]:
    """Of its shelf; a task's skills stand together whatever family they name."""
    return (skill.task, "") if skill.task else ("", skill.family)
