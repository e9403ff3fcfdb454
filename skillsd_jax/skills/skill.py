"""A skill as a value: what it says, whom it is for and where it comes from."""

import dataclasses
from collections.abc import Sequence

from skillsd_jax import artifacts

TRAINING = "train"  # the split whose tasks may have skills


@dataclasses.dataclass(frozen=True)
class Skill:
    """Summary of one finished episode, or a lesson for a family or for every task.

    Args:
      id: `skill_id` of its scope and the three text fields.
      success_analysis: what came of it.
      mistake_analysis: what was wasted.
      golden_workflow: the steps that were needed, in order.
      task: key of the task it was written for; "" if for more than one.
      family: kind of that task; "" without a task: it is for all.
      source: id of the episode, or the file and name it was read from.
      born: iteration it was written in.
      reward: of the episode, in [0, 1].
      policy: iterations that the policy which played the episode had learned from.
      maker: who wrote it: template, policy, endpoint, library.
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

    @property
    def scope(self) -> str:
        """Whom it is for: 'task', 'family' or 'global'."""
        if self.task:
            return "task"
        return "family" if self.family else "global"

    @property
    def text(self) -> str:
        """All it says, as one string to search and compare."""
        parts = (self.success_analysis, self.mistake_analysis, *self.golden_workflow)
        return "\n".join(parts)


def skill_id(
    task: str, success: str, mistake: str, workflow: Sequence[str], family: str = ""
) -> str:
    """The same in every process and run; a task's does not depend on its family."""
    scope = (task,) if task or not family else (task, family)
    return artifacts.content_hash(*scope, success, mistake, tuple(workflow))


def check_split(skill: Skill) -> None:
    """Raises ValueError for a skill of an evaluation task: it would tell the answer."""
    if skill.task and skill.task.split("/")[1:2] != [TRAINING]:
        raise ValueError(
            f"task={skill.task!r} is not one of environment/{TRAINING}/seed: a skill of "
            "another split must not enter the bank; leave it out"
        )


@dataclasses.dataclass(frozen=True)
class Stats:
    """How a skill fared as privileged context.

    Args:
      uses: n, times shown to the teacher.
      mean_reward: mean reward, in [0, 1], of the episodes it was shown on; 0 if none.
        It scores those episodes, not the effect of the skill.
      last_shown: iteration of the latest use; -1 if none is known.
    """

    uses: int
    mean_reward: float
    last_shown: int = -1
