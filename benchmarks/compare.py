"""Compares runs that differ in objective and seed: a table with paired intervals.

  python benchmarks/compare.py runs/household-*
  python benchmarks/compare.py runs/alfworld-* --plot=curves.png
  python benchmarks/compare.py runs/retrieval-* --by=skills.retrieval --baseline=none

Every folder must hold summary.json; the curves are of its metrics.jsonl. Runs that
differ in another setting than the objective are told apart by `--by`. They are paired by
seed: the warm start, the panel and the number of episodes are the same, so the difference
between objectives is taken seed by seed. The interval is Student's t over the
differences, 95 %. `steps` are environment steps, `teacher` its success in the end, shown
an expert's skill.
"""

import argparse
import collections
import json
import math
from pathlib import Path

COLOURS = {"grpo": "#999999", "skill_sd": "#228833", "sdar": "#aa3377"}
# Two-sided 95 % quantiles of Student's t by degrees of freedom.
T_95 = (math.nan, 12.71, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)


def label(config: dict, by: list[str]) -> str:
    """What a run is called: its values of the settings named by `by`."""
    values = []
    for setting in by:
        value = config
        for part in setting.split("."):
            if not isinstance(value, dict) or part not in value:
                raise SystemExit(f"--by: runs have no setting {setting!r}")
            value = value[part]
        values.append(str(value) or "default")
    return " ".join(values)


def load(folders: list[str], by: list[str]) -> dict[str, dict[int, dict]]:
    """label → seed → summary, of runs that have ended."""
    runs: dict[str, dict[int, dict]] = collections.defaultdict(dict)
    for folder in folders:
        summary = json.loads((Path(folder) / "summary.json").read_text())
        seeds = runs[label(summary["config"], by)]
        if summary["seed"] in seeds:
            raise SystemExit(
                f"{folder}: a second run of {label(summary['config'], by)} "
                f"with seed {summary['seed']}; tell them apart with --by"
            )
        seeds[summary["seed"]] = summary
    return runs


def check_baseline(runs: dict[str, dict[int, dict]], baseline: str) -> None:
    """Refuses a baseline that no run is of."""
    if baseline not in runs:
        raise SystemExit(
            f"no run is {baseline!r}; set --baseline to one of: {', '.join(sorted(runs))}"
        )


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


def curve(folder: Path, summary: dict) -> tuple[list[int], list[float]]:
    """Environment steps and success on the panel: before, during, after."""
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    rows = [row for row in map(json.loads, lines) if "evaluation" in row]
    steps = [row["environment_steps"] for row in rows]
    success = [row["evaluation"]["success"] for row in rows]
    before, after = summary["before"]["success"], summary["after"]["success"]
    return [0, *steps, summary["environment_steps"]], [before, *success, after]


def plot(folders: list[str], by: list[str], path: str) -> None:
    """A thin line a run, a thick one for the mean of an objective."""
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    curves = collections.defaultdict(list)
    for folder in map(Path, folders):
        summary = json.loads((folder / "summary.json").read_text())
        curves[label(summary["config"], by)].append(curve(folder, summary))
    figure, axes = plt.subplots(figsize=(6, 3.5), layout="constrained")
    for name, runs in sorted(curves.items()):
        for steps, success in runs:
            axes.plot(
                steps, [100 * s for s in success], color=COLOURS.get(name), lw=0.6
            )
        points = min(len(steps) for steps, _ in runs)
        mean = [
            [sum(run[k][i] for run in runs) / len(runs) for i in range(points)]
            for k in (0, 1)
        ]
        success = [100 * s for s in mean[1]]
        axes.plot(mean[0], success, color=COLOURS.get(name), lw=2.5, label=name)
    axes.set_xlabel("environment steps")
    axes.set_ylabel("held-out success, %")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    figure.savefig(path, dpi=120)


def interval(values: list[float]) -> tuple[float, float]:
    """Mean and half width of its 95 % interval."""
    n = len(values)
    mean = sum(values) / n
    if n < 2:
        return mean, math.nan
    deviation = math.sqrt(sum((v - mean) ** 2 for v in values) / (n - 1))
    return mean, T_95[min(n - 1, len(T_95) - 1)] * deviation / math.sqrt(n)


def points(values: list[float]) -> str:
    if not values:
        return "–"
    mean, half = interval([100 * v for v in values])
    return f"{mean:.1f} ± {half:.1f}"


def cells(seeds: dict[int, dict], baseline: dict[int, dict]) -> list[str]:
    """A row of the table but for its name: count, figures, paired difference."""
    figures = [
        points([s[key]["success"] for s in seeds.values() if key in s])
        for key in ("before", "after", "after_greedy", "teacher_after")
    ]
    gain = [
        seeds[s]["after"]["success"] - baseline[s]["after"]["success"]
        for s in sorted(set(seeds) & set(baseline))
    ]
    steps = sum(s["environment_steps"] for s in seeds.values()) / len(seeds)
    difference = points(gain) if seeds is not baseline else "–"
    return [str(len(seeds)), f"{steps:,.0f}", *figures, difference]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("folders", nargs="+")
    parser.add_argument("--baseline", default="grpo", help="its label")
    parser.add_argument("--by", help="settings, by commas; default: objective.name")
    parser.add_argument("--plot", help="PNG of the curves; needs matplotlib")
    arguments = parser.parse_args()
    by = (arguments.by or "objective.name").split(",")
    runs = load(arguments.folders, by)
    if arguments.by:
        check_baseline(runs, arguments.baseline)
    check_same(runs)
    if arguments.plot:
        plot(arguments.folders, by, arguments.plot)
    heads = (",".join(by), "seeds", "steps", "before", "after", "greedy", "teacher")
    print(f"| {' | '.join(heads)} | minus {arguments.baseline} |")
    print("|---" * (len(heads) + 1) + "|")
    for name, seeds in sorted(runs.items()):
        row = [name, *cells(seeds, runs.get(arguments.baseline, {}))]
        print(f"| {' | '.join(row)} |")


if __name__ == "__main__":
    main()
