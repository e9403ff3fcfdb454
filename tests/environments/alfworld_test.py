import importlib.util
import json
import subprocess
import sys

import numpy as np
import pytest

from skillsd_jax.environments import alfworld_rooms, chores
from skillsd_jax.environments.alfworld import Alfworld
from skillsd_jax.environments.alfworld_games import TASKS, Generated

present = pytest.mark.skipif(
    importlib.util.find_spec("alfworld") is None, reason="needs the extra alfworld"
)
EVERYTHING = {"rooms": "all", "families": "all", "max_receptacles": 0}


@pytest.fixture
def make(tmp_path, monkeypatch):
    monkeypatch.delenv("ALFWORLD_DATA", raising=False)
    made = []

    def build(split="test", **options):
        made.append(Alfworld(split, cache=str(tmp_path / "cache"), **options))
        return made[-1]

    yield build
    for environment in made:
        environment.close()


def act(environment, command):
    return environment.step(f"<action>{command}</action>")


def play(environment, seed, rng, workflow=(), noise=0.0):
    step = environment.reset(seed)
    while not step.done:
        step = environment.step(environment.demonstrate(rng, workflow, noise))
    return step


@present
def test_expert_wins_every_family_with_admissible_commands(make):
    environment = make(**EVERYTHING)
    won = dict.fromkeys(TASKS, 0)
    for seed in range(24):
        step = environment.reset(seed)
        for command in environment.expert_workflow():
            assert command in step.admissible
            assert not step.done
            step = act(environment, command)
            assert step.effective
        assert step.success and step.done and step.reward == 1
        won[environment.task().family] += 1
    assert set(won.values()) == {4}


@present
def test_expert_wins_from_where_another_left_off(make):
    environment, rng = make(**EVERYTHING, max_steps=50), np.random.default_rng(0)
    hindered = 0
    for seed in range(12):
        step = environment.reset(seed)
        for _ in range(12):
            if not step.done:
                step = act(environment, rng.choice(step.admissible))
        hindered += bool(environment._engine.facts.of("holds"))
        for command in environment.expert_workflow() if not step.done else ():
            step = act(environment, command)
        assert step.success
    assert hindered  # somebody had to put something down first


@present
def test_a_workflow_beats_an_honest_search(make):
    """40 games: 26 and more against 34 and fewer would come once in a million runs."""
    environment, rng = make(), np.random.default_rng(0)
    plain = sum(play(environment, seed, rng).success for seed in range(40))
    told = 0
    for seed in range(40):
        environment.reset(seed)
        plan = environment.expert_workflow()
        told += play(environment, seed, rng, plan).success
    assert told == 40
    assert 4 <= plain <= 30


@present
def test_reward_comes_once_with_success(make):
    environment = make()
    environment.reset(0)
    *plan, last = environment.expert_workflow()
    steps = [act(environment, command) for command in plan]
    assert [step.reward for step in steps] == [0] * len(plan)
    step = act(environment, last)
    assert (step.reward, step.success, step.done) == (1, True, True)
    with pytest.raises(RuntimeError, match="call reset"):
        act(environment, "look")


@present
def test_help_is_hidden_but_understood(make):
    environment = make()
    step = environment.reset(0)
    assert "help" not in step.admissible
    assert {"look", "inventory", "go to fridge 1"} <= set(step.admissible)
    step = act(environment, "help")
    assert step.valid and not step.effective
    assert "help" not in step.admissible


@present
def test_looking_has_no_effect_and_a_refused_command_neither(make):
    environment = make()
    environment.reset(0)
    for command in ("look", "inventory", "take mug 1 from fridge 1", "open fridge 1"):
        assert not act(environment, command).effective
    assert act(environment, "go to fridge 1").effective
    assert act(environment, "open fridge 1").effective


@present
@pytest.mark.parametrize(
    ("command", "valid"),
    [
        ("go to fridge 1", True),
        ("open fridge 1", True),  # refused from afar, but it exists
        ("go to fridge 9", False),
        ("take unicorn 1 from fridge 1", False),
        ("sing", False),
    ],
)
def test_a_command_is_valid_if_what_it_names_exists(make, command, valid):
    environment = make()
    environment.reset(0)
    assert act(environment, command).valid == valid


@present
def test_a_receptacle_that_shares_its_spot_counts_as_searched(make):
    """The engine refuses the walk to it; a searcher must not try for ever."""
    environment = make(max_steps=50)
    environment.reset(0)
    act(environment, "go to stoveburner 1")
    step = act(environment, "go to stoveburner 2")
    assert step.feedback == "Nothing happens."
    act(environment, "examine stoveburner 2")
    assert {"stoveburner 1", "stoveburner 2"} <= environment._notes.searched


@present
def test_player_searches_every_receptacle_of_a_room(make):
    """Shared spots, closed ones: nothing keeps an honest player from finding it."""
    environment, rng = make(max_steps=120), np.random.default_rng(1)
    assert all(play(environment, seed, rng).success for seed in range(16))


@present
def test_views_show_notes_or_the_engines_words(make):
    native, notes = make(view="native"), make(view="notes")
    first, compact = native.reset(0), notes.reset(0)
    assert first.observation == first.feedback == compact.feedback
    assert first.observation.startswith("-= Welcome to TextWorld, ALFRED! =-")
    assert f"Your task is to: {native.task().instruction}" in first.observation
    assert compact.observation.startswith("at: middle")
    step = act(native, "go to fridge 1")
    assert step.observation == "You arrive at fridge 1. The fridge 1 is closed."
    with pytest.raises(ValueError, match="view='video' must be one of"):
        make(view="video")


@present
def test_older_games_keep_their_wording(make, tmp_path):
    game = Generated("train", "kitchen", "pick", 20).game(0)
    grammar = game.grammar.replace('"move {o} to {r}"', '"put {o} in/on {r}"')
    assert grammar != game.grammar
    folder = tmp_path / "data" / "json_2.1.1" / "train"
    write_original(folder, game, grammar)
    environment = make("train", games=str(tmp_path / "data"), max_receptacles=0)
    environment.reset(0)
    plan = environment.expert_workflow()
    assert plan[-1].startswith("put ") and " in/on " in plan[-1]
    assert play(environment, 0, np.random.default_rng(0), plan).success


def write_original(folder, game, grammar):
    goal = game.goal
    name = f"{TASKS[goal.family]}-{goal.target}-None-{goal.destination}-13"
    trial = folder / name / "trial_1"
    trial.mkdir(parents=True)
    params = {"object_target": goal.target, "parent_target": goal.destination}
    params["toggle_target"] = goal.lamp
    traits = {"task_type": TASKS[goal.family], "pddl_params": params}
    (trial / "traj_data.json").write_text(json.dumps(traits))
    texts = {"pddl_domain": game.domain, "grammar": grammar, "solvable": True}
    texts["pddl_problem"] = game.problem
    (trial / "game.tw-pddl").write_text(json.dumps(texts))


@present
def test_real_games_are_used_when_they_are_there(make, tmp_path, monkeypatch):
    game = Generated("train", "kitchen", "pick", 20).game(0)
    write_original(tmp_path / "json_2.1.1" / "train", game, game.grammar)
    assert make("train").data == "generated"
    assert make("train", games=str(tmp_path), max_receptacles=0).data == "original"
    monkeypatch.setenv("ALFWORLD_DATA", str(tmp_path))
    environment = make("train", max_receptacles=0)
    assert environment.data == "original"
    environment.reset(7)
    assert environment.task().instruction == game.instruction
    with pytest.raises(ValueError, match="no game.tw-pddl in"):
        make("validation", max_receptacles=0)


@present
def test_a_folder_without_games_is_refused(make, tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="has no folder json_2.1.1"):
        make(games=str(tmp_path))
    # ALFWorld itself points the variable at an empty folder.
    monkeypatch.setenv("ALFWORLD_DATA", str(tmp_path))
    assert make().data == "generated"


@present
def test_playing_leaves_the_users_folders_and_settings_alone(tmp_path):
    code = (
        "import os, sys\n"
        "before = dict(os.environ), list(sys.argv)\n"
        "from skillsd_jax.environments.alfworld import Alfworld\n"
        "environment = Alfworld(cache=sys.argv[1])\n"
        "environment.reset(0)\n"
        "environment.step('<action>look</action>')\n"
        "assert before == (dict(os.environ), sys.argv)\n"
        "assert not {'alfworld', 'jax'} & set(sys.modules)\n"
    )
    home, cache = tmp_path / "home", tmp_path / "cache"
    home.mkdir()
    environment = {"HOME": str(home), "PYTHONPATH": ":".join(sys.path)}
    command = [sys.executable, "-c", code, str(cache)]
    done = subprocess.run(
        command, env=environment, check=False, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == ""
    assert list(home.iterdir()) == []
    assert list(cache.glob("alfworld-*/*.game"))


def test_missing_package_names_the_extra(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    alfworld_rooms.wheel.cache_clear()
    try:
        with pytest.raises(ImportError, match=r"pip install 'skillsd_jax\[alfworld\]'"):
            Alfworld()
    finally:
        alfworld_rooms.wheel.cache_clear()


@present
@pytest.mark.parametrize("engine", ["textworld", "fast_downward"])
def test_missing_engine_names_the_extra(engine):
    code = (
        f"import sys; sys.modules[{engine!r}] = None\n"
        "from skillsd_jax.environments.alfworld import Alfworld\n"
        "Alfworld.lexicon()\n"
        "Alfworld()"
    )
    command = [sys.executable, "-c", code]
    environment = {"PYTHONPATH": ":".join(sys.path)}
    done = subprocess.run(
        command, env=environment, check=False, capture_output=True, text=True
    )
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("ImportError: ALFWorld is not installed")
    assert "pip install 'skillsd_jax[alfworld]'" in last


@present
@pytest.mark.parametrize("options", [{}, EVERYTHING])
def test_lexicon_names_everything_the_notes_may_show(make, options):
    phrases = set(Alfworld.lexicon(**options))
    for split in ("train", "test"):
        environment = make(split, **options)
        for seed in range(12):
            environment.reset(seed)
            names = {e.name for e in environment._engine.entities.values()}
            things = {f" {name}" for name in names if name[-1].isdigit()}
            things = {t for t in things if not t.startswith((" loc ", " agent"))}
            assert things <= phrases
            goal = chores.read_goal(environment.task().instruction)
            assert {f" {goal.thing}", f" {goal.place}"} <= phrases
    assert len(phrases) < (250 if not options else 700)
