"""ALFWorld games: generated in ALFRED's rooms, or read from ALFWorld's own data.

The wheel holds the dynamics (PDDL), the text grammar, the goals and the floor plans,
but no game. What is added here is which objects lie where and which task is asked: a
score on generated games is not comparable with a published one.
"""

import dataclasses
import functools
import json
import os
import re
import zlib
from pathlib import Path

import numpy as np

from skillsd_jax.environments import alfworld_rooms
from skillsd_jax.environments.alfworld_rooms import Receptacle, Room, mangled
from skillsd_jax.environments.base import SPLITS

# Family of the settings → ALFRED's name of the task.
TASKS = {
    "pick": "pick_and_place_simple",
    "look": "look_at_obj_in_light",
    "clean": "pick_clean_then_place_in_recep",
    "heat": "pick_heat_then_place_in_recep",
    "cool": "pick_cool_then_place_in_recep",
    "pick_two": "pick_two_obj_and_place",
}
# Family → what the object must allow, and the class of receptacle that does it.
TOOLS = {
    "clean": ("Cleanable", "SinkBasin"),
    "heat": ("Heatable", "Microwave"),
    "cool": ("Coolable", "Fridge"),
}
_DISTRACTORS = 14  # other objects in a room, at most, one of a class
_NEAREST = 0.6  # chance of the first of several receptacles of one class
_FURNITURE = ("SideTable", "Desk", "Dresser", "CoffeeTable", "DiningTable", "Shelf")
_FOLDERS = {
    "train": "train",
    "validation": "valid_seen",
    "test": "valid_unseen",
    "teacher": "valid_unseen",
}
_INSTRUCTION = re.compile(r'Your task is to: ([^"]*?)\.?"')


@dataclasses.dataclass(frozen=True)
class Goal:
    """What is asked for, in ALFRED's class names; '' where the family has none."""

    family: str
    target: str
    destination: str = ""
    lamp: str = ""


@dataclasses.dataclass(frozen=True)
class Game:
    """A game: the texts that a game file holds, and what its task asks for."""

    domain: str
    grammar: str
    problem: str
    goal: Goal
    instruction: str


def parse_families(text: str) -> tuple[str, ...]:
    """'pick,heat' or 'all' → families, in the order of TASKS."""
    wanted = set(TASKS) if text == "all" else set(text.replace(" ", "").split(","))
    if not wanted <= set(TASKS):
        known = ",".join(TASKS)
        raise ValueError(f"families={text!r} must be 'all' or some of {known}")
    return tuple(family for family in TASKS if family in wanted)


class Generated:
    """Games made on demand; game `seed` is the same in every process.

    'train' is played in ALFRED's training rooms, the other splits in its unseen ones,
    where a game belongs to the split that a checksum of its text names.
    """

    data = "generated"

    def __init__(self, split: str, rooms: str, families: str, max_receptacles: int):
        self._split = split
        self._families = parse_families(families)
        self._chances = {
            family: _chances(split, rooms, family, max_receptacles)
            for family in self._families
        }
        for family, chances in self._chances.items():
            if not chances:
                raise ValueError(
                    f"no room can ask for family {family!r} with rooms={rooms!r}, "
                    f"max_receptacles={max_receptacles}; set rooms='all' or leave "
                    f"{family!r} out of families"
                )

    def game(self, seed: int) -> Game:
        """Game `seed` of the split; families take turns."""
        family = self._families[seed % len(self._families)]
        chances = self._chances[family]
        attempt = 0
        while True:
            rng = np.random.default_rng([SPLITS.index(self._split), seed, attempt])
            room, options = chances[rng.integers(len(chances))]
            made = _make(rng, room, options)
            if self._split in ("train", _unseen_split(made.problem)):
                return made
            attempt += 1


class Original:
    """ALFWorld's own games, from a folder with json_2.1.1/.

    'validation' is valid_seen; 'test' and 'teacher' are two halves of valid_unseen.

    Raises:
      ValueError: no game is left, or a file is damaged; the message names it.
    """

    data = "original"

    def __init__(
        self, folder: Path, split: str, rooms: str, families: str, max_receptacles: int
    ):
        wanted = parse_families(families)
        numbers = set(alfworld_rooms.scenes("train", rooms))
        numbers |= set(alfworld_rooms.scenes("test", rooms))
        if max_receptacles:
            sizes = {n: len(alfworld_rooms.room(n).receptacles) for n in numbers}
            numbers = {n for n, size in sizes.items() if size <= max_receptacles}
        found = sorted((folder / _FOLDERS[split]).glob("**/game.tw-pddl"))
        if not found:
            raise ValueError(
                f"no game.tw-pddl in {folder / _FOLDERS[split]}; run alfworld-download "
                "or leave games and ALFWORLD_DATA unset for generated games"
            )
        if split in ("test", "teacher"):
            found = found[("test", "teacher").index(split) :: 2]
        chosen = [path for path in found if _fits(path, wanted, numbers)]
        self._files = [path for path in chosen if _solvable(path)]
        if not self._files:
            raise ValueError(
                f"none of the {len(found)} games in {folder / _FOLDERS[split]} has "
                f"rooms={rooms!r}, families={families!r}, "
                f"max_receptacles={max_receptacles}; widen these options"
            )

    def game(self, seed: int) -> Game:
        """Game `seed`, counted modulo the number of games."""
        path = self._files[seed % len(self._files)]
        story = path.with_name("traj_data.json")
        texts, traits = _read(path), _read(story)
        instruction = _INSTRUCTION.search(texts["grammar"])
        if instruction is None:
            raise ValueError(f"{path} tells no task; download the data again")
        params = traits["pddl_params"]
        families = {task: family for family, task in TASKS.items()}
        return Game(
            domain=texts["pddl_domain"],
            grammar=texts["grammar"],
            problem=texts["pddl_problem"],
            goal=Goal(
                families[traits["task_type"]],
                params["object_target"],
                params["parent_target"],
                params["toggle_target"],
            ),
            instruction=instruction[1],
        )


def goals(room: Room, family: str) -> list[Goal]:
    """What can be asked for in a room."""
    tables = alfworld_rooms.constants()
    if room.kind not in tables.GOALS_VALID[TASKS[family]]:
        return []
    if family == "look":
        return [
            Goal(family, cls, lamp=lamp)
            for cls in room.classes
            for lamp in room.lamps
            if alfworld_rooms.homes(room.kinds, cls)
        ]
    able, tool = TOOLS.get(family, (None, None))
    if tool and tool not in room.kinds:
        return []
    return [
        Goal(family, cls, destination=kind)
        for cls in room.classes
        if able is None or cls in tables.VAL_ACTION_OBJECTS[able]
        for kind in room.kinds
        if kind != tool and cls in tables.VAL_RECEPTACLE_OBJECTS[kind]
        if alfworld_rooms.homes(room.kinds, cls, avoid=kind)
    ]


@functools.cache
def _chances(
    split: str, rooms: str, family: str, max_receptacles: int
) -> list[tuple[Room, list[Goal]]]:
    """The rooms that can ask for a family, and what they can ask."""
    numbers = alfworld_rooms.scenes(split, rooms)
    places = [alfworld_rooms.room(number, max_receptacles) for number in numbers]
    return [(room, found) for room in places if (found := goals(room, family))]


def _make(rng: np.random.Generator, room: Room, options: list[Goal]) -> Game:
    targets = sorted({goal.target for goal in options})
    target = targets[rng.integers(len(targets))]
    options = [goal for goal in options if goal.target == target]
    goal = options[rng.integers(len(options))]
    problem = _problem(room, goal, _placed(rng, room, goal), _start(rng, room))
    wheel = alfworld_rooms.wheel()
    library = alfworld_rooms.table(wheel / "gen" / "goal_library.py")
    entry = library.gdict[TASKS[goal.family]]
    words = {"obj": goal.target, "recep": goal.destination, "toggle": goal.lamp}
    lower = {key: word.lower() for key, word in words.items()}
    template = entry["templates"][rng.integers(len(entry["templates"]))]
    instruction = template.format(**lower, mrecep="")
    asked = entry["pddl"].format(**words, mrecep="").replace("#", "-").rstrip()
    # The template closes the problem, and Fast Downward wants :metric after :goal.
    problem += asked.removesuffix(")") + "(:metric minimize (total-cost)))"
    grammar = alfworld_rooms.text(wheel / "data" / "alfred.twl2")
    return Game(
        domain=alfworld_rooms.text(wheel / "data" / "alfred.pddl"),
        grammar=grammar.replace("UNKNOWN GOAL", instruction),
        problem=problem,
        goal=goal,
        instruction=instruction,
    )


def _placed(
    rng: np.random.Generator, room: Room, goal: Goal
) -> dict[str, tuple[str, Receptacle]]:
    """Object id → (class, where it lies). The target is never at its destination."""
    wanted = [goal.target] * (2 if goal.family == "pick_two" else 1)
    others = [
        cls
        for cls in room.classes
        if cls != goal.target and alfworld_rooms.homes(room.kinds, cls)
    ]
    others = [others[i] for i in rng.permutation(len(others))[:_DISTRACTORS]]
    lying = {}
    for cls in wanted + others:
        avoid = goal.destination if cls == goal.target else ""
        kinds = alfworld_rooms.homes(room.kinds, cls, avoid)
        kind = list(kinds)[rng.choice(len(kinds), p=list(kinds.values()))]
        name = f"{cls}|{alfworld_rooms.position(rng)}"
        lying[name] = (cls, _one(rng, room.of(kind)))
    furniture = [r for kind in _FURNITURE for r in room.of(kind)]
    for lamp in room.lamps:
        spot = _one(rng, furniture or list(room.receptacles))
        lying[f"{lamp}|{alfworld_rooms.position(rng)}"] = (lamp, spot)
    return lying


def _one(rng: np.random.Generator, choices: list[Receptacle]) -> Receptacle:
    if len(choices) == 1 or rng.random() < _NEAREST:
        return choices[0]
    return choices[rng.integers(1, len(choices))]


def _start(rng: np.random.Generator, room: Room) -> str:
    """A location without a receptacle: the middle of the room."""
    used = {r.location for r in room.receptacles}
    while True:
        x, z, turn = rng.integers([-12, -12, 0], [13, 13, 4])
        if (start := f"loc|{x}|{z}|{turn}|30") not in used:
            return start


def _problem(
    room: Room, goal: Goal, lying: dict[str, tuple[str, Receptacle]], start: str
) -> str:
    """The PDDL problem up to its goal."""
    tables = alfworld_rooms.constants()
    classes = sorted({goal.target} | {cls for cls, _ in lying.values()})
    # The domain names these types, so that every problem must declare them.
    object_types = sorted({*classes, "Knife", "ButterKnife"})
    room_types = sorted({*room.kinds, "SinkBasin", "Microwave", "Fridge"})
    places = sorted({r.location for r in room.receptacles} | {start})
    lines = ["(define (problem plan)", "(:domain alfred)", "(:objects"]
    lines += ["agent1 - agent"]
    lines += [f"{cls}Type - otype" for cls in object_types]
    lines += [f"{kind}Type - rtype" for kind in room_types]
    lines += [f"{mangled(name)} - object" for name in sorted(lying)]
    lines += [f"{mangled(r.id)} - receptacle" for r in room.receptacles]
    lines += [f"{mangled(spot)} - location" for spot in places]
    lines += [")", "(:init", "(= (total-cost) 0)"]
    for kind in room.kinds:
        held = [cls for cls in classes if cls in tables.VAL_RECEPTACLE_OBJECTS[kind]]
        lines += [f"(canContain {kind}Type {cls}Type)" for cls in held]
    for r in room.receptacles:
        name = mangled(r.id)
        lines.append(f"(receptacleType {name} {r.kind}Type)")
        lines.append(f"(receptacleAtLocation {name} {mangled(r.location)})")
        if r.kind in tables.OPENABLE_CLASS_SET:
            lines.append(f"(openable {name})")
    for name, (cls, where) in sorted(lying.items()):
        lines += _object_facts(mangled(name), cls, where)
    lines += [f"(atLocation agent1 {mangled(start)})", ")"]
    return "\n".join(lines)


def _object_facts(name: str, cls: str, where: Receptacle) -> list[str]:
    tables = alfworld_rooms.constants()
    lines = [
        f"(objectType {name} {cls}Type)",
        f"(inReceptacle {name} {mangled(where.id)})",
        f"(objectAtLocation {name} {mangled(where.location)})",
    ]
    able = tables.VAL_ACTION_OBJECTS
    lines += [f"({verb.lower()} {name})" for verb in sorted(able) if cls in able[verb]]
    if cls not in able["Toggleable"]:
        lines.append(f"(pickupable {name})")
    if cls in tables.MOVABLE_RECEPTACLES_SET:
        lines.append(f"(isReceptacleObject {name})")
    return lines


def _unseen_split(problem: str) -> str:
    """The split that a problem in an unseen room belongs to."""
    return ("validation", "test", "teacher")[zlib.crc32(problem.encode()) % 3]


def _fits(path: Path, families: tuple[str, ...], rooms: set[int]) -> bool:
    """Reads <task>-<object>-<movable>-<receptacle>-<scene>, the folder's name."""
    parts = path.parent.parent.name.split("-")
    if "Sliced" in path.parent.parent.name or not parts[-1].isdigit():
        return False
    return parts[0] in {TASKS[f] for f in families} and int(parts[-1]) in rooms


def _solvable(path: Path) -> bool:
    """Whether the game can be won; checks that its two files are whole.

    The last of a file is read, not all: there are thousands, 100 kB each.
    """
    for file in (path, path.with_name("traj_data.json")):
        if not file.exists():
            raise ValueError(f"{file} is missing; download the data again")
        with open(file, "rb") as stream:
            stream.seek(max(0, os.path.getsize(file) - 4096))
            end = stream.read().rstrip()
        if not end.endswith(b"}"):
            raise ValueError(f"{file} is cut off or damaged; download the data again")
        if file == path and re.search(rb'"solvable": *false', end):
            return False
    return True


def _read(path: Path) -> dict:
    try:
        return json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path} is no JSON; download the data again") from error
