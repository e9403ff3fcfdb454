import importlib.util
import json
import subprocess
import sys
from collections import Counter

import pytest

from skillsd_jax.environments import alfworld_games, alfworld_rooms
from skillsd_jax.environments.alfworld_games import Generated, Original
from skillsd_jax.environments.base import SPLITS

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("alfworld") is None, reason="needs the extra alfworld"
)
ALL = ("all", "all", 0)
DEFAULT = ("kitchen", "pick,clean,heat,cool", 20)


def facts(problem):
    """The facts of a problem by predicate."""
    found = {}
    for line in problem.partition("(:init")[2].partition("(:goal")[0].splitlines():
        name, *ids = line.strip("()").split() or [""]
        found.setdefault(name, []).append(tuple(ids))
    return found


def kept_in(game):
    """Where the objects asked for lie, as receptacle classes."""
    known = facts(game.problem)
    kinds = {name: kind.removesuffix("Type") for name, kind in known["receptacleType"]}
    wanted = f"{game.goal.target}Type"
    targets = {name for name, kind in known["objectType"] if kind == wanted}
    return [kinds[place] for name, place in known["inReceptacle"] if name in targets]


def write_game(folder, game, scene=1, solvable=True):
    """A game in the layout of ALFWorld's data; the folder of its two files."""
    goal = game.goal
    task = alfworld_games.TASKS[goal.family]
    name = f"{task}-{goal.target}-None-{goal.destination}-{scene}"
    trial = folder / name / f"trial_{len(list(folder.glob('*/*')))}"
    trial.mkdir(parents=True)
    params = {
        "object_target": goal.target,
        "parent_target": goal.destination,
        "toggle_target": goal.lamp,
    }
    traits = {"task_type": task, "pddl_params": params}
    (trial / "traj_data.json").write_text(json.dumps(traits))
    texts = {
        "pddl_domain": game.domain,
        "grammar": game.grammar,
        "pddl_problem": game.problem,
        "solvable": solvable,
        "walkthrough": None,
    }
    (trial / "game.tw-pddl").write_text(json.dumps(texts))
    return trial


def test_games_are_the_same_bytes_in_every_process():
    code = (
        "from skillsd_jax.environments.alfworld_games import Generated\n"
        "from skillsd_jax.artifacts import content_hash\n"
        "made = [Generated(s, 'all', 'all', 0).game(i)"
        " for s in ('train', 'test') for i in range(6)]\n"
        "print(content_hash(made))"
    )
    hashes = set()
    for seed in "01":
        command = [sys.executable, "-c", code]
        environment = {"PYTHONHASHSEED": seed, "PYTHONPATH": ":".join(sys.path)}
        done = subprocess.run(
            command, env=environment, check=True, capture_output=True, text=True
        )
        hashes.add(done.stdout)
    assert len(hashes) == 1


def test_families_take_turns():
    games = Generated("train", *ALL)
    families = [games.game(seed).goal.family for seed in range(12)]
    assert families == 2 * list(alfworld_games.TASKS)


def test_unseen_rooms_are_never_trained_in():
    train = set(alfworld_rooms.scenes("train", "all"))
    unseen = {s: set(alfworld_rooms.scenes(s, "all")) for s in SPLITS[1:]}
    assert all(rooms.isdisjoint(train) for rooms in unseen.values())
    assert len(train) == 96
    assert {len(rooms) for rooms in unseen.values()} == {24}


def test_splits_in_unseen_rooms_share_no_game():
    games = [
        {Generated(split, *DEFAULT).game(seed).problem for seed in range(30)}
        for split in SPLITS
    ]
    assert all(len(split) == 30 for split in games)
    assert len(set().union(*games)) == 120
    # By construction, not by luck: the problem itself says whose it is.
    for split, problems in zip(SPLITS[1:], games[1:], strict=True):
        assert {alfworld_games._unseen_split(p) for p in problems} == {split}


def test_no_object_asked_for_is_where_it_should_go():
    for split in ("train", "test"):
        games = Generated(split, *ALL)
        for seed in range(60):
            game = games.game(seed)
            places = kept_in(game)
            assert len(places) == (2 if game.goal.family == "pick_two" else 1)
            assert game.goal.destination not in places


def test_objects_lie_where_the_prior_says():
    """250 games, 0.65 to the first home: 4.7 deviations, a false alarm in 400,000."""
    games = Generated("train", *DEFAULT)
    first = 0
    for seed in range(250):
        game = games.game(seed)
        kinds = {kind[:-4] for _, kind in facts(game.problem)["receptacleType"]}
        homes = alfworld_rooms.homes(sorted(kinds), game.goal.target)
        homes = {k: p for k, p in homes.items() if k != game.goal.destination}
        first += kept_in(game)[0] == max(homes, key=homes.get)
    assert 0.65 * 250 - 4.7 * 7.6 < first


@pytest.mark.parametrize("avoid", ["", "Fridge"])
def test_homes_are_a_distribution_over_what_may_hold_the_object(avoid):
    kinds = ["Cabinet", "CounterTop", "Fridge", "Microwave", "Sofa"]
    homes = alfworld_rooms.homes(kinds, "Egg", avoid)
    assert sum(homes.values()) == pytest.approx(1)
    assert set(homes) == {"CounterTop", "Fridge", "Microwave"} - {avoid}
    if not avoid:
        assert homes["Fridge"] == pytest.approx(0.65)
        assert homes["Microwave"] == pytest.approx(0.2)


def test_every_usual_home_may_hold_its_object():
    holds = alfworld_rooms.constants().VAL_RECEPTACLE_OBJECTS
    for cls, kinds in alfworld_rooms._home_table().items():
        assert all(cls in holds[kind] for kind in kinds), cls


def test_a_large_room_loses_its_most_frequent_receptacles():
    whole, fitted = alfworld_rooms.room(5), alfworld_rooms.room(5, 20)
    assert len(whole.receptacles) > 20 == len(fitted.receptacles)
    for kind in whole.kinds:  # what is left is numbered as it was
        left = fitted.of(kind)
        assert left and left == whole.of(kind)[: len(left)]
    lost = Counter(r.kind for r in set(whole.receptacles) - set(fitted.receptacles))
    assert set(lost) <= {"Cabinet", "Drawer", "CounterTop"}
    assert alfworld_rooms.room(5, 99) == whole


def test_some_receptacles_share_a_spot():
    spots = [r.location for r in alfworld_rooms.room(1).of("StoveBurner")]
    assert len(spots) == 2
    assert len(set(spots)) == 1


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("kitchen", "pick,bake", 20), "families='pick,bake' must be"),
        (("kitchen", "", 20), "families='' must be"),
        (("cellar", "pick", 20), "rooms='cellar' must be"),
        (("kitchen", "pick,look", 20), "leave 'look' out of families"),
    ],
)
def test_wrong_options_are_refused(options, words):
    with pytest.raises(ValueError, match=words):
        Generated("train", *options)


def test_original_games_are_read_as_they_lie(tmp_path):
    made = [Generated("train", *DEFAULT).game(seed) for seed in range(3)]
    for game in made:
        write_game(tmp_path / "train", game)
    read = [Original(tmp_path, "train", *DEFAULT[:2], 0).game(s) for s in range(4)]
    assert sorted(map(repr, read[:3])) == sorted(map(repr, made))
    assert read[3] == read[0]  # seeds count on, modulo the number of games


def test_test_and_teacher_are_halves_of_the_unseen_games(tmp_path):
    for seed in range(5):
        write_game(tmp_path / "valid_unseen", Generated("test", *DEFAULT).game(seed))
    halves = [
        {Original(tmp_path, split, *ALL).game(seed).problem for seed in range(5)}
        for split in ("test", "teacher")
    ]
    assert [len(half) for half in halves] == [3, 2]
    assert halves[0].isdisjoint(halves[1])


def test_original_games_obey_the_options(tmp_path):
    games = Generated("train", "kitchen", "pick,heat", 20)
    write_game(tmp_path / "train", games.game(0), scene=13)
    write_game(tmp_path / "train", games.game(2), scene=301)
    write_game(tmp_path / "train", games.game(1), scene=15)
    write_game(tmp_path / "train", games.game(4), scene=14, solvable=False)
    chosen = Original(tmp_path, "train", "kitchen", "pick", 0)
    assert {chosen.game(seed) for seed in range(4)} == {games.game(0)}
    with pytest.raises(ValueError, match="none of the 4 games .*families='cool'"):
        Original(tmp_path, "train", "all", "cool", 0)
    with pytest.raises(ValueError, match="none of the 4 games .*max_receptacles=3"):
        Original(tmp_path, "train", "all", "all", 3)


def test_empty_folder_is_refused_by_name(tmp_path):
    with pytest.raises(ValueError, match=f"no game.tw-pddl in {tmp_path / 'train'}"):
        Original(tmp_path, "train", *ALL)


@pytest.mark.parametrize("name", ["game.tw-pddl", "traj_data.json"])
def test_damaged_file_is_named_before_work_starts(tmp_path, name):
    trial = write_game(tmp_path / "train", Generated("train", *DEFAULT).game(0))
    path = trial / name
    content = path.read_text()
    path.write_text(content[: len(content) // 2])
    with pytest.raises(ValueError, match=f"{path} is cut off"):
        Original(tmp_path, "train", *ALL)
    path.write_text(content[1:])  # whole at its end, which is all that is looked at
    with pytest.raises(ValueError, match=f"{path} is no JSON"):
        Original(tmp_path, "train", *ALL).game(0)
    if name == "traj_data.json":
        path.unlink()
        with pytest.raises(ValueError, match=f"{path} is missing"):
            Original(tmp_path, "train", *ALL)
