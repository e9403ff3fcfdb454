"""The text of ALFWorld's games: its grammar, evaluated without needless copies.

TextWorld's parsers read the grammar once; after that a sentence costs microseconds,
where TextWorld itself parses and copies at every word. Same text, letter by letter.
Imports textworld: import this module only when the engine is wanted.
"""

import dataclasses
import functools
import re
import threading
from collections.abc import Iterator, Mapping

from textworld.envs.pddl import logic, textgen
from textworld.logic import Rule

from skillsd_jax.environments.alfworld_state import Facts, Query

_PARSING = threading.Lock()  # TextWorld's parsers are one each for all threads
_TASK = re.compile(r"Your task is to: ([^\"#{}\[\]|;<>\\]*)\"")


@dataclasses.dataclass(frozen=True)
class Entity:
    """What the grammar may say of a thing."""

    id: str
    name: str
    definite: str = "the"
    indefinite: str = "a"

    def __str__(self) -> str:
        return self.name


@dataclasses.dataclass(frozen=True)
class Scope:
    """What a sentence is about: placeholder → id, in a state."""

    facts: Facts
    entities: Mapping[str, Entity]
    bound: Mapping[tuple[str, str], str]  # (name, type) of a placeholder → id

    def variables(self) -> dict[str, Entity]:
        return {name: self.entities[id] for (name, _), id in self.bound.items()}

    def matches(self, query: Query) -> Iterator["Scope"]:
        for bound in self.facts.matches(query, self.bound):
            yield dataclasses.replace(self, bound=bound)


class Grammar:
    """The grammar of one game.

    Args:
      source: text of the game's grammar (twl2).
    """

    def __init__(self, source: str):
        found = _TASK.search(source)
        self._task = found[0][:-1] if found else None
        # Games differ in their task only: without it, all share one parse.
        shared = source.replace(found[0], 'Your task is to: "') if found else source
        self._logic = _parsed(shared)

    def template(self, action: str) -> str:
        """How the command of an action is worded, such as 'take {o} from {r}'."""
        return self._logic.actions[action].template

    def feedback(self, action: str) -> str:
        """What is said when an action was done, as a text to `derive`."""
        return self._logic.actions[action].feedback_rule

    def derive(self, text: str, scope: Scope) -> str:
        """The text with every #rule#, {expression | query} and [list] worked out."""
        return "".join(self._derive(symbol, scope) for symbol in _symbols(text))

    def _derive(self, symbol, scope: Scope) -> str:
        if isinstance(symbol, textgen.TerminalSymbol):
            return str(symbol.symbol)
        if isinstance(symbol, textgen.NonterminalSymbol):
            return self._rule(symbol.symbol, scope)
        if isinstance(symbol, textgen.EvalSymbol):
            return str(eval(_code(symbol.expression), {}, scope.variables()))
        if isinstance(symbol, textgen.ListSymbol):
            return self._list(self._each(symbol.symbol, scope), scope)
        return "".join(self._each(symbol, scope))

    def _rule(self, name: str, scope: Scope) -> str:
        if name == "task" and self._task is not None:
            return self._task
        for rule in self._logic.grammar._rules.get(name) or ():
            if not rule.condition or any(scope.matches(_query(rule.condition))):
                return "".join(self._derive(symbol, scope) for symbol in rule.rhs)
        raise textgen.CSGUnknownSymbolError(name)

    def _each(self, symbol: "textgen.ConditionalSymbol", scope: Scope) -> list[str]:
        """The expression once per match of its query."""
        scopes = scope.matches(_query(symbol.given)) if symbol.given else (scope,)
        return [self._derive(symbol.expression, each) for each in scopes]

    def _list(self, items: list[str], scope: Scope) -> str:
        if not items:
            return self._rule("list_empty", scope)
        if len(items) == 1:
            return items[0]
        between = self._rule("list_separator", scope)
        return (
            between.join(items[:-1])
            + self._rule("list_last_separator", scope)
            + items[-1]
        )


@functools.lru_cache(maxsize=64)
def _parsed(source: str) -> "logic.GameLogic":
    with _PARSING:
        return logic.GameLogic(domain="", grammar=source)


@functools.lru_cache(maxsize=1024)
def _symbols(text: str) -> list:
    with _PARSING:
        return textgen._parse_and_convert(text, rule_name="symbols")


@functools.lru_cache(maxsize=1024)
def _query(expression: str) -> Query:
    with _PARSING:
        rule = Rule.parse_conjunctive_query(expression)
    return tuple(
        (part.name, tuple((slot.name, slot.type) for slot in part.parameters))
        for part in rule.preconditions
    )


@functools.lru_cache(maxsize=1024)
def _code(expression: str):
    return compile(expression.strip(), "<grammar>", "eval")
