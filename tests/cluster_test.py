"""Processes of one job on this machine, joined over gloo."""

import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from skillsd_jax import cluster
from skillsd_jax.validation import Refused

ROOT = Path(__file__).parent.parent

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
    cluster.check_same("the seed", 5)
    try:
        cluster.check_same("the seed", me)
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


def together(program: str) -> list[subprocess.Popen]:
    """Two processes of a job."""
    with socket.socket() as found:
        found.bind(("localhost", 0))
        port = found.getsockname()[1]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
    return [
        subprocess.Popen(
            [sys.executable, "-c", program, f"localhost:{port},2,{index}"],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for index in range(2)
    ]


def test_processes_share_work_and_tell_each_other():
    for process in together(TELLS):
        said, faults = process.communicate(timeout=120)
        assert process.returncode == 0, faults
        assert "the seed differs" in said
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


def test_one_process_needs_no_job():
    with cluster.job(""):
        assert cluster.gather("a") == ["a"]
        assert cluster.merge({2: "b", 1: "a"}) == {1: "a", 2: "b"}
        assert cluster.share([1, 2, 3]) == [1, 2, 3]
        assert cluster.told(lambda: 7) == 7


@pytest.mark.parametrize("text", ["host:1", "host,2,0", "host:1,2,2", "host:1,2,-1"])
def test_a_job_that_is_none_is_refused(text):
    with pytest.raises(Refused, match="HOST:PORT,PROCESSES,INDEX"), cluster.job(text):
        pass
