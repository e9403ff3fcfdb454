"""Where a run stands, kept in a checkpoint, so that the same command goes on from it."""

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Self

from skillsd_jax import agent, checkpoint, cluster, learner, rollout, validation
from skillsd_jax import config as settings
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
      faults: of environments, since the run began.
      skipped: iterations in a row up to now with updates that were not finite.
      lengths: that rows are padded to, see packing.Packer.
    """

    state: learner.LearnerState
    bank: skill_bank.Bank
    pending: list[dict]
    figures: dict[str, Any]
    environment_steps: int
    seconds: dict[str, float]
    faults: dict[str, int]
    skipped: int
    lengths: Sequence[Sequence[int]]


class Savepoints:
    """The savepoints of one run.

    What never changes is not in them: the base beside adapters, an external teacher.
    The start of the run makes it again, and its fingerprint must be the same.

    Args:
      workdir: of the run.
      config: of the run.
      player: tokenizer and network, which must stay the same as well.
      state: of the learner at the start of the run.
      external: the teacher is another model.
      say: told what is going on, a line at a time.
    """

    def __init__(
        self,
        workdir: Path,
        config: settings.Config,
        player: rollout.Player,
        state: learner.LearnerState,
        external: bool,
        say: Callable[[str], None],
    ):
        self._workdir, self._say = workdir, say
        self._fixed = ("frozen", "teacher") if external else ("frozen",)
        held = (getattr(state, name) for name in self._fixed)
        self._origin = agent.origin_of(player.encoder, player.model, *held)
        self._checkpoints = checkpoint.Checkpointer(
            workdir / "checkpoints", config.keep_checkpoints, config.keep_best, say
        )

    def save(self, done: int, standing: Standing, score: float | None) -> None:
        """Begins to save where the run stands after `done` iterations.

        Args:
          done: iterations.
          standing: where they led to; the learner's state may be donated afterwards.
          score: success of the last iteration's evaluation, if it had one.

        Raises:
          checkpoint.Unsaved: this one, or the one before, cannot be written.
        """
        host = {
            "figures": standing.figures,
            "bank": standing.bank.state(),
            "summaries": standing.pending,
            "environment_steps": standing.environment_steps,
            "seconds": standing.seconds,
            "faults": standing.faults,
            "skipped": standing.skipped,
            "lengths": standing.lengths,
            "origin": self._origin,
        }
        self._checkpoints.save(done, self._moving(standing.state), host, score)
        if cluster.first():
            standing.bank.save(self._workdir / "skills.jsonl")

    def restore(self, state: learner.LearnerState) -> tuple[int, Standing] | None:
        """The last savepoint, as (iterations done, standing); None: there is none.

        Args:
          state: at the start of a run.

        Raises:
          validation.Refused: every one is damaged, or none can be read, or it counts on
            other files than this run has.
        """
        try:
            found = self._checkpoints.newest()
            if found is None:
                return None
            done, host = found
            agent.check_origin(host["origin"], self._origin)
            moving = self._checkpoints.restore(done, self._moving(state))
        except (OSError, ValueError) as fault:
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
            faults=host["faults"],
            skipped=host["skipped"],
            lengths=host["lengths"],
        )

    def check(self) -> None:
        """Raises checkpoint.Unsaved where a save has failed by now; waits for nothing."""
        self._checkpoints.check()

    def wait(self) -> None:
        """Returns when the last savepoint is whole on disk, or raises as `check` does."""
        self._checkpoints.wait()

    def close(self) -> None:
        """Waits likewise; may be called twice."""
        self._checkpoints.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_) -> None:
        """Closes. What ended the run is not hidden by what cannot be saved any more."""
        try:
            self.close()
        except checkpoint.Unsaved as fault:
            if kind is None:
                raise
            self._say(str(fault))

    def _moving(self, state: learner.LearnerState) -> learner.LearnerState:
        return dataclasses.replace(state, **dict.fromkeys(self._fixed))


@contextlib.contextmanager
def ending(workdir: Path) -> Iterator[None]:
    """Ends a run in one message where its folder cannot take more.

    Raises:
      validation.Stopped: a savepoint cannot be written, or there is no space left.
    """
    try:
        yield
    except checkpoint.Unsaved as fault:
        raise validation.Stopped(f"stopped: {fault}") from fault
    except OSError as fault:
        if fault.errno not in checkpoint.FULL:
            raise
        raise validation.Stopped(
            f"stopped: no space left for {fault.filename or f'{workdir} or the cache'}; "
            "make room and rerun the same command"
        ) from fault
