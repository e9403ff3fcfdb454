"""Compares runs that differ in objective and seed: a table with paired intervals.

  python benchmarks/compare.py runs/household-*

Every folder must hold summary.json. Runs are paired by seed: the warm start, the
panel and the environment steps are the same, so the difference between objectives is
taken seed by seed. The interval is Student's t over the differences, 95 %.
"""

import argparse
import collections
import json
import math
from pathlib import Path

# Two-sided 95 % quantiles of Student's t by degrees of freedom.
T_95 = (math.nan, 12.71, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)


def load(folders: list[str]) -> dict[str, dict[int, dict]]:
    """objective → seed → summary, of runs that have ended."""
    runs: dict[str, dict[int, dict]] = collections.defaultdict(dict)
    for folder in folders:
        summary = json.loads((Path(folder) / "summary.json").read_text())
        runs[summary["config"]["objective"]["name"]][summary["seed"]] = summary
    return runs


def check_same(runs: dict[str, dict[int, dict]]) -> None:
    """Refuses to pair runs of different panels or start figures."""
    for seed in set().union(*runs.values()):
        seen = {
            (s[seed]["panel"]["hash"], s[seed]["before"]["success"])
            for s in runs.values()
            if seed in s
        }
        if len(seen) > 1:
            raise SystemExit(f"seed {seed}: runs differ in panel or warm start: {seen}")


def interval(values: list[float]) -> tuple[float, float]:
    """Mean and half width of its 95 % interval."""
    n = len(values)
    mean = sum(values) / n
    if n < 2:
        return mean, math.nan
    deviation = math.sqrt(sum((v - mean) ** 2 for v in values) / (n - 1))
    return mean, T_95[min(n - 1, len(T_95) - 1)] * deviation / math.sqrt(n)


def points(values: list[float]) -> str:
    mean, half = interval([100 * v for v in values])
    return f"{mean:.1f} ± {half:.1f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("folders", nargs="+")
    parser.add_argument("--baseline", default="grpo")
    arguments = parser.parse_args()
    runs = load(arguments.folders)
    check_same(runs)
    print("| objective | seeds | before | after | greedy | minus baseline |")
    print("|---|---|---|---|---|---|")
    for name, seeds in sorted(runs.items()):
        shared = sorted(set(seeds) & set(runs.get(arguments.baseline, {})))
        gain = [
            seeds[s]["after"]["success"]
            - runs[arguments.baseline][s]["after"]["success"]
            for s in shared
        ]
        cells = [
            points([s[key]["success"] for s in seeds.values() if key in s])
            for key in ("before", "after", "after_greedy")
        ]
        paired = points(gain) if gain and name != arguments.baseline else "–"
        print(f"| {name} | {len(seeds)} | {' | '.join(cells)} | {paired} |")


if __name__ == "__main__":
    main()
