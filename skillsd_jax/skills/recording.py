"""What a writer was asked and what it answered, as JSON lines: written and read again."""

import dataclasses
import json
import threading
from collections import defaultdict, deque
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


class Replay:
    """Answers from a recording. The same request asked again gets the next answer
    that was recorded for it, and the last one from then on."""

    def __init__(self, path: Path | str):
        """Raises:
        ValueError: there is no such file, or a line of it other than a last one that
          was cut short is damaged.
        """
        self._recorded: dict[str, deque[Exchange]] = defaultdict(deque)
        for exchange in _exchanges(Path(path)):
            self._recorded[exchange.hash].append(exchange)

    def next(self, hash: str) -> Exchange | None:
        """None if the request was never recorded."""
        recorded = self._recorded.get(hash)
        if not recorded:
            return None
        return recorded.popleft() if len(recorded) > 1 else recorded[0]


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
    *whole, rest = path.read_bytes().split(b"\n")
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
