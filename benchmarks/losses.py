"""What an objective costs next to the network it trains.

  python benchmarks/losses.py
  python benchmarks/losses.py --rows=256 --tokens=512 --repeats=5

Advantages, forward and backward of a whole objective, log-probs given, on [rows ×
tokens] against forward and backward of the student on the same tokens (4 layers, width
256, vocabulary 8,192; the sum of log-probs in its place, 16 rows at a time). JSON lines
{"benchmark", "case", "metric", "ours", "baseline", "baseline_name", "ratio"}; ratio =
baseline / ours, so that above 33 is below 3 %.
"""

import argparse
import dataclasses
import json
import time

import jax
import jax.numpy as jnp
import numpy as np

from skillsd_jax import config
from skillsd_jax.losses import masking, objective
from skillsd_jax.models import qwen, scoring
from skillsd_jax.tokens import TokenView

MODEL = qwen.ModelConfig(
    vocab=8192, width=256, layers=4, heads=4, kv_heads=4, head_size=64, hidden=1024
)
ROWS_AT_ONCE = 16


def signals(rows: int, tokens: int) -> objective.Signals:
    """Random log-probs of full rows, half of them skilled."""
    rng = np.random.default_rng(0)

    def draw():
        return rng.uniform(-3, -0.05, (rows, tokens)).astype(np.float32)

    return objective.Signals(
        student=draw(),
        old=draw(),
        teacher=draw(),
        reference=draw(),
        entropy=draw(),
        divergence=draw(),
        advantage=rng.normal(size=(rows, tokens)).astype(np.float32),
        mask=np.ones((rows, tokens), np.float32),
        segment=rng.integers(0, 3, (rows, tokens)).astype(np.int32),
        turn=np.zeros((rows, tokens), np.int32),
        skilled=(np.arange(rows) % 2).astype(np.float32),
        group_success=np.zeros(rows, np.float32),
        step=np.int32(1),
        stalled=np.int32(0),
        vocabulary=np.int32(MODEL.vocab),
        token_count=np.float32(rows * tokens),
        skilled_count=np.float32(rows * tokens / 2),
    )


def episodes(given: objective.Signals) -> objective.Episodes:
    """The rows as eight episodes a task, a turn for every 32 tokens."""
    row = jnp.arange(given.mask.shape[0])
    turn = jnp.broadcast_to(jnp.arange(given.mask.shape[1]) // 32, given.mask.shape)
    return objective.Episodes(
        reward=(row % 3 == 0).astype(jnp.float32),
        success=(row % 3 == 0).astype(jnp.float32),
        group=row // 8,
        trajectory=row,
        skilled=given.skilled,
        turn=turn,
        anchor=turn,
        returns=given.teacher,
        mask=given.mask,
        old=given.old,
        teacher=given.teacher,
        step=given.step,
    )


def objective_step(name: str):
    chosen = config.Objective(name=name, kl_coefficient=0.01)
    recipe = objective.recipe(name)

    def loss(student, divergence, given):
        advantage = recipe.advantage(episodes(given), chosen, given.stalled)
        moved = dataclasses.replace(
            given, student=student, divergence=divergence, advantage=advantage
        )
        output = recipe.loss(moved, chosen)
        total = sum(
            masking.aggregate(term, given.mask, "token-mean")
            for term in output.terms.values()
        )
        sums = [(jnp.sum(v * w), jnp.sum(w)) for v, w in output.metrics.values()]
        return total, sums

    step = jax.jit(jax.grad(loss, (0, 1), has_aux=True))
    return lambda given: step(given.student, given.divergence, given)


def student_step(rows: int, tokens: int):
    """Gradient of the sum of log-probs, `ROWS_AT_ONCE` rows at a time."""
    ids = np.random.default_rng(1).integers(0, MODEL.vocab, (rows, tokens + 1))
    ids = ids.reshape(-1, min(ROWS_AT_ONCE, rows), tokens + 1).astype(np.int32)
    scored = np.broadcast_to(np.arange(1, tokens + 1), (*ids.shape[:2], tokens))
    length = np.full(ids.shape[:2], tokens + 1, np.int32)
    mask = jnp.ones(scored.shape[1:])

    def loss(params, view):
        return scoring.score(MODEL, params, view, 1.0, mask).logprob.sum()

    @jax.jit
    def step(params, views):
        def add(total, view):
            return jax.tree.map(jnp.add, total, jax.grad(loss)(params, view)), None

        return jax.lax.scan(add, jax.tree.map(jnp.zeros_like, params), views)[0]

    views = TokenView(tokens=ids, length=length, scored=scored.astype(np.int32))
    params = qwen.init(MODEL, jax.random.key(0))
    return lambda: step(params, views)


def seconds(run, repeats: int) -> float:
    """The least of several runs, the first of which only compiles."""
    jax.block_until_ready(run())
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        jax.block_until_ready(run())
        times.append(time.perf_counter() - start)
    return min(times)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rows", type=int, default=256)
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--names", default=",".join(objective.OBJECTIVES))
    arguments = parser.parse_args()
    network = seconds(
        student_step(arguments.rows, arguments.tokens), min(arguments.repeats, 2)
    )
    given = jax.device_put(signals(arguments.rows, arguments.tokens))
    for name in arguments.names.split(","):
        step = objective_step(name)
        cost = seconds(lambda step=step: step(given), arguments.repeats)
        line = {
            "benchmark": "losses",
            "case": f"{name} {arguments.rows}x{arguments.tokens}",
            "metric": "seconds of forward and backward",
            "ours": round(cost, 5),
            "baseline": round(network, 3),
            "baseline_name": "student's forward and backward, 4 layers of 256",
            "ratio": round(network / cost, 1),
        }
        print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main()
