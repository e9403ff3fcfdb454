"""Learning curve of a warm start: success by cloning steps, as set and doubled.

  python benchmarks/warm_start.py --config=configs/alfworld.py

A warm start that was stopped too early would make any training look good. This plays
the validation panel, without skills at T = `evaluate.temperature`, at a few points of
the configured schedule and of one twice as long. JSON lines:
{"benchmark", "case", "steps", "loss", "success", "low", "high", "n"}.
"""

import json
from collections.abc import Iterator

import jax
from absl import app, flags
from ml_collections import config_flags

from skillsd_jax import agent, evaluate, imitate, rollout
from skillsd_jax.config import Config
from skillsd_jax.models import qwen

CONFIG = config_flags.DEFINE_config_file("config", None, "FILE.py[:PRESET]")
POINTS = flags.DEFINE_integer("points", 4, "panels played per schedule")


def curve(config: Config, made: agent.Recording) -> Iterator[dict]:
    """Plays the validation panel `points` times along one schedule."""
    stage = rollout.open_stage(config.environment, "validation", config.rollout.rows)
    player = rollout.Player(made.model, made.words, config.prompt, config.rollout.rows)
    setting = config.evaluate
    panel = evaluate.make_panel(stage.local, "validation", setting.tasks)
    key = jax.random.key(config.seed)
    start = qwen.init(made.model, key)
    every = max(1, config.imitate.steps // imitate.STEPS_PER_CALL // POINTS.value)
    cloned = imitate.clone(made.model, start, made.data, config.imitate, key)
    for call, (steps, params, loss) in enumerate(cloned, start=1):
        if call % every and steps != config.imitate.steps:
            continue
        result = evaluate.evaluate(
            player,
            params,
            stage,
            panel,
            key,
            setting.temperature,
            setting.samples,
        )
        yield {"steps": steps, "loss": round(loss, 4), **result.record()}


def main(_) -> None:
    config = CONFIG.value
    made = agent.record(config, lambda text: None)
    for factor in (1, 2):
        config.imitate.steps *= factor
        for point in curve(config, made):
            case = f"{config.environment.name} {config.imitate.steps} steps"
            line = {"benchmark": "warm_start", "case": case, **point}
            print(json.dumps(line), flush=True)


if __name__ == "__main__":
    app.run(main)
