"""A warm start is made once for all that share it, and is the same ever after."""

import compileall
import dataclasses
import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import skillsd_jax
from skillsd_jax import agent, artifacts, imitate
from skillsd_jax import config as settings
from skillsd_jax.environments import ENVIRONMENTS, household
from skillsd_jax.models import huggingface, qwen, shapes, tokenizer


def toy(cache) -> settings.Config:
    config = settings.Config(cache=str(cache))
    config.model.width, config.model.layers, config.model.hidden = 16, 1, 32
    config.model.heads = config.model.kv_heads = 2
    config.model.head_size = 8
    config.imitate.steps, config.imitate.rows = 3, 2
    config.imitate.episodes = config.imitate.tasks = 12
    return config


SPLITS: list[str] = []


class Watched(household.Household):
    """Notes in SPLITS what it is made for."""

    def __init__(self, split="train", **options):
        super().__init__(split, **options)
        SPLITS.append(split)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A warm start, the weights that were cloned, what was said, the cache."""
    cache, lines, cloned = tmp_path_factory.mktemp("cache"), [], []
    clone = imitate.clone

    def watched(*arguments):
        for done in clone(*arguments):
            cloned.append(done[1])
            yield done

    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(ENVIRONMENTS, "household", Watched)
        patch.setattr(imitate, "clone", watched)
        first = agent.make_agent(toy(cache), lines.append)
    return SimpleNamespace(agent=first, cloned=cloned[-1], lines=lines, cache=cache)


def assert_same_bits(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b)):
        assert x.dtype == y.dtype == np.float32
        np.testing.assert_array_equal(x, y)


def test_a_warm_start_is_made_once_and_loaded_to_the_bit(made):
    first, said = made.agent, []
    assert made.lines
    again = agent.make_agent(toy(made.cache), said.append)
    assert not said
    assert len(list((made.cache / "warm_starts").iterdir())) == 1
    assert_same_bits(first.params, made.cloned)
    assert_same_bits(again.params, made.cloned)
    assert again.player.model == first.player.model
    assert again.record == first.record
    text = "heat the apple 1 and move it to the shelf 1 \x00é<|im_end|>"
    encode = again.player.encoder.encode
    assert encode(text) == first.player.encoder.encode(text)


def test_making_it_anew_gives_the_same_bits(made, tmp_path):
    again = agent.make_agent(toy(tmp_path), lambda line: None)
    assert_same_bits(again.params, made.agent.params)
    assert again.record == made.agent.record


def test_it_learns_from_training_tasks_only(made):
    assert set(SPLITS) == {"train"}


def test_its_record_says_how_it_came_about(made):
    record = made.agent.record
    assert json.loads(json.dumps(record)) == record
    assert record["rows"]["plain"] > 12 and record["rows"]["skilled"] > 12
    assert 0 < record["demonstrator"]["plain"] <= record["demonstrator"]["skilled"] <= 1
    assert [step for step, _ in record["loss"]] == [3]


def test_another_seed_is_another_agent(monkeypatch, tmp_path):
    """Before any cloning: other demonstrations, other weights."""
    played = []

    def record(rows, scored):
        played.append([s.tokens.tolist() for row in rows for s in row.student])

    monkeypatch.setattr(imitate, "record", record)
    monkeypatch.setattr(imitate, "clone", lambda model, params, *_: [(1, params, 0.0)])
    weights = []
    for seed in (0, 1):
        config = toy(tmp_path)
        config.seed = seed
        weights.append(agent.make_agent(config, lambda line: None).params["layers"])
    plain, _, other, _ = played
    assert plain != other
    for a, b in zip(*map(jax.tree.leaves, weights), strict=True):
        assert np.all(a == 1) or np.any(a != b)  # norms start at 1


@pytest.fixture
def name(monkeypatch, tmp_path):
    """Tells what a config's warm start is filed under, without making it."""

    def cached(folder, key, make, load, save):
        assert folder == tmp_path / "warm_starts"
        return None, shapes.SHAPES["qwen3-0.6b"], None, key

    def ask(**changes):
        config = toy(tmp_path)
        for path, value in changes.items():
            *parts, last = path.split("__")
            place = config
            for part in parts:
                place = getattr(place, part)
            assert getattr(place, last) != value
            setattr(place, last, value)
        return agent.make_agent(config, print).record

    monkeypatch.setattr(artifacts, "cached", cached)
    return ask


@pytest.mark.parametrize(
    "change",
    [
        {"seed": 1},
        {"environment__name": "sokoban"},
        {"environment__require_think": True},
        {"environment__household__max_steps": 12},
        {"model__width": 32},
        {"model__dtype": "bfloat16"},
        {"prompt__context": "whole"},
        {"prompt__max_skill_length": 30},
        {"imitate__steps": 4},
        {"imitate__misled": 0.5},
    ],
)
def test_a_setting_that_matters_makes_another(name, change):
    assert name(**change) != name()


@pytest.mark.parametrize(
    "change",
    [
        {"objective__name": "grpo", "objective__sdl_lambda": 0.7},
        {"teacher__kind": "live", "teacher__every": 3},
        {"skills__retrieval": "random", "optimizer__learning_rate": 1.0},
        {"rollout__rows": 4, "rollout__temperature": 0.5},
        {"evaluate__tasks": 3, "iterations": 7, "writers": "wandb"},
        {"environment__train_tasks": 3, "environment__sokoban__size": 8},
    ],
)
def test_a_setting_that_does_not_matter_shares_it(name, change):
    assert name(**change) == name()


@pytest.fixture
def sources(monkeypatch, tmp_path):
    """A copy of the package that the sources of a warm start are read from."""
    package = Path(skillsd_jax.__file__).parent
    copied = tmp_path / "skillsd_jax"
    shutil.copytree(package, copied, ignore=shutil.ignore_patterns("__pycache__"))
    monkeypatch.setattr(skillsd_jax, "__file__", str(copied / "__init__.py"))
    return copied


@pytest.mark.parametrize(
    "path", ["environments/household.py", "models/qwen.py", "imitate.py", "prompts.py"]
)
def test_a_change_of_what_makes_it_makes_another(name, sources, path):
    before = name()
    assert name() == before
    with open(sources / path, "a") as file:
        file.write("# changed\n")
    assert name() != before


def test_a_change_of_what_only_uses_it_shares_it(name, sources):
    before = name()
    for path in ("learner.py", "losses/objective.py", "evaluate.py"):
        (sources / path).write_text("")
    assert name() == before


def test_bytecode_that_python_leaves_behind_shares_it(name, sources):
    before = name()
    compileall.compile_dir(sources, quiet=1)
    assert name() == before


@pytest.fixture
def folder(tmp_path):
    """A small Hugging Face folder in bfloat16, tokenizer included."""
    words = tokenizer.train(["some text"], [])
    words.save(tmp_path / "folder")
    shape = dataclasses.replace(shapes.SHAPES["qwen2.5-0.5b"], vocab=words.vocab_size)
    shape = dataclasses.replace(
        shape, width=16, layers=1, hidden=8, heads=2, head_size=4
    )
    params = qwen.init(shape, jax.random.key(0))
    huggingface.save(tmp_path / "folder", shape, params, dtype="bfloat16")
    return str(tmp_path / "folder"), shape


def test_a_pretrained_agent_and_teacher_have_float32_masters(folder, tmp_path):
    path, shape = folder
    config = settings.Config(model=settings.Model(path=path, dtype="bfloat16"))
    config.model.attention, config.model.remat = "xla", "nothing"
    config.teacher.path = path
    student = agent.make_agent(config, print)
    model, params, record = agent.make_teacher(config, student, print)
    assert student.record == record == {"path": path}
    assert (
        student.player.model
        == model
        == dataclasses.replace(
            shape, dtype="bfloat16", attention="xla", remat="nothing"
        )
    )
    assert_same_bits(student.params, params)


def test_a_named_shape_starts_from_scratch_in_the_embedded_vocabulary():
    config = settings.Model(shape="qwen3-0.6b", attention="xla", remat="everything")
    wanted = dataclasses.replace(
        shapes.SHAPES["qwen3-0.6b"], vocab=321, attention="xla", remat="everything"
    )
    assert agent._shape(config, 321) == wanted
    config = settings.Model(attention="xla", remat="everything")
    made = agent._shape(config, 321)
    assert (made.vocab, made.width, made.layers) == (321, 64, 2)
    assert (made.attention, made.remat) == ("xla", "everything")


def test_fingerprints_tell_weights_apart():
    """By any bit and its place, and by nothing else."""
    model = qwen.ModelConfig(
        vocab=9, width=8, layers=3, heads=2, kv_heads=1, head_size=4, hidden=6
    )
    params = qwen.init(model, jax.random.key(0))
    same = agent.fingerprint(jax.tree.map(np.array, params))
    assert same == agent.fingerprint(params)
    leaves, tree = jax.tree.flatten(params)
    rng = np.random.default_rng(0)
    for index, leaf in enumerate(leaves):
        place = tuple(rng.integers(0, size) for size in leaf.shape)
        noise = rng.permutation(leaf.size).reshape(leaf.shape).astype(np.float32)
        for before, after in (
            (leaf, leaf.at[place].set(jnp.nextafter(leaf[place], 9.0))),
            (leaf, -leaf),
            *((noise, np.flip(noise, axis)) for axis in range(leaf.ndim)),
        ):
            pair = [[*leaves[:index], x, *leaves[index + 1 :]] for x in (before, after)]
            one, other = (agent.fingerprint(tree.unflatten(x)) for x in pair)
            assert one != other
    origin = {"tokenizer": "a", "base": same, "teacher": None}
    agent.check_origin(origin, dict(origin))
    for name in ("tokenizer", "base"):
        with pytest.raises(ValueError, match=f"with another {name};"):
            agent.check_origin(origin, origin | {name: "b"})


def test_a_checkpoint_of_another_network_is_refused_with_the_sizes():
    words = SimpleNamespace(fingerprint="a")
    small = qwen.ModelConfig(19, 8, 1, 2, 1, 4, 8)
    saved = json.loads(json.dumps(agent.origin_of(words, small)))
    agent.check_origin(saved, agent.origin_of(words, small))
    now = agent.origin_of(words, dataclasses.replace(small, layers=2))
    said = "another network; give the same files in model.path.*layers: 1 there, 2 now"
    with pytest.raises(ValueError, match=f"(?s){said}"):
        agent.check_origin(saved, now)
