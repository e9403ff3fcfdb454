"""One pytree and one dict of host state, saved and restored as one.

A checkpoint is DIRECTORY/STEP with `tree`, `host.json` and `manifest.json`. It gets its
name last, when all of it is on disk: one with a name is whole, unless it was damaged
later, which the manifest tells.
"""

import concurrent.futures
import errno
import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

from skillsd_jax import artifacts, cluster, manifest

PyTree = Any

TIMEOUT_S = 4 * 3600  # of a save; orbax's own 20 minutes are short for a slow disk
FULL = (errno.ENOSPC, errno.EDQUOT)
_PART = ".part-"  # begins the name of what is not finished, or is being deleted


class Unsaved(ValueError):
    """A checkpoint could not be written; those before it are as they were."""


class Checkpointer:
    """The checkpoints of a run: the newest and, where scores are given, the best.

    `save` returns as soon as the tree is copied off the device and may be donated; the
    rest goes on beside the loop. One at a time: the next `save` waits for the one before.

    Args:
      directory: made where missing; of one run at a time. The processes of a job write
        their parts of a tree to it, and the first does everything else.
      keep: how many of the newest stay.
      best: how many of those with the best scores stay besides; of equal ones the
        newer.
      say: told of damaged checkpoints, a line at a time.
    """

    def __init__(
        self,
        directory: Path | str,
        keep: int,
        best: int = 0,
        say: Callable[[str], None] = print,
    ):
        self._directory = Path(directory).absolute()
        self._keep, self._best, self._say = keep, best, say
        cluster.told(self._cleared)
        self._orbax = ocp.AsyncCheckpointer(
            ocp.StandardCheckpointHandler(), timeout_secs=TIMEOUT_S
        )
        self._thread = concurrent.futures.ThreadPoolExecutor(1, "checkpoint")
        self._saving: concurrent.futures.Future[None] | None = None

    def save(
        self, step: int, tree: PyTree, host: dict, score: float | None = None
    ) -> None:
        """Begins to save both under `step`.

        Args:
          step: later than every saved one.
          tree: of arrays, typed keys and numbers; empty parts and None are kept.
          host: what JSON can hold.
          score: the higher, the better; None: this one is not among the best.

        Raises:
          ValueError: the step is not later than the last one saved.
          Unsaved: this save, or the one before, cannot be written.
        """
        self.wait()
        latest = cluster.told(lambda: max(_steps(self._directory), default=None))
        if latest is not None and step <= latest:
            raise ValueError(
                f"step {step} must be later than the saved step {latest}; restore it "
                f"first or use another folder"
            )
        text, tree = json.dumps(host), jax.tree.map(_array, tree)
        part = self._directory / f"{_PART}{step}"
        size = sum(leaf.nbytes for leaf in jax.tree.leaves(tree) if _sized(leaf))
        try:
            cluster.told(part.mkdir)
            self._orbax.save(part / "tree", args=ocp.args.StandardSave(tree))
        except (OSError, ValueError, RuntimeError) as fault:
            if cluster.lost(fault):
                raise
            raise self._failed(step, size, fault) from fault
        self._saving = self._thread.submit(self._finish, step, size, text, score)

    def wait(self) -> None:
        """Returns when the last save is whole on disk.

        Raises:
          Unsaved: it cannot be written; in a job, the part of this process, which has to
            end for the others to notice.
        """
        saving, self._saving = self._saving, None
        if saving is not None:
            saving.result()

    def check(self) -> None:
        """Raises Unsaved where a save has failed by now; waits for nothing."""
        if self._saving is not None and self._saving.done():
            self.wait()

    def newest(self) -> tuple[int, dict] | None:
        """The newest checkpoint that is whole, as (step, host); None: there is none.

        Damaged ones that are newer are set aside, as DIRECTORY/damaged-STEP.

        Raises:
          ValueError: there are some and all are damaged; all stay where they are.
        """
        self.wait()
        return cluster.told(self._newest)

    def _newest(self) -> tuple[int, dict] | None:
        step, damaged = _whole(self._directory)
        if step is None:
            return None
        for other, fault in damaged.items():
            aside = self._aside(other)
            (self._directory / str(other)).rename(aside)
            self._say(
                f"checkpoint {other} is damaged ({fault}) and lies in {aside}; "
                f"checkpoint {step} is used"
            )
        return step, _host(self._directory / str(step))

    def restore(self, step: int, like: PyTree) -> PyTree:
        """The tree that was saved under `step`.

        Args:
          step: from `newest`.
          like: a tree of the same structure, shapes, types and shardings; its values
            are not read.

        Raises:
          ValueError: the saved tree has another structure or other shapes.
        """
        wanted = jax.tree.map(
            ocp.utils.to_shape_dtype_struct, jax.tree.map(_array, like)
        )
        return self._orbax.restore(
            self._directory / str(step) / "tree",
            args=ocp.args.StandardRestore(wanted),
        )

    def close(self) -> None:
        """Waits as `wait` does; may be called twice."""
        try:
            self.wait()
        finally:
            self._thread.shutdown()
            self._orbax.close()

    def _cleared(self) -> None:
        """The folder, without what a crash has left unfinished."""
        self._directory.mkdir(parents=True, exist_ok=True)
        for part in self._directory.glob(_PART + "*"):
            shutil.rmtree(part)

    def _finish(self, step: int, size: int, host: str, score: float | None) -> None:
        part = self._directory / f"{_PART}{step}"
        try:
            self._orbax.wait_until_finished()
            if not cluster.first():
                return
            artifacts.write_atomic(part / "host.json", host)
            manifest.write(part, {"score": score})
            part.rename(self._directory / str(step))
        except (OSError, ValueError, RuntimeError) as fault:
            if cluster.lost(fault):
                raise
            raise self._failed(step, size, fault) from fault
        self._prune()

    def _failed(self, step: int, size: int, fault: Exception) -> Unsaved:
        """Clears away what there is of a save, and says what was wrong.

        Other processes may still be writing their parts: then the next start clears.
        """
        free = shutil.disk_usage(self._directory).free
        if cluster.count() == 1:
            shutil.rmtree(self._directory / f"{_PART}{step}", ignore_errors=True)
        last = max(_steps(self._directory), default=None)
        kept = "there is none before it" if last is None else f"{last} is still whole"
        full = getattr(fault, "errno", None) in FULL or "No space left" in str(fault)
        why = "no space left" if full else f"{type(fault).__name__}: {fault}"
        return Unsaved(
            f"checkpoint {step} of about {_megabytes(size)} cannot be written to "
            f"{self._directory} ({_megabytes(free)} free): {why}; {kept}. Make room and "
            "rerun the same command"
        )

    def _prune(self) -> None:
        """Deletes what is neither among the newest nor among the best."""
        steps = sorted(_steps(self._directory))
        scores = {
            step: manifest.about(self._directory / str(step)).get("score")
            for step in (steps if self._best else ())
        }
        ranked = sorted((s, n) for n, s in scores.items() if isinstance(s, float | int))
        best = [step for _, step in ranked[max(0, len(ranked) - self._best) :]]
        for step in set(steps[: -self._keep]) - set(best):
            # Named as unfinished first: what a crash leaves of it is no checkpoint.
            gone = self._directory / f"{_PART}gone-{step}"
            (self._directory / str(step)).rename(gone)
            shutil.rmtree(gone, ignore_errors=True)

    def _aside(self, step: int) -> Path:
        """A free name for a damaged checkpoint."""
        names = [f"damaged-{step}"] + [f"damaged-{step}.{n}" for n in range(2, 1000)]
        paths = (self._directory / name for name in names)
        return next(path for path in paths if not path.exists())


def read(
    directory: Path | str,
    branch: str,
    step: int | None = None,
    say: Callable[[str], None] = print,
):
    """One branch of a saved tree, as numpy arrays, without a template.

    Args:
      directory: of a Checkpointer; nothing in it is changed.
      branch: name of a field of the saved tree.
      step: None: the newest that is whole.
      say: told of newer ones that are damaged, a line at a time.

    Returns:
      (step, the branch, the host's dict).

    Raises:
      ValueError: there is no such checkpoint, or it is damaged; those that are there
        are named.
    """
    folder = Path(directory).absolute()
    steps = sorted(_steps(folder))
    there = ", ".join(map(str, steps)) or "none"
    if step is None and steps:
        step, damaged = _whole(folder)
        for other, fault in damaged.items():
            say(f"checkpoint {other} is damaged ({fault}); checkpoint {step} is read")
    elif step not in steps:
        raise ValueError(f"no checkpoint of step {step} in {directory}; there: {there}")
    elif fault := manifest.fault(folder / str(step)):
        raise ValueError(f"{folder / str(step)} is damaged ({fault}); there: {there}")
    place = folder / str(step)
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as reader:
        saved = reader.metadata(place / "tree").item_metadata.tree[branch]
        wanted = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), saved)
        plain = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), wanted)
        arguments = ocp.args.PyTreeRestore(
            item={branch: wanted}, restore_args={branch: plain}, partial_restore=True
        )
        found = reader.restore(place / "tree", args=arguments)
    return step, found[branch], _host(place)


def _steps(directory: Path) -> Iterator[int]:
    names = [path.name for path in directory.iterdir()] if directory.is_dir() else []
    return (int(name) for name in names if name.isdecimal())


def _whole(directory: Path) -> tuple[int | None, dict[int, str]]:
    """The newest step that is whole, and what is wrong with those after it.

    Raises:
      ValueError: all are damaged.
    """
    damaged: dict[int, str] = {}
    for step in sorted(_steps(directory), reverse=True):
        fault = manifest.fault(directory / str(step))
        if not fault:
            return step, damaged
        damaged[step] = fault
    if damaged:
        rows = "".join(f"\n  {step}: {fault}" for step, fault in damaged.items())
        raise ValueError(
            f"every checkpoint in {directory} is damaged; put one back that is whole, or "
            f"move the folder away to start anew:{rows}"
        )
    return None, damaged


def _host(folder: Path) -> dict:
    return json.loads((folder / "host.json").read_text(encoding="utf-8"))


def _sized(leaf) -> bool:
    return isinstance(leaf, np.ndarray | jax.Array)


def _megabytes(size: int) -> str:
    return f"{size / 1e6:,.1f} MB"


def _array(leaf):
    """Orbax refuses numpy scalars."""
    return np.asarray(leaf) if isinstance(leaf, np.generic) else leaf
