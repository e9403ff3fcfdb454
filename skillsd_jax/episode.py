"""One episode in progress: replies in, turns recorded, faults contained."""

import dataclasses
from collections.abc import Callable

from skillsd_jax.environments import base
from skillsd_jax.trajectory import Segment, Task, Trajectory, Turn

# What an environment may raise without taking the run down with it.
ENVIRONMENT_FAULTS = (
    *(RuntimeError, ValueError, LookupError, OSError, TypeError),
    *(AttributeError, AssertionError, ArithmeticError),
)


@dataclasses.dataclass
class Episode:
    """An episode in progress."""

    index: int
    environment: base.Environment
    task: Task
    step: base.TimeStep
    hint: str | None = None  # skill text in the player's own prompt, if any
    turns: list[Turn] = dataclasses.field(default_factory=list)
    contexts: list[list[Segment]] = dataclasses.field(default_factory=list)
    cut: int = 0
    ending: str = ""

    def take(self, reply: str) -> None:
        """Plays one reply and records the turn."""
        before = self.step
        try:
            self.step = self.environment.step(reply)
        except ENVIRONMENT_FAULTS as fault:
            self.step = _faulty(fault, before.observation)
            self.ending = "error"
        after = self.step
        self.turns.append(
            Turn(
                observation=before.observation,
                reply=reply,
                action=after.action,
                valid=after.valid,
                effective=after.effective,
                reward=after.reward,
                feedback=after.feedback,
                admissible=before.admissible,
            )
        )
        if after.done and not self.ending:
            late = len(self.turns) >= self.environment.max_steps
            self.ending = "limit" if late else "failure"
            self.ending = "success" if after.success else self.ending

    def finish(self) -> Trajectory:
        return Trajectory(
            task=self.task,
            turns=tuple(self.turns),
            contexts=tuple(tuple(context) for context in self.contexts),
            reward=float(sum(turn.reward for turn in self.turns)),
            success=self.step.success,
            ending=self.ending,
            cut=self.cut,
        )


def begin(
    index: int,
    environment: base.Environment,
    seed: int,
    hint: Callable[[Task], str | None] | None = None,
) -> Episode:
    """Resets the environment; one that breaks even here leaves an episode of no turn.

    Args:
      index: number of the episode in its batch.
      environment: is reset.
      seed: index into its split.
      hint: skill text by task for the player's own prompt.
    """
    try:
        step = environment.reset(seed)
        task = environment.task()
    except ENVIRONMENT_FAULTS as fault:
        nobody = Task(environment="", seed=seed, split="", family="")
        return Episode(index, environment, nobody, _faulty(fault), ending="error")
    return Episode(index, environment, task, step, hint(task) if hint else None)


def _faulty(fault: BaseException, observation: str = "") -> base.TimeStep:
    return base.TimeStep(
        observation, valid=False, effective=False, feedback=repr(fault)
    )
