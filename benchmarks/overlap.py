"""How well two cohorts hide slow environments behind the device.

  python benchmarks/overlap.py
  python benchmarks/overlap.py --widths=64,512 --sleep_ms=50

A random network plays the household, whole histories, in two cohorts; each step of the
environment sleeps. In one run: the wall time of an iteration's episodes; the device
alone, which is the sum of both cohorts' calls, one at a time, over the same episodes;
and the environment alone, which is the sum over turns of the slowest of each cohort.
JSON lines {"benchmark", "case", "metric", "ours", "baseline", "baseline_name",
"ratio"}: ours is the wall time, the baseline the longer of the two; above 0.8 is within
1.25 times.
"""

import argparse
import dataclasses
import json
import time

import jax
import numpy as np

from skillsd_jax import config as settings
from skillsd_jax import imitate, rollout, slots
from skillsd_jax.environments import household, pool
from skillsd_jax.environments.stage import Maker, Stage
from skillsd_jax.models import qwen, tokenizer

COHORTS = 2


class Sleepy(household.Household):
    """The household, with a world that takes its time."""

    def __init__(self, sleep_s: float, **options):
        super().__init__(**options)
        self.sleep_s = sleep_s

    def step(self, text: str):
        time.sleep(self.sleep_s)
        return super().step(text)


@dataclasses.dataclass
class Timed:
    """A voice whose calls are waited for, one at a time."""

    voice: slots.Slots
    seconds: list[float]

    def ask(self, asks):
        start = time.perf_counter()
        heard = self.voice.ask(asks)
        heard.result()
        self.seconds.append(time.perf_counter() - start)
        return heard


@dataclasses.dataclass(frozen=True)
class TimedPlayer(rollout.Player):
    """Plays alike and notes how long the device takes."""

    seconds: list[float] = dataclasses.field(default_factory=list, compare=False)

    def voice(self, *arguments):
        return Timed(super().voice(*arguments), self.seconds)


class Noted:
    """What was asked of a stage, to ask for it again without a device."""

    def __init__(self, stage: Stage):
        self.stage, self.calls = stage, []

    def __enter__(self):
        for name in ("reset", "step"):
            setattr(self.stage, name, self._noting(name, getattr(self.stage, name)))
        return self

    def __exit__(self, *_) -> None:
        for name in ("reset", "step"):
            delattr(self.stage, name)

    def _noting(self, name, call):
        def noted(places, values):
            self.calls.append((name, list(places), list(values)))
            return call(places, values)

        return noted

    def again(self) -> float:
        """Seconds of the same steps, cohort after cohort."""
        total = 0.0
        for name, places, values in self.calls:
            start = time.perf_counter()
            getattr(self.stage, name)(places, values).result()
            total += (time.perf_counter() - start) * (name == "step")
        return total


def make_player(width: int, rows: int) -> tuple[rollout.Player, qwen.Params]:
    demonstrations = imitate.demonstrations(
        household.Household(), settings.Imitate(episodes=10), 0
    )
    words = tokenizer.train(
        imitate.texts(list(demonstrations)), household.Household.lexicon()
    )
    model = qwen.ModelConfig(
        vocab=words.vocab_size,
        width=width,
        layers=4,
        heads=width // 32,
        kv_heads=width // 32,
        head_size=32,
        hidden=3 * width,
    )
    prompt = settings.Prompt(context="whole", max_length=512)
    player = rollout.Player(model, words, prompt, rows, cohorts=COHORTS)
    return player, qwen.init(model, jax.random.key(0))


def measure(width: int, arguments) -> dict:
    player, params = make_player(width, arguments.rows)
    setting = settings.Environment(workers="threads", worker_count=arguments.rows)
    sleepy = Maker(
        "overlap:Sleepy" if __name__ != "__main__" else "__main__:Sleepy",
        "train",
        (("sleep_s", arguments.sleep_ms / 1000),),
    )
    seeds = np.arange(arguments.rows)

    def play(player):
        start = time.perf_counter()
        rollout.collect(player, params, stage, seeds, jax.random.key(1), 1.0)
        return time.perf_counter() - start

    with pool.open_stage(sleepy, arguments.rows, setting) as stage:
        rollout.warm_up(player, params)
        play(player)
        wall = min(play(player) for _ in range(arguments.repeats))
        fields = {f.name: getattr(player, f.name) for f in dataclasses.fields(player)}
        timed = TimedPlayer(**fields)
        with Noted(stage) as noted:
            play(timed)
        environment = noted.again()
    device = sum(timed.seconds)
    name = "device" if device > environment else "environment"
    return {
        "benchmark": "overlap",
        "case": f"width {width}, {arguments.rows} episodes in {COHORTS} cohorts, "
        f"{arguments.sleep_ms} ms a step; device {device:.2f} s, environment "
        f"{environment:.2f} s",
        "metric": "seconds",
        "ours": round(wall, 3),
        "baseline": round(max(device, environment), 3),
        "baseline_name": f"the {name} alone",
        "ratio": round(max(device, environment) / wall, 3),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--widths", default="64,256,512")
    parser.add_argument("--rows", type=int, default=32, help="episodes at once")
    parser.add_argument("--sleep_ms", type=float, default=50.0)
    parser.add_argument("--repeats", type=int, default=3)
    arguments = parser.parse_args()
    for width in arguments.widths.split(","):
        print(json.dumps(measure(int(width), arguments)), flush=True)


if __name__ == "__main__":
    main()
