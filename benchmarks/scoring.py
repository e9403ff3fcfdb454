"""Scoring of sampled tokens against the naive version: memory and time.

  python benchmarks/scoring.py [--width=64,896] [--dtype=float32] [--repeats=3]

Value and gradient of the log-probs of B 4 × T 512 tokens over V 151,936 words, with
respect to hidden states and head; the naive version makes the logits once and lets JAX
derive the gradient. Memory is what the compiled program needs beside its arguments and
results. The floor: four matmuls of 2·B·T·V·D operations, of which the naive version
does three. JSON lines; ratio = baseline / ours, above 1 is better.
"""

import dataclasses
import json
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags

from skillsd_jax.losses import divergence
from skillsd_jax.models import qwen, scoring
from skillsd_jax.tokens import TokenView

WIDTH = flags.DEFINE_list("width", ["64", "896"], "widths of the network")
DTYPE = flags.DEFINE_string("dtype", "float32", "of the matmuls")
REPEATS = flags.DEFINE_integer("repeats", 3, "timed calls; the fastest counts")
ROWS, LENGTH, VOCABULARY = 4, 512, 151_936
MIB = 2.0**20


def model(width: int) -> qwen.ModelConfig:
    return qwen.ModelConfig(
        vocab=VOCABULARY,
        width=width,
        layers=1,
        heads=1,
        kv_heads=1,
        head_size=64,
        hidden=64,
        dtype=DTYPE.value,
    )


def view(scored: int) -> TokenView:
    """Rows whose last `scored` tokens count."""
    rng = np.random.default_rng(0)
    return TokenView(
        tokens=rng.integers(0, VOCABULARY, (ROWS, LENGTH), dtype=np.int32),
        length=np.full(ROWS, LENGTH, np.int32),
        scored=np.tile(np.arange(LENGTH - scored, LENGTH, dtype=np.int32), (ROWS, 1)),
    )


def naive(voice: scoring.Voice, view: TokenView, temperature, mask, entropy=False):
    """The equation as it is written, whole logits and all."""
    logits = voice.logits(voice.states) / temperature
    logs = jax.nn.log_softmax(logits)
    token = jnp.take_along_axis(view.tokens, view.scored, axis=1)
    logprob = jnp.take_along_axis(logs, token[..., None], -1)[..., 0]
    spread = -jnp.sum(jnp.exp(logs) * logs, -1) if entropy else jnp.zeros_like(logprob)
    return scoring.Scores(logprob * mask, spread * mask)


def naive_divergence(measure, student, teacher, temperature, mask):
    both = (voice.logits(voice.states) / temperature for voice in (student, teacher))
    return measure(*both) * mask


@dataclasses.dataclass(frozen=True)
class Measured:
    """Bytes beside arguments and results, and seconds of the fastest call."""

    memory: int
    seconds: float

    @classmethod
    def of(cls, loss: Callable, *arguments) -> "Measured":
        compiled = jax.jit(jax.value_and_grad(loss, (0, 1))).lower(*arguments).compile()
        jax.block_until_ready(compiled(*arguments))
        seconds = []
        for _ in range(REPEATS.value):
            start = time.perf_counter()
            jax.block_until_ready(compiled(*arguments))
            seconds.append(time.perf_counter() - start)
        return cls(compiled.memory_analysis().temp_size_in_bytes, min(seconds))


def say(case: str, metric: str, ours: float, baseline: float, name: str) -> None:
    line = {
        "benchmark": "scoring",
        "case": case,
        "metric": metric,
        "ours": round(ours, 4),
        "baseline": round(baseline, 4),
        "baseline_name": name,
        "ratio": round(baseline / ours, 3),
    }
    print(json.dumps(line), flush=True)


def compare(case: str, ours: Measured, baseline: Measured, name: str) -> None:
    say(case, "temp MiB", ours.memory / MIB, baseline.memory / MIB, name)
    say(case, "seconds", ours.seconds, baseline.seconds, name)


def log_prob(config, scored: int, scores: Callable, entropy: bool) -> Callable:
    seen, mask = view(scored), jnp.ones((ROWS, scored))

    def loss(states, kernel):
        voice = scoring.Voice(config, {"embed": kernel}, states)
        found = scores(voice, seen, 0.7, mask, entropy)
        return found.logprob.sum() + 0.1 * found.entropy.sum()

    return loss


def apart(config, compare: Callable, teacher) -> Callable:
    """JSD to a teacher of its own head."""
    mask = jnp.ones((ROWS, LENGTH))

    def loss(states, kernel):
        voices = (
            scoring.Voice(config, {"embed": k}, s)
            for s, k in ((states, kernel), teacher)
        )
        return compare(divergence.jsd, *voices, 0.7, mask).sum()

    return loss


def run(width: int) -> None:
    config, keys = model(width), jax.random.split(jax.random.key(0), 4)
    states = jax.random.normal(keys[0], (ROWS, LENGTH, width), config.dtype)
    head = jax.random.normal(keys[1], (VOCABULARY, width)) * width**-0.5
    case = f"{jax.default_backend()} {config.dtype} width {width}"

    def measured(scores, scored=LENGTH, entropy=False):
        loss = log_prob(config, scored, scores, entropy)
        return Measured.of(loss, states[:, :scored], head)

    ours = measured(scoring.scores)
    compare(case, ours, measured(naive), "whole logits")
    entropy = measured(scoring.scores, entropy=True)
    say(f"{case}, entropy", "seconds", entropy.seconds, ours.seconds, "without")
    few = measured(scoring.scores, scored=LENGTH * 3 // 10)
    say(f"{case}, 30 % scored", "seconds", few.seconds, ours.seconds, "all scored")
    teacher = (
        jax.random.normal(keys[2], states.shape, config.dtype),
        jax.random.normal(keys[3], head.shape) * width**-0.5,
    )
    wide = Measured.of(apart(config, scoring.divergence, teacher), states, head)
    whole = Measured.of(apart(config, naive_divergence, teacher), states, head)
    compare(f"{case}, jsd", wide, whole, "whole logits")


def main(_) -> None:
    for width in WIDTH.value:
        run(int(width))


if __name__ == "__main__":
    app.run(main)
