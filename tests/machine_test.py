"""Memory that is freed stays with the process; results stay what they are."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from skillsd_jax import machine

# Pages that calls of a program with 300 MB of temporary memory fault in, as a share of
# that memory.
FAULTS = """
import functools, resource, sys
import jax, jax.numpy as jnp
from skillsd_jax import machine

if sys.argv[1] == "kept" and not machine.keep_freed_memory():
    sys.exit("not here")

@jax.jit
def program(x):
    return jnp.sort(jnp.zeros(25_000_000) + x)[::1000].sum()

def faults(times):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for i in range(times):
        program(float(i)).block_until_ready()
    pages = resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
    return pages * resource.getpagesize() / (times * 100_000_000)

faults(2)
print(faults(3))
"""


def faulted_in(how: str) -> float:
    root = str(Path(__file__).parent.parent)
    done = subprocess.run(
        [sys.executable, "-c", FAULTS, how],
        check=False,
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": root, "JAX_PLATFORMS": "cpu"},
    )
    if done.stderr.endswith("not here\n"):
        pytest.skip("no glibc")
    assert done.returncode == 0, done.stderr
    return float(done.stdout)


def test_temporary_memory_of_a_program_is_not_faulted_in_again():
    if faulted_in("as it is") < 0.5:
        pytest.skip("the system hands out huge pages: there is nothing to mend")
    assert faulted_in("kept") < 0.1


@pytest.mark.parametrize("backend,library", [("gpu", "glibc"), ("cpu", "")])
def test_elsewhere_malloc_is_left_alone(monkeypatch, backend, library):
    monkeypatch.setattr(machine.jax, "default_backend", lambda: backend)
    monkeypatch.setattr(machine.platform, "libc_ver", lambda: (library, ""))
    monkeypatch.setattr(machine, "ctypes", None)  # any use of it raises
    assert machine.keep_freed_memory() is False
