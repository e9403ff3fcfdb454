"""Whose a folder is, and what is refused in it."""

import functools
import json
import os
import re

import pytest

from skillsd_jax import config, runfolder
from skillsd_jax.validation import Refused


def test_a_workdir_is_claimed_once_and_taken_up_again(tmp_path):
    folder = str(tmp_path / "a" / "run")
    assert runfolder.claim(folder, config.Config()) is False
    assert runfolder.claim(folder, config.Config()) is True


@pytest.mark.parametrize("fault", [Refused, KeyboardInterrupt])
def test_a_new_workdir_is_given_back_by_a_refusal_alone(fault, tmp_path):
    for folder, known in ((tmp_path / "new", False), (tmp_path / "old", True)):
        if known:
            runfolder.claim(str(folder), config.Config())
        with pytest.raises(fault), runfolder.claimed(str(folder), config.Config()):
            assert (folder / "config.json").exists()
            raise fault("no")
        given_back = fault is Refused and not known
        assert (folder / "config.json").exists() != given_back


def test_a_workdir_of_other_settings_is_refused_with_the_difference(tmp_path):
    runfolder.claim(str(tmp_path), config.Config())
    before = (tmp_path / "config.json").read_text()
    other = config.Config()
    other.objective.sdl_lambda = 0.5
    held = config.Objective().sdl_lambda
    message = re.escape(f"objective.sdl_lambda: {held} there, 0.5 now")
    with pytest.raises(Refused, match=message):
        runfolder.claim(str(tmp_path), other)
    assert (tmp_path / "config.json").read_text() == before


def test_a_workdir_of_an_earlier_version_has_its_new_settings_at_their_defaults(
    tmp_path,
):
    runfolder.claim(str(tmp_path), config.Config())
    path = tmp_path / "config.json"
    earlier = json.loads(path.read_text())
    del earlier["skills"]["maker"], earlier["rollout"]["hinted_groups"]
    path.write_text(json.dumps(earlier))
    assert runfolder.claim(str(tmp_path), config.Config())
    other = config.Config()
    other.skills.maker = "policy"
    with pytest.raises(Refused, match="skills.maker: 'template' there"):
        runfolder.claim(str(tmp_path), other)


def test_a_workdir_that_cannot_be_written_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(Refused, match="cannot be used: Not a directory"):
        runfolder.claim(str(tmp_path / "file" / "run"), config.Config())


def test_a_workdir_without_permission_is_refused(tmp_path, monkeypatch):
    # The file mode does not bind a superuser, so the system's answer is played.
    def denied(*_, **__):
        raise PermissionError(13, os.strerror(13))

    monkeypatch.setattr(runfolder, "write_atomic", denied)
    with pytest.raises(Refused, match="Permission denied; pass --workdir"):
        runfolder.claim(str(tmp_path), config.Config())


def test_a_run_whose_folder_became_read_only_is_refused(tmp_path, monkeypatch):
    runfolder.claim(str(tmp_path), config.Config())

    def denied(*_, **__):
        raise OSError(30, os.strerror(30))

    monkeypatch.setattr(runfolder, "write_atomic", denied)
    with pytest.raises(Refused, match="Read-only file system; pass"):
        runfolder.claim(str(tmp_path), config.Config())


def test_a_damaged_config_file_is_refused(tmp_path):
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(Refused, match="damaged"):
        runfolder.claim(str(tmp_path), config.Config())


def test_two_processes_do_not_write_to_one_folder(tmp_path):
    claim = functools.partial(runfolder.claimed, str(tmp_path), config.Config())
    refused = pytest.raises(Refused, match="another process is at work")
    with claim(), refused, claim():
        pass
    with claim():
        pass


def test_a_bucket_is_no_folder():
    with pytest.raises(Refused, match="mount the bucket"):
        runfolder.claim("gs://bucket/run", config.Config())
