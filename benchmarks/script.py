"""Scripted, ragged episodes that benchmarks/rollout.py has every contender play."""

import dataclasses
import time
from collections.abc import Iterator, Sequence
from typing import Protocol

import numpy as np

GROUP = 4  # episodes that share their first prompt
FIRST, OBSERVATION, REPLY = (60, 180), (10, 60), (8, 64)  # tokens, both included
CHECKED_TURNS, CHECKED_ROWS = 2, 4


@dataclasses.dataclass(frozen=True)
class Script:
    """Args:
    first: ids of each episode's first prompt.
    observations: ids of what follows each reply, by turn and episode.
    limits: [episodes, turns] lengths of the replies; nothing else ends one.
    """

    first: Sequence[np.ndarray]
    observations: Sequence[Sequence[np.ndarray]]
    limits: np.ndarray

    @property
    def rows(self) -> int:
        return len(self.first)

    def cut(self, turns: int) -> "Script":
        """Its first turns."""
        return Script(self.first, self.observations[:turns], self.limits[:, :turns])

    def lengths(self) -> np.ndarray:
        """[episodes, turns] tokens of the context that each turn begins with."""
        first = np.array([len(ids) for ids in self.first])
        seen = np.array([[len(ids) for ids in turn] for turn in self.observations]).T
        grown = np.cumsum(self.limits + seen, axis=1)
        return first[:, None] + np.pad(grown, ((0, 0), (1, 0)))[:, :-1]

    @property
    def longest(self) -> int:
        """Tokens of the longest context with its reply."""
        return int((self.lengths() + self.limits).max())


class Speaker(Protocol):
    """A contender. Rows keep their places from turn to turn."""

    def ready(self, script: Script) -> None:
        """Compiles what the script will need."""

    def forget(self) -> None:
        """Drops what it has read."""

    def say(
        self, contexts: Sequence[np.ndarray], limits: np.ndarray, turn: int
    ) -> list[np.ndarray]:
        """A reply of limits[b] tokens to the whole context of each row b."""

    def difference(self, script: Script) -> float:
        """How far it is, at most, from a network that keeps nothing between tokens."""


def write(rows: int, turns: int, vocab: int) -> Script:
    """The same for every contender; a longer script begins like a shorter one."""

    def words(rng, bounds):
        return rng.integers(0, vocab, rng.integers(*bounds, endpoint=True), np.int32)

    rng = np.random.default_rng(0)
    prompts = [words(rng, FIRST) for _ in range(-(-rows // GROUP))]
    observations, limits = [], []
    for turn in range(turns):
        rng = np.random.default_rng((1, turn))
        observations.append([words(rng, OBSERVATION) for _ in range(rows)])
        limits.append(rng.integers(*REPLY, rows, endpoint=True))
    first = [prompts[row // GROUP] for row in range(rows)]
    return Script(first, observations, np.stack(limits, axis=1))


def spoken(script: Script, speaker: Speaker) -> Iterator[tuple[list, list]]:
    """Contexts and replies of each turn.

    Raises:
      ValueError: a reply has another length than the script asks for.
    """
    contexts = list(script.first)
    for turn, observations in enumerate(script.observations):
        limits = script.limits[:, turn]
        replies = speaker.say(contexts, limits, turn)
        if [len(reply) for reply in replies] != limits.tolist():
            raise ValueError(f"turn {turn}: replies of other lengths than {limits}")
        yield contexts, replies
        contexts = [
            np.concatenate(parts) for parts in zip(contexts, replies, observations)
        ]


def timed(script: Script, speaker: Speaker) -> list[float]:
    """Seconds from the start of the script to the end of each turn."""
    start = time.perf_counter()
    return [time.perf_counter() - start for _ in spoken(script, speaker)]
