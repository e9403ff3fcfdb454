"""Decoding speed against the time that memory needs, and against transformers.

  python benchmarks/decode.py --shapes=qwen3-0.6b,qwen3-1.7b --rows=64,256
  python benchmarks/decode.py --shapes=qwen3-0.6b --layers=2 --rows=4 --cache=64 \
      --tokens=8 --dtype=float32

Random weights in --dtype, every row live, a cache half full at the start. A decoder reads
its weights and the keys and values of every row once a token: those bytes over the
bandwidth of a large copy, measured in the same run, are the floor. Hugging Face generate
with a static cache, where torch sees the same device: what --tokens take behind a prompt
that fills as much, less what one takes. JSON lines; ratio = ours / baseline for tokens a
second.
"""

import argparse
import dataclasses
import importlib.util
import json
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp

from skillsd_jax import sampler
from skillsd_jax.models import kv_cache, qwen, shapes

COPIED = 2**30  # bytes of the copy that measures the bandwidth


def fastest(call: Callable, repeats: int) -> float:
    """Seconds of the fastest call; the first, which compiles, is not timed."""
    jax.block_until_ready(call())
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        jax.block_until_ready(call())
        seconds.append(time.perf_counter() - start)
    return min(seconds)


def bandwidth(repeats: int) -> float:
    """Bytes a second that a copy reads and writes."""
    x = jnp.zeros(COPIED // 4, jnp.float32)
    return 2 * COPIED / fastest(lambda: copied(x), repeats)


copied = jax.jit(lambda x: x + 1)


def network(config: qwen.ModelConfig) -> qwen.Params:
    """Random weights in the type of the matmuls, layers apart."""

    def made(key):
        return qwen.unstack(config, qwen.init(config, key))

    return jax.jit(made)(jax.random.key(0))


def ours(config: qwen.ModelConfig, rows: int, arguments) -> tuple[float, float]:
    """Seconds of a token of all rows, and the bytes it reads."""
    params, slots, count = network(config), arguments.cache, arguments.tokens
    how = sampler.Decoding(count)

    def spoken(params, keys):
        state = sampler.start(config, rows, slots)
        length = jnp.full(rows, slots // 2, jnp.int32)
        cache = dataclasses.replace(state.cache, length=length)
        state = dataclasses.replace(state, cache=cache)
        ask = sampler.Ask(keys, jnp.ones(rows, bool))
        return sampler.generate(config, params, state, ask, 1.0, how)[1]

    keys = jax.random.split(jax.random.key(1), rows)
    call = jax.jit(spoken)
    seconds = fastest(lambda: call(params, keys), arguments.repeats)
    weights = sum(leaf.nbytes for leaf in jax.tree.leaves(params))
    empty = jax.eval_shape(lambda: kv_cache.empty(config, rows, slots))
    held = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(empty))
    live = held * (slots // 2 + count / 2) / slots
    return seconds / (count - 1), weights + live  # the first is drawn, nothing is read


def transformers(config: qwen.ModelConfig, rows: int, arguments) -> float | None:
    """Seconds of a token of all rows; None where torch does not see the device."""
    if not importlib.util.find_spec("torch"):
        return None
    import torch
    from transformers import Qwen3Config, Qwen3ForCausalLM

    on_gpu = jax.default_backend() == "gpu"
    if on_gpu and not torch.cuda.is_available():
        return None
    shape = Qwen3Config(
        vocab_size=config.vocab,
        hidden_size=config.width,
        intermediate_size=config.hidden,
        num_hidden_layers=config.layers,
        num_attention_heads=config.heads,
        num_key_value_heads=config.kv_heads,
        head_dim=config.head_size,
        tie_word_embeddings=config.tie_embeddings,
        max_position_embeddings=2 * arguments.cache,
    )
    device = "cuda" if on_gpu else "cpu"
    with torch.device(device):
        model = Qwen3ForCausalLM(shape).to(getattr(torch, config.dtype)).eval()
    prompt = torch.randint(config.vocab, (rows, arguments.cache // 2), device=device)

    def took(count: int) -> float:
        start = time.perf_counter()
        model.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            do_sample=True,
            top_k=0,
            min_new_tokens=count,
            max_new_tokens=count,
            cache_implementation="static",
            pad_token_id=0,
        )
        if on_gpu:
            torch.cuda.synchronize()
        return time.perf_counter() - start

    took(arguments.tokens)  # compiles, captures
    most, one = (
        min(took(count) for _ in range(arguments.repeats))
        for count in (arguments.tokens, 1)
    )
    return (most - one) / (arguments.tokens - 1)


def line(case: str, rows: int, ours: float, baseline: float, name: str) -> str:
    """Of seconds a token, as tokens a second."""
    return json.dumps(
        {
            "benchmark": "decode",
            "case": case,
            "metric": "tokens per second",
            "ours": round(rows / ours, 1),
            "baseline": round(rows / baseline, 1),
            "baseline_name": name,
            "ratio": round(baseline / ours, 3),
        }
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--shapes", default="qwen3-0.6b,qwen3-1.7b")
    parser.add_argument("--rows", default="64,256")
    parser.add_argument("--cache", type=int, default=2048, help="slots of a row")
    parser.add_argument("--tokens", type=int, default=128, help="drawn by each row")
    parser.add_argument("--layers", type=int, default=0, help="0: as the shape has")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--repeats", type=int, default=3)
    arguments = parser.parse_args()
    speed = bandwidth(arguments.repeats)
    device = jax.devices()[0].device_kind
    for name in arguments.shapes.split(","):
        config = dataclasses.replace(shapes.SHAPES[name], dtype=arguments.dtype)
        if arguments.layers:
            config = dataclasses.replace(config, layers=arguments.layers)
        for rows in map(int, arguments.rows.split(",")):
            case = f"{device} {name} {config.layers} layers {config.dtype}, {rows} rows"
            taken, read = ours(config, rows, arguments)
            floor = f"{read / 2**30:.2f} GiB a token at {speed / 1e9:.0f} GB/s"
            print(line(case, rows, taken, read / speed, floor), flush=True)
            peer = transformers(config, rows, arguments)
            if peer is not None:
                static = "transformers, static cache"
                print(line(case, rows, taken, peer, static), flush=True)


if __name__ == "__main__":
    main()
