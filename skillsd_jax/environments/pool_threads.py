"""A stage in threads of this process. Opened by pool.open_stage.

Threads share one interpreter: only an engine that waits or computes outside of Python
gains from them.
"""

import concurrent.futures
import contextlib
import dataclasses
import queue
import threading
import time

from skillsd_jax import config
from skillsd_jax.environments.stage import Job, Maker, Outcome, Seat, Stage, failed

_GRACE_S = 5.0  # for the calls under way when the stage is closed
_GLANCE_S = 0.02  # between looks at a thread that has not taken the next job yet

_CLOSED = failed("error", "the stage was closed")


class Threads(Stage):
    """Plays in `worker_count` threads; slot s belongs to thread s % worker_count.

    A thread cannot be killed. One whose call overruns the time limit is left behind
    as a daemon, with its environment; the slot ends in 'timeout' and gets a new
    environment, and a new thread takes the other slots over. Nothing else is lost.
    """

    def __init__(self, make: Maker, count: int, setting: config.Environment):
        super().__init__(make(), count)
        self._make, self._limit = make, setting.max_observation
        self._timeout_s = setting.timeout_s
        self._seats = [Seat(make, self._limit) for _ in range(count)]
        lanes = min(setting.worker_count, count)
        self._lanes = [_Lane(self._seats, queue.SimpleQueue()) for _ in range(lanes)]
        self._replacing = threading.Lock()

    def wait(self, job: Job) -> Outcome:
        """Its outcome, at most one time limit after its thread began with it."""
        number = job.slot % len(self._lanes)
        while not job.future.done():
            lane = self._lanes[number]
            concurrent.futures.wait([job.future], lane.left_s(self._timeout_s))
            if not job.future.done():
                self._replace_if_overdue(number, lane)
        return job.future.result()

    def settled(self, job: Job) -> bool:
        """Whether its outcome is there; a call that has overrun its limit has one."""
        if not job.future.done():
            number = job.slot % len(self._lanes)
            self._replace_if_overdue(number, self._lanes[number])
        return job.future.done()

    def _start(self, jobs: list[Job]) -> "_Awaited":
        for job in jobs:
            self._lanes[job.slot % len(self._lanes)].jobs.put(job)
        return _Awaited(self, jobs)

    def _replace_if_overdue(self, number: int, lane: "_Lane") -> None:
        with self._replacing:
            if self._closed or self._lanes[number] is not lane:
                return
            slot = lane.leave_if_overdue(self._timeout_s)
            if slot >= 0:
                self._seats[slot] = Seat(self._make, self._limit)
                self._lanes[number] = _Lane(self._seats, lane.jobs)
                self._tally.restarted()

    def _end(self) -> None:
        with self._replacing:
            for lane in self._lanes:
                lane.stop()
        until = time.monotonic() + min(self._timeout_s, _GRACE_S)
        for lane in self._lanes:
            lane.thread.join(max(0.0, until - time.monotonic()))
        stuck = {lane.slot for lane in self._lanes if lane.thread.is_alive()}
        for slot, seat in enumerate(self._seats):
            if slot not in stuck:  # its environment is in the middle of a call
                seat.close()
        self.local.close()


@dataclasses.dataclass(frozen=True)
class _Awaited:
    stage: Threads
    jobs: list[Job]

    def result(self) -> list[Outcome]:
        return [self.stage.wait(job) for job in self.jobs]

    def ready(self) -> bool:
        return all(self.stage.settled(job) for job in self.jobs)


class _Lane:
    """A thread and the jobs that it takes, one after another.

    Args:
      seats: by slot; shared with the stage, which may put a new one there.
      jobs: shared with the lane that takes over, should this one be left.
    """

    def __init__(self, seats: list[Seat], jobs: "queue.SimpleQueue[Job | None]"):
        self.jobs = jobs
        self._seats = seats
        self._lock = threading.Lock()
        self._current: Job | None = None
        self._since = 0.0
        self._left = False
        self.thread = threading.Thread(target=self._run, daemon=True)
        self.thread.start()

    @property
    def slot(self) -> int:
        """Where it is in the middle of a call; −1 if it is not."""
        current = self._current
        return -1 if current is None else current.slot

    def left_s(self, timeout_s: float) -> float:
        """Seconds until the present call overruns the limit."""
        with self._lock:
            if self._current is None:
                return _GLANCE_S
            return max(_GLANCE_S, self._since + timeout_s - time.monotonic())

    def leave_if_overdue(self, timeout_s: float) -> int:
        """The slot that it hangs in, whose job is settled now; −1 if it does not hang.

        It takes no other job then.
        """
        with self._lock:
            job = self._current
            if job is None or time.monotonic() - self._since < timeout_s:
                return -1
            if not job.settle(failed("timeout", f"no answer in {timeout_s} s")):
                return -1  # answered in this very moment
            self._left = True
            return job.slot

    def stop(self) -> None:
        """Ends the thread after its present call; what waits ends as an error."""
        with self._lock:
            self._left = True
            if self._current is not None:
                self._current.settle(_CLOSED)
        with contextlib.suppress(queue.Empty):
            while True:
                self.jobs.get_nowait().settle(_CLOSED)
        self.jobs.put(None)

    def _run(self) -> None:
        while (job := self.jobs.get()) is not None:
            with self._lock:
                if self._left:
                    job.settle(_CLOSED)
                    return
                self._current, self._since = job, time.monotonic()
            seat, first = self._seats[job.slot], True
            try:
                first = job.settle(seat.call(job.kind, job.value))
            except BaseException as error:  # noqa: BLE001  handed on
                job.give_up(error)
            with self._lock:
                self._current = None
                left = self._left
            if left:
                if not first:  # nobody else has this environment any more
                    seat.close()
                return
