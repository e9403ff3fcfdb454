"""What happened in an episode: host values, frozen, without jax."""

import dataclasses
import enum

import numpy as np


class Role(enum.IntEnum):
    """Author of a segment of the model's context."""

    SYSTEM = 0
    TASK = 1
    SKILL = 2
    AGENT = 3
    ENVIRONMENT = 4


@dataclasses.dataclass(frozen=True)
class Task:
    """Names one episode: the same task always starts in the same state."""

    environment: str
    seed: int  # index into the split
    split: str
    family: str  # kind of task; feeds retrieval and per-family figures
    instruction: str = ""  # the task in words, as every context shows it

    @property
    def key(self) -> str:
        """Stable name of the task: what skills and panels are filed under."""
        return f"{self.environment}/{self.split}/{self.seed}"


@dataclasses.dataclass(frozen=True)
class Segment:
    """A run of tokens by one author.

    Args:
      role: who wrote it.
      tokens: int32 [n], the ids the model really saw.
      logprobs: float32 [n] of the sampled ids in nats, at the sampling temperature.
        Only an AGENT segment that is to be scored has them.
    """

    role: Role
    tokens: np.ndarray
    logprobs: np.ndarray | None = None

    @property
    def scored(self) -> bool:
        return self.logprobs is not None


@dataclasses.dataclass(frozen=True)
class Turn:
    """One reply and what the environment made of it."""

    observation: str  # what the agent saw before it replied
    reply: str  # the whole raw reply, decoded
    action: str  # what the environment read in it; "" if unreadable
    valid: bool  # the reply could be read and the action exists
    effective: bool  # the action changed the state
    reward: float
    feedback: str = ""  # the environment's own words after the action
    admissible: tuple[str, ...] = ()  # commands that would have been understood
    stopped: bool = True  # the reply ended by itself, not by its length limit


@dataclasses.dataclass(frozen=True)
class Trajectory:
    """A finished episode.

    Args:
      task: which one was played.
      turns: in order.
      contexts: the segment lists the model really saw: one if history is whole, one
        per turn if it is windowed. The scored AGENT segments of all contexts, in
        order, are the episode's replies, one per turn.
      reward: return of the episode.
      success: whether the task was solved.
      ending: 'success', 'failure', 'limit' (out of turns), 'error' or 'timeout'.
      cut: how many history entries were cut to fit the window.
    """

    task: Task
    turns: tuple[Turn, ...]
    contexts: tuple[tuple[Segment, ...], ...]
    reward: float
    success: bool
    ending: str
    cut: int = 0
