"""A miniature household: ten receptacles, eight kinds of object, four kinds of task.

It speaks ALFWorld's sentences and shows the agent's own notes. Where an object lies is
hidden and drawn from a fixed prior per object, the same in every split: that prior is
what experience can teach. Doors stand open; nothing has to be opened.
"""

import bisect
import dataclasses
import functools
import itertools
from collections.abc import Sequence

import numpy as np

from skillsd_jax import config
from skillsd_jax.environments import chores
from skillsd_jax.environments.base import (
    TimeStep,
    in_split,
    parse_action,
    split_index,
)
from skillsd_jax.trajectory import Task

PLACES = tuple(
    f"{kind} 1"
    for kind in (
        *("fridge", "cabinet", "drawer", "shelf", "diningtable"),
        *("stoveburner", "garbagecan", "sinkbasin", "countertop", "microwave"),
    )
)
OBJECTS = tuple(
    f"{kind} 1"
    for kind in ("apple", "egg", "potato", "tomato", "cup", "mug", "plate", "bowl")
)
FAMILIES = ("pick", "heat", "cool", "clean")
HOME, SECOND = 0.7, 0.15  # chance of an object's two usual places; the rest share 0.15
PRESENT = 4  # objects in a level, the wanted one among them
_PRIOR_SEED = 123
_NOTHING = "Nothing happens."


@dataclasses.dataclass(frozen=True)
class Level:
    """A starting state; indices into FAMILIES, OBJECTS and PLACES."""

    family: int
    objects: tuple[int, ...]  # the wanted one first
    places: tuple[int, ...]  # of the objects, in their order
    destination: int

    @property
    def instruction(self) -> str:
        thing, place = OBJECTS[self.objects[0]], PLACES[self.destination]
        if self.family == 0:
            return f"move the {thing} to the {place}"
        return f"{FAMILIES[self.family]} the {thing} and move it to the {place}"


@functools.cache
def prior() -> np.ndarray:
    """Chance [object, place] that an object starts there; rows sum to 1."""
    rng = np.random.default_rng(_PRIOR_SEED)
    rest = (1 - HOME - SECOND) / (len(PLACES) - 2)
    table = np.full((len(OBJECTS), len(PLACES)), rest)
    for row in table:
        home, second = rng.permutation(len(PLACES))[:2]
        row[home], row[second] = HOME, SECOND
    return table


@functools.cache
def _cumulative() -> list[list[float]]:
    return [list(itertools.accumulate(row)) for row in prior().tolist()]


def draw_level(split: str, seed: int) -> Level:
    """Level `seed` of a split: the first draw that hashes into the split's share.

    Sharing the levels out by a hash of the whole level keeps the splits disjoint and
    leaves the prior untouched; removing near-duplicates would flatten it.
    """
    number = split_index(split)
    draws = (
        _draw(np.random.default_rng([number, seed, attempt]))
        for attempt in itertools.count()
    )
    return next(x for x in draws if in_split(split, repr(dataclasses.astuple(x))))


def _draw(rng: np.random.Generator) -> Level:
    objects = rng.permutation(len(OBJECTS))[:PRESENT].tolist()
    last = len(PLACES) - 1
    places = [
        min(bisect.bisect(_cumulative()[thing], u), last)
        for thing, u in zip(objects, rng.random(PRESENT).tolist(), strict=True)
    ]
    destination = int(rng.integers(last))
    destination += destination >= places[0]  # any place but where the object lies
    family = int(rng.integers(len(FAMILIES)))
    return Level(family, tuple(objects), tuple(places), destination)


class Household:
    """The miniature household as an environment; options: config.Household."""

    def __init__(self, split: str = "train", require_think: bool = False, **options):
        split_index(split)  # refuses an unknown split
        self.max_steps = config.Household(**options).max_steps
        self.data, self.families = "generated", FAMILIES
        self._split = split
        self._require_think = require_think
        self._level: Level | None = None
        self._done = True

    def reset(self, seed: int) -> TimeStep:
        self._level = level = draw_level(self._split, seed)
        self._task = Task(
            "household", seed, self._split, FAMILIES[level.family], level.instruction
        )
        self._where = {
            OBJECTS[thing]: PLACES[place]
            for thing, place in zip(level.objects, level.places, strict=True)
        }
        self._states: dict[str, set[str]] = {}
        self._place = self._hand = ""
        self._steps, self._done = 0, False
        self._knows_tools: bool | None = None
        self._notes = chores.Notes(level.instruction, _INTRO)
        return TimeStep(
            self._notes.render(), admissible=self._admissible(), feedback=_INTRO
        )

    def task(self) -> Task:
        return self._task

    def step(self, text: str) -> TimeStep:
        if self._done:
            raise RuntimeError("the episode is over or not begun: call reset(seed)")
        action, readable = parse_action(text, self._require_think)
        command = chores.read_command(action)
        exists = command is not None and _exists(command)
        change = self._act(command) if exists else ""
        effective = change != ""
        feedback = change or (self._look(command) if exists else "") or _NOTHING
        self._notes.read(action, feedback)
        success = effective and command.verb == "move" and self._solved()
        self._steps += 1
        self._done = success or self._steps >= self.max_steps
        return TimeStep(
            observation=self._notes.render(),
            reward=float(success),
            done=self._done,
            success=success,
            admissible=() if self._done else self._admissible(),
            action=action,
            valid=readable and exists,
            effective=effective,
            feedback=feedback,
        )

    def close(self) -> None:
        self._done = True

    def demonstrate(
        self, rng: np.random.Generator, workflow: Sequence[str] = (), noise: float = 0.0
    ) -> str:
        """A searcher; whether it knows the tools is drawn once per episode (½)."""
        if self._knows_tools is None:
            self._knows_tools = bool(rng.random() < 0.5)
        command = chores.player(self._notes, rng, workflow, noise, self._knows_tools)
        return f"<action>{command}</action>"

    def expert_workflow(self) -> list[str]:
        level = self._level
        thing, verb = OBJECTS[level.objects[0]], FAMILIES[level.family]
        source, goal = PLACES[level.places[0]], PLACES[level.destination]
        plan = [f"go to {source}", f"take {thing} from {source}"]
        if verb in chores.TOOLS:
            kind = chores.TOOLS[verb]
            (tool,) = (place for place in PLACES if chores.matches(place, kind))
            plan += [f"go to {tool}"] * (tool != source)
            plan.append(f"{verb} {thing} with {tool}")
            source = tool
        plan += [f"go to {goal}"] * (goal != source)
        return [*plan, chores.MOVE.format(thing=thing, place=goal)]

    @classmethod
    def lexicon(cls, **options) -> list[str]:
        return chores.lexicon([*PLACES, *OBJECTS])

    def _act(self, command: chores.Command) -> str:
        """Carries the command out; the engine's words, "" if it changes nothing."""
        verb, thing, place = command.verb, command.thing, command.place
        here = self._place
        if verb == "go to" and place != here:
            self._place = place
            return f"You arrive at {place}. {self._contents()}"
        if place != here or not thing:
            return ""
        if verb == "take" and not self._hand and self._where.get(thing) == here:
            self._hand = thing
            del self._where[thing]
            return f"You pick up the {thing} from the {here}."
        if thing != self._hand:
            return ""
        if verb == "move":
            self._hand = ""
            self._where[thing] = here
            return f"You move the {thing} to the {here}."
        states = self._states.setdefault(thing, set())
        tool, state = chores.TOOLS.get(verb, ""), chores.STATES.get(verb, "")
        if not chores.matches(here, tool) or state in states:
            return ""
        if verb != "clean":
            states -= {"hot", "cold"}
        states.add(state)
        return f"You {verb} the {thing} using the {here}."

    def _look(self, command: chores.Command) -> str:
        """The engine's words on a command that only looks; "" for any other."""
        if command.verb == "look":
            return f"You are facing the {self._place}." if self._place else _INTRO
        if command.verb == "inventory" and self._hand:
            return f"You are carrying: {_listed([self._hand])}."
        if command.verb == "inventory":
            return "You are not carrying anything."
        if command.verb == "examine" and command.thing == self._place:
            return self._contents()
        return ""

    def _contents(self) -> str:
        here = [thing for thing, place in self._where.items() if place == self._place]
        return f"On the {self._place}, you see {_listed(here)}."

    def _solved(self) -> bool:
        level = self._level
        thing = OBJECTS[level.objects[0]]
        state = chores.STATES.get(FAMILIES[level.family])
        return self._where.get(thing) == PLACES[level.destination] and (
            state is None or state in self._states.get(thing, ())
        )

    def _admissible(self) -> tuple[str, ...]:
        here, hand = self._place, self._hand
        commands = [f"go to {place}" for place in PLACES if place != here]
        if hand and here:
            commands.append(chores.MOVE.format(thing=hand, place=here))
            commands += [
                f"{verb} {hand} with {here}"
                for verb, kind in chores.TOOLS.items()
                if chores.matches(here, kind)
            ]
        elif here:
            commands += [
                f"take {thing} from {here}"
                for thing, place in self._where.items()
                if place == here
            ]
        return (*commands, "look", "inventory")


def _exists(command: chores.Command) -> bool:
    things = PLACES + OBJECTS if command.verb == "examine" else OBJECTS
    return command.thing in ("", *things) and command.place in ("", *PLACES)


def _listed(names: Sequence[str]) -> str:
    """The engine's enumeration: 'a mug 1, and an egg 1', or 'nothing'."""
    words = [f"{'an' if name[0] in 'aeiou' else 'a'} {name}" for name in names]
    if len(words) > 1:
        words[-1] = f"and {words[-1]}"
    return ", ".join(words) or "nothing"


_INTRO = (
    "You are in the middle of a room. Looking quickly around you, you see "
    f"{_listed(PLACES)}."
)
