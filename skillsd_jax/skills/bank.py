"""The skill bank: what was learned about each task, and how often it was shown."""

import dataclasses
import json
from collections.abc import Iterable, Sequence
from pathlib import Path

from skillsd_jax import artifacts


@dataclasses.dataclass(frozen=True)
class Skill:
    """Summary of one finished episode.

    Args:
      id: `skill_id` of the task and the three text fields.
      success_analysis: what came of it.
      mistake_analysis: what was wasted.
      golden_workflow: the steps that were needed, in order.
      task: key of the task it was written for.
      family: kind of that task.
      source: id of the episode.
      born: iteration it was written in.
      reward: of the episode, in [0, 1].
      policy: iterations that whoever played the episode had learned from.
      maker: who wrote it.
    """

    id: str
    success_analysis: str
    mistake_analysis: str
    golden_workflow: tuple[str, ...]
    task: str
    family: str
    source: str
    born: int
    reward: float
    policy: int = 0
    maker: str = "template"


def skill_id(task: str, success: str, mistake: str, workflow: Sequence[str]) -> str:
    """The same in every process and run."""
    return artifacts.content_hash(task, success, mistake, tuple(workflow))


@dataclasses.dataclass(frozen=True)
class Stats:
    """How a skill fared as privileged context.

    Args:
      uses: n, times shown to the teacher.
      mean_reward: mean reward, in [0, 1], of the episodes it was shown on; 0 if none.
        It scores those episodes, not the effect of the skill.
    """

    uses: int
    mean_reward: float


@dataclasses.dataclass
class _Entry:
    skill: Skill
    sources: list[str]  # every episode that summarised to this skill
    uses: int = 0
    total: float = 0.0  # reward credited over all uses

    @property
    def value(self) -> float:
        """Mean reward, the source episode counted as one use: defined when untried."""
        return (self.skill.reward + self.total) / (1 + self.uses)


class Bank:
    """Skills per task, at most `capacity` each; starts empty."""

    def __init__(self, capacity: int):
        if capacity < 1:
            raise ValueError(f"skills.capacity={capacity} must be at least 1")
        self.capacity = capacity
        self._entries: dict[str, _Entry] = {}
        self._by_task: dict[str, list[str]] = {}
        self._by_family: dict[str, dict[str, None]] = {}
        self._absorbed = self._merged = self._evicted = 0

    def __len__(self) -> int:
        return len(self._entries)

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

        A skill that a task already has is merged: the bank remembers the new source and
        the better reward. A task over capacity loses the skill of least value, of
        equal ones the oldest; that may be the new one.
        """
        for skill in skills:
            entry = self._entries.get(skill.id)
            if entry is None:
                self._add(_Entry(skill, [skill.source]))
                self._absorbed += 1
                self._evict(skill.task)
            else:
                _merge(entry, skill)
                self._merged += 1

    def credit(self, rewards: Iterable[tuple[str, float]]) -> None:
        """Counts one use per (skill id, reward in [0, 1] of the row's episode).

        A skill that was evicted since it was shown is passed over.
        """
        for id, reward in rewards:
            entry = self._entries.get(id)
            if entry is not None:
                entry.uses += 1
                entry.total += float(reward)

    def for_task(self, key: str) -> tuple[Skill, ...]:
        """The task's skills, oldest first."""
        return tuple(self._entries[id].skill for id in self._by_task.get(key, ()))

    def for_family(self, name: str) -> tuple[Skill, ...]:
        """The skills of all tasks of a kind, oldest first."""
        return tuple(self._entries[id].skill for id in self._by_family.get(name, ()))

    def stats(self, id: str) -> Stats:
        """Raises KeyError for a skill that is not held."""
        entry = self._entries[id]
        return Stats(entry.uses, entry.total / entry.uses if entry.uses else 0.0)

    def sources(self, id: str) -> tuple[str, ...]:
        """Ids of every episode that summarised to the skill."""
        return tuple(self._entries[id].sources)

    def state(self) -> dict:
        """Everything, as plain values that survive JSON."""
        return {
            "capacity": self.capacity,
            "absorbed": self._absorbed,
            "merged": self._merged,
            "evicted": self._evicted,
            "entries": [dataclasses.asdict(entry) for entry in self._entries.values()],
        }

    @classmethod
    def from_state(cls, state: dict) -> "Bank":
        bank = cls(state["capacity"])
        for entry in state["entries"]:
            fields = dict(entry["skill"])
            fields["golden_workflow"] = tuple(fields["golden_workflow"])
            skill = Skill(**fields)
            sources = list(entry["sources"])
            bank._add(_Entry(skill, sources, entry["uses"], entry["total"]))
        bank._absorbed = state["absorbed"]
        bank._merged = state["merged"]
        bank._evicted = state["evicted"]
        return bank

    def save(self, path: Path | str) -> None:
        """Writes one JSON line per skill, with its use and mean reward, atomically."""
        lines = []
        for entry in self._entries.values():
            stats = dataclasses.asdict(self.stats(entry.skill.id))
            line = dataclasses.asdict(entry.skill) | {"sources": entry.sources} | stats
            lines.append(json.dumps(line, ensure_ascii=False) + "\n")
        artifacts.write_atomic(path, "".join(lines))

    def _add(self, entry: _Entry) -> None:
        skill = entry.skill
        self._entries[skill.id] = entry
        self._by_task.setdefault(skill.task, []).append(skill.id)
        self._by_family.setdefault(skill.family, {})[skill.id] = None

    def _evict(self, task: str) -> None:
        held = self._by_task[task]
        if len(held) > self.capacity:
            worst = min(held, key=lambda id: self._entries[id].value)
            held.remove(worst)
            entry = self._entries.pop(worst)
            del self._by_family[entry.skill.family][worst]
            self._evicted += 1


def _merge(entry: _Entry, skill: Skill) -> None:
    if skill.source not in entry.sources:
        entry.sources.append(skill.source)
    entry.skill = dataclasses.replace(
        entry.skill,
        born=max(entry.skill.born, skill.born),
        reward=max(entry.skill.reward, skill.reward),
    )
