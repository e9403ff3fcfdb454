"""One episode in progress: replies in, turns recorded, faults contained."""

import dataclasses
from collections.abc import Callable

from skillsd_jax.environments import base
from skillsd_jax.environments.stage import Outcome
from skillsd_jax.trajectory import Segment, Task, Trajectory, Turn


@dataclasses.dataclass
class Episode:
    """An episode in progress.

    Args:
      index: its number among the episodes that are asked for.
      slot: its place on the stage and on the device.
      task, step: what is to be done, and what the environment said last.
      max_steps: turns after which the environment ends it.
      hint: skill text in the player's own prompt, if any.
    """

    index: int
    slot: int
    task: Task
    step: base.TimeStep
    max_steps: int
    hint: str | None = None
    turns: list[Turn] = dataclasses.field(default_factory=list)
    contexts: list[list[Segment]] = dataclasses.field(default_factory=list)
    cut: int = 0
    ending: str = ""

    def take(self, reply: str, outcome: Outcome, stopped: bool = True) -> None:
        """Records one turn.

        Args:
          reply: what the agent said.
          outcome: what the environment made of it.
          stopped: the reply came to its end by itself.
        """
        before = self.step
        self.step = _step(outcome, before.observation)
        self.ending = outcome.fault
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
                stopped=stopped,
            )
        )
        if after.done and not self.ending:
            late = len(self.turns) >= self.max_steps
            self.ending = "limit" if late else "failure"
            self.ending = "success" if after.success else self.ending
        if len(self.turns) >= self.max_steps and not self.ending:
            self.ending = "limit"  # a world that forgets to end

    def fail(self, message: str) -> None:
        """Ends the episode for what is no doing of the agent's."""
        self.ending = "error"
        self.step = base.TimeStep(self.step.observation, feedback=message)

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
    slot: int,
    seed: int,
    outcome: Outcome,
    max_steps: int,
    hint: Callable[[Task], str | None] | None = None,
) -> Episode:
    """An episode after its reset; one that broke even there has no turn.

    Args:
      index, slot, max_steps: see Episode.
      seed: index into the environment's split.
      outcome: of the reset.
      hint: skill text by task for the player's own prompt.
    """
    if outcome.fault:
        nobody = Task(environment="", seed=seed, split="", family="")
        return Episode(
            index, slot, nobody, _step(outcome, ""), max_steps, ending=outcome.fault
        )
    text = hint(outcome.task) if hint else None
    return Episode(index, slot, outcome.task, outcome.step, max_steps, text)


def _step(outcome: Outcome, observation: str) -> base.TimeStep:
    if not outcome.fault:
        return outcome.step
    return base.TimeStep(
        observation, valid=False, effective=False, feedback=outcome.message
    )
