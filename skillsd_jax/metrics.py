"""What a run says: writers of figures, the progress display, the final table."""

import importlib.metadata
import json
import math
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import IO, Protocol, Self

from skillsd_jax.artifacts import write_atomic
from skillsd_jax.config import flatten
from skillsd_jax.validation import Refused


class Writer(Protocol):
    """Takes the figures of one iteration: numbers, text, and dicts of them."""

    def write(self, iteration: int, values: Mapping) -> None: ...

    def close(self) -> None: ...


class JsonLines:
    """metrics.jsonl: one object per iteration, on disk when `write` returns.

    Args:
      path: the file; lines of an earlier run stay where they lie before `start`.
      start: the first iteration that will be written.
    """

    def __init__(self, path: Path | str, start: int = 0):
        kept = [json.dumps(row) for row in read(path) if row["iteration"] < start]
        write_atomic(path, "".join(line + "\n" for line in kept))
        self._file = open(path, "a", encoding="utf-8")  # noqa: SIM115

    def write(self, iteration: int, values: Mapping) -> None:
        row = {"iteration": iteration, **_plain(values)}
        self._file.write(json.dumps(row, allow_nan=False) + "\n")
        self._file.flush()
        os.fsync(self._file.fileno())

    def close(self) -> None:
        self._file.close()


class TensorBoard:
    """Scalars for TensorBoard, a dict's entries under its name; text is left out."""

    def __init__(self, folder: Path | str, start: int = 0):
        try:
            import tensorboardX
        except ImportError as error:
            raise _missing("tensorboard") from error
        self._writer = tensorboardX.SummaryWriter(str(folder), purge_step=start)

    def write(self, iteration: int, values: Mapping) -> None:
        for name, value in flatten(values):
            if not isinstance(value, str):
                self._writer.add_scalar(name.replace(".", "/"), value, iteration)
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()


class WeightsAndBiases:
    """A Weights & Biases run named after the workdir, resumed with it."""

    def __init__(self, workdir: Path):
        try:
            import wandb
        except ImportError as error:
            raise _missing("wandb") from error
        self._run = wandb.init(
            project="skillsd_jax",
            dir=str(workdir),
            id=workdir.resolve().name,
            resume="allow",
            config=json.loads((workdir / "config.json").read_text()),
        )

    def write(self, iteration: int, values: Mapping) -> None:
        self._run.log(dict(values), step=iteration)

    def close(self) -> None:
        self._run.finish()


class Several:
    """Writes to each of several writers."""

    def __init__(self, writers: Sequence[Writer]):
        self.writers = tuple(writers)

    def write(self, iteration: int, values: Mapping) -> None:
        for writer in self.writers:
            writer.write(iteration, values)

    def close(self) -> None:
        for writer in self.writers:
            writer.close()


def open_writer(extra: str | None, workdir: Path | str, start: int) -> Several:
    """The writer of a run: metrics.jsonl always, then the sinks named in `extra`.

    Args:
      extra: comma-separated: tensorboard, wandb. None: nothing is written at all.
      workdir: where they write.
      start: the first iteration that will be written; what an earlier run wrote of it
        and of later ones goes.

    Raises:
      Refused: a sink is unknown or not installed.
    """
    if extra is None:
        return Several([])
    workdir = Path(workdir)
    sinks: dict[str, Callable[[], Writer]] = {
        "tensorboard": lambda: TensorBoard(workdir / "tensorboard", start),
        "wandb": lambda: WeightsAndBiases(workdir),
    }
    names = [name for name in extra.split(",") if name]
    for name in names:
        if name not in sinks:
            raise Refused(f"unknown writer {name!r}; known: {', '.join(sinks)}")
    lines = JsonLines(workdir / "metrics.jsonl", start)
    return Several([lines, *(sinks[name]() for name in names)])


def read(path: Path | str) -> list[dict]:
    """The rows of a metrics.jsonl; none where there is no file.

    A last line that a crash cut short is left out.
    """
    path = Path(path)
    if not path.exists():
        return []
    lines = path.read_text(encoding="utf-8").split("\n")
    return [json.loads(line) for line in lines[:-1]]


def write_summary(path: Path | str, summary: Mapping) -> None:
    """Writes summary.json; a figure that is not finite becomes null."""
    text = json.dumps(_plain(summary), indent=2, allow_nan=False, ensure_ascii=False)
    write_atomic(path, text + "\n")


def versions() -> dict[str, str]:
    """Python and the packages a result may depend on, as far as they are installed."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


PACKAGES = (
    "skillsd_jax",
    "jax",
    "jaxlib",
    "flax",
    "optax",
    "numpy",
    "transformers",
    "sentencepiece",
    "alfworld",
    "textworld",
)


def commit() -> str | None:
    """The commit of this code, '+' behind it when files differ; None outside git."""
    folder = Path(__file__).resolve().parent
    texts = []
    for command in ("rev-parse HEAD", "status --porcelain --untracked-files=no"):
        try:
            answer = subprocess.run(
                ["git", *command.split()],
                check=False,
                cwd=folder,
                capture_output=True,
                text=True,
            )
        except FileNotFoundError:
            return None
        if answer.returncode:
            return None
        texts.append(answer.stdout.strip())
    return texts[0] + "+" * bool(texts[1])


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
    "tokens/s": "{:,.0f}",
}


class Progress:
    """The one display of a run: live on a terminal, plain lines elsewhere.

    Args:
      total: iterations.
      stream: where it goes; default standard output.
      enabled: False on every process but the first.
      clock: seconds; for the time left.
    """

    def __init__(
        self,
        total: int,
        stream: IO[str] | None = None,
        enabled: bool = True,
        clock: Callable[[], float] = time.monotonic,
    ):
        self._total, self._enabled, self._clock = total, enabled, clock
        self._stream = stream or sys.stdout
        self._first: tuple[int, float] | None = None  # iteration shown first, when
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

    def iteration(self, iteration: int, record: Mapping) -> None:
        """Shows the figures of an iteration that is over; unknown ones read –."""
        seconds = sum(record.get("seconds", {}).values())
        values = {**record}
        if seconds and "tokens" in record:
            values["tokens/s"] = record["tokens"] / seconds
        figures = [
            f"{name} {shape.format(values[name]) if name in values else '–'}"
            for name, shape in SHOWN.items()
        ]
        if "evaluation" in record:
            figures.insert(1, f"held-out {record['evaluation']['success']:.1%}")
        done, left = iteration + 1, self._left(iteration)
        text = f"iteration {done}/{self._total}  {'  '.join(figures)}  left {left}"
        if self._live is None:
            self.say(text)
        else:
            self._live.update(self._bar(done, text), refresh=True)

    def say(self, text: str) -> None:
        """A line of its own: a phase begins, a panel was played."""
        if not self._enabled:
            return
        if self._live is None:
            print(text, file=self._stream, flush=True)
        else:
            self._live.console.print(text, markup=False, highlight=False)

    def _bar(self, done: int, text: str):
        from rich.console import Group
        from rich.progress_bar import ProgressBar
        from rich.text import Text

        # The bar ends without a newline: it goes last.
        return Group(Text(text), ProgressBar(total=max(self._total, 1), completed=done))

    def _left(self, iteration: int) -> str:
        """Minutes and seconds, from the pace since the first iteration shown."""
        now = self._clock()
        if self._first is None:
            self._first = iteration, now
        first, begun = self._first
        if iteration == first:
            return "–"
        pace = (now - begun) / (iteration - first)
        seconds = round(pace * (self._total - iteration - 1))
        return f"{seconds // 60}:{seconds % 60:02d}"


def table(summary: Mapping) -> str:
    """Warm start → trained, and what the teacher reaches with a skill.

    Args:
      summary: what summary.json holds; each panel is {'success', 'low', 'high', 'n'}
        as fractions. A panel that was not played is left out.
    """
    temperature = summary["config"]["evaluate"]["temperature"]
    rows = [("", "warm start", "trained", "change")]
    panels = (
        (f"T = {temperature}", ""),
        ("greedy", "_greedy"),
        ("with skills", "_with_skills"),
    )
    for label, suffix in panels:
        before, after = summary.get(f"before{suffix}"), summary.get(f"after{suffix}")
        if before and after:
            change = 100 * (after["success"] - before["success"])
            rows.append((label, _rate(before), _rate(after), f"{change:+.1f} points"))
            rows += _families(before, after)
    for label, before, after in (
        ("teacher, expert's skill", "teacher_before", "teacher_after"),
        (
            "teacher, own skill",
            "teacher_before_own_skills",
            "teacher_after_own_skills",
        ),
        (
            "student, same tasks",
            "student_on_teacher_panel",
            "student_on_teacher_panel_after",
        ),
    ):
        if before in summary:
            trained = _rate(summary[after]) if after in summary else ""
            rows.append((label, _rate(summary[before]), trained, ""))
    widths = [max(map(len, column)) for column in zip(*rows)]
    lines = [
        "  ".join(f"{cell:<{width}}" for cell, width in zip(row, widths)).rstrip()
        for row in rows
    ]
    panel = summary["panel"]
    lines.append(
        f"held-out panel: {panel['size']} tasks ({summary['data']}), hash "
        f"{panel['hash']}; [ ]: 95 % interval"
    )
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


def _plain(value):
    """A value for JSON; what is not finite becomes null, which no reader misreads."""
    if isinstance(value, Mapping):
        return {name: _plain(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if hasattr(value, "item"):  # a numpy or jax scalar
        value = value.item()
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _missing(extra: str) -> Refused:
    return Refused(
        f"writers={extra} needs a package that is not installed; "
        f"pip install 'skillsd_jax[{extra}]'"
    )
