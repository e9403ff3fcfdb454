"""A server with the chat interface of OpenAI as the writer of skills.

The server is untrusted: every request has a deadline, every reply a size, and whatever
it sends is an answer's text or a counted failure. The key is read from the environment
when it is sent; it is in no setting, text, file or error.
"""

import contextlib
import dataclasses
import json
import math
import os
import queue
import re
import threading
import time
import zlib
from collections import Counter
from collections.abc import Sequence
from typing import Self

from skillsd_jax import artifacts
from skillsd_jax.skills import exchange, untrusted
from skillsd_jax.skills.recording import Exchange, Recording, Replay

# Why a request has no answer.
FAILURES = (
    "timeout",  # no whole reply in time
    "refused",  # nobody listens there
    "network",  # any other way a connection breaks
    "denied",  # 401 or 403: the key is wrong or not set
    "redirect",  # 3xx, never followed: the key is for this host alone
    "status",  # any other status but 200
    "too_large",
    "not_json",
    "no_choice",  # JSON without choices[0].message.content
    "not_recorded",  # nowhere in the recording that is replayed
    "closed",  # the writer was closed first
)
# Beside the statuses of 500 and more.
AGAIN = (408, 409, 429)
DAY_S = 86_400.0
SECRET = 8  # characters of a key from which on it is one; 'EMPTY' is not


@dataclasses.dataclass(frozen=True)
class Endpoint:
    """How to ask, and how hard to try.

    Args:
      url: up to what `/chat/completions` is appended to, e.g. http://localhost:8000/v1.
      model: as the server calls it.
      temperature: of the answers.
      max_tokens: of one answer.
      seed: sent if set.
      key_variable: environment variable with the key; where it is "" or not set,
        none is sent. To an http address it travels unencrypted.
      timeout_s: of one attempt, from the connection to the last byte.
      max_bytes: of one reply.
      retries: further attempts after one that may go better next time.
      backoff_s: before the first of them; doubled every time.
      max_wait_s: before any of them, whatever the server asks for.
      concurrency: requests at a time.
      record: file to append every request and its answer to; "": none.
      replay: file to answer from instead of the network; "": none.
    """

    url: str
    model: str
    temperature: float = 0.7
    max_tokens: int = 512
    seed: int | None = None
    key_variable: str = "OPENAI_API_KEY"
    timeout_s: float = 60.0
    max_bytes: int = 1_000_000
    retries: int = 3
    backoff_s: float = 1.0
    max_wait_s: float = 30.0
    concurrency: int = 4
    record: str = ""
    replay: str = ""

    def __post_init__(self):
        exchange.Target.of(self.url)
        if not self.model:
            raise ValueError("model is not set; name one that the server has")
        for name in ("max_tokens", "timeout_s", "max_bytes", "concurrency"):
            self._check(name, getattr(self, name) > 0, "more than 0")
        for name in ("temperature", "retries", "backoff_s", "max_wait_s"):
            self._check(name, getattr(self, name) >= 0, "0 or more")
        for name in ("timeout_s", "backoff_s", "max_wait_s"):
            self._check(name, getattr(self, name) <= DAY_S, f"at most {DAY_S}")
        self._check("temperature", math.isfinite(self.temperature), "finite")
        # Not repeated: it may be the key itself, put in the wrong place.
        if self.key_variable and not re.fullmatch(
            r"[A-Z_][A-Z0-9_]*", self.key_variable
        ):
            raise ValueError(
                "key_variable is no name of an environment variable; put the key into "
                "one, such as OPENAI_API_KEY, and give that name"
            )
        if self.record and self.replay:
            raise ValueError("record and replay are both set; leave one of them out")

    def _check(self, name: str, good: bool, wanted: str) -> None:
        if not good:
            raise ValueError(f"{name}={getattr(self, name)} must be {wanted}")

    def body(self, request: str) -> dict:
        """What is sent, and all that the answer depends on."""
        body = {
            "model": self.model,
            "messages": [{"role": "user", "content": request}],
            "temperature": self.temperature,
            "max_tokens": self.max_tokens,
        }
        return body if self.seed is None else body | {"seed": self.seed}


class Handle:
    """Requests under way."""

    def __init__(self, requests: Sequence[str], recording: Recording | None = None):
        self._open = len(requests)
        self._done: list[Exchange | None] = [None] * len(requests)
        self._recording = recording
        self._recorded = 0
        self._broken: OSError | None = None
        self._changed = threading.Condition()

    def ready(self) -> bool:
        """Whether `result` need not wait."""
        with self._changed:
            return not self._open

    def result(self, timeout_s: float | None = None) -> list[str | None]:
        """The answers in the order asked; None where there is none. Any number of times.

        Args:
          timeout_s: how long to wait; None: until all are there, which takes no longer
            than the attempts and the pauses between them.

        Raises:
          TimeoutError: they are not there yet; ask again.
          OSError: the recording could not be written.
        """
        with self._changed:
            if not self._changed.wait_for(lambda: not self._open, timeout_s):
                raise TimeoutError(f"{self._open} answers are not there yet")
            if self._broken is not None:
                raise self._broken
            return [done.answer for done in self._done if done is not None]

    def finish(self, index: int, done: Exchange) -> None:
        """Takes in what became of a request; records in the order asked.

        What a closed writer left undone is not recorded: nothing became of it.
        """
        with self._changed:
            self._done[index] = done
            self._open -= 1
            try:
                while self._recording and self._recorded < len(self._done):
                    following = self._done[self._recorded]
                    if following is None:
                        break
                    self._recorded += 1
                    if following.failure != "closed":
                        self._recording.append(following)
            except OSError as error:
                self._broken = error
            self._changed.notify_all()


@dataclasses.dataclass(frozen=True)
class _Job:
    handle: Handle
    index: int
    request: str


class Writer:
    """Asks an endpoint, `concurrency` requests at a time, in threads of its own.

    The threads never keep a process from ending. Close a writer, or use it in a `with`.
    """

    def __init__(self, endpoint: Endpoint):
        """Raises:
        ValueError: the key cannot be sent, or the recording cannot be replayed.
        """
        self.endpoint = endpoint
        self._target = exchange.Target.of(
            endpoint.url.rstrip("/") + "/chat/completions"
        )
        self._replay = Replay(endpoint.replay) if endpoint.replay else None
        self._recording = Recording(endpoint.record) if endpoint.record else None
        self._jobs: queue.SimpleQueue[_Job | None] = queue.SimpleQueue()
        self._lock = threading.Lock()
        self._counts: Counter[str] = Counter()
        self._deadlines: set[exchange.Deadline] = set()
        self._closed = threading.Event()
        self._threads: list[threading.Thread] = []
        if self._replay is None:
            _key(endpoint)
            for _ in range(endpoint.concurrency):
                self._threads.append(threading.Thread(target=self._work, daemon=True))
                self._threads[-1].start()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_) -> None:
        self.close()

    @property
    def counts(self) -> dict[str, int]:
        """Requests so far: 'asked', 'answered' and each of FAILURES that came; further
        attempts under 'retried'."""
        with self._lock:
            return dict(self._counts)

    def write(self, requests: Sequence[str]) -> list[str | None]:
        """The answers in order; None where there is none."""
        return self.submit(requests).result()

    def submit(self, requests: Sequence[str]) -> Handle:
        """Begins to ask.

        Raises:
          ValueError: the writer is closed.
        """
        handle = Handle(requests, self._recording)
        jobs = [_Job(handle, i, request) for i, request in enumerate(requests)]
        with self._lock:
            # Under the lock of `close`: what is put here is put before its None.
            if self._closed.is_set():
                raise ValueError("the writer is closed; make another one")
            self._counts["asked"] += len(jobs)
            for job in jobs if self._replay is None else ():
                self._jobs.put(job)
        if self._replay is not None:
            for job in jobs:
                self._finish(job, self._replayed(self._replay, job.request))
        return handle

    def close(self) -> None:
        """Ends what is under way as 'closed', and waits for its threads a moment."""
        self._stop()
        ends = time.monotonic() + 1.0
        for thread in self._threads:
            thread.join(max(0.0, ends - time.monotonic()))

    def _stop(self) -> None:
        with self._lock:
            self._closed.set()
            under_way = list(self._deadlines)
            waiting = []
            with contextlib.suppress(queue.Empty):
                while True:
                    waiting.append(self._jobs.get_nowait())
            for _ in self._threads:
                self._jobs.put(None)
        for deadline in under_way:
            deadline.end()
        for job in waiting:
            if job is not None:
                hash = artifacts.content_hash(self.endpoint.body(job.request))
                self._finish(job, Exchange(hash, job.request, None, "closed"))

    def _finish(self, job: _Job, done: Exchange) -> None:
        self._count(done.failure or "answered")
        job.handle.finish(job.index, done)

    def _count(self, name: str, times: int = 1) -> None:
        with self._lock:
            self._counts[name] += times

    def _replayed(self, replay: Replay, request: str) -> Exchange:
        hash = artifacts.content_hash(self.endpoint.body(request))
        return replay.next(hash) or Exchange(hash, request, None, "not_recorded")

    def _work(self) -> None:
        try:
            self._serve()
        finally:
            # A mistake of ours ends the writer and not the wait for an answer.
            self._stop()

    def _serve(self) -> None:
        while (job := self._jobs.get()) is not None:
            hash = artifacts.content_hash(self.endpoint.body(job.request))
            answer, failure = None, "closed"
            try:
                answer, failure = self._asked(job.request, hash), ""
            except exchange.Failed as failed:
                failure = failed.reason
            finally:
                self._finish(job, Exchange(hash, job.request, answer, failure))

    def _asked(self, request: str, hash: str) -> str:
        """The answer, after as many attempts as it takes."""
        for attempt in range(self.endpoint.retries + 1):
            if self._closed.is_set():
                raise exchange.Failed("closed")
            try:
                return self._answer(request)
            except _Again as again:
                if attempt == self.endpoint.retries or self._closed.is_set():
                    raise
                self._count("retried")
                self._closed.wait(_pause_s(self.endpoint, hash, attempt, again))
        raise exchange.Failed("closed")

    def _answer(self, request: str) -> str:
        """The answer of one attempt."""
        key = _key(self.endpoint)
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
                raise _Again(failed.reason) from None
            raise
        answer = _content(reply)
        return answer.replace(key, "(key)") if len(key) >= SECRET else answer

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


class _Again(exchange.Failed):
    """A failure that may not come again."""

    def __init__(self, reason: str, wait_s: float = 0.0):
        super().__init__(reason)
        self.wait_s = wait_s


def _key(endpoint: Endpoint) -> str:
    """The key, or "" if none is set.

    Raises:
      ValueError: it cannot be sent in a header. Says nothing of it.
    """
    name = endpoint.key_variable
    key = os.environ.get(name, "").strip() if name else ""
    if key and not (key.isascii() and key.isprintable() and " " not in key):
        raise ValueError(
            f"{name} holds spaces, line ends or other characters that no key has; set "
            "it again"
        )
    return key


def _content(reply: exchange.Reply) -> str:
    """What the model said. Raises Failed."""
    status = reply.status
    if status in AGAIN or status >= 500:
        raise _Again("status", exchange.seconds(reply.retry_after))
    if status in (401, 403):
        raise exchange.Failed("denied")
    if status != 200:
        raise exchange.Failed("redirect" if 300 <= status < 400 else "status")
    try:
        found = untrusted.loads(reply.body.decode())
    except ValueError:
        raise exchange.Failed("not_json") from None
    choices = found.get("choices") if isinstance(found, dict) else None
    first = choices[0] if isinstance(choices, list) and choices else None
    message = first.get("message") if isinstance(first, dict) else None
    content = message.get("content") if isinstance(message, dict) else None
    if not isinstance(content, str):
        raise exchange.Failed("no_choice")
    return content


def _pause_s(endpoint: Endpoint, hash: str, attempt: int, again: _Again) -> float:
    """Half to all of a doubling pause, the same for the same request and attempt."""
    share = 0.5 + 0.5 * (zlib.crc32(f"{hash} {attempt}".encode()) / 2**32)
    own = share * endpoint.backoff_s * 2.0 ** min(attempt, 60)
    return min(max(own, again.wait_s), endpoint.max_wait_s)
