import numpy as np
import pytest

from skillsd_jax.environments import chores
from skillsd_jax.environments.chores import Command, Goal, Notes, player, read_goal

INTRO = (
    "-= Welcome to TextWorld, ALFRED! =-\n\nYou are in the middle of a room. Looking "
    "quickly around you, you see a cabinet 2, a cabinet 1, a fridge 1, a microwave 1, "
    "a shelf 1, and a sinkbasin 1.\n\nYour task is to: {}."
)
HEAT = "heat some apple and put it in cabinet"


def notes(instruction=HEAT, **options):
    return Notes(instruction, INTRO.format(instruction), **options)


def rng(seed=0):
    return np.random.default_rng(seed)


def goes(memory, place, contents="nothing"):
    """Walks to an open receptacle."""
    feedback = f"You arrive at {place}. On the {place}, you see {contents}."
    memory.read(f"go to {place}", feedback)


def takes(memory, thing, place):
    feedback = f"You pick up the {thing} from the {place}."
    memory.read(f"take {thing} from {place}", feedback)


@pytest.mark.parametrize(
    ("instruction", "goal"),
    [
        ("put a apple in fridge.", Goal("pick", "apple", "fridge")),
        ("put some cd on desk.", Goal("pick", "cd", "desk")),
        ("put a hot egg in garbagecan.", Goal("heat", "egg", "garbagecan")),
        ("heat some egg and put it in fridge.", Goal("heat", "egg", "fridge")),
        ("put a cool mug in shelf.", Goal("cool", "mug", "shelf")),
        ("cool some mug and put it in shelf.", Goal("cool", "mug", "shelf")),
        ("put a clean pan in drawer.", Goal("clean", "pan", "drawer")),
        ("clean some pan and put it in drawer.", Goal("clean", "pan", "drawer")),
        ("put two book in sofa.", Goal("two", "book", "sofa")),
        ("find two book and put them in sofa.", Goal("two", "book", "sofa")),
        ("look at bowl under the desklamp.", Goal("look", "bowl", "desklamp")),
        ("examine the bowl with the desklamp.", Goal("look", "bowl", "desklamp")),
        ("move the egg 1 to the shelf 1", Goal("pick", "egg 1", "shelf 1")),
        (
            "Your task is to: heat the egg 1 and move it to the shelf 1",
            Goal("heat", "egg 1", "shelf 1"),
        ),
        ("sing a song", Goal()),
    ],
)
def test_instruction_is_read(instruction, goal):
    assert read_goal(instruction) == goal


@pytest.mark.parametrize(
    ("text", "command"),
    [
        ("go to fridge 1", Command("go to", "", "fridge 1")),
        ("open fridge 1", Command("open", "", "fridge 1")),
        ("close fridge 1", Command("close", "", "fridge 1")),
        ("take cd 2 from safe 1", Command("take", "cd 2", "safe 1")),
        ("move cd 2 to safe 1", Command("move", "cd 2", "safe 1")),
        ("put cd 2 in/on safe 1", Command("move", "cd 2", "safe 1")),
        ("cool egg 1 with fridge 1", Command("cool", "egg 1", "fridge 1")),
        ("use desklamp 1", Command("use", "desklamp 1")),
        ("examine shelf 1", Command("examine", "shelf 1")),
        ("look", Command("look")),
        ("inventory", Command("inventory")),
        ("go to", None),
        ("go to fridge 1 and open it", None),
        ("take cd 2", None),
        ("", None),
        ("go to " + "a" * 100, None),
    ],
)
def test_command_is_taken_apart(text, command):
    assert chores.read_command(text) == command


def test_notes_read_a_native_episode():
    memory = notes()
    assert memory.places[:3] == ("cabinet 2", "cabinet 1", "fridge 1")
    assert memory.render() == (
        "at: middle; see: nothing; hand: nothing; last: none; searched: nothing; "
        "left: cabinet 2 cabinet 1 fridge 1 microwave 1 shelf 1 sinkbasin 1"
    )
    memory.read("go to fridge 1", "You arrive at fridge 1. The fridge 1 is closed.")
    assert "at: fridge 1; see: closed; hand: nothing" in memory.render()
    assert "searched: nothing" in memory.render()
    memory.read(
        "open fridge 1",
        "You open the fridge 1. The fridge 1 is open. In it, you see a mug 1, "
        "an apple 1, and an apple 2.",
    )
    assert "see: apple 1 apple 2 mug 1; hand" in memory.render()
    assert "searched: fridge 1; left: cabinet 2 cabinet 1 mic" in memory.render()
    takes(memory, "apple 1", "fridge 1")
    memory.read(
        "go to microwave 1", "You arrive at microwave 1. The microwave 1 is closed."
    )
    assert "hand: apple 1 plain; last: go to microwave 1 ok" in memory.render()
    memory.read(
        "heat apple 1 with microwave 1", "You heat the apple 1 using the microwave 1."
    )
    assert "hand: apple 1 hot;" in memory.render()
    goes(memory, "shelf 1")
    memory.read("move apple 1 to shelf 1", "You move the apple 1 to the shelf 1.")
    assert memory.render() == (
        "at: shelf 1; see: apple 1; hand: nothing; found: apple 2 fridge 1; "
        "last: move apple 1 to shelf 1 ok; searched: fridge 1 shelf 1; "
        "left: cabinet 2 cabinet 1 microwave 1 sinkbasin 1"
    )


def test_notes_say_that_a_command_failed():
    memory = notes()
    memory.read("take apple 1 from shelf 1", "Nothing happens.")
    assert "last: take apple 1 from shelf 1 failed;" in memory.render()


@pytest.mark.parametrize("text", ["", "xyzzy", "go to " + "very " * 500, "\ud800"])
def test_nonsense_does_not_enter_the_notes(text):
    memory = notes()
    memory.read(text, "Nothing happens.")
    assert "last: unknown failed;" in memory.render()


def test_notes_forget_what_is_no_longer_there():
    memory = notes()
    goes(memory, "shelf 1", "a mug 1")
    goes(memory, "sinkbasin 1")
    goes(memory, "shelf 1", "a cup 1")
    assert memory.in_sight() == ["cup 1"]


def test_closing_hides_the_contents():
    memory = notes()
    memory.read(
        "go to fridge 1",
        "You arrive at fridge 1. The fridge 1 is open. In it, you see an apple 1.",
    )
    assert memory.in_sight() == ["apple 1"]
    memory.read("close fridge 1", "You close the fridge 1.")
    assert memory.in_sight() == []
    assert player(memory, rng()) == "open fridge 1"


def test_heat_and_cold_exclude_each_other_and_clean_stays():
    memory = notes()
    takes(memory, "egg 1", "shelf 1")
    for verb in ("clean", "heat", "cool"):
        memory.read(
            f"{verb} egg 1 with fridge 1", f"You {verb} the egg 1 using the fridge 1."
        )
    assert "hand: egg 1 clean cold;" in memory.render()


def test_many_objects_in_sight_are_cut_to_the_tasks_own_first():
    memory = notes()
    others = ", ".join(f"a mug {i}" for i in range(1, 8))
    goes(memory, "shelf 1", f"{others}, and an apple 3")
    assert "see: apple 3 mug 1 mug 2 mug 3 mug 4; hand" in memory.render()


def test_refused_walk_means_a_shared_spot_and_is_not_repeated():
    # Two receptacles at one pose: the engine answers "Nothing happens.".
    memory = notes()
    goes(memory, "shelf 1")
    memory.read("go to cabinet 1", "Nothing happens.")
    assert "at: cabinet 1; see: unknown" in memory.render()
    assert player(memory, rng()) == "examine cabinet 1"
    memory.read("examine cabinet 1", "Nothing happens.")
    assert "cabinet 1" in memory.searched
    assert player(memory, rng()) not in ("examine cabinet 1", "go to cabinet 1")


def test_refused_opening_is_not_repeated():
    memory = notes()
    memory.read("go to fridge 1", "You arrive at fridge 1. The fridge 1 is closed.")
    assert player(memory, rng()) == "open fridge 1"
    memory.read("open fridge 1", "Nothing happens.")
    assert player(memory, rng()).startswith("go to")


def test_refused_opening_of_the_destination_is_not_repeated():
    memory = notes()
    takes(memory, "apple 1", "shelf 1")
    memory.states["apple 1"] = {"hot"}
    memory.read("go to cabinet 1", "You arrive at cabinet 1. The cabinet 1 is closed.")
    assert player(memory, rng()) == "open cabinet 1"
    memory.read("open cabinet 1", "Nothing happens.")
    assert player(memory, rng()) == "move apple 1 to cabinet 1"


def test_refusal_elsewhere_does_not_rule_a_place_out():
    memory = notes()
    memory.read("open fridge 1", "Nothing happens.")
    assert "fridge 1" not in memory.searched
    takes(memory, "apple 1", "shelf 1")
    memory.read("heat apple 1 with microwave 1", "Nothing happens.")
    assert not memory.failed


def test_refused_delivery_goes_to_another_receptacle_of_the_kind():
    memory = notes("put a apple in cabinet")
    takes(memory, "apple 1", "shelf 1")
    goes(memory, "cabinet 1")
    assert player(memory, rng()) == "move apple 1 to cabinet 1"
    memory.read("move apple 1 to cabinet 1", "Nothing happens.")
    assert player(memory, rng()) == "go to cabinet 2"


def test_older_games_put_instead_of_move():
    memory = notes("put a apple in shelf", move=chores.OLD_MOVE)
    takes(memory, "apple 1", "fridge 1")
    memory.read(
        "go to shelf 1", "You arrive at loc 4. On the shelf 1, you see nothing."
    )
    command = player(memory, rng())
    assert command == "put apple 1 in/on shelf 1"
    memory.read(command, "You put the apple 1 in/on the shelf 1.")
    assert "see: apple 1; hand: nothing" in memory.render()
    assert memory.wanted() == {}


def test_honest_player_searches_every_receptacle_at_random_and_none_twice():
    first = set()
    for seed in range(40):
        memory, chance, visited = notes(), rng(seed), []
        for _ in memory.places:
            command = player(memory, chance)
            place = command.removeprefix("go to ")
            goes(memory, place)
            visited.append(place)
        assert sorted(visited) == sorted(memory.places)
        first.add(visited[0])
    assert first == set(memory.places)


def test_player_takes_only_the_tasks_object():
    memory = notes()
    goes(memory, "shelf 1", "a mug 1")
    assert player(memory, rng()).startswith("go to")
    goes(memory, "fridge 1", "a mug 2, and an apple 7")
    assert player(memory, rng()) == "take apple 7 from fridge 1"


def test_player_puts_a_wrong_object_down():
    memory = notes()
    goes(memory, "shelf 1", "a mug 1")
    takes(memory, "mug 1", "shelf 1")
    assert player(memory, rng()) == "move mug 1 to shelf 1"


def test_player_goes_back_to_what_it_has_seen():
    memory = notes()
    goes(memory, "shelf 1", "an apple 1")
    memory.read("go to fridge 1", "You arrive at fridge 1. The fridge 1 is closed.")
    memory.searched.add("fridge 1")
    assert player(memory, rng()) == "go to shelf 1"


def test_known_tool_is_used_and_an_unknown_one_found_by_trying():
    assert tools_tried(knows_tools=True, seeds=5) == {("microwave 1",)}
    orders = tools_tried(knows_tools=False, seeds=60)
    assert {order[-1] for order in orders} == {"microwave 1"}
    assert max(map(len, orders)) == 3
    assert min(map(len, orders)) == 1


def tools_tried(knows_tools, seeds):
    orders = set()
    for seed in range(seeds):
        memory, chance, order = notes(), rng(seed), []
        takes(memory, "apple 1", "shelf 1")
        for _ in range(12):
            if memory.ready("apple 1"):
                break
            command = player(memory, chance, knows_tools=knows_tools)
            place = command.split()[-2] + " " + command.split()[-1]
            if command.startswith("go to"):
                answer = f"You arrive at {place}. On the {place}, you see nothing."
            elif place == "microwave 1":
                order.append(place)
                answer = f"You heat the apple 1 using the {place}."
            else:
                order.append(place)
                answer = "Nothing happens."
            memory.read(command, answer)
        orders.add(tuple(order))
    return orders


def test_workflow_names_place_tool_and_destination():
    workflow = (
        "go to cabinet 2",
        "open cabinet 2",
        "take apple 1 from cabinet 2",
        "go to sinkbasin 1",
        "heat apple 1 with sinkbasin 1",
        "go to cabinet 1",
        "move apple 1 to cabinet 1",
    )
    for seed in range(10):
        memory = notes()
        assert player(memory, rng(seed), workflow) == "go to cabinet 2"
        takes(memory, "apple 2", "shelf 1")
        assert player(memory, rng(seed), workflow) == "go to sinkbasin 1"
        memory.states["apple 2"] = {"hot"}
        assert player(memory, rng(seed), workflow) == "go to cabinet 1"


def test_workflow_without_the_objects_place_leaves_an_honest_search():
    workflow = ("go to shelf 1", "take mug 1 from shelf 1")
    starts = {player(notes(), rng(seed), workflow) for seed in range(60)}
    assert starts == {f"go to {place}" for place in notes().places}


def test_wrong_place_in_a_workflow_is_tried_once():
    workflow = ("take apple 1 from shelf 1",)
    memory = notes()
    assert player(memory, rng(), workflow) == "go to shelf 1"
    goes(memory, "shelf 1")
    assert player(memory, rng(), workflow) != "go to shelf 1"
    goes(memory, "fridge 1")
    left = {f"go to {place}" for place in memory.places} - {"go to fridge 1"}
    drawn = {player(memory, rng(seed), workflow) for seed in range(60)}
    assert drawn == left - {"go to shelf 1"}


def test_two_objects_are_fetched_one_after_the_other():
    memory = notes("put two mug in shelf")
    goes(memory, "fridge 1", "a mug 2")
    goes(memory, "shelf 1", "a mug 1")
    assert player(memory, rng()) == "go to fridge 1"


def test_object_is_examined_under_the_lamp():
    memory = notes("look at bowl under the desklamp")
    takes(memory, "bowl 1", "fridge 1")
    goes(memory, "fridge 1")
    workflow = ("take bowl 1 from fridge 1", "go to shelf 1", "use desklamp 1")
    assert player(memory, rng(), workflow) == "go to shelf 1"
    goes(memory, "shelf 1", "a desklamp 1")
    assert player(memory, rng()) == "use desklamp 1"


def test_noise_is_the_share_of_random_commands():
    # With the apple in hand at the microwave only `heat` is sound. A random command is
    # the same one with chance 1/7, so 600 draws at noise ½ differ 257 times ± 12.
    memory = notes()
    takes(memory, "apple 1", "shelf 1")
    memory.read(
        "go to microwave 1", "You arrive at microwave 1. The microwave 1 is closed."
    )
    chance = rng()
    drawn = [player(memory, chance, noise=0.5) for _ in range(600)]
    assert 197 < sum(c != "heat apple 1 with microwave 1" for c in drawn) < 317
    assert all(map(chores.read_command, drawn))


def test_player_without_places_looks_around():
    assert player(Notes("sing a song", ""), rng(), noise=1.0) == "look"
    assert player(Notes("sing a song", ""), rng()) == "look"


def test_lexicon_spells_notes_and_commands():
    phrases = chores.lexicon(["fridge 1", "apple 1", "apple 1"])
    assert len(phrases) == len(set(phrases))
    assert {"<action>", "go to", " fridge 1", " apple 1", "; last: "} <= set(phrases)
