"""What one update takes on meshes that are not there: memory and collectives.

  python benchmarks/scaling.py [--platform=tpu] [--topology=v5p:4x4x1,v5p:8x8x1]
      [--models=qwen3-4b,qwen2.5-7b] [--tp=1,4]

The published ALFWorld setting's update (skill_sd, live teacher, a reference for the KL
term, bfloat16 matmuls, 2,048 + 512 tokens and a skill of 1,024) is compiled ahead of
time for every model and mesh, without an array: --platform=tpu describes TPUs by their
topology and needs `pip install 'jax[tpu]'`, no TPU; its compiler's memory is that of
the real program. --platform=cpu compiles for as many forced CPU devices: its bytes of
parameters and moments are exact, but its temporaries are not those of a TPU, as plain
attention keeps scores and the CPU's compiler reuses less.

Every device scores one row at a time; fsdp × tp covers the mesh. JSON lines: GiB per device
of student, moments, reference, batch and temporaries; whether they fit --memory; how
often an update of one minibatch, all of its micro-batches filled, runs each kind of
collective, and the GiB that come out of them on a device.
"""

import dataclasses
import json
import math
import os
import re
import time
from pathlib import Path

import jax
import numpy as np
from absl import app, flags
from jax.experimental import topologies

from skillsd_jax import config as settings
from skillsd_jax import learner, presets, sharding, tokens
from skillsd_jax.models import qwen, shapes

PLATFORM = flags.DEFINE_enum("platform", "tpu", ["tpu", "cpu"], "compiled for")
TOPOLOGY = flags.DEFINE_list("topology", ["v5p:4x4x1", "v5p:8x8x1"], "of the chips")
MODELS = flags.DEFINE_list("models", ["qwen3-4b", "qwen2.5-7b"], "published shapes")
TP = flags.DEFINE_list("tp", ["1", "4"], "parts of the heads; fsdp takes the rest")
ATTENTION = flags.DEFINE_string("attention", "", "'': splash on a TPU, else plain")
MEMORY = flags.DEFINE_float("memory", 95.0, "GiB of a device")
PROGRAM = flags.DEFINE_string("program", "", "file that takes the last program's text")
GIB = 2.0**30
TURNS = 50
COLLECTIVES = (
    "all-gather",
    "all-reduce",
    "reduce-scatter",
    "all-to-all",
    "collective-permute",
)
BYTES = {"pred": 1, "s8": 1, "u8": 1, "bf16": 2, "f16": 2, "s32": 4, "u32": 4, "f32": 4}


def devices(topology: str) -> list:
    """Devices to compile for."""
    if PLATFORM.value == "tpu":
        return topologies.get_topology_desc(topology, platform="tpu").devices
    count = math.prod(int(n) for n in topology.partition(":")[2].split("x"))
    found = jax.devices()
    if len(found) < count:
        raise ValueError(
            f"{topology} has {count} devices, jax sees {len(found)}; set "
            f"XLA_FLAGS=--xla_force_host_platform_device_count={count}"
        )
    return found[:count]


def published(model: str, mesh: settings.Mesh) -> settings.Config:
    config = presets.load(str(presets.FOLDER / "alfworld.py")).get_config(model)
    config.mesh, config.optimizer.micro_rows = mesh, mesh.data * mesh.fsdp
    config.optimizer.micro_tokens = 0  # a row of the longest on each part
    return config


def empty_batch(config: settings.Config) -> tokens.Arranged:
    """An iteration's arrays in their shapes, with one minibatch."""
    prompt = config.prompt
    length = prompt.max_prompt_length + prompt.max_response_length
    rows = config.rollout.prompts * config.rollout.group_size * TURNS + 1
    skilled = length + prompt.max_skill_length
    batch = tokens.pack([], rows, length, skilled, prompt.max_response_length)
    arranged = tokens.arrange(batch, np.arange(0), config.optimizer)
    return jax.tree.map(lambda x: x[:1], arranged)


def abstract(tree, where):
    """Shapes with shardings, in the place of arrays."""
    return jax.tree.map(
        lambda x, at: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=at), tree, where
    )


def held(tree) -> float:
    """GiB that one device holds of it."""
    return (
        sum(
            math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize
            for x in jax.tree.leaves(tree)
        )
        / GIB
    )


@dataclasses.dataclass(frozen=True)
class Program:
    """The text of a compiled program, by computation.

    Args:
      parts: name → its lines.
      entry: where it begins.
      loops: how often a loop of unknown length runs.
    """

    parts: dict[str, list[str]]
    entry: str
    loops: int

    @classmethod
    def of(cls, text: str, loops: int) -> "Program":
        parts, entry, name = {}, "", ""
        for line in text.splitlines():
            opened = re.match(r"(ENTRY )?%?([\w.\-]+) .*\{$", line)
            if opened and not line.startswith(" "):
                name = opened[2]
                parts[name] = []
                entry = name if opened[1] else entry
            elif name:
                parts[name].append(line)
        return cls(parts, entry, loops)

    def collectives(self) -> dict[str, list[float]]:
        """Kind → [how often it runs, GiB that come out of it on a device]."""
        found = {kind: [0, 0.0] for kind in COLLECTIVES}
        self._walk(self.entry, 1, found)
        return found

    def _walk(self, name: str, times: int, found) -> None:
        for line in self.parts[name]:
            made = re.search(r" = (.*?) ([\w\-]+)\(", line)
            if made is None:
                continue
            kind = made[2].removesuffix("-start")
            if kind in found:
                found[kind][0] += times
                found[kind][1] += times * _gib(made[1])
            inner = times * (self._rounds(line) if made[2] == "while" else 1)
            called = re.findall(
                r"(?:body|calls|to_apply|true_computation|false_computation|"
                r"branch_computations)=\{?((?:%[\w.\-]+(?:, )?)+)",
                line,
            )
            for names in called:
                for other in re.findall(r"%([\w.\-]+)", names):
                    self._walk(other, inner, found)

    def _rounds(self, line: str) -> int:
        """How often a loop runs: as is known, or as its condition compares with."""
        known = re.search(r'"known_trip_count":\{"n":"(\d+)"', line)
        if known:
            return int(known[1])
        name = re.search(r"condition=%([\w.\-]+)", line)[1]
        bounds = re.findall(
            r" [su]32\[\]\S* constant\((\d+)\)", "\n".join(self.parts[name])
        )
        if len(bounds) != 1:
            return self.loops
        # A product whose weights come in turns takes two of them a round.
        return -(-int(bounds[0]) // (2 if "windowed" in name else 1))


def _gib(shape: str) -> float:
    """Of the largest array in a result: a start carries its operand as well."""
    sizes = [
        BYTES.get(kind, 4) * math.prod(int(n) for n in dims.split(",") if n)
        for kind, dims in re.findall(r"(\w+)\[([\d,]*)\]", shape)
    ]
    return max(sizes, default=0) / GIB


def measure(model: str, topology: str, tp: int) -> dict:
    chips = devices(topology)
    config = published(model, settings.Mesh(fsdp=len(chips) // tp, tp=tp))
    kernel = ATTENTION.value or ("splash" if PLATFORM.value == "tpu" else "plain")
    shape = dataclasses.replace(
        shapes.SHAPES[model],
        dtype=config.model.dtype,
        attention=kernel,
        remat=config.model.remat,
    )
    batch = empty_batch(config)
    began = time.perf_counter()
    with jax.set_mesh(sharding.make(config.mesh, chips)):
        made = learner.Learner(shape, config, updates=config.iterations)
        start = jax.eval_shape(lambda: made.init(qwen.init(shape, jax.random.key(0))))
        start = abstract(start, sharding.shardings(start))
        rows = abstract(batch, sharding.whole_shardings(batch))
        compiled = made._update.lower(start, rows).compile()
    memory = compiled.memory_analysis()
    total = memory.argument_size_in_bytes + memory.temp_size_in_bytes
    total += memory.output_size_in_bytes - memory.alias_size_in_bytes
    text = compiled.as_text()
    if PROGRAM.value:
        Path(PROGRAM.value).write_text(text)
    program = Program.of(text, loops=batch.chosen.shape[1])
    collectives = program.collectives()
    return {
        "student": held(start.params),
        "moments": held(start.optimizer),
        "reference": held(start.reference),
        "batch": held(rows),
        "temporaries": memory.temp_size_in_bytes / GIB,
        "total": total / GIB,
        "fits": total / GIB <= MEMORY.value,
        "collectives": {k: n for k, (n, _) in collectives.items() if n},
        "collective_gib": {k: round(g, 2) for k, (n, g) in collectives.items() if n},
        "compile_s": time.perf_counter() - began,
    }


def main(_) -> None:
    if PLATFORM.value == "tpu":
        os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")  # nobody to ask
    for model in MODELS.value:
        for topology in TOPOLOGY.value:
            for tp in map(int, TP.value):
                found = measure(model, topology, tp)
                line = {"benchmark": "scaling", "platform": PLATFORM.value}
                line |= {"model": model, "topology": topology, "tp": tp}
                line |= {
                    k: round(v, 2) if isinstance(v, float) else v
                    for k, v in found.items()
                }
                print(json.dumps(line), flush=True)


if __name__ == "__main__":
    app.run(main)
