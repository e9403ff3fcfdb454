"""What a finished folder held, to tell later whether it still does."""

import errno
import json
import zlib
from pathlib import Path
from typing import Any

from skillsd_jax.artifacts import write_atomic

NAME = "manifest.json"
_BLOCK = 1 << 20  # bytes read at once


def write(folder: Path, about: dict[str, Any]) -> None:
    """Writes the size and the CRC-32 of every file into the folder, as its last file.

    Args:
      folder: complete but for this.
      about: whatever JSON can hold, for `about`.
    """
    files = {
        path.relative_to(folder).as_posix(): [path.stat().st_size, _checksum(path)]
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }
    text = json.dumps({"about": about, "files": files}, indent=1)
    write_atomic(folder / NAME, text + "\n")


def about(folder: Path) -> dict[str, Any]:
    """What `write` was told; nothing where there is no manifest, or a damaged one."""
    try:
        return _read(folder)["about"]
    except ValueError:
        return {}


def fault(folder: Path) -> str:
    """What is wrong with the files of a folder; '' if they are as they were.

    A file that was added later is no fault.

    Raises:
      OSError: they cannot be read, which says nothing about them.
    """
    try:
        files = _read(folder)["files"]
        for name, (size, checksum) in files.items():
            path = folder / name
            if not path.is_file():
                return f"{name} is missing"
            if path.stat().st_size != size:
                return f"{name} has {path.stat().st_size} bytes instead of {size}"
            if _checksum(path) != checksum:
                return f"{name} holds other bytes than were written"
    except (TypeError, ValueError) as error:
        return str(error)
    except OSError as error:
        if error.errno != errno.EIO:
            raise  # cannot be told: it may be whole
        return str(error)
    return ""


def _read(folder: Path) -> dict[str, dict]:
    """Raises ValueError where there is no manifest, or one that is damaged itself."""
    try:
        found = json.loads((folder / NAME).read_text(encoding="utf-8"))
        whole = found.keys() == {"about", "files"}
        if not whole or not all(isinstance(part, dict) for part in found.values()):
            raise ValueError("wrong fields")
    except FileNotFoundError as error:
        raise ValueError(
            f"{NAME} is missing: damaged, or saved by an earlier version"
        ) from error
    except (AttributeError, ValueError) as error:
        raise ValueError(f"{NAME} cannot be read ({error})") from error
    return found


def _checksum(path: Path) -> int:
    total = 0
    with open(path, "rb") as file:
        while block := file.read(_BLOCK):
            total = zlib.crc32(block, total)
    return total
