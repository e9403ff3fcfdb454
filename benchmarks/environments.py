"""How fast a stage steps environments, and what memory it takes; no model plays.

  python benchmarks/environments.py
  python benchmarks/environments.py --environment=household --episodes=64 --turns=9

Episodes live at once and choose at random among the admissible commands, from a seed;
turn by turn, all live ones in one call. Each case runs in a process of its own. Steps
per second are of the turns alone; resets, on games that lie in the cache, stand beside
them. Memory is the highest sum, over that process and its workers, of the shares that
/proc/PID/smaps_rollup gives (PSS), looked at every 0.2 s. The last case kills a worker
in mid-run. The baseline plays one environment after another in one process, and all of
its memory. JSON lines; ratio above 1 is better: ours / baseline for rates, baseline /
ours for bytes and episodes.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np

from skillsd_jax import config
from skillsd_jax.environments import pool
from skillsd_jax.environments.base import TimeStep
from skillsd_jax.environments.stage import Maker, Stage

KINDS = ("inline", "threads", "processes")
LOOK_S = 0.2
MIB = 2.0**20


def reply(rng: np.random.Generator, step: TimeStep) -> str:
    return f"<action>{step.admissible[rng.integers(len(step.admissible))]}</action>"


def played(stage: Stage, arguments: argparse.Namespace, kill_at: int = -1) -> dict:
    """Plays one episode a slot; a worker is killed before turn `kill_at`.

    Returns:
      resets and steps per second, steps, and episodes that ended in a fault.
    """
    rngs = [np.random.default_rng([arguments.seed, s]) for s in range(stage.count)]
    slots = list(range(stage.count))
    seeds = [slot % arguments.tasks for slot in slots]
    start = time.perf_counter()
    outcomes = stage.reset(slots, seeds).result()
    reset_s, start = time.perf_counter() - start, time.perf_counter()
    steps = lost = turn = 0
    while slots:
        texts = [
            reply(rngs[slot], outcome.step)
            for slot, outcome in zip(slots, outcomes, strict=True)
        ]
        if turn == kill_at:
            os.kill(stage.pids[0], signal.SIGKILL)
        outcomes = stage.step(slots, texts).result()
        steps, turn = steps + len(slots), turn + 1
        lost += sum(outcome.fault != "" for outcome in outcomes)
        live = [
            (slot, outcome)
            for slot, outcome in zip(slots, outcomes, strict=True)
            if not outcome.fault and not outcome.step.done
        ]
        slots, outcomes = [slot for slot, _ in live], [outcome for _, outcome in live]
    rate = steps / (time.perf_counter() - start)
    return {
        "resets": stage.count / reset_s,
        "rate": rate,
        "steps": steps,
        "lost": lost,
    }


def one_by_one(make: Maker, arguments: argparse.Namespace) -> dict:
    """The same episodes, one after another in one environment."""
    environment = make()
    reset_s, steps, total_s = 0.0, 0, time.perf_counter()
    for slot in range(arguments.episodes):
        rng, start = np.random.default_rng([arguments.seed, slot]), time.perf_counter()
        step = environment.reset(slot % arguments.tasks)
        reset_s += time.perf_counter() - start
        while not step.done:
            step, steps = environment.step(reply(rng, step)), steps + 1
    total_s = time.perf_counter() - total_s - reset_s
    return {
        "resets": arguments.episodes / reset_s,
        "rate": steps / total_s,
        "steps": steps,
        "lost": 0,
    }


def case(arguments: argparse.Namespace) -> dict:
    """One case, in this process."""
    setting = config.Environment(
        name=arguments.environment,
        workers=arguments.case if arguments.case in KINDS else "processes",
        worker_count=arguments.workers,
    )
    getattr(setting, setting.name).max_steps = arguments.turns
    make = Maker.of(setting, "train")
    if arguments.case == "one by one":
        return one_by_one(make, arguments)
    with pool.open_stage(make, arguments.episodes, setting) as stage:
        if arguments.case == "killed":
            result = played(stage, arguments, kill_at=arguments.turns // 2)
            again = stage.reset(range(stage.count), [0] * stage.count).result()
            result["again"] = sum(outcome.fault == "" for outcome in again)
            return result | stage.counts()
        return played(stage, arguments)


def tree(pid: int) -> list[int]:
    """A process and all that descend from it."""
    found = [pid]
    for task in Path(f"/proc/{pid}/task").glob("*/children"):
        for child in task.read_text().split():
            found += tree(int(child))
    return found


def share(pid: int) -> int:
    """Bytes of memory of a process, shared pages divided by who shares them."""
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    except OSError:  # it has ended
        return 0
    return 1024 * sum(int(x.split()[1]) for x in lines if x.startswith("Pss:"))


def measured(name: str) -> dict:
    """A case in a process of its own, with the most memory it had."""
    process = subprocess.Popen(
        [sys.executable, __file__, *sys.argv[1:], f"--case={name}"],
        stdout=subprocess.PIPE,
        text=True,
    )
    peak = 0
    while process.poll() is None:
        peak = max(peak, sum(map(share, tree(process.pid))))
        time.sleep(LOOK_S)
    if process.returncode:
        raise SystemExit(f"case {name} ended with {process.returncode}")
    return json.loads(process.stdout.read().splitlines()[-1]) | {"peak": peak}


def say(name: str, metric: str, ours: float, baseline: float, of: str) -> None:
    more = "per second" in metric or "usable" in metric
    better = ours / baseline if more else baseline / max(ours, 1)
    line = {
        "benchmark": "environments",
        "case": name,
        "metric": metric,
        "ours": round(ours, 1),
        "baseline": round(baseline, 1),
        "baseline_name": of,
        "ratio": round(better, 3),
    }
    print(json.dumps(line), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--environment", default="alfworld")
    parser.add_argument("--episodes", type=int, default=256, help="live at once")
    parser.add_argument("--tasks", type=int, default=32, help="they are drawn from")
    parser.add_argument("--turns", type=int, default=15, help="of an episode")
    parser.add_argument("--workers", type=int, default=2, help="threads or processes")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--kinds", default=",".join(KINDS))
    parser.add_argument("--case", default="", help="one case, in this process")
    arguments = parser.parse_args()
    if arguments.case:
        print(json.dumps(case(arguments)), flush=True)
        return
    measured("one by one")  # puts the games into the cache
    alone = measured("one by one")
    about = f"{arguments.environment} {arguments.episodes} episodes"
    for kind in arguments.kinds.split(","):
        name = about if kind == "inline" else f"{about} {arguments.workers}"
        name, ours = f"{name} {kind}", measured(kind)
        say(name, "steps per second", ours["rate"], alone["rate"], "one by one")
        say(name, "resets per second", ours["resets"], alone["resets"], "one by one")
        say(name, "peak MiB", ours["peak"] / MIB, alone["peak"] / MIB, "one by one")
    if "processes" in arguments.kinds:
        ours, name = measured("killed"), f"{about}, one of {arguments.workers} killed"
        say(name, "episodes lost", ours["lost"], arguments.episodes, "all")
        say(name, "slots usable again", ours["again"], arguments.episodes, "all")


if __name__ == "__main__":
    main()
