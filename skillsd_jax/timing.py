"""Where a run's time goes: seconds by phase, programs compiled."""

import collections
import contextlib
import platform
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

import jax

from skillsd_jax import artifacts


class Clock:
    """Seconds by phase, over the run and since the last lap.

    Args:
      total: seconds of an earlier part of the same run.
    """

    def __init__(self, total: Mapping[str, float] = {}):
        self.total = collections.defaultdict(float, total)
        self._lap = collections.defaultdict(float)

    @contextlib.contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        start = time.monotonic()
        try:
            yield
        finally:
            for seconds in (self.total, self._lap):
                seconds[phase] += time.monotonic() - start

    def lap(self) -> dict[str, float]:
        """Seconds by phase since the last call."""
        lap, self._lap = self._lap, collections.defaultdict(float)
        return {phase: round(s, 3) for phase, s in sorted(lap.items())}


class Compilations:
    """Counts programs that XLA compiles or takes from its cache, process-wide."""

    def __init__(self):
        self.count = 0
        jax.monitoring.register_event_duration_secs_listener(self._heard)

    def _heard(self, event: str, seconds: float, **_) -> None:
        self.count += event == "/jax/core/compile/backend_compile_duration"

    def close(self) -> None:
        jax.monitoring.unregister_event_duration_listener(self._heard)


def keep_compiled(folder: Path) -> None:
    """Programs are compiled once: kept in `folder`, apart for each kind of machine."""
    jax.config.update("jax_compilation_cache_dir", str(folder / _machine()))


def _machine() -> str:
    """Names what compiled programs depend on: jaxlib and the processor's features."""
    described = Path("/proc/cpuinfo")
    features = described.read_text() if described.exists() else platform.processor()
    flags = {line for line in features.split("\n") if line.startswith("flags")}
    return artifacts.content_hash(jax.lib.__version__, platform.machine(), flags)
