import json

import pytest

from skillsd_jax import manifest


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep" / "a").write_bytes(b"weights" * 1000)
    (tmp_path / "b").write_bytes(b"")
    manifest.write(tmp_path, {"score": 0.5})
    return tmp_path


def test_a_folder_as_it_was_written_has_no_fault(folder):
    assert manifest.fault(folder) == ""
    assert manifest.about(folder) == {"score": 0.5}
    (folder / "later").write_text("added")
    assert manifest.fault(folder) == ""


def cut(folder):
    (folder / "deep" / "a").write_bytes(b"weights")


def flip(folder):
    (folder / "deep" / "a").write_bytes(b"Weights" + b"weights" * 999)


def lose(folder):
    (folder / "b").unlink()


def replace(folder):
    lose(folder)
    (folder / "b").mkdir()


def forget(folder):
    (folder / manifest.NAME).unlink()


def tear(folder):
    text = (folder / manifest.NAME).read_text()
    (folder / manifest.NAME).write_text(text[: len(text) // 2])


def confuse(folder):
    (folder / manifest.NAME).write_text(json.dumps({"about": {}, "files": {"b": 3}}))


@pytest.mark.parametrize(
    "damage, said",
    [
        (cut, "deep/a has 7 bytes instead of 7000"),
        (flip, "deep/a holds other bytes than were written"),
        (lose, "b is missing"),
        (replace, "b is missing"),
        (forget, "manifest.json is missing"),
        (tear, "manifest.json cannot be read"),
        (confuse, "cannot unpack"),
    ],
)
def test_every_damage_is_named(folder, damage, said):
    damage(folder)
    assert said in manifest.fault(folder)


@pytest.mark.parametrize("text", ["", "[]", "{}", "null", '{"about": 1, "files": {}}'])
def test_a_manifest_that_is_none_tells_nothing(folder, text):
    (folder / manifest.NAME).write_text(text)
    assert manifest.about(folder) == {}
    assert "cannot be read" in manifest.fault(folder)
