"""Meshes change nothing but rounding, and devices hold their part alone.

A process of its own has eight forced CPU devices; it learns on every mesh once and says
what it saw, and the tests here look at that.
"""

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from skillsd_jax import config as settings
from skillsd_jax import optimizers, preflight, runfolder, sharding, validation
from skillsd_jax.models import lora, qwen, shapes

ROOT = Path(__file__).parent.parent
MESHES = {"one": (1, 1, 1), "fsdp": (1, 8, 1), "fsdp_tp": (1, 4, 2), "all": (2, 2, 2)}
ALL = {"data": 2, "fsdp": 2, "tp": 2}


def run(code: str, *arguments: str) -> str:
    """What the code prints in a process with eight devices."""
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "JAX_NUM_CPU_DEVICES": "8",
        "XLA_FLAGS": "--xla_backend_optimization_level=0",
        "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")]),
    }
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments],
        check=False,
        capture_output=True,
        text=True,
        env=environment,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout


LEARNING = """
import dataclasses, json, sys
import jax, numpy as np
import learner_test as toys
from skillsd_jax import checkpoint, learner, sharding, timing, tokens
from skillsd_jax import config as settings
from skillsd_jax.models import qwen, scoring

SHAPE = dataclasses.replace(toys.MODEL, width=32, heads=4, kv_heads=2)
scoring.TILE, scoring.LANES = 8 * 4 * 8, 8  # the head is walked through, in parts
config = toys.configured(minibatches=2, micro_rows=8, learning_rate=1e-3)
config.teacher.every = 2
config.teacher.kind = "periodic"
data = toys.batch(rows=12, size=13)
cut = toys.configured(minibatches=2, length_buckets=4, micro_tokens=120)
folder, meshes, seen = sys.argv[1], json.loads(sys.argv[2]), {}

compilations = timing.Compilations()

def arranged(step):
    order = np.random.default_rng(step).permutation(12)
    return tokens.arrange(data, order, config.optimizer)

def held(tree):
    return sum(x.addressable_shards[0].data.nbytes for x in jax.tree.leaves(tree))

def start(config=config):
    made = learner.Learner(SHAPE, config, updates=10)
    return made, made.init(qwen.init(SHAPE, jax.random.key(0)))

def learn(made, state, steps):
    losses = []
    for step in steps:
        state, sums = made.update(state, arranged(step))
        losses.append(learner.means(sums)["loss"])
    return state, losses

for name, sizes in meshes.items():
    with sharding.over(settings.Mesh(*sizes)):
        made, state = start()
        if name == "all":  # goes on with what another mesh has saved
            saved = checkpoint.Checkpointer(folder, keep=1)
            found = saved.restore(saved.newest()[0], state)
            saved.close()
            same = jax.tree.map(lambda a, b: a.sharding == b.sharding, found, state)
            found, resumed = learn(made, found, (3, 4))
        state, losses = learn(made, state, range(1))
        before = compilations.count
        state, more = learn(made, state, (1, 2))
        compiled = compilations.count - before
        if name == "fsdp":
            saved = checkpoint.Checkpointer(folder, keep=1)
            saved.save(3, state, {})
            saved.close()
        before = compilations.count
        state, later = learn(made, state, (3, 4))
        seen[name] = {
            "losses": losses + more + later,
            "params": held(state.params),
            "teacher": held(state.teacher),
            "moments": held(state.optimizer),
            "compiled": compiled + compilations.count - before,
        }
        if name == "all":
            seen[name] |= {"resumed": resumed, "places": all(jax.tree.leaves(same))}
        if name in ("one", "all"):
            made, state = start(cut)
            sums = made.update(state, toys.packed(toys.ragged(), cut, sharding.ways()))[1]
            seen[name]["cut"] = learner.means(sums)
print(json.dumps(seen))
"""


@pytest.fixture(scope="module")
def learned(tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoints")
    return json.loads(run(LEARNING, str(folder), json.dumps(MESHES)))


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in MESHES if name != "one"])
def test_a_mesh_changes_nothing_but_rounding(learned, name):
    losses = learned["one"]["losses"]
    np.testing.assert_allclose(learned[name]["losses"], losses, atol=1e-4, rtol=1e-4)
    assert np.ptp(losses) > 1e-2  # they do move


@pytest.mark.slow
def test_rows_of_many_lengths_are_cut_on_a_mesh_as_without(learned):
    wanted = learned["one"]["cut"]
    for key, value in learned["all"]["cut"].items():
        assert value == pytest.approx(wanted[key], abs=1e-4, rel=1e-4), key


@pytest.mark.slow
@pytest.mark.parametrize("name, parts", [("fsdp", 8), ("fsdp_tp", 8), ("all", 4)])
def test_a_device_holds_its_part_of_weights_and_moments(learned, name, parts):
    """Norms are whole everywhere: 3 % of this network."""
    for what in ("params", "teacher", "moments"):
        share = learned[name][what] / learned["one"][what]
        assert 1 / parts <= share < 1 / parts + 0.03, what


@pytest.mark.slow
def test_nothing_compiles_after_the_first_update(learned):
    assert {name: seen["compiled"] for name, seen in learned.items()} == dict.fromkeys(
        MESHES, 0
    )


@pytest.mark.slow
def test_a_checkpoint_goes_on_on_another_mesh(learned):
    found = learned["all"]
    assert found["places"]
    losses = learned["one"]["losses"][3:]
    np.testing.assert_allclose(found["resumed"], losses, atol=1e-4, rtol=1e-4)


PLAYING = """
import dataclasses, functools
import jax, jax.numpy as jnp, numpy as np
from skillsd_jax import rollout, sharding, slots
from skillsd_jax import config as settings
from skillsd_jax.models import attention, flash_decoding, qwen
from skillsd_jax.sampler import Decoding

SHAPE = qwen.ModelConfig(
    vocab=32, width=32, layers=1, heads=4, kv_heads=2, head_size=8, hidden=32
)

def said(sizes, gathered, still, rows=8):
    with sharding.over(settings.Mesh(*sizes)):
        params = rollout.apart(SHAPE, qwen.init(SHAPE, jax.random.key(0)), gathered)
        how = Decoding(max_new=4, stop_ids=(3,))
        voice = slots.Voice(SHAPE, params, how, jax.random.key(1), 1.0)
        keeps = slots.Slots(voice, slots.Room(rows, 48, still=still))
        fresh = slots.Fresh(voice, [rows], 48)
        out, rng = [], np.random.default_rng(0)
        contexts = [rng.integers(4, 32, 5 + row // 2 % 3) for row in range(rows)]
        contexts[1] = contexts[0]  # read once and copied
        for turn in range(3):
            who = range(rows) if turn != 1 else range(1, rows, 2)
            asks = [slots.Ask(b, contexts[b], b, turn, 4) for b in who]
            heard = keeps.ask(asks).result()
            for (ids, logprob), (again, same) in zip(heard, fresh.ask(asks).result()):
                np.testing.assert_array_equal(ids, again)
                np.testing.assert_allclose(logprob, same, atol=1e-4)
            for b, (ids, _) in zip(who, heard):
                contexts[b] = np.concatenate([contexts[b], ids, [b + 4]])
            out += heard
        sizes = {x.addressable_shards[0].data.size for x in keeps.state.cache.keys}
        return out, sizes, slots._speak._cache_size()

want, whole, _ = said((1, 1, 1), False, False)
for sizes, gathered in (((2, 2, 2), True), ((1, 4, 2), False)):
    found, part, before = said(sizes, gathered, True)
    for (ids, logprob), (right, wanted) in zip(found, want):
        np.testing.assert_array_equal(ids, right)
        np.testing.assert_allclose(logprob, wanted, atol=1e-4)
    assert {8 * size for size in part} == whole, (part, whole)

# A kernel that the compiler cannot divide, over rows and heads; tp = 8 divides neither.
splash = functools.partial(attention._splash, interpret=True)
q, k, v = (jax.random.normal(jax.random.key(n), (4, 24, n and 2 or 4, 128)) for n in range(3))
right = attention.causal("plain", q, k, v)
for sizes in ((2, 2, 2), (1, 1, 8)):
    with sharding.over(settings.Mesh(*sizes)):
        found = jax.jit(splash, static_argnums=3)(q, k, v, None)
    np.testing.assert_allclose(found, right, atol=2e-3)

flash = functools.partial(flash_decoding.attend, interpret=True)
k, v = (x.transpose(0, 2, 1, 3).astype(jnp.bfloat16) for x in (k, v))
q, end = q[:, 0].astype(jnp.bfloat16), jnp.array([24, 1, 9, 0])
right = flash(q, k, v, 0 * end, end)
for sizes in ((2, 2, 2), (1, 1, 8)):
    with sharding.over(settings.Mesh(*sizes)):
        found = jax.jit(flash)(q, k, v, 0 * end, end)
    np.testing.assert_allclose(*(x.astype(jnp.float32) for x in (found, right)), atol=1e-2)
"""


@pytest.mark.slow
def test_replies_are_the_same_on_every_mesh_and_caches_are_split():
    run(PLAYING)


WHOLE_RUN = """
import json, pathlib, sys
from skillsd_jax import metrics, train
import train_test
folder, seen = pathlib.Path(sys.argv[1]), []
for number, sizes in enumerate(((1, 1, 1), (2, 2, 2))):
    config = train_test.toy(folder)
    config.iterations, config.rollout.rows, config.rollout.prompts = 5, 8, 4
    config.evaluate.every, config.evaluate.greedy = 0, False
    config.mesh.data, config.mesh.fsdp, config.mesh.tp = sizes
    train.run(config, str(folder / str(number)))
    seen.append(metrics.read(folder / str(number) / "metrics.jsonl"))
print(json.dumps(seen))
"""


@pytest.mark.slow
def test_a_whole_run_is_the_same_on_a_mesh(tmp_path):
    one, many = json.loads(run(WHOLE_RUN, str(tmp_path)).splitlines()[-1])
    for name in ("loss", "gap_rms", "success", "return", "tokens"):
        a, b = ([row[name] for row in rows] for rows in (one, many))
        np.testing.assert_allclose(a, b, atol=1e-4, rtol=1e-4)
    assert [row["compilations"] for row in many[2:]] == [0, 0, 0]
    assert max(row["old_difference_max"] for row in many) < 1e-4


def every(model: qwen.ModelConfig) -> dict:
    return jax.eval_shape(lambda: qwen.init(model, jax.random.key(0)))


@pytest.mark.parametrize("name", shapes.SHAPES)
def test_every_parameter_and_adapter_of_every_shape_has_a_rule(name):
    adapters = lora.Lora(rank=8, alpha=16.0, targets=".")
    model = dataclasses.replace(shapes.SHAPES[name], lora=adapters)
    sharding.check(every(model), ALL)
    with pytest.raises(ValueError, match="no rule of sharding.RULES says where gate"):
        sharding.check({"gate": np.zeros(3)}, ALL)


@pytest.mark.parametrize("name", optimizers.OPTIMIZERS)
def test_moments_lie_where_their_parameters_do(name):
    params = every(shapes.SHAPES["qwen3-0.6b"])
    made = optimizers.make(settings.Optimizer(name=name), 10)
    places = {sharding.spec(path, x.shape, ALL): x.shape for path, x in named(params)}
    for path, leaf in named(jax.eval_shape(made.init, params)):
        where = sharding.spec(path, leaf.shape, ALL)
        assert leaf.size < 8 or places[where] is not None
        if path.endswith("mlp/down/kernel"):
            assert where == jax.sharding.PartitionSpec(None, "tp", "fsdp")


def named(tree):
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        yield jax.tree_util.keystr(path, simple=True, separator="/"), leaf


def test_what_an_axis_does_not_divide_is_named_with_what_would():
    with pytest.raises(ValueError, match=r"mlp/up/kernel \[3, 12, 5\]: mesh.fsdp = 8 "):
        sharding.spec("layers/mlp/up/kernel", (3, 12, 5), {"fsdp": 8, "tp": 1})
    wanted = "mesh.tp × mesh.fsdp = 8 does not divide its 12; .* 1, 2, 3, 4, 6, 12$"
    with pytest.raises(ValueError, match=wanted):
        sharding.spec("embed", (7, 12), {"fsdp": 4, "tp": 2})


@pytest.mark.parametrize(
    "sizes, message",
    [
        ((4, 1, 1), "mesh.data=4 asks for 4 devices and jax sees 2"),
        ((1, 3, 2), r"mesh.fsdp=3 × mesh.tp=2 asks for 6 .* product at most 2"),
        ((0, 4, 1), "mesh.fsdp × mesh.tp = 4 must divide the 2 devices"),
    ],
)
def test_a_mesh_of_more_devices_than_there_are_is_refused(sizes, message):
    with pytest.raises(ValueError, match=message):
        sharding.make(settings.Mesh(*sizes), devices=jax.devices() * 2)


def test_one_device_needs_no_mesh():
    assert sharding.make(settings.Mesh()) is None
    assert sharding.make(settings.Mesh(data=0), jax.devices()[:1]) is None
    with sharding.over(settings.Mesh()):
        assert sharding.ways() == 1 and not sharding.sizes()
        x = np.zeros(3)
        assert sharding.put({"kernel?": x})["kernel?"] is x
        assert sharding.rows(x) is x


@pytest.mark.parametrize(
    "mesh, change, message",
    [
        ({"fsdp": 2}, {}, "mesh.fsdp=2 asks for 2 devices and jax sees 1"),
        ({"fsdp": 3}, {}, r"\[1, 64\]: mesh.tp × mesh.fsdp = 3 does not divide its 64"),
        (
            {"data": 3},
            {},
            "3 must divide optimizer.micro_rows=32; set micro_rows to 30",
        ),
        (
            {"data": 2},
            {"rows": 129},
            "2 must divide rollout.rows=129; .* to 128 or 130",
        ),
        ({"tp": 8}, {}, "mesh.tp=8 must divide the 4 attention heads"),
    ],
)
def test_a_run_that_cannot_be_divided_is_refused(mesh, change, message, monkeypatch):
    config = settings.Config()
    config.mesh = settings.Mesh(**mesh)
    config.rollout = dataclasses.replace(config.rollout, group_size=1, **change)
    if "jax sees" not in message:  # a mesh of as many as it takes

        def pretended(setting):
            sizes = setting.data, setting.fsdp, setting.tp
            return jax.sharding.AbstractMesh(sizes, sharding.AXES)

        monkeypatch.setattr(sharding, "make", pretended)
    with pytest.raises(validation.Refused, match=message):
        preflight.check(config)


def test_a_run_may_go_on_over_another_mesh(tmp_path):
    config = settings.Config()
    assert not runfolder.claim(str(tmp_path), config)
    config.mesh.fsdp = 4
    assert runfolder.claim(str(tmp_path), config)
    config.optimizer.micro_rows = 4
    with pytest.raises(validation.Refused, match="micro_rows"):
        runfolder.claim(str(tmp_path), config)
