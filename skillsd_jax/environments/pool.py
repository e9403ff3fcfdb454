"""Opens a stage: environments stepped many at once, by the settings.

inline      one after another in this process; a call has no time limit
threads     in threads of this process; one that hangs is left behind and replaced
processes   in worker processes that are killed and started anew when they hang or die

The answers are the same. An engine of pure Python gains from processes alone.
"""

import dataclasses
from collections.abc import Callable, Sequence

from skillsd_jax import config
from skillsd_jax.environments.base import Environment
from skillsd_jax.environments.pool_processes import Processes
from skillsd_jax.environments.pool_threads import Threads
from skillsd_jax.environments.stage import Job, Maker, Outcome, Seat, Stage


def open_stage(make: Maker, count: int, setting: config.Environment) -> Stage:
    """A stage of `count` environments, made as they are first needed.

    Args:
      make: which environment, on which split.
      count: slots: episodes that can be live at once.
      setting: workers, worker_count, timeout_s and max_observation are read.

    Raises:
      ImportError: the engine is missing; names the pip extra.
      RuntimeError: workers cannot be started; names the cause.
    """
    return STAGES[setting.workers](make, count, setting)


def stage_of(
    environments: Sequence[Environment],
    max_observation: int = config.Environment.max_observation,
) -> Stage:
    """An inline stage of environments that are there already.

    They stay their owner's: closing the stage leaves them open. `local` is the first
    of them, so it is not to be used while episodes are live.
    """
    seats = [Seat(None, max_observation, environment=each) for each in environments]
    return Inline(environments[0], seats)


@dataclasses.dataclass(frozen=True)
class Answered:
    """Calls that are done."""

    outcomes: list[Outcome]

    def result(self) -> list[Outcome]:
        return self.outcomes

    def ready(self) -> bool:
        return True


class Inline(Stage):
    """Plays in the call itself; there is no time limit.

    Args:
      local: for panels and demonstrations.
      seats: where episodes are played.
      close: ends what was made for them.
    """

    def __init__(
        self,
        local: Environment,
        seats: Sequence[Seat],
        close: Callable[[], None] = lambda: None,
    ):
        super().__init__(local, len(seats))
        self._seats, self._end_seats = seats, close

    def _start(self, jobs: list[Job]) -> Answered:
        for job in jobs:
            job.settle(self._seats[job.slot].call(job.kind, job.value))
        return Answered([job.future.result() for job in jobs])

    def _end(self) -> None:
        self._end_seats()


def _inline(make: Maker, count: int, setting: config.Environment) -> Inline:
    local = make()
    seats = [Seat(make, setting.max_observation) for _ in range(count)]

    def close() -> None:
        for each in (local, *seats):
            each.close()

    return Inline(local, seats, close)


STAGES: dict[str, Callable[[Maker, int, config.Environment], Stage]] = {
    "inline": _inline,
    "threads": Threads,
    "processes": Processes,
}
