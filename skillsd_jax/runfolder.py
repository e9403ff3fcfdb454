"""The folder of a run: whose it is, and that one run at a time writes to it."""

import contextlib
import errno
import fcntl
import json
import os
from collections.abc import Iterator
from pathlib import Path

from skillsd_jax.artifacts import sweep, write_atomic
from skillsd_jax.config import Config, difference, from_dict, to_dict
from skillsd_jax.validation import Refused

UNLOCKED = (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS)  # file systems without locks


def claim(workdir: str, config: Config) -> bool:
    """Makes the folder a run's own by writing config.json into it.

    Returns:
      Whether a run with the same settings was there before, to go on from.

    Raises:
      Refused: it belongs to a run with other settings, or cannot be written.
    """
    path = _check_folder(workdir) / "config.json"
    try:
        before = _completed(json.loads(path.read_text())) if path.exists() else None
        changed = difference(before or {}, to_dict(config))
        # A run may go on over other devices: they change nothing but rounding.
        changed = {k: v for k, v in changed.items() if not k.startswith("mesh.")}
        if before is None or not changed:
            # Also where it is there already: the folder may have become read-only.
            write_atomic(path, json.dumps(to_dict(config), indent=2) + "\n")
            return before is not None
    except OSError as error:
        raise _unusable(workdir, error) from error
    except json.JSONDecodeError as error:
        raise Refused(f"{path} is damaged; pass another --workdir") from error
    rows = [f"  {name}: {a!r} there, {b!r} now" for name, (a, b) in changed.items()]
    raise Refused(
        f"workdir {workdir!r} belongs to a run with other settings; pass another "
        f"--workdir or the same settings\n" + "\n".join(rows)
    )


@contextlib.contextmanager
def claimed(workdir: str, config: Config) -> Iterator[None]:
    """`claim` for as long as the run goes on; taken back where a new one is refused.

    Raises:
      Refused: as `claim` does, or another process is at work there.
    """
    with _alone(workdir):
        known = claim(workdir, config)
        sweep(Path(workdir))
        try:
            yield
        except Refused:
            if not known:
                (Path(workdir) / "config.json").unlink()
            raise


@contextlib.contextmanager
def _alone(workdir: str) -> Iterator[None]:
    """A lock that goes with its process, however that ends."""
    folder = _check_folder(workdir)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = os.open(folder / ".lock", os.O_RDWR | os.O_CREAT, 0o666)
    except OSError as error:
        raise _unusable(workdir, error) from error
    try:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise Refused(
                f"another process is at work in workdir {workdir!r}; wait for it, stop it, "
                "or pass another --workdir"
            ) from error
        except OSError as error:
            if error.errno not in UNLOCKED:
                raise
        yield
    finally:
        os.close(file)


def _check_folder(workdir: str) -> Path:
    if "://" in workdir:
        raise Refused(
            f"workdir {workdir!r} is no folder; mount the bucket and pass where it is "
            "mounted"
        )
    return Path(workdir)


def _unusable(workdir: str, error: OSError) -> Refused:
    return Refused(
        f"workdir {workdir!r} cannot be used: {error.strerror}; "
        f"pass --workdir=FOLDER that can be written"
    )


def _completed(before: dict) -> dict:
    """Settings of an earlier version: what it did not have is at its default."""
    try:
        return to_dict(from_dict(before))
    except (ValueError, AttributeError, TypeError):
        return before  # has what we do not know; shown as a difference


def read_config(workdir: Path) -> Config:
    """The settings of a run.

    Raises:
      Refused: the folder is none of a run.
    """
    path = workdir / "config.json"
    try:
        return from_dict(json.loads(path.read_text()))
    except OSError as fault:
        raise Refused(f"{workdir} is no run: no config.json in it") from fault
    except (ValueError, AttributeError, TypeError) as fault:
        raise Refused(f"{path} is damaged or of another version: {fault}") from fault
