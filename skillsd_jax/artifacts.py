"""Atomic writes and a cache keyed by what its entries are made from."""

import dataclasses
import enum
import hashlib
import os
import re
import shutil
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar

import numpy as np

T = TypeVar("T")

_PART = re.compile(r"\.[0-9a-f]{32}-")  # begins the names that `_beside` gives


def write_atomic(path: Path | str, data: bytes | str) -> None:
    """Writes a file so that a reader sees the old one or the new one, never a part.

    Missing folders are made. Text is written as UTF-8.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = _beside(path)
    try:
        with open(part, "wb") as file:
            file.write(data.encode() if isinstance(data, str) else data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def sweep(folder: Path) -> None:
    """Deletes what writes that a crash cut short have left in a folder.

    Nobody else may be writing there.
    """
    for path in folder.rglob(".*"):
        if _PART.match(path.name) and path.is_file():
            path.unlink()


def content_hash(*values) -> str:
    """A name for the values: equal values, equal name, in every process and version.

    Takes None, bool, int, float, str, bytes, enums, numpy arrays and scalars,
    dataclasses, and lists, tuples, sets and dicts of them. The order of a dict does
    not matter. 1, 1.0, True and "1" are four values; a list equals a tuple. A `Path`
    stands for what lies there: a file's bytes, a folder's names and bytes.

    Returns:
      20 hexadecimal digits.

    Raises:
      TypeError: a value of another type, whose repr may not be stable.
      FileNotFoundError: a `Path` where nothing lies.
    """
    digest = hashlib.sha256()
    for piece in _pieces(values):
        digest.update(len(piece).to_bytes(8, "little"))
        digest.update(piece)
    return digest.hexdigest()[:20]


def cache_folder(option: str = "") -> Path:
    """The folder a setting names; '' is the user's own cache folder."""
    if option:
        return Path(option).expanduser()
    root = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(root) / "skillsd_jax"


def cached(
    folder: Path | str,
    key: str,
    make: Callable[[], T],
    load: Callable[[Path], T],
    save: Callable[[Path, T], None],
) -> T:
    """What lies in the cache under `key`, made and saved first where nothing does.

    The value returned is always the loaded one, so a first run and a later one go on
    from the same bytes. An entry appears whole or not at all; of two processes that
    make the same entry, one wins and both load it.

    Args:
      folder: of the cache; made where missing.
      key: file name of the entry, best a kind and a `content_hash`.
      make: computes the value.
      load: reads an entry.
      save: writes an entry as one file or one folder at the path it is given, which
        does not exist yet and keeps the suffix of `key`.
    """
    if Path(key).name != key:
        raise ValueError(f"key={key!r} must be a plain file name; leave out folders")
    folder = Path(folder)
    path = folder / key
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        part = _beside(path)
        try:
            save(part, make())
            _move(part, path)
        finally:
            _remove(part)
    return load(path)


def _beside(path: Path) -> Path:
    """A path of its own in the same folder, so that a rename is one step."""
    return path.with_name(f".{uuid.uuid4().hex}-{path.name}")


def _move(part: Path, path: Path) -> None:
    try:
        os.replace(part, path)
    except OSError:
        # A folder is not replaced by a folder: another process was first.
        if not path.is_dir():
            raise


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _pieces(value) -> Iterator[bytes]:
    """A prefix-free spelling of a value: tag, count, parts."""
    if isinstance(value, enum.Enum):
        yield f"enum {type(value).__qualname__}.{value.name}".encode()
    elif isinstance(value, np.generic):
        yield from _pieces(value.item())
    elif value is None or isinstance(value, bool | int | float | str):
        yield f"{type(value).__name__} {value!r}".encode()
    elif isinstance(value, bytes):
        yield b"bytes"
        yield value
    elif isinstance(value, np.ndarray):
        yield from _array(value)
    elif isinstance(value, Path):
        yield from _content(value)
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        yield f"dataclass {type(value).__qualname__}".encode()
        fields = dataclasses.fields(value)
        yield from _pieces({field.name: getattr(value, field.name) for field in fields})
    else:
        yield from _container(value)


def _container(value) -> Iterator[bytes]:
    if isinstance(value, list | tuple):
        yield f"list {len(value)}".encode()
        for item in value:
            yield from _pieces(item)
    elif isinstance(value, set | frozenset):
        yield b"set"
        yield from _pieces(sorted(content_hash(item) for item in value))
    elif isinstance(value, dict):
        yield b"dict"
        pairs = [(content_hash(k), content_hash(v)) for k, v in value.items()]
        yield from _pieces(sorted(pairs))
    else:
        raise TypeError(
            f"content_hash wants plain values, numpy, dataclasses or paths, not "
            f"{type(value).__name__}; turn it into one of them"
        )


def _array(value: np.ndarray) -> Iterator[bytes]:
    if value.dtype.hasobject:
        raise TypeError("content_hash wants numbers in an array, not objects")
    yield f"array {value.dtype.str} {value.shape}".encode()
    yield np.ascontiguousarray(value).tobytes()


def _content(path: Path) -> Iterator[bytes]:
    if path.is_dir():
        files = sorted(p for p in path.rglob("*") if p.is_file())
        yield f"folder {len(files)}".encode()
        for file in files:
            yield file.relative_to(path).as_posix().encode()
            yield file.read_bytes()
    else:
        yield b"file"
        yield path.read_bytes()
