"""Where episodes are played: what all stages share, whatever does the stepping.

pool.py opens one of three: in this process, in threads, in worker processes.
"""

import abc
import collections
import concurrent.futures
import contextlib
import dataclasses
import importlib
import threading
from collections.abc import Callable, Sequence
from typing import Protocol

from skillsd_jax import config
from skillsd_jax.environments import ENVIRONMENTS
from skillsd_jax.environments.base import Environment, TimeStep
from skillsd_jax.environments.bounds import bounded, bounded_task, clean
from skillsd_jax.trajectory import Task

# What an environment may raise without taking the run down with it.
FAULTS = (
    *(RuntimeError, ValueError, LookupError, OSError, TypeError),
    *(AttributeError, AssertionError, ArithmeticError),
)
MAX_MESSAGE = 500  # characters kept of what a fault says


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What became of one reset or step.

    Args:
      step: what the environment says, bounded; None if faulty.
      task: of the episode, after a reset.
      fault: '', 'error' or 'timeout': how the episode ended out of its turn.
      message: what went wrong, bounded.
      bounded: text was cut, or control characters were replaced.
    """

    step: TimeStep | None
    task: Task | None = None
    fault: str = ""
    message: str = ""
    bounded: bool = False


class Pending(Protocol):
    """Calls under way."""

    def result(self) -> list[Outcome]:
        """Waits; the outcomes in the order of the slots. May be called again."""
        ...

    def ready(self) -> bool:
        """Whether `result` need not wait."""
        ...


@dataclasses.dataclass(frozen=True)
class Maker:
    """Makes environments, here or in another process: plain values only.

    Args:
      name: in ENVIRONMENTS, or 'module:Class' of a class that can be imported where
        it is made: environments of tests, or of one's own.
      split: of base.SPLITS.
      options: keyword arguments as pairs; values that JSON can hold.
    """

    name: str
    split: str = "train"
    options: tuple[tuple[str, object], ...] = ()

    @classmethod
    def of(cls, setting: config.Environment, split: str) -> "Maker":
        """The configured environment on a split."""
        options = dataclasses.asdict(getattr(setting, setting.name))
        options["require_think"] = setting.require_think
        return cls(setting.name, split, tuple(options.items()))

    def __call__(self) -> Environment:
        """A new instance.

        Raises:
          ImportError: the engine is missing; names the pip extra.
          ValueError: there is no environment of that name.
        """
        module, _, name = self.name.partition(":")
        if not name and self.name not in ENVIRONMENTS:
            known = ", ".join(ENVIRONMENTS)
            raise ValueError(f"unknown environment {self.name!r}; known: {known}")
        chosen = (
            getattr(importlib.import_module(module), name)
            if name
            else ENVIRONMENTS[self.name]
        )
        return chosen(split=self.split, **dict(self.options))


class Seat:
    """One place: its environment, what it says bounded, what it raises contained.

    The environment is made at the first reset, and made anew at the reset after a
    fault, which may have left it broken.

    Args:
      make: makes the environment; None: the given one stays whatever happens.
      limit: characters of a text.
      faults: what may be raised and ends the episode alone.
      environment: the first instance, if there is one.
    """

    def __init__(
        self,
        make: Callable[[], Environment] | None,
        limit: int,
        faults: tuple[type[BaseException], ...] = FAULTS,
        environment: Environment | None = None,
    ):
        self._make, self._limit, self._faults = make, limit, faults
        self._environment = environment
        self._broken = False

    def call(self, kind: str, value: int | str) -> Outcome:
        """Plays a 'reset' with its seed or a 'step' with its text."""
        try:
            return self._reset(value) if kind == "reset" else self._step(value)
        except self._faults as fault:
            self._broken = True
            return failed("error", repr(fault))

    def close(self) -> None:
        if self._environment is not None:
            with contextlib.suppress(*self._faults):
                self._environment.close()

    def _reset(self, seed: int) -> Outcome:
        if self._broken and self._make is not None:
            self.close()
            self._environment = None
        if self._environment is None:
            self._environment = self._make()
        self._broken = False
        step, cut = bounded(self._environment.reset(seed), self._limit)
        task, cut_task = bounded_task(self._environment.task(), self._limit)
        return Outcome(step, task, bounded=cut or cut_task)

    def _step(self, text: str) -> Outcome:
        if self._environment is None:
            raise RuntimeError("no episode has begun here: call reset")
        step, cut = bounded(self._environment.step(text), self._limit)
        return Outcome(step, bounded=cut)


def failed(fault: str, message: str) -> Outcome:
    """The outcome of a call without one of its own."""
    return Outcome(None, fault=fault, message=clean(message, MAX_MESSAGE))


class Tally:
    """Counts of a stage since it was opened; safe in threads."""

    def __init__(self):
        self._lock = threading.Lock()
        self._counts = collections.Counter()

    def add(self, outcome: Outcome) -> None:
        with self._lock:
            self._counts["errors"] += outcome.fault == "error"
            self._counts["timeouts"] += outcome.fault == "timeout"
            self._counts["bounded"] += outcome.bounded

    def restarted(self) -> None:
        with self._lock:
            self._counts["restarts"] += 1

    def read(self) -> dict[str, int]:
        names = ("errors", "timeouts", "restarts", "bounded")
        with self._lock:
            return {name: self._counts[name] for name in names}


class Job:
    """One call of one slot. Its first outcome counts; a later one is ignored."""

    def __init__(self, slot: int, kind: str, value: int | str, tally: Tally):
        self.slot, self.kind, self.value = slot, kind, value
        self.future: concurrent.futures.Future[Outcome] = concurrent.futures.Future()
        self._tally, self._lock = tally, threading.Lock()

    def settle(self, outcome: Outcome) -> bool:
        """Whether this outcome is the first."""
        with self._lock:
            if self.future.done():
                return False
            self._tally.add(outcome)  # before anybody who waits goes on
            self.future.set_result(outcome)
            return True

    def give_up(self, error: BaseException) -> None:
        """Raises the error where the result is asked for."""
        with self._lock:
            if not self.future.done():
                self.future.set_exception(error)


class Stage(abc.ABC):
    """Places for live episodes, and many of them stepped at once.

    A slot is a place for one live episode, numbered from 0 to count − 1. A slot has
    one call under way at most; after a fault it wants a reset. Closed on leaving a
    `with` block.

    Args:
      local: an instance in this process, for panels and demonstrations.
      count: slots.
    """

    def __init__(self, local: Environment, count: int):
        self.local, self.count = local, count
        self.max_steps, self.data = local.max_steps, local.data
        self._tally = Tally()
        self._closed = False

    def reset(self, slots: Sequence[int], seeds: Sequence[int]) -> Pending:
        """Starts an episode in each of the slots; what was played there is dropped."""
        return self._asked("reset", slots, [int(seed) for seed in seeds])

    def step(self, slots: Sequence[int], texts: Sequence[str]) -> Pending:
        """Takes the agent's whole raw reply in each of the slots."""
        return self._asked("step", slots, list(texts))

    def counts(self) -> dict[str, int]:
        """In total since the stage was opened.

        errors, timeouts: faults; restarts: workers or threads that were replaced;
        bounded: steps whose text was cut or cleaned.
        """
        return self._tally.read()

    def close(self) -> None:
        """Ends everything that was started; may be called twice.

        Calls under way end as errors.
        """
        if not self._closed:
            self._closed = True
            self._end()

    def __enter__(self):
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def _asked(self, kind: str, slots: Sequence[int], values: list) -> Pending:
        if self._closed:
            raise RuntimeError("the stage is closed; open another")
        if len(slots) != len(values) or len(set(slots)) != len(slots):
            raise ValueError(
                f"{len(values)} values for slots {list(slots)}: one value for each "
                "slot, and each slot once"
            )
        if not set(slots) <= set(range(self.count)):
            raise ValueError(f"slots {list(slots)} must be below count={self.count}")
        jobs = [
            Job(int(slot), kind, value, self._tally)
            for slot, value in zip(slots, values, strict=True)
        ]
        return self._start(jobs)

    @abc.abstractmethod
    def _start(self, jobs: list[Job]) -> Pending:
        """Puts the jobs under way."""

    @abc.abstractmethod
    def _end(self) -> None:
        """Ends what this stage has started."""
