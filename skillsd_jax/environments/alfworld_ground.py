"""PDDL → the grounded task (SAS) that Fast Downward's library plays.

Fast Downward's translator prepares a task for search; playing needs the operators and
the facts only. Grounding by joins over the facts that never change takes a tenth of
the time. The operators are the translator's, name by name and effect by effect.
Imports fast_downward: import this module only when the engine is wanted.
"""

import dataclasses
import functools
import importlib
import re
import sys
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from types import ModuleType
from typing import NamedTuple

import fast_downward

from skillsd_jax.environments.alfworld_state import Fact


def _translator(module: str) -> ModuleType:
    """A module of the translator, which reads the command line when imported."""
    arguments, sys.argv = sys.argv, ["translate", "domain", "problem"]
    try:
        return importlib.import_module(f"fast_downward.translate.{module}")
    finally:
        sys.argv = arguments


normalize = _translator("normalize")
pddl = _translator("pddl")
parsing_functions = _translator("pddl_parser.parsing_functions")

_TOKEN = re.compile(r"[()]|\??[^\s()?]+")
_COMMENT = re.compile(r";.*")

Row = dict[str, str]  # variable → object


@dataclasses.dataclass(frozen=True)
class Translation:
    """A game as Fast Downward runs it, and what its text needs to know.

    Args:
      sas: the grounded task.
      facts: true at first, the ones that never change included.
      types: id → its type and all supertypes.
      slots: action → its parameters as (name, type).
    """

    sas: bytes
    facts: tuple[Fact, ...]
    types: dict[str, frozenset[str]]
    slots: dict[str, tuple[tuple[str, str], ...]]


@dataclasses.dataclass(frozen=True)
class _Clause:
    """A conjunction, sorted by what it asks of.

    Args:
      joined: what must be true of facts that never change.
      checked: what must not be true of them, and equalities.
      changing: (predicate, arguments, wanted) of facts that change.
    """

    joined: tuple
    checked: tuple
    changing: tuple[tuple[str, tuple[str, ...], bool], ...]


@dataclasses.dataclass(frozen=True)
class _Action:
    name: str
    slots: tuple
    named: int  # how many of the slots are part of an operator's name
    clause: _Clause
    # Slots of a quantifier, condition, and what becomes true or false.
    effects: tuple[tuple[tuple, _Clause, tuple[str, tuple[str, ...], bool]], ...]


class _Operator(NamedTuple):
    """A grounded action; facts are numbers of the world's."""

    name: str
    condition: dict[int, bool]
    effects: list[tuple[list[tuple[int, bool]], int, bool]]


def translate(domain: str, problem: str) -> Translation:
    """Grounds a game; a domain with derived predicates goes to the full translator."""
    known = _domain(domain)
    if known is None:
        return _full_translation(domain, problem)
    parsed = parsing_functions.parse_task_pddl(
        _nested(problem), known.types, known.predicates
    )
    _, _, _, objects, init, goal, _ = parsed
    typed = {o.name: known.supertypes[o.type_name] for o in objects}
    facts = sorted(_fact(atom) for atom in init if isinstance(atom, pddl.Atom))
    world = _World(typed, facts)
    operators = [op for action in known.actions for op in _operators(world, action)]
    ways = list(_goal(world, goal, known.changing))
    true = {world.number(fact) for fact in facts if fact[0] in known.changing}
    operators, reachable = _reachable(operators, true)
    return Translation(
        sas=_sas(world.facts, operators, sorted(reachable), true, ways).encode(),
        facts=tuple(facts),
        types=typed,
        slots={action.name: known.slots[action.name] for action in known.actions},
    )


class _Domain(NamedTuple):
    types: dict
    predicates: dict
    supertypes: dict[str, frozenset[str]]
    changing: frozenset[str]
    actions: list[_Action]
    slots: dict[str, tuple[tuple[str, str], ...]]


@functools.lru_cache(maxsize=8)
def _domain(text: str) -> _Domain | None:
    """A domain in normal form; None if it derives predicates or names objects."""
    parts = list(parsing_functions.parse_domain_pddl(_nested(text)))
    name, requirements, types, by_name, constants, _, predicates = parts[:7]
    functions, actions, axioms = parts[7:]
    task = pddl.Task(
        name, "", requirements, types, constants, list(predicates.values()), functions,
        [], pddl.Conjunction([]), actions, axioms, False,
    )  # fmt: skip
    normalize.normalize(task)
    if task.axioms or constants:
        return None
    changing = frozenset(e.literal.predicate for a in task.actions for e in a.effects)
    return _Domain(
        types=by_name,
        predicates=predicates,
        supertypes={
            name: frozenset([name, *each.supertype_names])
            for name, each in by_name.items()
        },
        changing=changing,
        actions=[_compiled(action, changing) for action in task.actions],
        slots=_slots(task.actions),
    )


def _compiled(action, changing: frozenset[str]) -> _Action:
    return _Action(
        name=action.name,
        slots=tuple(action.parameters),
        named=action.num_external_parameters,
        clause=_clause(action.precondition, changing),
        effects=tuple(
            (
                tuple(effect.parameters),
                _clause(effect.condition, changing),
                _clause(effect.literal, changing).changing[0],
            )
            for effect in action.effects
        ),
    )


def _clause(condition, changing: frozenset[str]) -> _Clause:
    single = isinstance(condition, pddl.Literal)
    literals = (condition,) if single else condition.parts
    fixed = [x for x in literals if x.predicate not in changing]
    plain = [x for x in fixed if not x.negated and x.predicate != "="]
    return _Clause(
        joined=tuple(plain),
        checked=tuple(x for x in fixed if x not in plain),
        changing=tuple(
            (x.predicate, tuple(x.args), not x.negated)
            for x in literals
            if x.predicate in changing
        ),
    )


def _nested(text: str) -> list:
    """Parentheses as lists, in lower case."""
    stack: list[list] = [[]]
    for token in _TOKEN.findall(_COMMENT.sub("", text).lower()):
        if token == "(":
            stack.append([])
        elif token == ")":
            stack[-2].append(stack.pop())
        else:
            stack[-1].append(token)
    return stack[0][0]


class _World:
    """The objects of a problem, and its facts by number."""

    def __init__(self, types: dict[str, frozenset[str]], facts: list[Fact]):
        self.facts: list[Fact] = []
        self._numbers: dict[Fact, int] = {}
        self._objects = defaultdict(list)
        for name, held in types.items():
            for kind in held:
                self._objects[kind].append(name)
        # Objects that a condition names stand for themselves.
        self.start = {name: name for name in types}
        self._rows = defaultdict(list)
        for name, ids in facts:
            self._rows[name].append(ids)
        self._true = set(facts)
        self._indices = {}

    def number(self, fact: Fact) -> int:
        if (number := self._numbers.get(fact)) is None:
            number = self._numbers[fact] = len(self.facts)
            self.facts.append(fact)
        return number

    def rows(self, slots: Sequence, clause: _Clause, start: Row) -> Iterator[Row]:
        """Every filling of the slots that the facts that never change allow."""
        rows, known, left = [start], set(start), list(clause.joined)
        while left:
            literal = max(left, key=lambda x: sum(a in known for a in x.args))
            left.remove(literal)
            rows = list(self._join(rows, literal, known))
            known.update(literal.args)
        for slot in slots:
            objects = self._objects.get(slot.type_name, [])
            if slot.name in known:
                allowed = set(objects)
                rows = [row for row in rows if row[slot.name] in allowed]
            else:
                rows = [{**row, slot.name: each} for row in rows for each in objects]
                known.add(slot.name)
        return (row for row in rows if all(self._holds(x, row) for x in clause.checked))

    def changing(self, clause: _Clause, row: Row) -> list[tuple[int, bool]]:
        """The facts that change which a clause asks about, by number."""
        filled = row.__getitem__
        return [
            (self.number((predicate, tuple(map(filled, slots)))), wanted)
            for predicate, slots, wanted in clause.changing
        ]

    def _join(self, rows: list[Row], literal, known: set[str]) -> Iterator[Row]:
        keys = tuple(i for i, arg in enumerate(literal.args) if arg in known)
        index = self._index(literal.predicate, keys)
        names = [literal.args[i] for i in keys]
        for row in rows:
            for ids in index.get(tuple(map(row.__getitem__, names)), ()):
                new = {**row, **dict(zip(literal.args, ids, strict=True))}
                if tuple(map(new.__getitem__, literal.args)) == ids:
                    yield new

    def _index(self, predicate: str, keys: tuple[int, ...]) -> dict:
        if (index := self._indices.get((predicate, keys))) is None:
            index = self._indices[predicate, keys] = defaultdict(list)
            for ids in self._rows[predicate]:
                index[tuple(ids[i] for i in keys)].append(ids)
        return index

    def _holds(self, literal, row: Row) -> bool:
        ids = tuple(map(row.__getitem__, literal.args))
        if literal.predicate == "=":
            return (ids[0] == ids[1]) != literal.negated
        return ((literal.predicate, ids) in self._true) != literal.negated


def _operators(world: _World, action: _Action) -> Iterator[_Operator]:
    named = [slot.name for slot in action.slots[: action.named]]
    for row in world.rows(action.slots, action.clause, world.start):
        effects = []
        for slots, clause, (predicate, arguments, value) in action.effects:
            plain = not slots and not clause.joined and not clause.checked
            for each in (row,) if plain else world.rows(slots, clause, row):
                fact = (predicate, tuple(map(each.__getitem__, arguments)))
                when = world.changing(clause, each)
                effects.append((when, world.number(fact), value))
        name = " ".join([action.name, *map(row.__getitem__, named)])
        yield _Operator(name, dict(world.changing(action.clause, row)), effects)


def _reachable(
    operators: list[_Operator], true: set[int]
) -> tuple[list[_Operator], set[int]]:
    """Drops operators whose conditions nothing can bring about, and what they add."""
    while True:
        added = {fact for op in operators for _, fact, value in op.effects if value}
        reachable = true | added
        kept = [
            op
            for op in operators
            if all(fact in reachable for fact, value in op.condition.items() if value)
        ]
        if len(kept) == len(operators):
            return operators, reachable
        operators = kept


def _goal(
    world: _World, goal, changing: frozenset[str]
) -> Iterator[list[tuple[int, bool]]]:
    """The goal as alternatives, each a list of facts."""
    task = pddl.Task("", "", [], [], [], [], [], [], goal, [], [], False)
    normalize.normalize(task)
    ways = [(axiom.parameters, axiom.condition) for axiom in task.axioms]
    for slots, condition in ways or [((), task.goal)]:
        clause = _clause(condition, changing)
        for row in world.rows(slots, clause, world.start):
            yield world.changing(clause, row)


def _sas(
    facts: list[Fact],
    operators: list[_Operator],
    reachable: list[int],
    true: set[int],
    goal: list[list[tuple[int, bool]]],
) -> str:
    """Fast Downward's text format; every fact is a variable, 0 true and 1 false."""
    number = {fact: i for i, fact in enumerate(reachable)}
    won = len(number)
    lines = ["begin_version\n3\nend_version\nbegin_metric\n0\nend_metric", won + 1]
    for fact, i in number.items():
        words = f"{facts[fact][0]}({', '.join(facts[fact][1])})"
        lines.append(f"begin_variable\nvar{i}\n-1\n2")
        lines.append(f"Atom {words}\nNegatedAtom {words}\nend_variable")
    lines.append(f"begin_variable\nvar{won}\n0\n2\nAtom won()\nNegatedAtom won()")
    lines += ["end_variable\n0\nbegin_state", *(int(f not in true) for f in number)]
    lines.append(f"1\nend_state\nbegin_goal\n1\n{won} 0\nend_goal")
    blocks = [block for op in operators if (block := _block(op, number))]
    lines += [len(blocks), *blocks]
    ways = [way for way in goal if all(f in number for f, value in way if value)]
    lines.append(len(ways))
    for way in ways:
        pairs = [f"{number[f]} {1 - value}" for f, value in way if f in number]
        lines += ["begin_rule", len(pairs), *pairs, f"{won} 1 0\nend_rule"]
    return "\n".join(map(str, lines)) + "\n"


def _block(op: _Operator, number: dict[int, int]) -> str:
    """The text of an operator; '' if it changes nothing."""
    # A fact that nothing makes true has no number: it is false for good.
    condition = {f: 1 - value for f, value in op.condition.items() if f in number}
    added = {fact for when, fact, value in op.effects if value and not when}
    effects, touched = [], set()
    for when, fact, value in op.effects:
        if fact not in number or any(f not in number for f, v in when if v):
            continue
        if condition.get(fact) == 1 - value or (not value and fact in added):
            continue  # nothing to change, or added in the same breath
        pairs = "".join(f" {number[f]} {1 - v}" for f, v in when if f in number)
        count = sum(f in number for f, _ in when)
        change = f"{number[fact]} {condition.get(fact, -1)} {1 - value}"
        effects.append(f"{count}{pairs} {change}")
        touched.add(fact)
    if not effects:
        return ""
    held = [f"{number[f]} {v}" for f, v in condition.items() if f not in touched]
    parts = ["begin_operator", op.name, str(len(held)), *held, str(len(effects))]
    return "\n".join([*parts, *effects, "1", "end_operator"])


def _fact(atom) -> Fact:
    return atom.predicate, tuple(atom.args)


def _slots(actions: Iterable) -> dict[str, tuple[tuple[str, str], ...]]:
    return {
        action.name: tuple((s.name.strip("?"), s.type_name) for s in action.parameters)
        for action in actions
    }


def _full_translation(domain: str, problem: str) -> Translation:
    arguments = sys.argv
    try:
        task, sas = fast_downward.pddl2sas(domain, problem)
    finally:
        sys.argv = arguments  # the translator sets its own
    supertypes = {t.name: frozenset([t.name, *t.supertype_names]) for t in task.types}
    atoms = [atom for atom in task.init if isinstance(atom, pddl.Atom)]
    return Translation(
        sas=sas.encode(),
        facts=tuple(sorted(_fact(a) for a in atoms if a.predicate != "=")),
        types={o.name: supertypes[o.type_name] for o in task.objects},
        slots=_slots(task.actions),
    )
