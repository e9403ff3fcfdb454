"""A stage in worker processes. Opened by pool.open_stage. POSIX only.

Nothing is forked, and nothing of the caller's __main__ runs again: a worker is a fresh
interpreter that imports the environments and no jax, so scripts without a main guard
and notebooks can have workers.
"""

import concurrent.futures
import contextlib
import dataclasses
import json
import os
import queue
import select
import signal
import socket
import subprocess
import sys
import threading
import time

from skillsd_jax import config
from skillsd_jax.environments import pool_worker
from skillsd_jax.environments.stage import Job, Maker, Outcome, Stage, Tally, failed

_START_S = 120.0  # until a worker has imported its engine
_TRIES = 3  # starts in a row
_GRACE_S = 1.0  # for a worker to close its engines
_LOOK_S = 1.0  # between looks whether a silent worker is still there
_CHUNK = 1 << 16  # bytes read at once
_CLOSED = "the stage was closed"


class Processes(Stage):
    """Plays in `worker_count` processes; slot s belongs to process s % worker_count.

    timeout_s bounds each single reset or step. A worker that overruns it, or dies, is
    killed and started anew. Its live episodes end: the one that hung in 'timeout', the
    others in 'error', at their present or next step; a reset forgets it.
    """

    def __init__(self, make: Maker, count: int, setting: config.Environment):
        super().__init__(make(), count)
        setup = {
            "make": pool_worker.described(make),
            "max_observation": setting.max_observation,
        }
        self._keepers = [
            _Keeper(setup, setting.timeout_s, self._tally)
            for _ in range(min(setting.worker_count, count))
        ]
        try:
            for keeper in self._keepers:
                keeper.start()
            for keeper in self._keepers:
                keeper.ready.result()
        except BaseException:
            self.close()
            raise

    @property
    def pids(self) -> list[int]:
        """Of the workers."""
        return [keeper.pid for keeper in self._keepers]

    def _start(self, jobs: list[Job]) -> "_Awaited":
        by_keeper: list[list[Job]] = [[] for _ in self._keepers]
        for job in jobs:
            by_keeper[job.slot % len(self._keepers)].append(job)
        for keeper, own in zip(self._keepers, by_keeper, strict=True):
            if own:
                keeper.calls.put(own)
        return _Awaited(jobs)

    def _end(self) -> None:
        for keeper in self._keepers:
            keeper.stop()
        for keeper in self._keepers:
            if keeper.is_alive():
                keeper.join()
        self.local.close()


@dataclasses.dataclass(frozen=True)
class _Awaited:
    jobs: list[Job]

    def result(self) -> list[Outcome]:
        return [job.future.result() for job in self.jobs]

    def ready(self) -> bool:
        return all(job.future.done() for job in self.jobs)


class _Keeper(threading.Thread):
    """Keeps one worker going: hands it one call after another, starts it anew.

    Args:
      setup: the worker's first message.
      timeout_s: of one reset or step.
      tally: counts the restarts.
    """

    def __init__(self, setup: dict, timeout_s: float, tally: Tally):
        super().__init__(daemon=True)
        self.ready: concurrent.futures.Future[None] = concurrent.futures.Future()
        self.calls: queue.SimpleQueue[list[Job] | None] = queue.SimpleQueue()
        self._setup, self._timeout_s, self._tally = setup, timeout_s, tally
        self._worker: _Worker | None = None
        self._failure: Exception | None = None  # why there is no worker any more
        self._closing = False
        self._begun: set[int] = set()  # slots that were reset in this worker
        self._lost = "no episode has begun here: call reset"  # said in the others

    @property
    def pid(self) -> int:
        return self._worker.pid if self._worker is not None else -1

    def stop(self) -> None:
        """Ends worker and thread, whatever they are doing."""
        self._closing = True
        self.calls.put(None)
        if self._worker is not None:
            self._worker.hang_up()

    def run(self) -> None:
        self._begin()
        if self._failure is not None:
            self.ready.set_exception(self._failure)
        else:
            self.ready.set_result(None)
        while (jobs := self.calls.get()) is not None:
            self._serve(jobs)
        if self._worker is not None:
            self._worker.end(_GRACE_S)

    def _begin(self) -> None:
        """Starts a worker, or says in `_failure` why none can be started."""
        cause = ""
        for _ in range(_TRIES):
            if self._closing:
                return
            try:
                self._worker = worker = _Worker(self._setup)
            except OSError as fault:
                cause = repr(fault)
                continue
            kind, cause = self._greeting(worker)
            if kind == "ready":
                return
            ended = worker.end(_GRACE_S if kind == "EOFError" else 0)
            if kind == "ImportError":
                self._failure = ImportError(cause)
                return
            cause = ended if kind == "EOFError" else f"{kind}: {cause}"
        self._failure = RuntimeError(
            f"no worker for {self._setup['make']['name']} can be started, {_TRIES} "
            f"tries in a row; the last: {cause}"
        )

    def _greeting(self, worker: "_Worker") -> tuple[str, str]:
        """'ready', or the name of what went wrong; and its message."""
        if self._closing:  # too early for `stop` to have seen this worker
            return "ready", ""
        try:
            kind, message = worker.receive(_START_S)
        except (EOFError, TimeoutError, ValueError) as fault:
            return type(fault).__name__, str(fault)
        return kind, message

    def _serve(self, jobs: list[Job]) -> None:
        """Plays the jobs and settles every one of them."""
        if self._failure is None and not self._closing and not self._worker.alive:
            self._lose([], "error", "")
        asked = []
        for job in jobs:
            if self._closing:
                job.settle(failed("error", _CLOSED))
            elif self._failure is not None:
                job.give_up(self._failure)
            elif job.kind == "step" and job.slot not in self._begun:
                job.settle(failed("error", self._lost))
            else:
                asked.append(job)
        if asked:
            self._play(asked)

    def _play(self, jobs: list[Job]) -> None:
        calls = [[job.slot, job.value] for job in jobs]
        done = 0
        try:
            self._worker.send([jobs[0].kind, calls], self._timeout_s)
            for job in jobs:
                outcome = pool_worker.unpacked(self._worker.receive(self._timeout_s))
                self._begun.add(job.slot)
                job.settle(outcome)
                done += 1
        except TimeoutError:
            cause = f"no answer in {self._timeout_s:g} s"
            self._lose(jobs[done:], "timeout", cause)
        except EOFError:
            self._lose(jobs[done:], "error", "")
        except (ValueError, TypeError) as fault:
            cause = f"no answer of a worker, something else wrote on its line: {fault}"
            self._lose(jobs[done:], "error", cause)

    def _lose(self, jobs: list[Job], fault: str, cause: str) -> None:
        """Replaces the worker. Its episodes end, those of `jobs` at once.

        Args:
          jobs: without an answer; it hung or died in the first of them.
          fault: of that one.
          cause: of it; "" if the worker ended by itself.
        """
        ended = self._worker.end(0 if cause else _GRACE_S)
        cause = _CLOSED if self._closing else cause or f"its worker ended: {ended}"
        if not self._closing:
            self._tally.restarted()
        for job in jobs:
            job.settle(failed(fault, cause))
            if fault == "timeout":
                fault, cause = "error", f"another episode in its worker: {cause}"
        self._lost = cause
        self._begun.clear()
        self._begin()


class _Worker:
    """One worker process, and the line to it."""

    def __init__(self, setup: dict):
        self._line, theirs = socket.socketpair()
        with theirs:
            try:
                self._process = subprocess.Popen(
                    [*_PYTHON, pool_worker.__name__, str(theirs.fileno())],
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.DEVNULL,  # engines print
                    env=_variables(),
                    pass_fds=[theirs.fileno()],
                    start_new_session=True,  # its group ends with it; no SIGINT
                )
            except OSError:
                self._line.close()
                raise
        self._buffer, self._ended = b"", ""
        with contextlib.suppress(EOFError):  # `receive` will say so
            self.send(setup, _START_S)

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def alive(self) -> bool:
        return self._process.poll() is None

    def send(self, message: list | dict, limit_s: float) -> None:
        """Raises EOFError if the worker is gone, TimeoutError if it does not read."""
        self._line.settimeout(limit_s)
        try:
            self._line.sendall(json.dumps(message).encode("ascii") + b"\n")
        except TimeoutError:
            raise
        except OSError as fault:
            raise EOFError(str(fault)) from fault

    def receive(self, limit_s: float) -> list:
        """The next message.

        Raises:
          TimeoutError: there is none within the limit.
          EOFError: the worker is gone.
          ValueError: what came is no message.
        """
        until = time.monotonic() + limit_s
        while b"\n" not in self._buffer:
            self._buffer += self._read(until)
        line, self._buffer = self._buffer.split(b"\n", 1)
        return json.loads(line)

    def _read(self, until: float) -> bytes:
        """What is there, once something is, or b"" after a look at the worker."""
        try:
            left = min(_LOOK_S, max(0.0, until - time.monotonic()))
            poll = select.poll()  # select has no room for descriptors above 1023
            poll.register(self._line, select.POLLIN)
            ready = poll.poll(1000 * left)
            chunk = self._line.recv(_CHUNK) if ready else b""
        except OSError as fault:
            raise EOFError(str(fault)) from fault
        # A program that the engine has started may hold the line open.
        if not chunk and (ready or not self.alive):
            raise EOFError("the line is closed")
        if not chunk and time.monotonic() >= until:
            raise TimeoutError("no message in time")
        return chunk

    def hang_up(self) -> None:
        """Wakes who waits for a message; the worker ends by itself."""
        with contextlib.suppress(OSError):
            self._line.shutdown(socket.SHUT_RDWR)

    def end(self, grace_s: float) -> str:
        """Ends it and all that it has started; says how it ended."""
        if self._ended:
            return self._ended
        self._line.close()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(grace_s)
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self._process.pid, signal.SIGKILL)
        code = self._process.wait()
        self._ended = signal.Signals(-code).name if code < 0 else f"exit status {code}"
        return self._ended


_PYTHON = (sys.executable, "-P", "-m")  # -P: the working folder is not to be imported


def _variables() -> dict[str, str]:
    """The parent's, with its import path; one thread for numpy in each worker."""
    path = os.pathsep.join(os.path.abspath(part) for part in sys.path)
    one = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "1")
    return {**one, **os.environ, "PYTHONPATH": path}
