"""Decoding speed against the time that memory needs, and against transformers.

  python benchmarks/decode.py --shapes=qwen3-0.6b,qwen3-1.7b --rows=64,256
  python benchmarks/decode.py --shapes=qwen3-0.6b --layers=2 --rows=4 --cache=64 \
      --tokens=8 --dtype=float32

Random weights in --dtype, every row live, a cache half full at the start. A decoder reads
its weights and the keys and values of every row once a token: those bytes over the
bandwidth of a large copy, measured beside it, are the floor. Hugging Face generate with a
static cache, behind a prompt that fills as much; torch has to see the same device. Both:
what --tokens take, less what one takes. Each case in a process of its own, so that none
finds another's memory taken. JSON lines; ratio = ours / baseline for tokens a second. Why
a case fails goes to stderr.
"""

import argparse
import dataclasses
import functools
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from importlib.metadata import version

COPIED = 2**30  # bytes of the copy that measures the bandwidth
MEMORY = {"XLA_PYTHON_CLIENT_MEM_FRACTION": "0.95"}  # 256 rows of 2,048 take 56 GiB


def fastest(call: Callable[..., object], repeats: int, *given) -> float:
    """Seconds of the fastest call; the first, which compiles, is not timed."""
    call(*given)
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        call(*given)
        seconds.append(time.perf_counter() - start)
    return min(seconds)


def configured(name: str, arguments):
    """The published shape, with what the command line changes."""
    from skillsd_jax.models import shapes

    config = dataclasses.replace(shapes.SHAPES[name], dtype=arguments.dtype)
    if arguments.layers:
        config = dataclasses.replace(config, layers=arguments.layers)
    return config


def bandwidth(repeats: int) -> float:
    """Bytes a second that a copy reads and writes."""
    import jax
    import jax.numpy as jnp

    x = jnp.zeros(COPIED // 4, jnp.float32)
    copied = jax.jit(lambda x: x + 1)
    return 2 * COPIED / fastest(lambda: copied(x).block_until_ready(), repeats)


def network(config):
    """Random weights in the type of the matmuls, layers apart."""
    import jax

    from skillsd_jax.models import qwen

    # In one program the two take minutes to compile for a GPU.
    params = qwen.init(config, jax.random.key(0))
    return jax.jit(lambda params: qwen.unstack(config, params))(params)


def begun(config, rows: int, slots: int):
    """A state of random numbers."""
    import jax
    import jax.numpy as jnp

    from skillsd_jax import sampler

    normal = jax.jit(jax.random.normal, static_argnums=(1, 2))
    state = jax.eval_shape(lambda: sampler.start(config, rows, slots))
    leaves, shape = jax.tree.flatten(state)
    keys = jax.random.split(jax.random.key(1), len(leaves))

    def filled(key, x):
        if jnp.issubdtype(x.dtype, jnp.floating):
            return normal(key, x.shape, x.dtype)
        return jnp.full(x.shape, slots // 2, x.dtype)

    return jax.tree.unflatten(shape, map(filled, keys, leaves))


def ours(config, rows: int, arguments) -> dict:
    """Seconds of a token of all rows, the bytes it reads, and how fast memory is."""
    import jax
    import jax.numpy as jnp

    from skillsd_jax import sampler

    slots, count, repeats = arguments.cache, arguments.tokens, arguments.repeats
    speed, how = bandwidth(repeats), sampler.Decoding(count)
    params, held = network(config), [begun(config, rows, slots)]
    keys = jax.random.split(jax.random.key(2), rows)

    @functools.partial(jax.jit, donate_argnums=1)
    def spoken(params, state, keys, limit):
        length = jnp.full(rows, slots // 2, jnp.int32)
        cache = dataclasses.replace(state.cache, length=length)
        state = dataclasses.replace(state, cache=cache)
        ask = sampler.Ask(keys, jnp.ones(rows, bool), jnp.full(rows, limit))
        state, reply = sampler.generate(config, params, state, ask, 1.0, how)
        return state, jnp.sum(reply.count)

    def speak(limit):
        state, said = spoken(params, held.pop(), keys, limit)
        if int(said) != rows * limit:  # waits
            raise SystemExit(f"{said} tokens instead of {rows * limit}")
        held.append(state)

    most, one = (fastest(speak, repeats, limit) for limit in (count, 1))
    read = params if config.tie_embeddings else params | {"embed": ()}
    weights = sum(leaf.nbytes for leaf in jax.tree.leaves(read))
    whole = sum(x.nbytes for x in (*held[0].cache.keys, *held[0].cache.values))
    return {
        "device": jax.devices()[0].device_kind,
        "platform": jax.default_backend(),
        "seconds": (most - one) / (count - 1),
        "bytes": weights + whole * (slots // 2 + count / 2) / slots,
        "bytes_per_second": speed,
    }


def transformers(config, rows: int, arguments) -> dict:
    """Seconds of a token of all rows."""
    import torch
    from transformers import Qwen3Config, Qwen3ForCausalLM

    device = {"gpu": "cuda"}.get(arguments.platform, arguments.platform)
    if device == "cuda" and not torch.cuda.is_available():
        raise SystemExit("torch sees no GPU; install the build of torch that does")
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
    with torch.device(device):
        model = Qwen3ForCausalLM(shape).to(getattr(torch, config.dtype)).eval()
    prompt = torch.randint(config.vocab, (rows, arguments.cache // 2), device=device)

    def generate(count: int) -> None:
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
        if device == "cuda":
            torch.cuda.synchronize()

    counts = arguments.tokens, 1
    most, one = (fastest(generate, arguments.repeats, count) for count in counts)
    seconds = (most - one) / (arguments.tokens - 1)
    known = f"transformers {version('transformers')}, torch {torch.__version__}"
    return {"seconds": seconds, "name": f"{known}, static cache"}


CONTENDERS = {"ours": ours, "transformers": transformers}


def child(contender: str, name: str, rows: int, arguments, platform: str = ""):
    """What one case reports, in a process of its own; None: it failed, and said why."""
    given = ("cache", "tokens", "layers", "dtype", "repeats")
    options = [f"--{option}={getattr(arguments, option)}" for option in given]
    done = subprocess.run(
        [sys.executable, __file__, f"--only={contender}", f"--shapes={name}"]
        + [f"--rows={rows}", f"--platform={platform}", *options],
        check=False,
        stdout=subprocess.PIPE,
        text=True,
        env=MEMORY | os.environ,
    )
    if done.returncode:
        print(f"{contender}, {name}, {rows} rows: failed", file=sys.stderr)
        return None
    return json.loads(done.stdout.splitlines()[-1])


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


def compare(name: str, rows: int, arguments) -> bool:
    """Prints the lines of one shape and number of rows; whether there are all."""
    mine = child("ours", name, rows, arguments)
    if mine is None:
        return False
    layers = arguments.layers or "all"
    case = f"{mine['device']}, {name}, {layers} layers, {arguments.dtype}, {rows} rows"
    gib, speed = mine["bytes"] / 2**30, mine["bytes_per_second"]
    floor = f"{gib:.2f} GiB a token at {speed / 1e9:.0f} GB/s"
    print(line(case, rows, mine["seconds"], mine["bytes"] / speed, floor), flush=True)
    others = [other for other in arguments.contenders.split(",") if other != "ours"]
    for other in others:
        theirs = child(other, name, rows, arguments, mine["platform"])
        if theirs is None:
            return False
        seconds = mine["seconds"], theirs["seconds"]
        print(line(case, rows, *seconds, theirs["name"]), flush=True)
    return True


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--shapes", default="qwen3-0.6b,qwen3-1.7b")
    parser.add_argument("--rows", default="64,256")
    parser.add_argument("--cache", type=int, default=2048, help="slots of a row")
    parser.add_argument("--tokens", type=int, default=64, help="drawn by each row")
    parser.add_argument("--layers", type=int, default=0, help="0: as the shape has")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--contenders", default="ours,transformers")
    parser.add_argument("--only", choices=CONTENDERS, help=argparse.SUPPRESS)
    parser.add_argument("--platform", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    refuse(parser, arguments)
    shapes = arguments.shapes.split(",")
    cases = [(name, int(rows)) for name in shapes for rows in arguments.rows.split(",")]
    if arguments.only:
        [(name, rows)] = cases
        config = configured(name, arguments)
        print(json.dumps(CONTENDERS[arguments.only](config, rows, arguments)))
    elif False in [compare(name, rows, arguments) for name, rows in cases]:
        raise SystemExit(1)


def refuse(parser: argparse.ArgumentParser, arguments) -> None:
    """Ends with what is wrong with the command line, if anything is."""
    unknown = set(arguments.contenders.split(",")) - set(CONTENDERS)
    if unknown:
        parser.error(f"--contenders={','.join(unknown)}: {', '.join(CONTENDERS)}")
    room = arguments.cache - arguments.cache // 2
    if not 2 <= arguments.tokens <= room:
        parser.error(
            f"--tokens={arguments.tokens} must be 2 to {room}: --cache={arguments.cache}"
            " is half full at the start"
        )


if __name__ == "__main__":
    main()
