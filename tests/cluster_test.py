"""Processes of one job on this machine, joined over gloo."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import jax
import numpy as np
import pytest

from skillsd_jax import cluster, metrics
from skillsd_jax.validation import Refused

ROOT = Path(__file__).parent.parent
STARTED: list[subprocess.Popen[str]] = []

TELLS = """
import sys
from skillsd_jax import cluster
from skillsd_jax.validation import Refused

with cluster.job(sys.argv[1]):
    me = cluster.index()
    assert cluster.first() == (me == 0)
    assert cluster.gather("x" * (1 + 100_000 * me)) == ["x", "x" * 100_001]
    part = cluster.share(list(range(7)))
    assert cluster.merge({i: (me, i) for i in part}) == {
        i: (int(i >= 3), i) for i in range(7)
    }
    assert cluster.told(lambda: f"of {me}") == "of 0"
    cluster.check_same({"seed": 5})
    try:
        cluster.check_same({"seed": me})
    except Refused as refusal:
        print(refusal)
"""

LOSES = """
import os, sys
from skillsd_jax import cluster

with cluster.job(sys.argv[1]):
    cluster.gather(0)
    if cluster.index() == 1:
        os.kill(os.getpid(), 9)
    while True:
        cluster.gather(0)
"""


FAILS = """
import sys
from skillsd_jax import cluster
from skillsd_jax.validation import Refused

with cluster.job(sys.argv[2]):
    cluster.gather(0)
    if cluster.index() == 1:
        raise {"KeyError": KeyError, "Refused": Refused}[sys.argv[1]]("a reason")
    while True:
        cluster.gather(0)
"""


SAVES = """
import resource, signal, sys, time
import numpy as np
from skillsd_jax import checkpoint, cluster, savepoint, sharding
from skillsd_jax.config import Mesh

folder, who, job = sys.argv[1:]
with cluster.job(job), savepoint.ending(folder), sharding.over(Mesh(fsdp=2)):
    numbers = np.random.default_rng(0).random((64, 1024), np.float32)
    tree = sharding.put({"embed": numbers})  # ones would be packed to nothing
    saved = checkpoint.Checkpointer(folder, keep=2)
    saved.save(1, tree, {})
    saved.wait()
    if cluster.index() == int(who):
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
    saved.save(2, tree, {})
    while True:
        saved.check()
        cluster.gather(0)
        time.sleep(0.1)
"""


def start(
    program: str, arguments: Sequence[str], devices: int = 1
) -> subprocess.Popen[str]:
    flags = os.environ.get("XLA_FLAGS", "")
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")]),
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": f"{flags} --xla_force_host_platform_device_count={devices}",
    }
    process = subprocess.Popen(
        [sys.executable, "-c", program, *arguments],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    STARTED.append(process)
    return process


@pytest.fixture(autouse=True)
def none_is_left():
    yield
    for process in STARTED:
        process.kill()
        process.wait()
    STARTED.clear()


def together(
    program: str, arguments: Sequence[str] = (), devices: int = 1
) -> list[subprocess.Popen[str]]:
    """Two processes of a job, which is the last argument of each."""
    with socket.socket() as found:
        found.bind(("localhost", 0))
        port = found.getsockname()[1]
    jobs = (f"localhost:{port},2,{index}" for index in range(2))
    return [start(program, [*arguments, job], devices) for job in jobs]


def test_processes_share_work_and_tell_each_other():
    for process in together(TELLS):
        said, faults = process.communicate(timeout=120)
        assert process.returncode == 0, faults
        assert "seed differs" in said
        assert "process 0: 0, process 1: 1" in said


def test_who_is_left_alone_says_so_and_ends():
    begun = time.monotonic()
    left, lost = together(LOSES)
    _, faults = left.communicate(timeout=120)
    assert lost.wait() == -9
    assert left.returncode == cluster.LOST
    assert "process 0 of 2 stops" in faults
    assert "start the job again" in faults
    assert time.monotonic() - begun < 60  # the start of both included


@pytest.mark.parametrize("fault", ["KeyError", "Refused"])
def test_what_goes_wrong_in_one_process_ends_the_job(fault):
    begun = time.monotonic()
    left, failed = together(FAILS, [fault])
    _, faults = failed.communicate(timeout=120)
    assert failed.returncode == 1
    assert f"process 1 of 2 stops: {fault}: " in faults and "a reason" in faults
    assert ("Traceback" in faults) == (fault == "KeyError")
    left.communicate(timeout=120)
    assert left.returncode == cluster.LOST
    assert time.monotonic() - begun < 60


@pytest.mark.parametrize("who", [0, 1])
def test_who_cannot_save_says_so_and_the_others_end(who, tmp_path):
    begun, both = time.monotonic(), together(SAVES, [str(tmp_path), str(who)])
    faults = [process.communicate(timeout=100)[1] for process in both]
    assert both[who].returncode == 1, faults[who]
    assert "checkpoint 2 of about" in faults[who].splitlines()[-1]
    assert "1 is still whole" in faults[who]
    assert both[1 - who].returncode == cluster.LOST, faults[1 - who]
    assert "start the job again" in faults[1 - who]
    assert time.monotonic() - begun < 60
    assert (tmp_path / "1").is_dir() and not (tmp_path / "2").exists()


@pytest.mark.parametrize(
    "fault, lost",
    [
        (ValueError("UNKNOWN: Gloo AllGather failed: Connection closed by peer"), True),
        (jax.errors.JaxRuntimeError("UNAVAILABLE: Socket closed"), True),
        (jax.errors.JaxRuntimeError("INTERNAL: ptxas exited with 1"), False),
        (Refused("the endpoint is unavailable"), False),
        (OSError("Connection reset by peer"), False),
    ],
)
def test_what_the_runtime_says_of_a_lost_process_is_told_from_other_faults(fault, lost):
    assert cluster.lost(fault) == lost


def test_one_process_needs_no_job():
    with cluster.job(""):
        assert cluster.gather("a") == ["a"]
        assert cluster.merge({2: "b", 1: "a"}) == {1: "a", 2: "b"}
        assert cluster.share([1, 2, 3]) == [1, 2, 3]
        assert cluster.told(lambda: 7) == 7


def test_where_a_job_cannot_meet_is_said_before_it_waits():
    with socket.socket() as taken:
        taken.bind(("", 0))
        taken.listen()
        port = taken.getsockname()[1]
        for text, fault in (
            (f"localhost:{port},2,0", "Address already in use"),
            ("no-such-host.invalid:1,2,1", "not known|resolution"),
        ):
            with pytest.raises(Refused, match=fault), cluster.job(text):
                pass


@pytest.mark.parametrize("text", ["host:1", "host,2,0", "host:1,2,2", "host:1,2,-1"])
def test_a_job_that_is_none_is_refused(text):
    with pytest.raises(Refused, match="HOST:PORT,PROCESSES,INDEX"), cluster.job(text):
        pass


RUN = """
import json, sys
from pathlib import Path
import train_test
from skillsd_jax import train

folder, name, mesh, job = sys.argv[1:]
config = train_test.toy(Path(folder))
config.iterations, config.rollout.rows, config.rollout.prompts = 5, 8, 4
config.evaluate.every, config.evaluate.greedy = 0, False
config.checkpoint_every = 1
config.mesh.data, config.mesh.fsdp, config.mesh.tp = json.loads(mesh)
train.run(config, f"{folder}/{name}", "" if job == "none" else job)
"""


def train(folder: Path, name: str, mesh: Sequence[int]) -> list[subprocess.Popen]:
    """A run in two processes with two devices each."""
    return together(RUN, [str(folder), name, json.dumps(mesh)], devices=2)


def finish(processes: Sequence[subprocess.Popen]) -> str:
    """What the first of them has printed, when all are done."""
    ends = [process.communicate(timeout=300) for process in processes]
    for process, (_, faults) in zip(processes, ends):
        assert process.returncode == 0, faults
    return ends[0][0]


def curves(work: Path) -> dict[str, list[float]]:
    rows = metrics.read(work / "metrics.jsonl")
    names = ("loss", "gap_rms", "success", "return", "tokens", "environment_steps")
    return {name: [row[name] for row in rows] for name in names}


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """A run in one process, with one device."""
    folder = tmp_path_factory.mktemp("job")
    arguments = [str(folder), "alone", "[1, 1, 1]", "none"]
    finish([start(RUN, arguments, devices=1)])
    return folder


def whole(folder: Path, mesh: Sequence[int]) -> None:
    """Trains to the end in FOLDER/MESH, unless that was done before."""
    if not (folder / str(mesh)).exists():
        finish(train(folder, str(mesh), mesh))


@pytest.mark.slow
@pytest.mark.parametrize("mesh", [(2, 2, 1), (1, 2, 2)])
def test_two_processes_learn_what_one_learns(alone, mesh):
    whole(alone, mesh)
    one, two = curves(alone / "alone"), curves(alone / str(mesh))
    for name, values in one.items():
        same = np.testing.assert_allclose
        same(two[name], values, atol=1e-4, rtol=1e-4, err_msg=name)
    before = [
        json.loads((alone / name / "summary.json").read_text())["before"]
        for name in ("alone", str(mesh))
    ]
    assert before[0] == before[1]
    rows = metrics.read(alone / str(mesh) / "metrics.jsonl")
    assert [row["compilations"] for row in rows[2:]] == [0, 0, 0]


@pytest.mark.slow
def test_a_lost_process_ends_the_job_and_the_same_job_goes_on(alone):
    mesh = 2, 2, 1
    whole(alone, mesh)
    left, lost = train(alone, "work", mesh)
    begun = time.monotonic()
    while not any((alone / "work" / "checkpoints").glob("[1-9]")):
        assert left.poll() is None and time.monotonic() - begun < 300
        time.sleep(0.05)
    os.kill(lost.pid, signal.SIGKILL)
    begun = time.monotonic()
    _, faults = left.communicate(timeout=120)
    assert time.monotonic() - begun < 30
    assert left.returncode == cluster.LOST, faults
    assert "start the job again" in faults
    lost.communicate()
    assert "resumed after iteration" in finish(train(alone, "work", mesh))
    assert curves(alone / "work") == curves(alone / str(mesh))
