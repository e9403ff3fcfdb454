"""A plan that wins an ALFWorld game, read off the true state.

Privileged: for teachers and checks, never for what an agent is shown as its own.
"""

import itertools
from collections.abc import Mapping, Sequence

from skillsd_jax.environments.alfworld_games import TOOLS, Goal
from skillsd_jax.environments.alfworld_state import Facts

_DONE = {"heat": "ishot", "cool": "iscool", "clean": "isclean"}


def plan(facts: Facts, names: Mapping[str, str], goal: Goal, move: str) -> list[str]:
    """The shortest of the plans that fetch one object after the other.

    Args:
      facts: the true state.
      names: id → name in commands.
      goal: what is asked for.
      move: how the game words putting an object down.

    Returns:
      Commands; empty if the state offers no such plan.
    """
    walk = _Walk(facts, names, move)
    if goal.family == "look":
        plans = _looks(walk, goal)
    else:
        plans = _deliveries(walk, goal)
    return min((each.commands for each in plans), key=len, default=[])


class _Walk:
    """A plan in the making; `copy` branches it."""

    def __init__(self, facts: Facts, names: Mapping[str, str], move: str):
        self._names, self._move = names, move
        self.facts = facts
        self.inside = dict(facts.of("inreceptacle"))
        self.held = next((ids[1] for ids in facts.of("holds")), "")
        self.commands: list[str] = []
        self._spots = dict(facts.of("receptacleatlocation"))
        self._spot = facts.of("atlocation")[0][1]
        opened = {ids[0] for ids in facts.of("opened")}
        self._closed = {ids[0] for ids in facts.of("openable")} - opened

    def copy(self) -> "_Walk":
        new = object.__new__(_Walk)
        new.__dict__.update(self.__dict__)
        new.inside, new._closed = dict(self.inside), set(self._closed)
        new.commands = list(self.commands)
        return new

    def of_type(self, predicate: str, kind: str) -> list[str]:
        """Ids of an ALFRED class, such as 'SinkBasin'."""
        wanted = kind.lower() + "type"
        return [id for id, held in self.facts.of(predicate) if held == wanted]

    def go(self, receptacle: str, open_it: bool = False) -> None:
        if self._spots[receptacle] != self._spot:
            self._say(f"go to {self._names[receptacle]}")
            self._spot = self._spots[receptacle]
        if open_it and receptacle in self._closed:
            self._say(f"open {self._names[receptacle]}")
            self._closed.remove(receptacle)

    def take(self, thing: str) -> None:
        """Fetches an object, putting down another one first."""
        if self.held == thing:
            return
        if self.held:
            self._drop()
        receptacle = self.inside.pop(thing)
        self.go(receptacle, open_it=True)
        self._say(f"take {self._names[thing]} from {self._names[receptacle]}")
        self.held = thing

    def use(self, verb: str, tool: str) -> None:
        self.go(tool)
        self._say(f"{verb} {self._names[self.held]} with {self._names[tool]}")

    def switch(self, lamp: str) -> None:
        self.go(self.inside[lamp])
        self._say(f"use {self._names[lamp]}")

    def put(self, receptacle: str) -> None:
        self.go(receptacle, open_it=True)
        thing, place = self._names[self.held], self._names[receptacle]
        self._say(self._move.format(thing=thing, place=place))
        self.inside[self.held] = receptacle
        self.held = ""

    def _drop(self) -> None:
        """Puts what is held where it may lie, here if possible."""
        kinds = dict(self.facts.of("objecttype"))
        rooms = dict(self.facts.of("receptacletype"))
        allowed = set(self.facts.of("cancontain"))
        fit = [r for r in rooms if (rooms[r], kinds[self.held]) in allowed]
        self.put(min(fit, key=lambda r: self._spots[r] != self._spot))

    def _say(self, command: str) -> None:
        self.commands.append(command)


def _looks(start: _Walk, goal: Goal) -> list[_Walk]:
    plans = []
    for thing in _present(start, goal.target):
        for lamp in start.of_type("objecttype", goal.lamp):
            walk = start.copy()
            walk.take(thing)
            walk.switch(lamp)
            plans.append(walk)
    return plans


def _deliveries(start: _Walk, goal: Goal) -> list[_Walk]:
    plans = []
    for place in start.of_type("receptacletype", goal.destination):
        things = _present(start, goal.target)
        ready = {t for t in things if start.inside.get(t) == place}
        if goal.family in TOOLS:
            ready &= {ids[0] for ids in start.facts.of(_DONE[goal.family])}
        count = (2 if goal.family == "pick_two" else 1) - len(ready)
        todo = [thing for thing in things if thing not in ready]
        for chosen in itertools.permutations(todo, max(0, count)):
            plans += _carried(start, goal, place, chosen)
    return plans


def _carried(
    start: _Walk, goal: Goal, place: str, things: Sequence[str]
) -> list[_Walk]:
    """Plans that bring these objects to a place, one for every tool there is."""
    tools = [""]
    if goal.family in TOOLS:
        tools = start.of_type("receptacletype", TOOLS[goal.family][1])
    plans = []
    for tool in tools:
        walk = start.copy()
        for thing in things:
            walk.take(thing)
            if tool and (thing,) not in start.facts.of(_DONE[goal.family]):
                walk.use(goal.family, tool)
            walk.put(place)
        plans.append(walk)
    return plans


def _present(walk: _Walk, kind: str) -> list[str]:
    things = walk.of_type("objecttype", kind)
    return [thing for thing in things if thing in walk.inside or thing == walk.held]
