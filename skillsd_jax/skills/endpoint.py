"""A server with the chat interface of OpenAI as the writer of skills.

The server is untrusted: every request has a deadline, every reply a size, and whatever
it sends is an answer's text or a counted failure. The same request has the same answer:
it is sent once, and with a recording once in all the runs that share it.
"""

import contextlib
import dataclasses
import json
import queue
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import Future, wait
from typing import Self

from skillsd_jax import artifacts
from skillsd_jax.skills import exchange, recording, replies
from skillsd_jax.skills.asking import Endpoint
from skillsd_jax.skills.recording import Exchange, Outcome

BROKEN = "the writer broke off by a mistake of its own, the cause of this"


@dataclasses.dataclass
class _Job:
    """A request to send.

    Args:
      request: its text.
      hash: of all that is sent.
      answer: where it will be.
      askers: how often it has been asked, and is to be counted.
      waiting: how many of them still wait.
      taken: whether a thread has begun with it.
    """

    request: str
    hash: str
    answer: Future[str | None] = dataclasses.field(default_factory=Future)
    askers: int = 1
    waiting: int = 1
    taken: bool = False


class Handle:
    """Requests under way."""

    def __init__(self, jobs: Sequence[_Job], leave: Callable[[Sequence[_Job]], None]):
        self._answers = [job.answer for job in jobs]
        self._jobs, self._leave = jobs, leave

    def ready(self) -> bool:
        """Whether `result` need not wait."""
        return all(answer.done() for answer in self._answers)

    def result(self, timeout_s: float | None = None) -> list[str | None]:
        """The answers in the order asked; None where there is none. Any number of times.

        Args:
          timeout_s: how long to wait; None: until all are there, which takes no longer
            than the attempts and the pauses between them.

        Raises:
          TimeoutError: they are not there yet; ask again.
          OSError: an answer could not be recorded.
          RuntimeError: the writer broke.
        """
        wait(self._answers, timeout_s)
        missing = sum(not answer.done() for answer in self._answers)
        if missing:
            raise TimeoutError(f"{missing} answers are not there yet")
        return [answer.result() for answer in self._answers]

    def cancel(self) -> None:
        """Waits no more. What nobody waits for is not sent, or not tried again."""
        jobs, self._jobs = self._jobs, ()
        self._leave(jobs)


def check(endpoint: Endpoint) -> None:
    """Refuses what a `Writer` could not work with; starts and leaves nothing.

    Raises:
      ValueError: begins with the name of the setting that is wrong.
    """
    if not endpoint.replay:
        endpoint.key()
    for name, fits in {"record": recording.check, "replay": recording.read}.items():
        path = getattr(endpoint, name)
        try:
            _ = path and fits(path)
        except ValueError as fault:
            raise ValueError(f"{name}: {fault}") from fault


class Writer:
    """Asks an endpoint, `concurrency` requests at a time, in threads of its own.

    What was answered once is not asked again, by the recording or in this process; a
    failure is. An answer is recorded before it is handed out, so the recording's order
    is that of the answers. The threads never keep a process from ending. Close a
    writer, or use it in a `with`.
    """

    def __init__(self, endpoint: Endpoint):
        """Raises:
        ValueError: the key cannot be sent, the recording cannot be read, or someone
          else records to it.
        """
        self.endpoint = endpoint
        self._target = exchange.Target.of(
            endpoint.url.rstrip("/") + "/chat/completions"
        )
        self._recording: recording.Recording | None = None
        self._known: dict[str, Outcome] = {}
        if not endpoint.replay:
            endpoint.key()
        if recorded := endpoint.record or endpoint.replay:
            self._known = self._opened(recorded)
        self._jobs: queue.SimpleQueue[_Job | None] = queue.SimpleQueue()
        self._lock = threading.Lock()
        self._under_way: dict[str, _Job] = {}
        self._counts: Counter[str] = Counter()
        self._deadlines: set[exchange.Deadline] = set()
        self._closed = threading.Event()
        self._mistake: BaseException | None = None  # of ours, that ended a thread
        self._threads: list[threading.Thread] = []
        for _ in range(0 if endpoint.replay else endpoint.concurrency):
            self._threads.append(threading.Thread(target=self._work, daemon=True))
            self._threads[-1].start()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_) -> None:
        self.close()

    @property
    def counts(self) -> dict[str, int]:
        """Requests so far: 'asked', and of those that are done 'answered' and each of
        FAILURES that came; further attempts under 'retried'. One that was cancelled
        before it was sent was not asked."""
        with self._lock:
            return dict(self._counts)

    def write(self, requests: Sequence[str]) -> list[str | None]:
        """The answers in order; None where there is none."""
        return self.submit(requests).result()

    def submit(self, requests: Sequence[str]) -> Handle:
        """Begins to ask.

        Raises:
          ValueError: the writer is closed.
          RuntimeError: it broke.
        """
        jobs = [_Job(request, self._hash(request)) for request in requests]
        with self._lock:
            # Under the lock of `close`: what is put here is put before its None.
            if self._mistake is not None:
                raise RuntimeError(BROKEN) from self._mistake
            if self._closed.is_set():
                raise ValueError("the writer is closed; make another one")
            self._counts["asked"] += len(jobs)
            return Handle([self._begun(job) for job in jobs], self._leave)

    def close(self) -> None:
        """Ends what is under way as 'closed', and waits for its threads a moment."""
        self._stop()
        ends = time.monotonic() + 1.0
        for thread in self._threads:
            thread.join(max(0.0, ends - time.monotonic()))
        if self._recording is not None:
            self._recording.close()

    def _opened(self, path: str) -> dict[str, Outcome]:
        """What a file has recorded; it is held if it is to be recorded to."""
        if self.endpoint.record:
            self._recording = recording.Recording(path)
        try:
            return recording.read(path)
        except ValueError:
            if self._recording is not None:
                self._recording.close()
            raise

    def _hash(self, request: str) -> str:
        return artifacts.content_hash(self.endpoint.body(request))

    def _begun(self, job: _Job) -> _Job:
        """Whose the answer will be: known, under way already, or now sent for."""
        if twin := self._under_way.get(job.hash):
            twin.askers += 1
            twin.waiting += 1
            return twin
        known = self._known.get(job.hash)
        if self.endpoint.replay and known is None:
            known = Outcome(None, "not_recorded")
        if known is not None and (self.endpoint.replay or not known.failure):
            self._counts[known.failure or "answered"] += 1
            job.answer.set_result(known.answer)
        else:
            self._under_way[job.hash] = job
            self._jobs.put(job)
        return job

    def _leave(self, jobs: Sequence[_Job]) -> None:
        """One who asked for them waits no more."""
        with self._lock:
            for job in jobs:
                if self._under_way.get(job.hash) is job:
                    job.waiting -= 1
                    job.askers -= not job.taken
                    self._counts["asked"] -= not job.taken

    def _taken(self, job: _Job) -> bool:
        """Whether a job of the queue is to be sent; if nobody waits it is gone."""
        with self._lock:
            job.taken = job.waiting > 0
            if not job.taken:
                del self._under_way[job.hash]
        if not job.taken:
            job.answer.set_result(None)
        return job.taken

    def _stop(self) -> None:
        with self._lock:
            self._closed.set()
            deadlines = list(self._deadlines)
            waiting = []
            with contextlib.suppress(queue.Empty):
                while True:
                    waiting.append(self._jobs.get_nowait())
            for _ in self._threads:
                self._jobs.put(None)
        for deadline in deadlines:
            deadline.end()
        for job in waiting:
            if job is not None:
                self._finish(job, None, "closed")

    def _finish(self, job: _Job, answer: str | None, failure: str) -> None:
        """Records what became of a request, then hands it to all who asked.

        What a closed writer left undone is not recorded: nothing became of it.
        """
        broken = None
        if self._mistake is not None and failure == "closed":
            broken = RuntimeError(BROKEN)
            broken.__cause__ = self._mistake
        if self._recording is not None and failure != "closed":
            done = Exchange(job.hash, job.request, answer, failure)
            try:
                self._recording.append(done)
            except OSError as error:
                broken = error
        with self._lock:
            if not failure and broken is None:
                self._known[job.hash] = Outcome(answer)
            del self._under_way[job.hash]
            self._counts[failure or "answered"] += job.askers
        if broken is None:
            job.answer.set_result(answer)
        else:
            job.answer.set_exception(broken)

    def _work(self) -> None:
        try:
            self._serve()
        finally:
            # A mistake of ours ends the writer and not the wait for an answer.
            self._stop()

    def _serve(self) -> None:
        while (job := self._jobs.get()) is not None:
            if not self._taken(job):
                continue
            answer, failure = None, "closed"
            try:
                answer, failure = self._asked(job), ""
            except exchange.Failed as failed:
                failure = failed.reason
            finally:
                self._mistake = self._mistake or sys.exception()
                self._finish(job, answer, failure)

    def _asked(self, job: _Job) -> str:
        """The answer, after as many attempts as it takes."""
        for attempt in range(self.endpoint.retries + 1):
            if self._closed.is_set():
                raise exchange.Failed("closed")
            try:
                return self._answer(job.request)
            except replies.Again as again:
                if attempt == self.endpoint.retries or self._closed.is_set():
                    raise
                if not job.waiting:
                    raise
                with self._lock:
                    self._counts["retried"] += 1
                pause_s = replies.pause_s(self.endpoint, job.hash, attempt, again)
                self._closed.wait(pause_s)
                if not job.waiting:
                    raise
        raise exchange.Failed("closed")

    def _answer(self, request: str) -> str:
        """The answer of one attempt."""
        key = self.endpoint.key()
        headers = {"Content-Type": "application/json", "Accept": "application/json"}
        headers |= {"Accept-Encoding": "identity", "Connection": "close"}
        if key:
            headers["Authorization"] = f"Bearer {key}"
        body = json.dumps(self.endpoint.body(request)).encode()
        try:
            reply = self._posted(body, headers)
        except exchange.Failed as failed:
            if self._closed.is_set():
                raise exchange.Failed("closed") from None
            if failed.reason in ("timeout", "refused", "network"):
                raise replies.Again(failed.reason) from None
            raise
        return self.endpoint.scrub(replies.content(reply))

    def _posted(self, body: bytes, headers: dict[str, str]) -> exchange.Reply:
        with exchange.Deadline(self.endpoint.timeout_s) as deadline:
            with self._lock:
                self._deadlines.add(deadline)
            if self._closed.is_set():
                deadline.end()
            try:
                limit = self.endpoint.max_bytes
                return exchange.post(self._target, body, headers, limit, deadline)
            finally:
                with self._lock:
                    self._deadlines.discard(deadline)
