import dataclasses
import enum
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from skillsd_jax import artifacts, config


class Colour(enum.Enum):
    RED = 1


@dataclasses.dataclass
class Point:
    x: int
    y: float = 0.0


def test_a_write_that_fails_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "a" / "file"
    artifacts.write_atomic(path, "old")

    def full(_):
        raise OSError("no space left")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="no space"):
        artifacts.write_atomic(path, "new")
    assert path.read_text() == "old"
    assert os.listdir(path.parent) == ["file"]


def test_text_is_written_as_utf8_and_bytes_as_they_are(tmp_path):
    artifacts.write_atomic(tmp_path / "text", "Δ\n")
    artifacts.write_atomic(tmp_path / "bytes", b"\r\n\xff")
    assert (tmp_path / "text").read_bytes() == "Δ\n".encode()
    assert (tmp_path / "bytes").read_bytes() == b"\r\n\xff"


def test_a_hash_is_the_same_in_every_process():
    code = (
        "import numpy as np; from skillsd_jax import artifacts, config;"
        "print(artifacts.content_hash(config.Config(), {'b', 'a'}, np.arange(3), None))"
    )
    found = {
        subprocess.run(
            [sys.executable, "-c", code],
            check=True,
            capture_output=True,
            text=True,
            cwd=Path(__file__).parent.parent,
            env=os.environ | {"PYTHONHASHSEED": seed},
        ).stdout.strip()
        for seed in ("1", "2")
    }
    here = artifacts.content_hash(config.Config(), {"b", "a"}, np.arange(3), None)
    assert found == {here}
    assert len(here) == 20


@pytest.mark.parametrize(
    "a, b",
    [
        ((1,), (1.0,)),
        ((1,), (True,)),
        ((1,), ("1",)),
        (("ab", "c"), ("a", "bc")),
        (([1], 2), ([1, 2],)),
        (({"a": 1},), ({"a": 2},)),
        (({"a": "b"},), ({"b": "a"},)),
        ((Point(1),), (Point(2),)),
        ((Point(1),), ({"x": 1, "y": 0.0},)),
        ((Colour.RED,), (1,)),
        ((b"a",), ("a",)),
        ((np.zeros(2, np.int32),), (np.zeros(2, np.float32),)),
        ((np.zeros((2, 1)),), (np.zeros((1, 2)),)),
        ((None,), ("None",)),
    ],
)
def test_different_values_have_different_hashes(a, b):
    assert artifacts.content_hash(*a) != artifacts.content_hash(*b)


def test_equal_values_have_equal_hashes():
    same = artifacts.content_hash
    assert same({"a": 1, "b": 2}) == same({"b": 2, "a": 1})
    assert same([1, 2]) == same((1, 2))
    assert same(np.float64(0.5)) == same(0.5)
    assert same(np.arange(6).reshape(2, 3).T.copy()) == same(
        np.arange(6).reshape(2, 3).T
    )


def test_a_path_is_hashed_by_what_lies_there(tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "x").write_text("1")
    same = artifacts.content_hash
    assert same(tmp_path / "a") == same(tmp_path / "b")
    (tmp_path / "b" / "x").write_text("2")
    assert same(tmp_path / "a") != same(tmp_path / "b")
    with pytest.raises(FileNotFoundError):
        same(tmp_path / "c")


def test_a_files_name_does_not_run_into_its_content(tmp_path):
    for folder, name, text in (("a", "x", "yz"), ("b", "xy", "z")):
        artifacts.write_atomic(tmp_path / folder / name, text)
    same = artifacts.content_hash
    assert same(tmp_path / "a") != same(tmp_path / "b")


def test_a_value_without_a_stable_form_is_refused():
    with pytest.raises(TypeError, match="object"):
        artifacts.content_hash(object())
    with pytest.raises(TypeError, match="objects"):
        artifacts.content_hash(np.array([object()]))


def save(path, value):
    artifacts.write_atomic(path, value)


def test_a_cached_value_is_made_once_and_always_loaded(tmp_path):
    made = []

    def make():
        made.append(1)
        return "value"

    def load(path):
        return f"loaded {path.read_text()}"

    for _ in range(2):
        found = artifacts.cached(tmp_path / "cache", "key", make, load, save)
        assert found == "loaded value"
    assert len(made) == 1


def test_an_entry_whose_save_fails_is_not_there(tmp_path):
    def fails(path, value):
        path.mkdir()
        (path / "half").write_text(value)
        raise OSError("no space left")

    with pytest.raises(OSError, match="no space"):
        artifacts.cached(tmp_path, "key", lambda: "value", Path.read_text, fails)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_another_process_made_first_is_loaded(tmp_path):
    def save_folder(path, value):
        path.mkdir()
        (path / "file").write_text(value)

    def make():
        save_folder(tmp_path / "key", "theirs")
        return "ours"

    def load(path):
        return (path / "file").read_text()

    assert artifacts.cached(tmp_path, "key", make, load, save_folder) == "theirs"
    assert [path.name for path in tmp_path.iterdir()] == ["key"]


def test_a_key_is_a_file_name(tmp_path):
    with pytest.raises(ValueError, match="plain file name"):
        artifacts.cached(tmp_path, "../key", str, Path.read_text, save)


def test_the_cache_lies_where_it_is_told_or_in_the_users_own(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert artifacts.cache_folder() == tmp_path / "skillsd_jax"
    assert artifacts.cache_folder("/else") == Path("/else")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert artifacts.cache_folder() == Path.home() / ".cache" / "skillsd_jax"


def test_what_a_crash_left_of_a_write_is_swept_and_nothing_else(tmp_path):
    (tmp_path / "deep").mkdir()
    left = [tmp_path / f".{'0a' * 16}-x.json", tmp_path / "deep" / f".{'f' * 32}-y"]
    kept = [
        tmp_path / "x.json",
        tmp_path / ".hidden",
        tmp_path / "deep" / f"{'f' * 32}-",
    ]
    for path in (*left, *kept):
        path.write_text("")
    artifacts.sweep(tmp_path)
    assert {p for p in tmp_path.rglob("*") if p.is_file()} == set(kept)
