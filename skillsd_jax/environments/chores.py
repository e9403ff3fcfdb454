"""Household chores in ALFWorld's words: commands, goals, an agent's notes, a player.

The miniature household and ALFWorld share the vocabulary of ALFWorld's text engine,
so one reader of its sentences and one scripted player serve both.
"""

import dataclasses
import functools
import re
from collections.abc import Iterable, Sequence

import numpy as np

TOOLS = {"heat": "microwave", "cool": "fridge", "clean": "sinkbasin"}
STATES = {"heat": "hot", "cool": "cold", "clean": "clean"}
MOVE = "move {thing} to {place}"
OLD_MOVE = "put {thing} in/on {place}"  # games made by alfworld 0.3 and earlier
SHOWN = 5  # objects in sight that the notes list; those of the task come first
_LONGEST = 80  # characters of a command; keeps nonsense out of the notes

_NAME = r"[a-z]+(?: \d+)?"
_COMMAND = re.compile(
    rf"(?P<verb>go to|open|close) (?P<place>{_NAME})"
    rf"|(?P<verb1>take) (?P<thing1>{_NAME}) from (?P<place1>{_NAME})"
    rf"|(?P<verb2>move) (?P<thing2>{_NAME}) to (?P<place2>{_NAME})"
    rf"|(?P<verb3>put) (?P<thing3>{_NAME}) (?:in/on|in|on) (?P<place3>{_NAME})"
    rf"|(?P<verb4>heat|cool|clean) (?P<thing4>{_NAME}) with (?P<place4>{_NAME})"
    rf"|(?P<verb5>use|examine) (?P<thing5>{_NAME})"
    r"|(?P<verb6>look|inventory)"
)
_CONTENTS = re.compile(r"(?:On the [a-z]+ \d+|In it), you see ([^.]*)")
_ROOM = re.compile(r"around you, you see ([^.]*)")
_LISTED = re.compile(r"\b(?:an?|some) ([a-z]+ \d+)")
_TO = rf"(?:in|on|to)(?: the)? (?P<place>{_NAME})"
_GOALS = tuple(
    pattern.replace("THING", rf"(?P<thing>{_NAME})").replace("TO PLACE", _TO)
    for pattern in (
        r"(?P<family>heat|cool|clean) (?:some|the) THING and (?:put|move) it TO PLACE",
        r"put a (?P<family>hot|cool|clean) THING TO PLACE",
        r"(?:put|find) (?P<family>two) THING(?: and put them)? TO PLACE",
        rf"(?P<family>look) at THING under the (?P<place>{_NAME})",
        rf"(?P<family>examine) the THING with the (?P<place>{_NAME})",
        r"(?P<family>put|move) (?:an?|some|the) THING TO PLACE",
    )
)
_FAMILY = {"hot": "heat", "examine": "look", "put": "pick", "move": "pick"}


@dataclasses.dataclass(frozen=True)
class Command:
    """A command taken apart; `thing` of `examine` may be a receptacle."""

    verb: str
    thing: str = ""
    place: str = ""


@functools.lru_cache(maxsize=8192)
def read_command(text: str) -> Command | None:
    """Takes a command apart; None if the grammar has no such command."""
    match = _COMMAND.fullmatch(text) if len(text) <= _LONGEST else None
    if match is None:
        return None
    parts = {k.rstrip("0123456789"): v for k, v in match.groupdict().items() if v}
    if parts["verb"] == "put":
        parts["verb"] = "move"
    return Command(**parts)


@dataclasses.dataclass(frozen=True)
class Goal:
    """What an instruction asks for.

    Args:
      family: pick, heat, cool, clean, two or look; "" if it could not be read.
      thing: object wanted, by class ("apple") or by name ("apple 1").
      place: where it must lie in the end; for look, the lamp.
    """

    family: str = ""
    thing: str = ""
    place: str = ""


@functools.lru_cache(maxsize=8192)
def read_goal(instruction: str) -> Goal:
    """Reads ALFWorld's templated instructions and the miniature household's."""
    for pattern in _GOALS:
        if match := re.search(pattern, instruction.lower()):
            family = match["family"]
            return Goal(_FAMILY.get(family, family), match["thing"], match["place"])
    return Goal()


def matches(name: str, wanted: str) -> bool:
    """Whether `name` ("mug 2") is the wanted object, or of the wanted class."""
    return bool(wanted) and (name == wanted or name.rpartition(" ")[0] == wanted)


class Notes:
    """What an agent has read so far, and nothing else.

    Args:
      instruction: the task in words.
      intro: the first feedback; it lists the receptacles of the room.
      move: how this engine words putting an object down, MOVE or OLD_MOVE.
    """

    def __init__(self, instruction: str, intro: str, move: str = MOVE):
        room = _ROOM.search(intro)
        self.goal = read_goal(instruction)
        self.places = tuple(_LISTED.findall(room[1])) if room else ()
        self.move = move
        self.place = ""  # receptacle in front of the agent; "": middle of the room
        self.hand = ""  # object held
        self.seen: dict[str, str] = {}  # object → receptacle where it was last seen
        self.states: dict[str, set[str]] = {}  # object → hot, cold, clean
        self.closed: set[str] = set()
        self.searched: set[str] = set()
        self.failed: set[str] = set()  # commands refused though all seemed in place
        self.last = ""
        self.worked = True

    def read(self, command: str, feedback: str) -> None:
        """Takes in the engine's words on a command (any text)."""
        parsed = read_command(command)
        self.last = command if parsed else "unknown"
        self.worked = "Nothing happens" not in feedback and feedback != ""
        if parsed is None:
            self.worked = False
        elif self.worked:
            self._note(parsed, feedback)
        else:
            self._note_failure(command, parsed)

    def _note(self, command: Command, feedback: str) -> None:
        verb, thing, place = command.verb, command.thing, command.place
        if verb == "go to":
            self.place = place
        elif verb == "take":
            self.hand = thing
            self.seen.pop(thing, None)
        elif verb == "move":
            self.hand = "" if self.hand == thing else self.hand
            self.seen[thing] = place
        elif verb in STATES:
            states = self.states.setdefault(thing, set())
            states -= {"heat": {"cold"}, "cool": {"hot"}}.get(verb, set())
            states.add(STATES[verb])
        elif verb == "close":
            self.closed.add(place)
        if verb in ("go to", "open") or (verb == "examine" and thing in self.places):
            self._look_into(place or thing, feedback)

    def _look_into(self, place: str, feedback: str) -> None:
        contents = _CONTENTS.search(feedback)
        if contents is None:
            if "is closed" in feedback:
                self.closed.add(place)
            return
        self.closed.discard(place)
        self.searched.add(place)
        for thing in [t for t, where in self.seen.items() if where == place]:
            del self.seen[thing]
        self.seen.update((thing, place) for thing in _LISTED.findall(contents[1]))

    def _note_failure(self, text: str, command: Command) -> None:
        verb, thing, place = command.verb, command.thing, command.place
        if verb == "go to":
            # Receptacles may share a spot: the engine then refuses the walk, because
            # the agent stands there already.
            if place in self.places and place != self.place:
                self.place = place
        elif verb in ("open", "examine"):
            if self.place and self.place == (place or thing):
                self.searched.add(self.place)  # no use trying it again
                self.closed.discard(self.place)
        elif verb == "take" and place == self.place and not self.hand:
            self.seen.pop(thing, None)
        elif thing and thing == self.hand and place == self.place:
            if place not in self.closed or verb != "move":
                self.failed.add(text)
        elif verb == "use" and self.seen.get(thing) == self.place:
            self.failed.add(text)

    def in_sight(self) -> list[str]:
        """Objects on or in the receptacle in front of the agent, the task's first."""
        if not self.place or self.place in self.closed:
            return []
        here = [thing for thing, place in self.seen.items() if place == self.place]
        return sorted(here, key=lambda thing: not matches(thing, self.goal.thing))

    def ready(self, thing: str) -> bool:
        """Whether the object is in the state the task asks for."""
        state = STATES.get(self.goal.family)
        return state is None or state in self.states.get(thing, ())

    def wanted(self) -> dict[str, str]:
        """Objects of the task that are still to be fetched → where they were seen."""
        goal = self.goal
        return {
            thing: place
            for thing, place in self.seen.items()
            if matches(thing, goal.thing)
            and not (matches(place, goal.place) and self.ready(thing))
        }

    def render(self) -> str:
        """The compact observation: fixed order, one short phrase per field."""
        here = self.place
        if here in self.closed:
            sight = " closed"
        elif here and here not in self.searched:
            sight = " unknown"
        else:
            sight = _words(self.in_sight()[:SHOWN])
        state = " ".join(sorted(self.states.get(self.hand, ()))) or "plain"
        fields = [f"at: {here or 'middle'}; see:{sight}; hand:"]
        fields.append(f" {self.hand} {state}" if self.hand else " nothing")
        found = [f"{t} {p}" for t, p in self.wanted().items() if p != here]
        if found and not self.hand:
            fields.append(f"; found:{_words(found[:2])}")
        outcome = " ok" if self.worked else " failed"
        fields.append(f"; last: {self.last + outcome if self.last else 'none'}")
        searched = [place for place in self.places if place in self.searched]
        left = [place for place in self.places if place not in self.searched]
        fields.append(f"; searched:{_words(searched)}; left:{_words(left)}")
        return "".join(fields)


def _words(names: Sequence[str]) -> str:
    return "".join(f" {name}" for name in names) or " nothing"


def lexicon(names: Iterable[str]) -> list[str]:
    """Phrases of commands, instructions and notes, with the given names.

    A phrase carries the space in front of it; "; last: " carries the one behind it,
    so that a command is the same token there as in a reply.
    """
    return list(dict.fromkeys([*_PHRASES, *(f" {name}" for name in names)]))


_PHRASES = (
    *("<action>", "</action>", "<think>", "</think>"),
    *("go to", "open", "close", "take", "move", "heat", "cool", "clean"),
    *("use", "examine", "look", "inventory", "put", "unknown", "none"),
    *(" from", " to", " with", " in/on", " in", " on", " the", " to the"),
    *(" and move it to the", " and put it in", " and put them in"),
    *("put a", "put some", "put two", "find two", "clean some", "heat some"),
    *("cool some", "look at", "examine the", " under the", " with the"),
    *("at:", "; see:", "; hand:", "; found:", "; last: ", "; searched:", "; left:"),
    *(" middle", " nothing", " closed", " unknown", " ok", " failed"),
    *(" plain", " hot", " cold", " cool", " clean"),
)


def player(
    notes: Notes,
    rng: np.random.Generator,
    workflow: Sequence[str] = (),
    noise: float = 0.0,
    knows_tools: bool = True,
) -> str:
    """The next command of a scripted player that knows only what it has read.

    It searches unsearched receptacles at random, takes the object of the task, brings
    it into the wanted state and delivers it.

    Args:
      notes: its memory.
      rng: source of every choice.
      workflow: commands of a skill; their places and tools come before its own guesses.
      noise: chance of a random command instead.
      knows_tools: whether it knows which receptacle heats, cools and cleans; if not,
        it tries the three kinds.
    """
    if noise and rng.random() < noise:
        return _random_command(notes, rng)
    hints = _read_hints(tuple(workflow), notes.goal.thing)
    if not notes.hand:
        return _search(notes, rng, notes.wanted(), hints)
    if not matches(notes.hand, notes.goal.thing):
        return _deliver(notes, rng, notes.places, notes.place)
    if notes.goal.family == "look":
        return _use_lamp(notes, rng, hints)
    if command := _use_tool(notes, rng, hints, knows_tools):
        return command
    goals = [place for place in notes.places if matches(place, notes.goal.place)]
    return _deliver(notes, rng, goals, hints.place)


@dataclasses.dataclass(frozen=True)
class _Hints:
    sources: tuple[str, ...] = ()  # where the workflow takes the object, in order
    tool: str = ""
    place: str = ""  # where it delivers
    lamps: tuple[str, ...] = ()  # places it goes to before it uses a lamp


@functools.lru_cache(maxsize=4096)
def _read_hints(workflow: tuple[str, ...], thing: str) -> _Hints:
    sources, tool, place, lamps, at = [], "", "", [], ""
    for command in filter(None, map(read_command, workflow)):
        if command.verb == "go to":
            at = command.place
        elif command.verb == "use":
            lamps.append(at)
        elif not matches(command.thing, thing):
            continue
        elif command.verb == "take":
            sources.append(command.place)
        elif command.verb in TOOLS:
            tool = command.place
        elif command.verb == "move":
            place = command.place
    return _Hints(tuple(sources), tool, place, tuple(lamps))


def _search(
    notes: Notes, rng: np.random.Generator, targets: dict[str, str], hints: _Hints
) -> str:
    here = notes.place
    near = [thing for thing, place in targets.items() if place == here]
    if here in notes.closed and (near or here not in notes.searched):
        return f"open {here}"
    if near:
        return f"take {near[0]} from {here}"
    if here and here not in notes.searched:
        return f"examine {here}"
    if targets:
        return f"go to {next(iter(targets.values()))}"
    left = [place for place in notes.places if place not in notes.searched]
    told = [place for place in hints.sources if place in left]
    return _go(rng, told[:1] or left or notes.places, here)


def _use_lamp(notes: Notes, rng: np.random.Generator, hints: _Hints) -> str:
    lamps = {
        thing: place
        for thing, place in notes.seen.items()
        if matches(thing, notes.goal.place) and f"use {thing}" not in notes.failed
    }
    command = _search(notes, rng, lamps, _Hints(sources=hints.lamps))
    return f"use {command.split(' from ')[0][5:]}" if command[:4] == "take" else command


def _use_tool(
    notes: Notes, rng: np.random.Generator, hints: _Hints, knows_tools: bool
) -> str:
    verb = notes.goal.family
    if notes.ready(notes.hand):
        return ""
    kinds = [TOOLS[verb]] if knows_tools else list(TOOLS.values())
    tools = [hints.tool] if hints.tool in notes.places else []
    tools = tools or [p for p in notes.places if any(matches(p, k) for k in kinds)]
    tools = [t for t in tools if f"{verb} {notes.hand} with {t}" not in notes.failed]
    if notes.place in tools:
        return f"{verb} {notes.hand} with {notes.place}"
    return _go(rng, tools, notes.place) if tools else ""


def _deliver(
    notes: Notes, rng: np.random.Generator, goals: Sequence[str], hint: str
) -> str:
    commands = {p: notes.move.format(thing=notes.hand, place=p) for p in goals}
    open_to = [place for place in goals if commands[place] not in notes.failed]
    here = notes.place
    if here in open_to:
        return f"open {here}" if here in notes.closed else commands[here]
    return _go(rng, [hint] if hint in open_to else open_to or notes.places, here)


def _go(rng: np.random.Generator, places: Sequence[str], here: str) -> str:
    others = [place for place in places if place != here]
    return f"go to {_one(rng, others)}" if others else "look"


def _one(rng: np.random.Generator, items: Sequence[str]) -> str:
    return items[int(rng.integers(len(items)))]


def _random_command(notes: Notes, rng: np.random.Generator) -> str:
    """A command of random kind about what is at hand; often refused."""
    if not notes.places:
        return "look"
    verb = _one(rng, ("go to", "open", "take", "move", "heat", "cool", "clean"))
    thing = notes.hand or next(iter(notes.in_sight()), "")
    place = notes.place or _one(rng, notes.places)
    if verb == "go to" or not thing:
        return _go(rng, notes.places, notes.place)
    if verb == "open":
        return f"open {place}"
    if verb == "take":
        return f"take {thing} from {place}"
    if verb == "move":
        return notes.move.format(thing=thing, place=_one(rng, notes.places))
    return f"{verb} {thing} with {place}"
