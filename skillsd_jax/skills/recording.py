"""What a writer was asked and what it answered, as JSON lines: written and read again.

Processes record to one file one after another; a second one at a time is refused.
"""

import contextlib
import dataclasses
import json
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import IO, NamedTuple

try:
    import fcntl
except ImportError:  # a platform without it
    fcntl = None


@dataclasses.dataclass(frozen=True)
class Exchange:
    """One request and what became of it.

    Args:
      hash: of everything the answer depends on.
      request: its text.
      answer: None if there is none.
      failure: why not; "" if there is one.
    """

    hash: str
    request: str
    answer: str | None
    failure: str = ""


class Outcome(NamedTuple):
    """What became of a request, without its text: see Exchange."""

    answer: str | None
    failure: str = ""


class Recording:
    """Appends exchanges to a file, each handed to the system before the next.

    Nobody else can record to it until it is closed.
    """

    def __init__(self, path: Path | str):
        """Args:
          path: of the file. One that is there is gone on with; the part of a line that
            a crash has left at its end is cut off.

        Raises:
          ValueError: someone else records to it.
        """
        self._path = Path(path)
        self._path.parent.mkdir(parents=True, exist_ok=True)
        self._lock = threading.Lock()
        with contextlib.ExitStack() as opened:
            self._held = opened.enter_context(open(self._path, "ab+"))
            _hold(self._held, self._path)
            self._held.truncate(_whole(self._held))
            opened.pop_all()

    def append(self, exchange: Exchange) -> None:
        """Raises:
        OSError: it could not be written; the file is as it was.
        """
        line = json.dumps(dataclasses.asdict(exchange)).encode() + b"\n"
        # Without a buffer, which would write the rest of a failed line when closed.
        with self._lock, open(self._path, "ab", buffering=0) as file:
            before = file.seek(0, 2)
            try:
                while line:
                    line = line[file.write(line) :]
            except OSError:
                file.truncate(before)
                raise

    def close(self) -> None:
        """Lets others record to the file."""
        self._held.close()


def read(path: Path | str) -> dict[str, Outcome]:
    """What was recorded, by hash: a request's first answer, or where it has none its
    first failure.

    Raises:
      ValueError: there is no such file, or a line of it other than a last one that
        was cut short is damaged.
    """
    recorded: dict[str, Outcome] = {}
    for exchange in _exchanges(Path(path)):
        outcome = Outcome(exchange.answer, exchange.failure)
        known = recorded.setdefault(exchange.hash, outcome)
        if known.failure and not outcome.failure:
            recorded[exchange.hash] = outcome
    return recorded


def check(path: Path | str) -> None:
    """Refuses a file that could not be recorded to; makes none and no folder.

    Raises:
      ValueError: it cannot be written, someone else records to it, or a line of it is
        damaged.
    """
    path = Path(path)
    try:
        if path.exists():
            if not path.is_file():  # opening a pipe would wait for its reader
                raise ValueError(f"{path} is no file; name another one")
            with open(path, "ab") as file:
                _hold(file, path)
            read(path)
            return
        there = next(folder for folder in path.parents if folder.exists())
        # Asked of the system by trying: the file has no name and is gone at once.
        with tempfile.TemporaryFile(dir=there):
            pass
    except OSError as error:
        raise ValueError(
            f"{path} cannot be written: {error.strerror}; name another file"
        ) from error


def _hold(file: IO[bytes], path: Path) -> None:
    """Keeps others from recording to an open file until it is closed.

    Where the platform or the file system has no locks, nobody is kept.

    Raises:
      ValueError: someone else holds it.
    """
    if fcntl is None:
        return
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise ValueError(
            f"{path} is being recorded to by another run; wait for its end, or name "
            "another file"
        ) from None
    except OSError:
        return


def _whole(file) -> int:
    """Bytes up to the end of the last whole line."""
    end = file.seek(0, 2)
    while end > 0:
        start = max(0, end - 65_536)
        file.seek(start)
        found = file.read(end - start).rfind(b"\n")
        if found >= 0:
            return start + found + 1
        end = start
    return 0


def _exchanges(path: Path) -> Iterator[Exchange]:
    if not path.is_file():
        raise ValueError(f"there is no recording {path}; record one first")
    damaged = 0
    try:
        with open(path, "rb") as file:
            for number, line in enumerate(file, 1):
                if damaged:
                    raise ValueError(
                        f"{path} line {damaged} is damaged: it holds no recorded "
                        "exchange; remove that line or record again"
                    )
                exchange = _exchange(line)
                if exchange is None:
                    damaged = number  # the rest of a crash, if it is the last one
                else:
                    yield exchange
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}") from error


def _exchange(line: bytes) -> Exchange | None:
    """None if the line is no exchange."""
    try:
        values = json.loads(line)
        exchange = Exchange(**values)
    except (ValueError, TypeError, RecursionError):
        return None
    texts = (exchange.hash, exchange.request, exchange.failure)
    answered = isinstance(exchange.answer, str)
    sound = all(isinstance(text, str) for text in texts)
    if not sound or answered == bool(exchange.failure):
        return None
    return exchange if answered or exchange.answer is None else None
