"""What an environment is: text in, TimeStep out. Nothing here or below imports jax."""

import dataclasses
import re
import zlib
from collections.abc import Sequence
from typing import Protocol

import numpy as np

from skillsd_jax.trajectory import Task

SPLITS = ("train", "validation", "test", "teacher")


@dataclasses.dataclass(frozen=True)
class TimeStep:
    """What an environment says after reset or step.

    Args:
      observation: what the agent reads next.
      reward: of this step.
      done: the episode is over; no further step may be taken.
      success: the task is solved.
      admissible: commands that would be understood now; empty if not enumerated.
      action: the command read in the last reply, "" if none could be read.
      valid: the last reply could be read and names a command that exists.
      effective: the last command changed the state.
      feedback: the engine's own words on the last command, unabridged.
    """

    observation: str
    reward: float = 0.0
    done: bool = False
    success: bool = False
    admissible: tuple[str, ...] = ()
    action: str = ""
    valid: bool = True
    effective: bool = True
    feedback: str = ""


class Environment(Protocol):
    """One episode at a time. Every class in ENVIRONMENTS keeps this contract.

    The constructor takes `split` (one of SPLITS) and keyword options; it raises
    ImportError naming the pip extra when its engine is missing.
    """

    max_steps: int  # the environment ends the episode itself after that many steps
    data: str  # 'generated' or 'original': said in every result
    families: Sequence[str]  # kinds that its tasks may be of

    def reset(self, seed: int) -> TimeStep:
        """Starts episode `seed`, an index into the split: any int ≥ 0."""
        ...

    def task(self) -> Task:
        """The task of the current episode."""
        ...

    def step(self, text: str) -> TimeStep:
        """Takes the agent's whole raw reply, any text at all; parses it itself."""
        ...

    def close(self) -> None:
        """Frees the engine; may be called twice."""
        ...

    def demonstrate(
        self, rng: np.random.Generator, workflow: Sequence[str] = (), noise: float = 0.0
    ) -> str:
        """The reply of a scripted player in the current state.

        Without a workflow it plays honestly: it knows the rules, not the hidden
        state. With one (the golden workflow of a skill) it follows the hint.

        Args:
          rng: source of every choice.
          workflow: commands of a skill, in order.
          noise: probability of a random command instead.
        """
        ...

    def expert_workflow(self) -> list[str]:
        """The workflow that solves the episode from its start, off the hidden state.

        `demonstrate` wins by it. Only for demonstrations and for the skills of the
        teacher's own panel.
        """
        ...

    @classmethod
    def lexicon(cls, **options) -> Sequence[str]:
        """Phrases the embedded tokenizer keeps whole, such as 'cabinet 3'."""
        ...


_SHARES = {"train": range(6), "validation": (6, 7), "test": (8,), "teacher": (9,)}


def split_index(split: str) -> int:
    """Number of a split, for seeding; raises ValueError for an unknown one."""
    if split not in SPLITS:
        raise ValueError(f"split={split!r} is unknown; use one of {', '.join(SPLITS)}")
    return SPLITS.index(split)


def in_split(split: str, level: str) -> bool:
    """Whether a generated level, written out in full, belongs to the split.

    Tenths of all levels by hash: 6 train, 2 validation, 1 test, 1 teacher. So splits
    are disjoint whatever the seeds, and each keeps the generator's distribution.
    """
    return zlib.crc32(level.encode()) % 10 in _SHARES[split]


_ACTION = re.compile(r"<action>(.*?)</action>", re.DOTALL | re.IGNORECASE)
_CJK = re.compile("[\u4e00-\u9fff]")
_TAIL = 30  # characters taken for the action when the released rules find no tag


def parse_action(reply: str, require_think: bool = False) -> tuple[str, bool]:
    """Reads the command in a raw reply.

    Args:
      reply: any text.
      require_think: keep the rules of the released ALFWorld projection: both tags
        must occur, a reasoning block must stand there in lower case, and no CJK
        ideograph may. An unreadable reply then yields its last 30 characters, and an
        empty or inverted tag a valid empty action, as there.

    Returns:
      The command, lower-cased and stripped ("" if there is none), and whether the
      reply could be read. Whether the command exists is for the environment to say.

    Source: the ALFWorld projection of github.com/ZJU-REAL/SDAR at 8b85c23.
    """
    if not require_think:
        match = _ACTION.search(reply)
        action = match[1].strip().lower() if match else ""
        return action, bool(action)
    lowered = reply.lower()
    start, end = lowered.find("<action>"), lowered.find("</action>")
    if start < 0 or end < 0:
        return lowered[-_TAIL:], False
    action = lowered[start + len("<action>") : end].strip()
    thought = "<think>" in reply and "</think>" in reply
    return action, thought and not _CJK.search(reply)
