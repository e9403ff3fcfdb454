"""SIGTERM, by which a cluster takes its machine back: heard, and left to the loop."""

import signal
import threading
from collections.abc import Callable
from typing import NoReturn, Self

from skillsd_jax.validation import Stopped

STATUS = 128 + signal.SIGTERM  # what a shell says of a program that SIGTERM ended


class Notice:
    """Hears SIGTERM inside its `with` block.

    The first one is remembered; a second ends the process, but not before Python has a
    turn, which a long computation does not give it. Signals come to the main thread
    alone: in another, nothing is heard and SIGTERM does what it did before.

    Attributes:
      given: whether one came.
    """

    def __init__(self):
        self.given = False
        self._before = None
        self._heard = threading.current_thread() is threading.main_thread()

    def __enter__(self) -> Self:
        if self._heard:
            self._before = signal.signal(signal.SIGTERM, self._remember)
        return self

    def __exit__(self, *_) -> None:
        if self._heard:
            signal.signal(signal.SIGTERM, self._before or signal.SIG_DFL)

    def stop(self, done: int, say: Callable[[str], None]) -> NoReturn:
        """Ends the program, all being saved.

        Args:
          done: iterations.
          say: told so.
        """
        say(f"stopped after iteration {done}; rerun the same command to go on")
        raise Stopped(STATUS)

    def _remember(self, number: int, frame) -> None:
        self.given = True
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
