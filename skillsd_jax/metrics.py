"""What a run says: writers of figures, the progress display, the final table."""

import json
import math
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import IO, Protocol, Self

from skillsd_jax.artifacts import write_atomic
from skillsd_jax.validation import Refused


class Writer(Protocol):
    """Takes the figures of one iteration. Steps only grow."""

    def write(self, step: int, values: Mapping[str, float | str]) -> None: ...

    def close(self) -> None: ...


class JsonLines:
    """metrics.jsonl: one object per step, on disk when `write` returns.

    Args:
      path: the file; lines of an earlier run stay up to step `start`, exclusive.
      start: the first step that will be written.
    """

    def __init__(self, path: Path | str, start: int = 0):
        kept = [json.dumps(row) for row in read(path) if row["step"] < start]
        write_atomic(path, "".join(line + "\n" for line in kept))
        self._file = open(path, "a", encoding="utf-8")  # noqa: SIM115

    def write(self, step: int, values: Mapping[str, float | str]) -> None:
        row = {"step": step} | {name: _plain(value) for name, value in values.items()}
        self._file.write(json.dumps(row, allow_nan=False) + "\n")
        self._file.flush()

    def close(self) -> None:
        self._file.close()


class TensorBoard:
    """Scalars for TensorBoard; text is left out."""

    def __init__(self, folder: Path | str, start: int = 0):
        try:
            import tensorboardX
        except ImportError as error:
            raise _missing("tensorboard") from error
        self._writer = tensorboardX.SummaryWriter(str(folder), purge_step=start)

    def write(self, step: int, values: Mapping[str, float | str]) -> None:
        for name, value in values.items():
            if not isinstance(value, str):
                self._writer.add_scalar(name, float(value), step)
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()


class WeightsAndBiases:
    """A Weights & Biases run named after the workdir, resumed with it."""

    def __init__(self, folder: Path | str, config: Mapping):
        try:
            import wandb
        except ImportError as error:
            raise _missing("wandb") from error
        name = Path(folder).name
        self._run = wandb.init(
            project="skillsd_jax",
            dir=str(folder),
            id=name,
            resume="allow",
            config=dict(config),
        )

    def write(self, step: int, values: Mapping[str, float | str]) -> None:
        self._run.log(dict(values), step=step)

    def close(self) -> None:
        self._run.finish()


def open_writers(
    workdir: Path | str, extra: str, start: int, config: Mapping
) -> list[Writer]:
    """The writers of a run: metrics.jsonl always, then those named in `extra`.

    Args:
      workdir: where they write.
      extra: comma-separated: tensorboard, wandb.
      start: the first step that will be written; later ones of an earlier run go.
      config: settings, for the sinks that show them.

    Raises:
      Refused: a sink is unknown or not installed.
    """
    workdir = Path(workdir)
    sinks: dict[str, Callable[[], Writer]] = {
        "tensorboard": lambda: TensorBoard(workdir / "tensorboard", start),
        "wandb": lambda: WeightsAndBiases(workdir, config),
    }
    names = [name for name in extra.split(",") if name]
    for name in names:
        if name not in sinks:
            raise Refused(f"unknown writer {name!r}; known: {', '.join(sinks)}")
    return [
        JsonLines(workdir / "metrics.jsonl", start),
        *(sinks[name]() for name in names),
    ]


def read(path: Path | str) -> list[dict]:
    """The rows of a metrics.jsonl; none where there is no file.

    A last line that a crash cut short is left out.
    """
    path = Path(path)
    if not path.exists():
        return []
    lines = path.read_text(encoding="utf-8").split("\n")
    return [json.loads(line) for line in lines[:-1]]


def wilson(successes: int, n: int, z: float = 1.959964) -> tuple[float, float]:
    """Wilson's 95 % interval of a success rate.

    (p + z²/2n ± z √(p(1 − p)/n + z²/4n²)) / (1 + z²/n). Unlike p ± z·SE it stays
    inside [0, 1] and keeps a width at 0 and n successes.

    Returns:
      (low, high); (0, 1) for n = 0.

    Source: Wilson 1927, J. Am. Stat. Assoc. 22.
    """
    if n == 0:
        return 0.0, 1.0
    p = successes / n
    middle = p + z * z / (2 * n)
    half = z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    scale = 1 + z * z / n
    return max(0.0, (middle - half) / scale), min(1.0, (middle + half) / scale)


# Shown while a run lasts: name of the figure → how it is written.
SHOWN = {
    "success": "{:.1%}",
    "gap": "{:+.3f}",
    "gate": "{:.2f}",
    "tokens_per_s": "{:,.0f}",
}


class Progress:
    """The one display of a run: live on a terminal, plain lines elsewhere.

    Args:
      total: iterations.
      start: iterations done before, when a run goes on.
      stream: where it goes; default standard output.
      enabled: False on every process but the first.
      clock: seconds; for the time left.
    """

    def __init__(
        self,
        total: int,
        start: int = 0,
        stream: IO[str] | None = None,
        enabled: bool = True,
        clock: Callable[[], float] = time.monotonic,
    ):
        self._total, self._start = total, start
        self._stream = stream or sys.stdout
        self._enabled = enabled
        self._clock = clock
        self._begun = clock()
        self._live = None

    def __enter__(self) -> Self:
        if self._enabled and self._stream.isatty():
            from rich.console import Console
            from rich.live import Live

            self._live = Live(console=Console(file=self._stream), auto_refresh=False)
            self._live.start()
        return self

    def __exit__(self, *exception) -> None:
        if self._live is not None:
            self._live.stop()
            self._live = None

    def update(self, done: int, values: Mapping[str, float]) -> None:
        """Shows the figures after `done` iterations; unknown ones read –."""
        figures = [
            f"{name} {shape.format(values[name]) if name in values else '–'}"
            for name, shape in SHOWN.items()
        ]
        left = f"left {self._left(done)}"
        line = "  ".join([f"iteration {done}/{self._total}", *figures, left])
        if not self._enabled:
            return
        if self._live is None:
            print(line, file=self._stream, flush=True)
        else:
            self._live.update(self._bar(done, line), refresh=True)

    def say(self, text: str) -> None:
        """A line of its own: a phase begins, a panel was played."""
        if not self._enabled:
            return
        if self._live is None:
            print(text, file=self._stream, flush=True)
        else:
            self._live.console.print(text, markup=False, highlight=False)

    def _bar(self, done: int, line: str):
        from rich.console import Group
        from rich.progress_bar import ProgressBar
        from rich.text import Text

        return Group(ProgressBar(total=max(self._total, 1), completed=done), Text(line))

    def _left(self, done: int) -> str:
        if done <= self._start:
            return "–"
        each = (self._clock() - self._begun) / (done - self._start)
        seconds = round(each * (self._total - done))
        return f"{seconds // 60}:{seconds % 60:02d}"


def final_table(summary: Mapping, workdir: Path | str) -> str:
    """Warm start → trained, the teacher, and where everything lies.

    Args:
      summary: what summary.json holds; each panel is {'success', 'low', 'high', 'n'}
        as fractions. A panel that was not played is left out.
      workdir: of the run.
    """
    temperature = summary["config"]["evaluate"]["temperature"]
    rows = [("", "warm start", "trained", "change")]
    for label, suffix in ((f"T = {temperature}", ""), ("greedy", "_greedy")):
        before, after = summary.get(f"before{suffix}"), summary.get(f"after{suffix}")
        if before and after:
            change = 100 * (after["success"] - before["success"])
            rows.append((label, _rate(before), _rate(after), f"{change:+.1f} points"))
            rows += _families(before, after)
    for label, name in (
        ("shown a skill", "teacher_before"),
        ("same tasks, no skill", "student_on_teacher_panel"),
    ):
        if name in summary:
            rows.append((label, _rate(summary[name]), "", ""))
    lines = [_line(row, rows) for row in rows]
    panel = summary.get("panel", {})
    lines.append("")
    lines.append(
        f"test panel: {panel.get('size', '?')} {summary.get('data', '')} tasks, hash "
        f"{panel.get('hash', '?')}; [ ]: 95 % interval"
    )
    lines.append(f"everything lies in {workdir}: {', '.join(_files(Path(workdir)))}")
    return "\n".join(lines)


def _families(before: Mapping, after: Mapping) -> list[tuple[str, ...]]:
    both = before.get("families", {}).keys() & after.get("families", {}).keys()
    return [
        (f"  {name}", _rate(before["families"][name]), _rate(after["families"][name]))
        + ("",)
        for name in sorted(both)
    ]


def _rate(panel: Mapping[str, float]) -> str:
    low, high = 100 * panel["low"], 100 * panel["high"]
    return f"{100 * panel['success']:.1f} % [{low:.1f}, {high:.1f}]"


def _line(row: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    widths = [max(len(other[i]) for other in rows) for i in range(len(row))]
    cells = [f"{cell:<{width}}" for cell, width in zip(row, widths)]
    return "  ".join(cells).rstrip()


def _files(workdir: Path) -> list[str]:
    if not workdir.is_dir():
        return []
    return [
        path.name + "/" * path.is_dir()
        for path in sorted(workdir.iterdir())
        if not path.name.startswith(".")
    ]


def _plain(value) -> float | int | str | None:
    """A value for JSON; what is not finite becomes null, which no reader misreads."""
    if hasattr(value, "item"):  # a numpy or jax scalar
        value = value.item()
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _missing(extra: str) -> Refused:
    return Refused(
        f"writers={extra} needs a package that is not installed; "
        f"pip install 'skillsd_jax[{extra}]'"
    )
