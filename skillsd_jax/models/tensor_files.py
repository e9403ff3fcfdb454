"""safetensors of a Hugging Face folder: one file, or numbered shards and an index."""

import dataclasses
import json
import pathlib
from collections.abc import Callable, Mapping

import ml_dtypes  # noqa: F401  numpy reads bfloat16 once this is imported
import numpy as np
import safetensors
import safetensors.numpy

DTYPES = {
    "F32": "float32",
    "BF16": "bfloat16",
    "F16": "float16",
}  # by their names there
_INDEX, _SINGLE = "model.safetensors.index.json", "model.safetensors"
_ALIGNED = 64  # bytes: what jax takes over on a CPU without a copy


@dataclasses.dataclass(frozen=True)
class Header:
    """Where a tensor lies, its dtype and its shape."""

    path: pathlib.Path
    dtype: str
    shape: tuple[int, ...]


class Tensors:
    """The tensors of a folder by name; their values are read when asked for.

    No file stays open: pages that were read count as memory in use until it is closed.

    Raises:
      FileNotFoundError: there are no weights, or a shard is missing.
      ValueError: a file is damaged, or the index names what its shard lacks.
    """

    def __init__(self, folder: pathlib.Path):
        self.folder = folder
        # As transformers: a single file wins over an index.
        whole = (folder / _SINGLE).is_file() or not (folder / _INDEX).is_file()
        listed = {} if whole else _weight_map(folder / _INDEX)
        files = {_SINGLE} if whole else set(listed.values())
        missing = sorted(file for file in files if not (folder / file).is_file())
        if missing:
            raise FileNotFoundError(
                f"{folder} has no weights: {', '.join(missing)} is missing; only "
                "safetensors are read"
            )
        headers = {file: _headers(folder / file) for file in sorted(files)}
        self._headers = {k: v for found in headers.values() for k, v in found.items()}
        for name, file in listed.items():
            if name not in headers[file]:
                raise ValueError(
                    f"{folder / _INDEX} says that {name} is in {file}, which lacks it; "
                    "download the folder again"
                )
            self._headers[name] = headers[file][name]

    @property
    def names(self) -> set[str]:
        return set(self._headers)

    def header(self, name: str) -> Header:
        """Of a tensor whose dtype is one we read."""
        header = self._headers[name]
        if header.dtype not in DTYPES:
            raise ValueError(
                f"{header.path}: {name} is {header.dtype}; only {', '.join(DTYPES)} are "
                "read, so convert the checkpoint first"
            )
        return header

    def dtype(self, name: str) -> np.dtype:
        return np.dtype(DTYPES[self.header(name).dtype])

    def read(self, name: str, part: tuple[slice, ...] = (slice(None),)) -> np.ndarray:
        """The tensor, or the part of it between the slices' bounds; nothing else."""
        with _open(self.header(name).path) as file:
            return file.get_slice(name)[part]


def json_object(path: pathlib.Path) -> dict:
    """What the file holds, which must be a JSON object."""
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing")
    try:
        value = json.loads(path.read_bytes())
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not JSON: {error}") from error
    if isinstance(value, dict):
        return value
    raise ValueError(f"{path} holds a {type(value).__name__}, not an object")


def aligned(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """An empty array that jax takes over on a CPU without a copy."""
    size = int(np.prod(shape)) * dtype.itemsize
    raw = np.empty(size + _ALIGNED, np.uint8)
    start = -raw.ctypes.data % _ALIGNED
    return raw[start : start + size].view(dtype).reshape(shape)


def write(
    folder: pathlib.Path,
    sizes: Mapping[str, int],
    read: Callable[[str], np.ndarray],
    shard_bytes: int,
) -> None:
    """Writes the tensors, one shard in memory at a time; older weights go away.

    Args:
      folder: exists.
      sizes: name → bytes, in the order in which they are written.
      read: gives a tensor by name, contiguous.
      shard_bytes: of one file, at most, unless a single tensor is larger.
    """
    for old in (*folder.glob("model*.safetensors"), folder / _INDEX):
        old.unlink(missing_ok=True)
    shards = _shards(sizes, shard_bytes)
    where = {}
    for number, names in enumerate(shards, 1):
        file = f"model-{number:05}-of-{len(shards):05}.safetensors"
        file = _SINGLE if len(shards) == 1 else file
        part = {name: read(name) for name in names}
        safetensors.numpy.save_file(part, folder / file, metadata={"format": "pt"})
        del part  # before the next one is read
        where |= dict.fromkeys(names, file)
    if len(shards) > 1:
        total = {"total_size": sum(sizes.values())}
        text = json.dumps({"metadata": total, "weight_map": where}, indent=2)
        (folder / _INDEX).write_text(text + "\n", encoding="utf-8")


def _shards(sizes: Mapping[str, int], most: int) -> list[list[str]]:
    shards: list[list[str]] = [[]]
    filled = 0
    for name, size in sizes.items():
        if shards[-1] and filled + size > most:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled += size
    return shards


def _weight_map(path: pathlib.Path) -> dict[str, str]:
    where = json_object(path).get("weight_map")
    if not isinstance(where, dict) or not where:
        raise ValueError(f"{path} has no weight_map of tensor names to files")
    for name, file in where.items():
        if not isinstance(file, str) or pathlib.PurePath(file).name != file:
            raise ValueError(
                f"{path}: {name} is in {file!r}, which is no file of the folder"
            )
    return where


def _headers(path: pathlib.Path) -> dict[str, Header]:
    with _open(path) as file:
        slices = {name: file.get_slice(name) for name in sorted(file.keys())}
        return {
            name: Header(path, header.get_dtype(), tuple(header.get_shape()))
            for name, header in slices.items()
        }


def _open(path: pathlib.Path):
    try:
        return safetensors.safe_open(path, framework="np")
    except safetensors.SafetensorError as error:
        raise ValueError(f"{path} is damaged or cut short: {error}") from error
