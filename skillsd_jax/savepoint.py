"""Where a run stands, kept in a checkpoint, so that the same command goes on from it."""

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from skillsd_jax import agent, checkpoint, learner, validation
from skillsd_jax.skills import bank as skill_bank


@dataclasses.dataclass(frozen=True)
class Standing:
    """All that an iteration changes and the next one counts on.

    Args:
      state: of the learner.
      bank: skills held.
      pending: skills that are asked for, as `Summaries.state` tells them.
      figures: what summary.json has so far.
      environment_steps: since the run began.
      seconds: by phase, since the run began.
    """

    state: learner.LearnerState
    bank: skill_bank.Bank
    pending: list[dict]
    figures: dict[str, Any]
    environment_steps: int
    seconds: dict[str, float]


class Savepoints:
    """The savepoints of one run.

    What never changes is not in them: the base beside adapters, an external teacher.
    The start of the run makes it again, and its fingerprint must be the same.

    Args:
      workdir: of the run.
      keep: how many savepoints stay.
      fixed: names of the fields of the learner's state that never change.
      origin: what the run counts on, as `agent.origin_of` tells it.
      say: told what is going on, a line at a time.
    """

    def __init__(
        self,
        workdir: Path,
        keep: int,
        fixed: Sequence[str],
        origin: dict[str, Any],
        say: Callable[[str], None],
    ):
        self._workdir, self._fixed = workdir, fixed
        self._origin, self._say = origin, say
        self._checkpoints = checkpoint.Checkpointer(workdir / "checkpoints", keep)

    def save(self, done: int, standing: Standing) -> None:
        """Saves where the run stands after `done` iterations, and skills.jsonl."""
        host = {
            "figures": standing.figures,
            "bank": standing.bank.state(),
            "summaries": standing.pending,
            "environment_steps": standing.environment_steps,
            "seconds": standing.seconds,
            "origin": self._origin,
        }
        self._checkpoints.save(done, self._moving(standing.state), host)
        standing.bank.save(self._workdir / "skills.jsonl")

    def restore(self, state: learner.LearnerState) -> tuple[int, Standing] | None:
        """The last savepoint, as (iterations done, standing); None: there is none.

        Args:
          state: at the start of a run.

        Raises:
          validation.Refused: it counts on other files than this run has.
        """
        found = self._checkpoints.restore(self._moving(state))
        if found is None:
            return None
        done, moving, host = found
        try:
            agent.check_origin(host["origin"], self._origin)
        except ValueError as fault:
            raise validation.Refused(f"{self._workdir}: {fault}") from fault
        self._say(f"resumed after iteration {done}")
        fixed = {name: getattr(state, name) for name in self._fixed}
        return done, Standing(
            state=dataclasses.replace(moving, **fixed),
            bank=skill_bank.Bank.from_state(host["bank"]),
            pending=host["summaries"],
            figures=host["figures"],
            environment_steps=host["environment_steps"],
            seconds=host["seconds"],
        )

    def close(self) -> None:
        self._checkpoints.close()

    def _moving(self, state: learner.LearnerState) -> learner.LearnerState:
        return dataclasses.replace(state, **dict.fromkeys(self._fixed))
