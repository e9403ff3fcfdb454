"""How much host memory reading a Hugging Face folder takes, next to its bytes.

  python benchmarks/loading.py
  python benchmarks/loading.py --shape=qwen2.5-0.5b --layers=4 --vocab=8192

Writes a random bfloat16 folder of the shape into a temporary folder (3.1 GB as it is)
and reads it in a fresh process for each case: bfloat16 kept, and float32 masters, whose
parameters alone are twice the folder. JSON lines {"benchmark", "case", "metric", "ours",
"baseline", "baseline_name", "ratio"}. Bytes: the most memory in use (maximum resident
set) above that of a process which only imports; baseline, the bytes of the folder's
weights; ratio = baseline / ours, so that above 0.77 is below 1.3 times the folder.
Linux only: the peak is the kernel's VmHWM.
"""

import argparse
import dataclasses
import json
import os
import pathlib
import subprocess
import sys
import tempfile
from collections.abc import Iterator

import jax
import ml_dtypes
import numpy as np

from skillsd_jax.models import huggingface, qwen, shapes

LOAD = """
import re, sys
import jax
from skillsd_jax.models import huggingface
jax.device_put(0.0).block_until_ready()
folder, dtype = sys.argv[1:]
if folder:
    _, params = huggingface.load(folder, dtype=dtype or None)
    jax.block_until_ready(params)
# Not ru_maxrss: a child inherits its parent's.
with open("/proc/self/status") as file:
    print(int(re.search(r"VmHWM:\\s+(\\d+) kB", file.read())[1]) * 1024)
"""


def write(folder: str, config: qwen.ModelConfig) -> int:
    """A folder of random weights; returns their bytes."""
    rng = np.random.default_rng(0)

    def leaf(shape):
        return (rng.random(shape.shape, np.float32) - 0.5).astype(ml_dtypes.bfloat16)

    wanted = jax.eval_shape(lambda: qwen.init(config, jax.random.key(0)))
    huggingface.save(folder, config, jax.tree.map(leaf, wanted), dtype="bfloat16")
    files = pathlib.Path(folder).glob("*.safetensors")
    return sum(file.stat().st_size for file in files)


def peak(folder: str, dtype: str) -> int:
    """Bytes that a process which reads the folder peaks at; "": that reads none."""
    done = subprocess.run(
        [sys.executable, "-c", LOAD, folder, dtype],
        check=True,
        stdout=subprocess.PIPE,
        env=os.environ | {"JAX_PLATFORMS": "cpu"},
    )
    return int(done.stdout)


def lines(folder: str, name: str, size: int) -> Iterator[dict]:
    idle = peak("", "")
    for dtype, case in (("", "bfloat16 kept"), ("float32", "float32")):
        ours = peak(folder, dtype) - idle
        yield {
            "benchmark": "loading",
            "case": f"{name} {case}",
            "metric": "peak bytes",
            "ours": ours,
            "baseline": size,
            "baseline_name": "bytes of the folder",
            "ratio": round(size / ours, 3),
        }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--shape", default="qwen2.5-1.5b", choices=shapes.SHAPES)
    parser.add_argument("--layers", type=int, default=0, help="0: as published")
    parser.add_argument("--vocab", type=int, default=0, help="0: as published")
    arguments = parser.parse_args()
    config, name = shapes.SHAPES[arguments.shape], arguments.shape
    for part in ("layers", "vocab"):
        if value := getattr(arguments, part):
            config = dataclasses.replace(config, **{part: value})
            name += f" {part}={value}"
    with tempfile.TemporaryDirectory() as folder:
        size = write(folder, config)
        for line in lines(folder, name, size):
            print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main()
