"""Model FLOPs utilisation of one training step against the card's own matmul ceiling.

  python benchmarks/network.py --shape=qwen3-0.6b --rows=8 --length=1024 --attention=cudnn

Forward and backward of the log-probs of every token, random weights, float32 masters,
matmuls in --dtype. Counted are the operations that the equations need: six per weight
of a linear map or the head and token, and causal attention; nothing that is computed
twice. The ceiling is a square matmul of the same type, measured in the same run. JSON
lines; ratio = ours / baseline: 1 would be the ceiling.
"""

import dataclasses
import json
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags

from skillsd_jax.models import attention, qwen, scoring, shapes
from skillsd_jax.tokens import TokenView

SHAPE = flags.DEFINE_string("shape", "qwen3-0.6b", "a name in models/shapes.py")
ROWS = flags.DEFINE_integer("rows", 8, "rows scored at once")
LENGTH = flags.DEFINE_integer("length", 1024, "tokens of a row")
LAYERS = flags.DEFINE_integer("layers", 0, "0: as the shape has")
DTYPE = flags.DEFINE_string("dtype", "bfloat16", "of the matmuls")
KIND = flags.DEFINE_string("attention", "plain", "plain, xla, cudnn, splash")
REMAT = flags.DEFINE_string("remat", "dots", "dots, nothing, everything")
SIDE = flags.DEFINE_integer("side", 8192, "of the square matmul")
REPEATS = flags.DEFINE_integer("repeats", 5, "timed calls; the fastest counts")


def fastest(call: Callable, *arguments) -> float:
    """Seconds of the fastest call; the first, which compiles, is not timed."""
    jax.block_until_ready(call(*arguments))
    seconds = []
    for _ in range(REPEATS.value):
        start = time.perf_counter()
        jax.block_until_ready(call(*arguments))
        seconds.append(time.perf_counter() - start)
    return min(seconds)


def ceiling() -> float:
    """FLOP/s of one large matmul."""
    n = SIDE.value
    a = jax.random.normal(jax.random.key(0), (n, n), DTYPE.value)
    return 2 * n**3 / fastest(jax.jit(jnp.matmul), a, a)


def operations(config: qwen.ModelConfig, rows: int, length: int) -> float:
    """Of forward and backward: three times the forward's."""
    heads = config.heads * config.head_size
    keys = config.kv_heads * config.head_size
    linear = config.width * (2 * heads + 2 * keys + 3 * config.hidden)
    weights = config.layers * linear + config.vocab * config.width
    scores = config.layers * 4 * heads * length / 2  # half of them are masked
    return 3 * rows * length * (2 * weights + scores)


def step(config: qwen.ModelConfig) -> float:
    """Seconds of value and gradient of a batch."""
    rng = np.random.default_rng(0)
    rows, length = ROWS.value, LENGTH.value
    place = np.arange(1, length, dtype=np.int32)
    view = TokenView(
        tokens=rng.integers(0, config.vocab, (rows, length), dtype=np.int32),
        length=np.full(rows, length, np.int32),
        scored=np.tile(place, (rows, 1)),
    )
    mask = jnp.ones(view.scored.shape)

    def loss(params):
        return scoring.score(config, params, view, 1.0, mask).logprob.mean()

    params = qwen.init(config, jax.random.key(0))
    return fastest(jax.jit(jax.value_and_grad(loss)), params)


def main(_) -> None:
    config = dataclasses.replace(
        shapes.SHAPES[SHAPE.value],
        dtype=DTYPE.value,
        attention=KIND.value,
        remat=REMAT.value,
    )
    if LAYERS.value:
        config = dataclasses.replace(config, layers=LAYERS.value)
    backend = jax.default_backend()
    fault = attention.refuse(KIND.value, config.head_size, config.dtype, backend)
    if fault:
        raise SystemExit(f"refused: {fault}")
    seconds, limit = step(config), ceiling()
    reached = operations(config, ROWS.value, LENGTH.value) / seconds
    device = jax.devices()[0].device_kind
    case = f"{device} {SHAPE.value} {ROWS.value} x {LENGTH.value} {KIND.value}"
    line = {
        "benchmark": "network",
        "case": f"{case} {config.dtype} {config.layers} layers remat={config.remat}",
        "metric": "TFLOP/s of forward and backward",
        "ours": round(reached / 1e12, 3),
        "baseline": round(limit / 1e12, 3),
        "baseline_name": f"matmul of {SIDE.value}",
        "ratio": round(reached / limit, 3),
    }
    print(json.dumps(line), flush=True)


if __name__ == "__main__":
    app.run(main)
