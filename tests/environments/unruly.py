"""The household until a reply asks for trouble; played in workers by pool_test."""

import dataclasses
import os
import signal
import subprocess
import sys
import time

import numpy as np

from skillsd_jax.environments.household import Household

MEGABYTE = 1 << 20


class EngineError(Exception):
    """Of no type that an environment may raise."""


class Unruly(Household):
    made = 0  # in this process

    def __init__(self, split="train", require_think=False, folder="", **options):
        super().__init__(split, require_think, **options)
        self.folder = folder  # where what was started writes its pid
        Unruly.made += 1
        self.number = Unruly.made
        print("an engine says hello", flush=True)
        os.write(1, b'[null, null, "", "", false]\n')

    def reset(self, seed):
        if seed == 666:
            raise RuntimeError("no such level")
        return super().reset(seed)

    def step(self, text):
        if text in TROUBLE:
            return TROUBLE[text](self)
        return super().step(text)


class Missing(Household):
    """Has no engine in a worker once the file `gone` lies in the folder."""

    def __init__(self, split="train", require_think=False, folder="", **options):
        super().__init__(split, require_think, **options)
        if "pytest" not in sys.modules and os.path.exists(f"{folder}/gone"):
            raise ImportError("pip install 'skillsd_jax[unruly]'")


class Stillborn(Household):
    """Kills every worker that makes it."""

    def __init__(self, **options):
        super().__init__(**options)
        if "pytest" not in sys.modules:
            os.kill(os.getpid(), signal.SIGKILL)


def _answer(environment, **changes):
    return dataclasses.replace(Household.step(environment, "look"), **changes)


def _raise(fault):
    raise fault


def _hang(environment):
    time.sleep(3600)


def _slow(environment):
    time.sleep(0.3)
    return _answer(environment)


def _print(environment):
    print("x" * MEGABYTE, flush=True)
    print("y" * MEGABYTE, file=sys.stdout, flush=True)
    return _answer(environment)


def _flood(environment):
    return _answer(
        environment,
        observation="\x1b[2Jfive\ud800\tbytes\n" + "o" * MEGABYTE,
        feedback="f" * MEGABYTE,
        admissible=("go\x00", "a" * MEGABYTE, *["look"] * MEGABYTE),
    )


def _numpy(environment):
    return _answer(environment, reward=np.float32(0.5), success=np.bool_(False))


def _child(environment):
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(3600)"])
    with open(os.path.join(environment.folder, "child"), "w") as file:
        file.write(str(child.pid))
    return _answer(environment)


def _modules(environment):
    main = sys.modules["__main__"].__spec__.name
    heavy = {"jax", "flax", "pytest"} & set(sys.modules)
    return _answer(environment, observation=f"{main} {sorted(heavy)} {os.getpid()}")


def _number(environment):
    return _answer(environment, observation=str(environment.number))


TROUBLE = {
    "number": _number,
    "raise": lambda _: _raise(RuntimeError("lost" * 1000)),
    "raise another": lambda _: _raise(EngineError("of its own")),
    "hang": _hang,
    "slow": _slow,
    "die": lambda _: os.kill(os.getpid(), signal.SIGKILL),
    "leave": lambda _: os._exit(7),
    "print": _print,
    "flood": _flood,
    "numpy": _numpy,
    "nothing": lambda _: None,
    "child": _child,
    "modules": _modules,
}
