"""Agent tokens a second of multi-turn rollouts, next to reading the history anew.

  pip install -e '.[parity,notebooks]'                    # torch, matplotlib
  python benchmarks/rollout.py --plot=rollout.png
  python benchmarks/rollout.py --widths=64 --layers=2 --vocab=512 --rows=4 --turns=3
  python benchmarks/rollout.py --tunix=VENV/bin/python    # as peer_tunix.py says
  python benchmarks/rollout.py --contenders=ours,hf-kept

Random Qwen3-shaped float32 weights, the same for all, and the same scripted episodes
(script.py): prompts, observations and reply lengths are ragged, 4 episodes share their
first prompt, and nothing but its length ends a reply. Sampled at T = 1 from the whole
softmax. Each contender plays in a process of its own on the same `--threads` cores:

  ours          skillsd_jax.slots: a turn reads only what is new
  reprefill     our sampler; every turn reads the whole history
  hf            transformers' generate; every turn reads the whole history
  hf-kept       transformers' generate; past_key_values are kept between turns
  tunix         google-tunix's sampler; every turn reads the whole history

Only tokens within a reply's length count. Not timed: compilation, and a first turn. Ours
and reprefill also report the log-probs of what they draw; the others are not asked to.
Afterwards each is compared with a forward pass without a cache. JSON lines; ratio =
ours / baseline for tokens a second, baseline / ours for memory (maximum resident set,
compilation included) and for how seconds grow when the turns are doubled (--double):
above 1 is better. What each process reports, or what it lacks, goes to stderr. Linux
only.
"""

import argparse
import importlib.util
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import script

NAMES = {
    "ours": "ours",
    "reprefill": "our sampler, history read anew",
    "hf": "transformers, history read anew",
    "hf-kept": "transformers, cache kept",
    "tunix": "tunix, history read anew",
}
NEEDS = {"hf": "torch", "hf-kept": "torch", "tunix": "tunix"}
COLOURS = ("#228833", "#999999", "#ee6677", "#aa3377", "#4477aa")
TOLERANCE = 1e-3  # of logits and log-probs
REFERENCE = "reference.npz"  # what qwen.apply says of some tokens
MIB = 2.0**20


def speaker(name: str, folder: str, episodes: script.Script) -> script.Speaker:
    """The contender; what it needs is imported here alone."""
    if name in ("ours", "reprefill"):
        import contenders

        made = {"ours": contenders.Ours, "reprefill": contenders.Reprefill}
        return made[name](folder, episodes)
    if name == "tunix":
        import peer_tunix

        return peer_tunix.Tunix(folder, episodes)
    import peer_transformers

    return peer_transformers.Transformers(folder, keep=name == "hf-kept")


def write(folder: str, width: int, arguments) -> None:
    """Random weights, and the logits of a few tokens."""
    import jax

    from skillsd_jax.models import huggingface, qwen

    heads = max(1, width // 64)
    config = qwen.ModelConfig(
        vocab=arguments.vocab,
        width=width,
        layers=arguments.layers,
        heads=heads,
        kv_heads=max(1, heads // 2),
        head_size=64,
        hidden=3 * width,
        rope_theta=1e6,  # Qwen3's; tunix 0.1.7 has no other, whatever it is told
    )
    params = qwen.init(config, jax.random.key(0))
    huggingface.save(folder, config, params)
    tokens = np.random.default_rng(2).integers(0, config.vocab, (2, 40), np.int32)
    logits = jax.jit(qwen.apply, static_argnums=0)(config, params, tokens)
    np.savez(Path(folder) / REFERENCE, tokens=tokens, logits=logits)


def peak() -> int:
    """Bytes of this process at most so far."""
    # Not ru_maxrss: a child inherits its parent's.
    status = Path("/proc/self/status").read_text()
    return int(re.search(r"VmHWM:\s+(\d+) kB", status)[1]) * 1024


def play(name: str, folder: str, width: int, arguments) -> dict:
    """What one contender does, measured in this process.

    Raises:
      SystemExit: it computes something else than the others.
    """
    if name in NEEDS and not importlib.util.find_spec(NEEDS[name]):
        return {"contender": name, "width": width, "missing": NEEDS[name]}
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: arguments.threads])
    double = str(width) in arguments.double.split(",")
    turns = arguments.turns * (1 + double)
    episodes = script.write(arguments.rows, turns, arguments.vocab)
    start = time.perf_counter()
    contender = speaker(name, folder, episodes)
    contender.ready(episodes)
    script.timed(episodes.cut(1), contender)
    ready, compiled, runs = time.perf_counter() - start, peak(), []
    for _ in range(arguments.repeats):
        contender.forget()
        runs.append(script.timed(episodes, contender))
    most = peak()
    differences = {"uncached": contender.difference(episodes)}
    if hasattr(contender, "forward"):
        with np.load(Path(folder) / REFERENCE) as known:
            apart = np.abs(contender.forward(known["tokens"]) - known["logits"])
        differences["reference"] = float(apart.max())
    # Written so that NaN is refused.
    if not all(difference <= TOLERANCE for difference in differences.values()):
        raise SystemExit(f"{name} differs by {differences}; allowed: {TOLERANCE}")
    return {
        "contender": name,
        "width": width,
        "ready_s": round(ready, 2),
        "seconds": [round(s, 4) for s in min(runs, key=lambda run: run[-1])],
        "tokens": np.cumsum(episodes.limits.sum(0)).tolist(),
        "ready_peak_bytes": compiled,
        "peak_bytes": most,
        "differences": differences,
    }


def child(name: str, folder: str, width: int, arguments) -> dict:
    """`play` in a process of its own."""
    given = ("layers", "vocab", "rows", "turns", "double", "threads", "repeats")
    options = [f"--{option}={getattr(arguments, option)}" for option in given]
    python = sys.executable
    if name == "tunix" and arguments.tunix:
        python = arguments.tunix
    done = subprocess.run(
        [python, __file__, f"--only={name}", f"--folder={folder}"]
        + [f"--widths={width}", *options],
        check=False,
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | {"JAX_PLATFORMS": "cpu"},
    )
    if done.returncode:
        return {"contender": name, "width": width, "failed": done.returncode}
    return json.loads(done.stdout.splitlines()[-1])


def line(case: str, metric: str, ours: float, baseline: float, name: str) -> dict:
    ratio = ours / baseline if "per second" in metric else baseline / ours
    return {
        "benchmark": "rollout",
        "case": case,
        "metric": metric,
        "ours": round(ours, 3),
        "baseline": round(baseline, 3),
        "baseline_name": NAMES[name],
        "ratio": round(ratio, 3),
    }


def lines(played: dict[str, dict], turns: int, rows: int) -> Iterator[dict]:
    """Ours against each of the others, at one width."""
    if "ours" not in played:
        return
    ours = played["ours"]

    def case(turns):
        return f"width {ours['width']}, {rows} episodes of {turns} turns"

    longest = len(ours["seconds"])
    for name, other in played.items():
        if name == "ours":
            continue
        speeds = (speed(one, turns) for one in (ours, other))
        yield line(case(turns), "agent tokens per second", *speeds, name)
        peaks = (one["peak_bytes"] / MIB for one in (ours, other))
        yield line(case(longest), "peak MiB", *peaks, name)
        if longest > turns:
            metric = f"seconds over those of {turns} turns"
            grown = (
                one["seconds"][-1] / one["seconds"][turns - 1] for one in (ours, other)
            )
            yield line(case(longest), metric, *grown, name)


def speed(played: dict, turns: int) -> float:
    """Agent tokens a second of the first turns."""
    return played["tokens"][turns - 1] / played["seconds"][turns - 1]


def plot(results: dict[int, dict[str, dict]], turns: int, path: str) -> None:
    """A row for each width: tokens a second, and seconds by number of turns."""
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    colours = dict(zip(NAMES, COLOURS))
    figure, axes = plt.subplots(
        len(results), 2, figsize=(10, 3.2 * len(results)), squeeze=False
    )
    for (width, played), (bars, curves) in zip(results.items(), axes):
        speeds = [speed(one, turns) for one in played.values()]
        names = [NAMES[name] for name in played]
        drawn = bars.barh(names, speeds, color=[colours[name] for name in played])
        bars.bar_label(drawn, fmt="%.0f", padding=3)
        bars.invert_yaxis()
        bars.margins(x=0.12)
        bars.set_xlabel(f"agent tokens a second, {turns} turns")
        bars.set_title(f"width {width}")
        for name, one in played.items():
            seconds = [0, *one["seconds"]]
            curves.plot(seconds, color=colours[name], label=NAMES[name])
        curves.set(xlabel="turns", ylabel="seconds", title=f"width {width}")
        curves.set(xlim=(0, None), ylim=(0, None))
        curves.legend(frameon=False, fontsize=8)
        for axis in (bars, curves):
            axis.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    figure.savefig(path, dpi=150)


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--widths", default="256,1024")
    parser.add_argument("--double", default="256", help="widths played twice as long")
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--vocab", type=int, default=32_768)
    parser.add_argument("--rows", type=int, default=32, help="episodes")
    parser.add_argument("--turns", type=int, default=8)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=1, help="the fastest counts")
    parser.add_argument("--contenders", default=",".join(NAMES))
    parser.add_argument("--tunix", default="", help="Python of its environment")
    parser.add_argument("--plot", default="", help="a PNG to write")
    parser.add_argument("--only", choices=NAMES, help="in this process; see child()")
    parser.add_argument("--folder", help="--only: weights that were written before")
    arguments = parser.parse_args()
    if bool(arguments.only) != bool(arguments.folder):
        parser.error("--only and --folder go together; --contenders takes names alone")
    return arguments


def main() -> None:
    arguments = parsed()
    widths = [int(width) for width in arguments.widths.split(",")]
    if arguments.only:
        print(json.dumps(play(arguments.only, arguments.folder, widths[0], arguments)))
        return
    results: dict[int, dict[str, dict]] = {}
    failed = False
    for width in widths:
        results[width] = {}
        with tempfile.TemporaryDirectory() as folder:
            write(folder, width, arguments)
            for name in arguments.contenders.split(","):
                found = child(name, folder, width, arguments)
                print(json.dumps(found), file=sys.stderr, flush=True)
                failed |= "failed" in found
                if "seconds" in found:
                    results[width][name] = found
        for found in lines(results[width], arguments.turns, arguments.rows):
            print(json.dumps(found), flush=True)
    if arguments.plot:
        plot(results, arguments.turns, arguments.plot)
    sys.exit(int(failed))


if __name__ == "__main__":
    main()
