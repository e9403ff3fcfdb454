"""What a writer was asked and what it answered, as JSON lines: written and read again."""

import dataclasses
import json
import tempfile
import threading
from pathlib import Path


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


class Recording:
    """Appends exchanges to a file, each handed to the system before the next."""

    def __init__(self, path: Path | str):
        """Args:
        path: of the file. One that is there is gone on with; the part of a line that
          a crash has left at its end is cut off.
        """
        self._path = Path(path)
        self._path.parent.mkdir(parents=True, exist_ok=True)
        self._lock = threading.Lock()
        with open(self._path, "ab+") as file:
            file.truncate(_whole(file))

    def append(self, exchange: Exchange) -> None:
        line = json.dumps(dataclasses.asdict(exchange))
        with self._lock, open(self._path, "ab") as file:
            file.write(line.encode() + b"\n")


def read(path: Path | str) -> dict[str, Exchange]:
    """What was recorded, by hash: a request's first answer, or where it has none its
    first failure.

    Raises:
      ValueError: there is no such file, or a line of it other than a last one that
        was cut short is damaged.
    """
    recorded: dict[str, Exchange] = {}
    for exchange in _exchanges(Path(path)):
        known = recorded.setdefault(exchange.hash, exchange)
        if known.failure and not exchange.failure:
            recorded[exchange.hash] = exchange
    return recorded


def check(path: Path | str) -> None:
    """Refuses a file that could not be recorded to; makes none and no folder.

    Raises:
      ValueError: it cannot be written, or a line of it is damaged.
    """
    path = Path(path)
    try:
        if path.exists():
            if not path.is_file():  # opening a pipe would wait for its reader
                raise ValueError(f"{path} is no file; name another one")
            with open(path, "ab"):
                pass
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


def _exchanges(path: Path) -> list[Exchange]:
    if not path.is_file():
        raise ValueError(f"there is no recording {path}; record one first")
    try:
        *whole, rest = path.read_bytes().split(b"\n")
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}") from error
    exchanges = []
    for number, line in enumerate(whole, 1):
        exchange = _exchange(line)
        if exchange is None and (number < len(whole) or rest):
            raise ValueError(
                f"{path} line {number} is damaged: it holds no recorded exchange; "
                "remove that line or record again"
            )
        if exchange is not None:
            exchanges.append(exchange)
    last = _exchange(rest)
    return exchanges if last is None else [*exchanges, last]


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
