"""ALFWorld games: generated from what the alfworld wheel ships, or read from its data.

The wheel holds the dynamics (PDDL), the text grammar, the goals, the affordances and
120 real floor plans, but no game. What is added here is which objects lie where and
which task is asked. A generated score is not comparable with a published one.
"""

import dataclasses
import functools
import importlib.util
import json
import re
import zlib
from pathlib import Path
from types import ModuleType

import numpy as np

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
# Family → what the object must be able to do, and the receptacle class that does it.
TOOLS = {
    "clean": ("Cleanable", "SinkBasin"),
    "heat": ("Heatable", "Microwave"),
    "cool": ("Coolable", "Fridge"),
}
_DISTRACTORS = 14  # other objects in a room, at most, one of a class
_NEAREST = 0.6  # chance of the first of several receptacles of one class
_FURNITURE = ("SideTable", "Desk", "Dresser", "CoffeeTable", "DiningTable", "Shelf")


@dataclasses.dataclass(frozen=True)
class Game:
    """A game as its file holds it, and what its task asks for.

    Args:
      target: class of the object asked for, lower case.
      destination: class of the receptacle it goes to; '' when it is looked at.
      lamp: class of the lamp it is looked at with; else ''.
    """

    domain: str
    grammar: str
    problem: str
    family: str
    instruction: str
    target: str
    destination: str
    lamp: str


@dataclasses.dataclass(frozen=True)
class Goal:
    family: str
    target: str
    destination: str = ""
    lamp: str = ""


def parse_families(text: str) -> tuple[str, ...]:
    """'pick,heat' or 'all' → families, in the order of TASKS."""
    wanted = set(TASKS) if text == "all" else set(text.replace(" ", "").split(","))
    if not wanted or not wanted <= set(TASKS):
        known = ",".join(TASKS)
        raise ValueError(f"families={text!r} must be 'all' or some of {known}")
    return tuple(family for family in TASKS if family in wanted)


class Generated:
    """Games made on demand: `game(seed)` is the same in every process."""

    data = "generated"

    def __init__(self, split: str, rooms: str, families: str, max_receptacles: int):
        self._split = split
        self._families = parse_families(families)
        self._rooms = [room(n, max_receptacles) for n in scenes(split, rooms)]
        for family in self._families:
            if not any(goals(r, family) for r in self._rooms):
                raise ValueError(
                    f"no room can ask for family {family!r} with rooms={rooms!r}, "
                    f"max_receptacles={max_receptacles}; set rooms='all' or leave "
                    f"{family!r} out of families"
                )

    def game(self, seed: int) -> Game:
        """Game `seed` of the split; families take turns."""
        family = self._families[seed % len(self._families)]
        attempt = 0
        while True:
            rng = np.random.default_rng([SPLITS.index(self._split), seed, attempt])
            made = _make(rng, self._rooms, family)
            if _bucket(made.problem) == self._split:
                return made
            attempt += 1


def goals(room: Room, family: str) -> list[Goal]:
    """What can be asked for in a room."""
    tables = constants()
    if room.kind not in tables.GOALS_VALID[TASKS[family]]:
        return []
    if family == "look":
        return [
            Goal(family, c, lamp=lamp)
            for c in room.classes
            for lamp in room.lamps
            if homes(room, c)
        ]
    able, tool = TOOLS.get(family, (None, None))
    if tool and tool not in room.kinds:
        return []
    return [
        Goal(family, c, destination=kind)
        for c in room.classes
        if able is None or c in tables.VAL_ACTION_OBJECTS[able]
        for kind in room.kinds
        if kind != tool and c in tables.VAL_RECEPTACLE_OBJECTS[kind]
        if homes(room, c, avoid=kind)
    ]


def _make(rng: np.random.Generator, rooms: list[Room], family: str) -> Game:
    chances = [r for r in rooms if goals(r, family)]
    place = chances[rng.integers(len(chances))]
    options = goals(place, family)
    targets = sorted({goal.target for goal in options})
    target = targets[rng.integers(len(targets))]
    options = [goal for goal in options if goal.target == target]
    goal = options[rng.integers(len(options))]
    problem = _problem(place, goal, _placed(rng, place, goal), _start(rng, place))
    library = _module(wheel() / "gen" / "goal_library.py").gdict[TASKS[family]]
    templates = library["templates"]
    words = {"obj": goal.target, "recep": goal.destination, "toggle": goal.lamp}
    lower = {k: v.lower() for k, v in words.items()}
    instruction = templates[rng.integers(len(templates))].format(**lower, mrecep="")
    asked = library["pddl"].format(**words, mrecep="").replace("#", "-").rstrip()
    # The template closes the problem, and Fast Downward wants :metric after :goal.
    problem += asked.removesuffix(")") + "(:metric minimize (total-cost)))"
    data = wheel() / "data"
    grammar = (data / "alfred.twl2").read_text().replace("UNKNOWN GOAL", instruction)
    return Game(
        domain=(data / "alfred.pddl").read_text(),
        grammar=grammar,
        problem=problem,
        family=family,
        instruction=instruction,
        target=lower["obj"],
        destination=lower["recep"],
        lamp=lower["toggle"],
    )


def _placed(
    rng: np.random.Generator, place: Room, goal: Goal
) -> dict[str, tuple[str, Receptacle]]:
    """Object id → (class, where it lies). The target is never at its destination."""
    wanted = [goal.target] * (2 if goal.family == "pick_two" else 1)
    others = [c for c in place.classes if c != goal.target and homes(place, c)]
    others = [others[i] for i in rng.permutation(len(others))[:_DISTRACTORS]]
    lying = {}
    for cls in wanted + others:
        kinds = homes(place, cls, avoid=goal.destination if cls == goal.target else "")
        kind = list(kinds)[rng.choice(len(kinds), p=list(kinds.values()))]
        lying[f"{cls}|{position(rng)}"] = (cls, _one(rng, place.of(kind)))
    furniture = [r for kind in _FURNITURE for r in place.of(kind)]
    for lamp in place.lamps:
        spot = _one(rng, furniture or list(place.receptacles))
        lying[f"{lamp}|{position(rng)}"] = (lamp, spot)
    return lying


def _one(rng: np.random.Generator, choices: list[Receptacle]) -> Receptacle:
    if len(choices) == 1 or rng.random() < _NEAREST:
        return choices[0]
    return choices[rng.integers(1, len(choices))]


def _start(rng: np.random.Generator, place: Room) -> str:
    """A location without a receptacle: the middle of the room."""
    used = {r.location for r in place.receptacles}
    while True:
        x, z, turn = rng.integers([-12, -12, 0], [13, 13, 4])
        if (start := f"loc|{x}|{z}|{turn}|30") not in used:
            return start


def _problem(
    place: Room, goal: Goal, lying: dict[str, tuple[str, Receptacle]], start: str
) -> str:
    """The PDDL problem up to its goal."""
    tables = constants()
    kinds = sorted({goal.target} | {cls for cls, _ in lying.values()})
    # The domain names these types, so that every problem must declare them.
    object_types = sorted({*kinds, "Knife", "ButterKnife"})
    room_types = sorted({*place.kinds, "SinkBasin", "Microwave", "Fridge"})
    places = sorted({r.location for r in place.receptacles} | {start})
    lines = ["(define (problem plan)", "(:domain alfred)", "(:objects"]
    lines += ["agent1 - agent"]
    lines += [f"{cls}Type - otype" for cls in object_types]
    lines += [f"{kind}Type - rtype" for kind in room_types]
    lines += [f"{mangled(name)} - object" for name in sorted(lying)]
    lines += [f"{mangled(r.id)} - receptacle" for r in place.receptacles]
    lines += [f"{mangled(spot)} - location" for spot in places]
    lines += [")", "(:init", "(= (total-cost) 0)"]
    for kind in place.kinds:
        held = [cls for cls in kinds if cls in tables.VAL_RECEPTACLE_OBJECTS[kind]]
        lines += [f"(canContain {kind}Type {cls}Type)" for cls in held]
    for r in place.receptacles:
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
    tables = constants()
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


def _bucket(problem: str) -> str:
    """The split a problem belongs to. Training rooms are train's alone."""
    number = zlib.crc32(problem.encode()) % 3
    return SPLITS[1 + number]
