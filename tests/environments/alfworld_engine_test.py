import collections
import concurrent.futures
import importlib.util
import json
import random
import shutil
import sys

import pytest

from skillsd_jax.environments.alfworld_games import Generated

if importlib.util.find_spec("alfworld") is None:
    pytest.skip("needs the extra alfworld", allow_module_level=True)

from skillsd_jax.environments import alfworld_engine, alfworld_ground
from skillsd_jax.environments.alfworld_engine import Engine, translated

# One room of each kind, small, so that the slow stock engine can be asked.
GAMES = Generated("test", "all", "all", 12)
KITCHEN = Generated("train", "kitchen", "pick,clean,heat,cool", 20)


@pytest.fixture
def engines(tmp_path):
    made = []

    def build():
        made.append(Engine(tmp_path))
        return made[-1]

    yield build
    for engine in made:
        engine.close()


@pytest.fixture
def stock(tmp_path, monkeypatch):
    """The engine as ALFWorld builds it."""
    # Importing alfworld makes this folder, and sets the variable where it is not set.
    monkeypatch.setenv("ALFWORLD_DATA", str(tmp_path / "data"))
    import textworld
    from alfworld.agents.environment import alfred_tw_env
    from textworld.envs import PddlEnv

    arguments = sys.argv
    infos = textworld.EnvInfos(admissible_commands=True, won=True)
    demangled = alfred_tw_env.AlfredDemangler(PddlEnv(infos), shuffle=False)
    yield alfred_tw_env.AlfredInfos(demangled)
    sys.argv = arguments


def on_disk(folder, game):
    path = folder / "game.tw-pddl"
    texts = {"pddl_domain": game.domain, "grammar": game.grammar}
    path.write_text(json.dumps({**texts, "pddl_problem": game.problem}))
    return str(path)


@pytest.mark.parametrize("seed", [0, 1, 5])
def test_transitions_are_the_stock_engines(stock, engines, tmp_path, seed):
    """Text, admissible commands, done and won, over 120 random commands in all."""
    game, engine, rng = GAMES.game(seed), engines(), random.Random(seed)
    stock.load(on_disk(tmp_path, game))
    state = stock.reset()
    assert engine.start(game) == state.feedback
    assert engine.admissible == state.admissible_commands
    for _ in range(40):
        choices = [*state.admissible_commands, "go to nowhere 1", " look "]
        command = rng.choice(choices)
        state, _, done = stock.step(command)
        assert engine.step(command) == state.feedback, command
        assert engine.admissible == state.admissible_commands, command
        assert engine.won == state.won == done
        if done:
            break


def operators(sas):
    """Operators by name: conditions and effects on named facts; the facts at first."""
    lines = sas.decode().split("\n")
    starts = [i for i, line in enumerate(lines) if line == "begin_variable"]
    names = [lines[i + 4] for i in starts]

    def read(words):
        numbers = [int(word) for word in words.split()]
        when, (fact, before, after) = numbers[1:-3], numbers[-3:]
        pairs = zip(when[::2], when[1::2], strict=True)
        return frozenset((names[f], v) for f, v in pairs), names[fact], before, after

    found = collections.Counter()
    for i in (i for i, line in enumerate(lines) if line == "begin_operator"):
        count = int(lines[i + 2])
        held = [line.split() for line in lines[i + 3 : i + 3 + count]]
        end = i + 4 + count
        effects = lines[end : end + int(lines[end - 1])]
        conditions = frozenset((names[int(fact)], value) for fact, value in held)
        found[lines[i + 1], conditions, frozenset(map(read, effects))] += 1
    first = lines.index("begin_state") + 1
    values = dict(zip(names, lines[first : first + len(names)], strict=True))
    derived = ("Atom won()", "Atom new-axiom@0()")
    return found, {k: v for k, v in values.items() if k not in derived}


@pytest.mark.parametrize("seed", range(6))
def test_grounding_finds_the_translators_operators(seed):
    game = GAMES.game(seed)
    ours = alfworld_ground.translate(game.domain, game.problem)
    full = alfworld_ground._full_translation(game.domain, game.problem)
    assert operators(ours.sas) == operators(full.sas)
    assert (ours.facts, ours.types, ours.slots) == (full.facts, full.types, full.slots)


def test_domain_with_derived_predicates_goes_to_the_full_translator():
    game = GAMES.game(0)
    rule = (
        "(:derived (examined ?l - location) (exists (?a - agent) (atLocation ?a ?l)))"
    )
    domain = game.domain.rstrip().removesuffix(")") + rule + ")"
    arguments = list(sys.argv)
    ours = alfworld_ground.translate(domain, game.problem)
    assert ours == alfworld_ground._full_translation(domain, game.problem)
    assert b"examined" in ours.sas
    assert sys.argv == arguments


def test_restarting_forgets_the_episode(engines):
    engine, game = engines(), KITCHEN.game(0)
    intro, commands = engine.start(game), engine.admissible
    engine.step(commands[0])
    assert engine.admissible != commands
    assert engine.start(game) == intro
    assert engine.admissible == commands


def test_unknown_command_changes_nothing(engines):
    engine = engines()
    engine.start(KITCHEN.game(0))
    before = engine.admissible
    assert engine.step("dance") == "Nothing happens."
    assert engine.admissible == before


def test_engines_in_one_process_do_not_share_their_state(engines):
    one, other, game = engines(), engines(), KITCHEN.game(1)
    one.start(game)
    other.start(game)
    before = other.admissible
    said = one.step("go to fridge 1")
    assert other.step("look").startswith("You are in the middle of a room.")
    assert set(other.admissible) == set(before)
    assert other.step("go to fridge 1") == said


def test_closed_engines_leave_their_library_to_new_ones(tmp_path):
    first = [Engine(tmp_path) for _ in range(3)]
    libraries = [engine._library for engine in first]
    for engine in first:
        engine.start(KITCHEN.game(0))
        engine.close()
        engine.close()
    second = [Engine(tmp_path) for _ in range(3)]
    assert {id(e._library) for e in second} == {id(library) for library in libraries}
    for engine in second:
        assert engine.start(KITCHEN.game(1)).startswith("-= Welcome")
        engine.close()


def test_many_engines_play_in_threads(engines):
    made = [engines() for _ in range(8)]

    def play(engine, seed):
        said = [engine.start(KITCHEN.game(seed))]
        rng = random.Random(seed)
        for _ in range(10):
            said.append(engine.step(rng.choice(engine.admissible)))
        return said

    alone = [play(engine, seed % 4) for seed, engine in enumerate(made)]
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        futures = [pool.submit(play, e, seed % 4) for seed, e in enumerate(made)]
        assert [future.result() for future in futures] == alone


def test_a_game_is_translated_once(tmp_path, monkeypatch):
    calls = []
    real = alfworld_engine.translate
    monkeypatch.setattr(
        alfworld_engine, "translate", lambda *a: calls.append(1) or real(*a)
    )
    monkeypatch.setattr(alfworld_engine, "_PACKED", collections.OrderedDict())
    game = KITCHEN.game(2)
    first = translated(game, tmp_path / "one")
    alfworld_engine._PACKED.clear()
    assert translated(game, tmp_path / "one") == first  # from disk
    shutil.rmtree(tmp_path / "one")
    assert translated(game, tmp_path / "one") == first  # from memory
    assert len(calls) == 1
    alfworld_engine._PACKED.clear()
    assert translated(game, tmp_path / "one") == first
    assert len(calls) == 2


def test_memory_keeps_the_games_used_last(tmp_path, monkeypatch):
    monkeypatch.setattr(alfworld_engine, "_PACKED", collections.OrderedDict())
    monkeypatch.setattr(alfworld_engine, "_KEPT", 2)
    for seed in (0, 1, 0, 2):
        translated(KITCHEN.game(seed), tmp_path)
    kept = list(alfworld_engine._PACKED)
    assert len(kept) == 2
    for seed in (0, 2):
        translated(KITCHEN.game(seed), tmp_path)
    assert kept == list(alfworld_engine._PACKED)
