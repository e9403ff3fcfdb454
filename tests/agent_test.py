"""A warm start is made once for all that share it, and is the same ever after."""

import json
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest

import skillsd_jax
from skillsd_jax import agent, artifacts, imitate
from skillsd_jax import config as settings
from skillsd_jax.environments import ENVIRONMENTS, household


def toy(cache) -> settings.Config:
    config = settings.Config(cache=str(cache))
    config.model.width, config.model.layers, config.model.hidden = 16, 1, 32
    config.model.heads = config.model.kv_heads = 2
    config.model.head_size = 8
    config.imitate.steps, config.imitate.rows = 3, 2
    config.imitate.episodes = config.imitate.tasks = 12
    return config


class Watched(household.Household):
    """Notes which splits it is made for."""

    splits: list[str] = []

    def __init__(self, split="train", **options):
        super().__init__(split, **options)
        self.splits.append(split)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A warm start, what was said meanwhile, and the cache it lies in."""
    cache, lines = tmp_path_factory.mktemp("cache"), []
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(ENVIRONMENTS, "household", Watched)
        first = agent.make_agent(toy(cache), lines.append)
    return first, lines, cache


def test_a_warm_start_is_made_once_and_loaded_to_the_bit(made):
    first, lines, cache = made
    assert lines
    said = []
    again = agent.make_agent(toy(cache), said.append)
    assert not said
    assert len(list((cache / "warm_starts").iterdir())) == 1
    assert again.player.model == first.player.model
    assert again.record == first.record
    assert jax.tree.structure(again.params) == jax.tree.structure(first.params)
    for a, b in zip(jax.tree.leaves(again.params), jax.tree.leaves(first.params)):
        assert a.dtype == b.dtype == np.float32
        np.testing.assert_array_equal(a, b)
    text = "heat the apple 1 and move it to the shelf 1 \x00é<|im_end|>"
    encode = again.player.encoder.encode
    assert encode(text) == first.player.encoder.encode(text)


def test_making_it_anew_gives_the_same_bits(made, tmp_path):
    first, _, _ = made
    again = agent.make_agent(toy(tmp_path), lambda line: None)
    jax.tree.map(np.testing.assert_array_equal, again.params, first.params)
    assert again.record == first.record


def test_it_learns_from_training_tasks_only(made):
    assert set(Watched.splits) == {"train"}


def test_its_record_says_how_it_came_about(made):
    record = made[0].record
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
        return None, None, None, key

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
        {"objective__name": "grpo", "objective__sdl_lambda": 0.1},
        {"teacher__kind": "live", "teacher__every": 3},
        {"skills__retrieval": "random", "optimizer__learning_rate": 1.0},
        {"rollout__rows": 4, "rollout__temperature": 0.5},
        {"evaluate__tasks": 3, "iterations": 7, "writers": "wandb"},
        {"environment__train_tasks": 3, "environment__sokoban__size": 8},
    ],
)
def test_a_setting_that_does_not_matter_shares_it(name, change):
    assert name(**change) == name()
