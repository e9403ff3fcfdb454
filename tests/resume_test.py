"""A run that is killed ends as one that is not: files, figures and weights, bit by bit.

The fast tests kill a tiny run inside a save. The slow ones kill the smoke configs at
random moments: Sokoban twice, and with all who write skills, ALFWorld too, as often as
asked, with a report of each kill:
SKILLSD_TEST_KILLS=10 python -m pytest -s -m slow tests/resume_test.py
"""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest

from skillsd_jax import checkpoint, metrics, presets
from skillsd_jax import config as settings
from tests.skills.server import serving

ROOT = Path(__file__).parent.parent
PROGRAM = """
import json, os, pathlib, signal, sys, time
from skillsd_jax import config, manifest, train

def killed(*_):
    os.kill(os.getpid(), signal.{signal})

def killed_when_saved():
    while not any(pathlib.Path({workdir!r}, "checkpoints").glob("[0-9]")):
        time.sleep(0.01)
    killed()

{patch}
train.run(config.from_dict(json.loads({text!r})), {workdir!r})
"""
IN_A_SAVE = """
write = manifest.write
manifest.write = lambda folder, about: (killed if "-3" in folder.name else write)(folder, about)
"""
IN_A_SUMMARY = """
take = train.summaries.Summaries.take
def taken(self, played, bank, params):
    made = take(self, played, bank, params)
    if played.iteration == 2:
        killed_when_saved()
    return made
train.summaries.Summaries.take = taken
"""
IN_AN_EVALUATION = """
during = train.panels.Panels.during
def played(self, done, *weights):
    if done == 2:
        self.student(weights[0])
        killed_when_saved()
    return during(self, done, *weights)
train.panels.Panels.during = played
"""
IN_AN_ITERATION = """
reuse = train.experience.reuse
def told(shown, bank, iteration):
    if iteration == 1:
        killed()
    return reuse(shown, bank, iteration)
train.experience.reuse = told
"""
ASKED = "SKILLSD_TEST_KILLS" in os.environ
KILLS = int(os.environ.get("SKILLSD_TEST_KILLS", "2"))
SECONDS = 1800.0  # no single run takes longer


def tiny(tmp: Path) -> settings.Config:
    config = settings.Config(iterations=4, checkpoint_every=1, cache=str(tmp / "cache"))
    config.environment.train_tasks = 6
    config.model.width, config.model.layers, config.model.hidden = 16, 1, 32
    config.model.heads = config.model.kv_heads = 2
    config.model.head_size = 8
    config.rollout.prompts = config.rollout.group_size = 2
    config.rollout.rows = 4
    config.optimizer.minibatches, config.optimizer.micro_rows = 2, 8
    config.imitate.steps, config.imitate.rows = 5, 4
    config.imitate.episodes = config.imitate.tasks = 30
    config.evaluate.tasks = config.evaluate.teacher_tasks = 4
    config.evaluate.every = 2
    return config


def start(
    config: settings.Config, workdir: Path, patch: str = "", sent: str = "SIGKILL"
) -> subprocess.Popen:
    text = json.dumps(settings.to_dict(config))
    values = {"patch": patch, "signal": sent, "text": text, "workdir": str(workdir)}
    return subprocess.Popen(
        [sys.executable, "-c", PROGRAM.format(**values)],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def whole(config: settings.Config, workdir: Path) -> str:
    """Runs to the end; what it said."""
    said, faults = (process := start(config, workdir)).communicate(timeout=SECONDS)
    assert process.returncode == 0, faults
    return said


def differences(a: Path, b: Path) -> list[str]:
    """What two finished runs do not share, times aside."""
    found = []
    for name in ("skills.jsonl", "config.json"):
        found += [name] * ((a / name).read_bytes() != (b / name).read_bytes())
    if figures(a) != figures(b):
        found.append("metrics.jsonl")
    episodes = [
        {path.name: path.read_bytes() for path in (work / "trajectories").iterdir()}
        for work in (a, b)
    ]
    found += ["trajectories"] * (episodes[0] != episodes[1])
    found += ["summary.json"] * (summary(a) != summary(b))
    for branch in ("params", "teacher", "optimizer", "plateau"):
        (done, one, host), (other, two, other_host) = (
            checkpoint.read(work / "checkpoints", branch) for work in (a, b)
        )
        one, two = jax.tree.leaves(one), jax.tree.leaves(two)
        same = len(one) == len(two) and all(map(np.array_equal, one, two))
        found += [] if same and done == other else [branch]
        del host["seconds"], other_host["seconds"]
        found += ["host.json"] * (host != other_host)
    hidden = [path.name for path in b.rglob(".*") if path.name != ".lock"]
    return found + hidden


def figures(work: Path) -> list[dict]:
    timing = ("seconds", "compilations")
    rows = metrics.read(work / "metrics.jsonl")
    return [{k: v for k, v in row.items() if k not in timing} for row in rows]


def summary(work: Path) -> dict:
    found = json.loads((work / "summary.json").read_text())
    timing = ("seconds", "warm_start")  # the warm start says whether it was cached
    return {k: v for k, v in found.items() if k not in timing}


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    tmp = tmp_path_factory.mktemp("resume")
    whole(tiny(tmp), tmp / "whole")
    return tmp


def test_a_run_killed_in_a_save_ends_as_if_it_were_not(uninterrupted):
    tmp, work = uninterrupted, uninterrupted / "killed"
    process = start(tiny(tmp), work, IN_A_SAVE)
    process.communicate(timeout=SECONDS)
    assert process.returncode == -signal.SIGKILL
    parts = [path.name for path in (work / "checkpoints").iterdir()]
    assert min(parts) == ".part-3" and "3" not in parts
    # What else a kill may leave: half a line, half a file, a line beyond the save.
    with open(work / "metrics.jsonl", "a") as file:
        file.write('{"iteration": 7, "success": 1.0}\n{"iteration": 8, "succ')
    (work / "trajectories" / f".{'0' * 32}-000003.jsonl").write_text("{")
    said = whole(tiny(tmp), work)
    assert "resumed after iteration 2" in said
    assert differences(tmp / "whole", work) == []


@pytest.mark.parametrize(
    "patch", [IN_A_SUMMARY, IN_AN_EVALUATION], ids=["summary", "panel"]
)
def test_a_run_killed_between_saves_ends_as_if_it_were_not(
    patch, uninterrupted, tmp_path
):
    tmp, work = uninterrupted, tmp_path / "killed"
    process = start(tiny(tmp), work, patch)
    process.communicate(timeout=SECONDS)
    assert process.returncode == -signal.SIGKILL
    assert "resumed after iteration" in whole(tiny(tmp), work)
    assert differences(tmp / "whole", work) == []


def test_a_damaged_checkpoint_costs_the_iterations_since_the_one_before(uninterrupted):
    tmp, work = uninterrupted, uninterrupted / "killed-too"
    process = start(tiny(tmp), work, IN_A_SAVE)
    process.communicate(timeout=SECONDS)
    (work / "checkpoints" / "2" / "host.json").write_text("{}")
    said = whole(tiny(tmp), work)
    assert "checkpoint 2 is damaged (host.json has 2 bytes" in said
    assert "resumed after iteration 1" in said
    assert differences(tmp / "whole", work) == []


def test_a_terminated_run_finishes_its_iteration_saves_and_says_so(uninterrupted):
    """Its checkpoints are due after the last iteration alone."""
    tmp, work = uninterrupted, uninterrupted / "terminated"
    config = tiny(tmp)
    config.checkpoint_every = 4
    process = start(config, work, IN_AN_ITERATION, "SIGTERM")
    said, faults = process.communicate(timeout=SECONDS)
    assert process.returncode == 143, faults
    assert said.endswith("stopped after iteration 2; rerun the same command to go on\n")
    assert faults == ""
    assert [path.name for path in (work / "checkpoints").iterdir()] == ["2"]
    assert "resumed after iteration 2" in whole(config, work)
    assert figures(work) == figures(tmp / "whole")
    assert summary(work)["after"] == summary(tmp / "whole")["after"]


def test_the_comparison_sees_one_bit(uninterrupted, tmp_path):
    other = tmp_path / "other"
    shutil.copytree(uninterrupted / "whole", other)
    assert differences(uninterrupted / "whole", other) == []
    text = (other / "metrics.jsonl").read_text()
    (other / "metrics.jsonl").write_text(text.replace('"loss": ', '"loss": 1', 1))
    (other / "trajectories" / "000001.jsonl").unlink()
    assert differences(uninterrupted / "whole", other) == [
        "metrics.jsonl",
        "trajectories",
    ]


@pytest.mark.slow
@pytest.mark.parametrize("maker", ["template", "policy", "endpoint"])
@pytest.mark.parametrize("name", ["sokoban", "alfworld"])
def test_kills_at_random_moments_change_nothing(name, maker, tmp_path):
    """Seeds are fixed, moments are not: a busy machine shifts them."""
    if (name, maker) != ("sokoban", "policy") and not ASKED:
        pytest.skip("takes minutes: SKILLSD_TEST_KILLS=10")
    if name == "alfworld":
        pytest.importorskip("alfworld")
    config = presets.load(str(ROOT / "configs" / f"{name}.py")).get_config("smoke")
    config.iterations, config.skills.maker = 4, maker
    config.cache = os.environ.get("SKILLSD_TEST_CACHE", str(tmp_path / "cache"))
    with serving("good") as server:  # asked by this run alone: the others replay
        config.skills.endpoint.model = "m"
        if maker == "endpoint":
            config.skills.endpoint.url = server.url
            config.skills.endpoint.record = str(tmp_path / "answers.jsonl")
        # Fills the caches: what is timed is a restart.
        whole(config, tmp_path / "warm")
    if maker == "endpoint":
        config.skills.endpoint.replay = config.skills.endpoint.record
        config.skills.endpoint.record = ""
    begun = time.monotonic()
    whole(config, tmp_path / "whole")
    length = time.monotonic() - begun
    assert figures(tmp_path / "whole") == figures(tmp_path / "warm")
    rng, kills, work = random.Random(f"{name} {maker}"), 0, tmp_path / "killed"
    while kills < KILLS:
        process = start(config, work)
        moment = rng.uniform(0.1, 1.0) * length
        try:
            process.communicate(timeout=moment)
        except subprocess.TimeoutExpired:
            process.kill()
            said = process.communicate()[0].splitlines() or ["nothing yet"]
            kills += 1
            print(f"{name} {maker}: kill {kills} after {moment:.0f} s, at: {said[-1]}")
            continue
        print(f"{name} {maker}: done before {moment:.0f} s, once more from the start")
        assert differences(tmp_path / "whole", work) == []
        shutil.rmtree(work)
    whole(config, work)
    assert differences(tmp_path / "whole", work) == []
