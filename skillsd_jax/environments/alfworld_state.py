"""What is true in an ALFWorld game, and conjunctive queries over it."""

import bisect
import functools
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping

Fact = tuple[str, tuple[str, ...]]  # predicate, ids
# Conjunction of (predicate, placeholders as (name, type)).
Query = tuple[tuple[str, tuple[tuple[str, str], ...]], ...]


class Facts:
    """A set of facts, sorted within each predicate.

    Args:
      facts: true at first.
      types: id → its type and all supertypes.
    """

    def __init__(self, facts: Iterable[Fact], types: Mapping[str, frozenset[str]]):
        self._types = types
        grouped = defaultdict(set)
        for name, ids in facts:
            grouped[name].add(ids)
        self._true = defaultdict(list, {k: sorted(v) for k, v in grouped.items()})

    def of(self, name: str) -> list[tuple[str, ...]]:
        """The ids that a predicate is true of, sorted."""
        return self._true.get(name, [])

    def add(self, fact: Fact) -> None:
        held = self._true[fact[0]]
        index = bisect.bisect_left(held, fact[1])
        if index == len(held) or held[index] != fact[1]:
            held.insert(index, fact[1])

    def remove(self, fact: Fact) -> None:
        held = self._true[fact[0]]
        index = bisect.bisect_left(held, fact[1])
        if index < len(held) and held[index] == fact[1]:
            del held[index]

    def matches(
        self, query: Query, bound: Mapping[tuple[str, str], str]
    ) -> Iterator[dict[tuple[str, str], str]]:
        """Every way to fill the placeholders, as TextWorld orders them.

        Two placeholders are never filled with the same id.
        """
        if not query:
            yield dict(bound)
            return
        (name, slots), rest = query[0], query[1:]
        for ids in self.of(name):
            if (filled := self._filled(slots, ids, bound)) is not None:
                yield from self.matches(rest, filled)

    def _filled(self, slots, ids, bound) -> dict[tuple[str, str], str] | None:
        filled = bound
        for slot, id in zip(slots, ids, strict=True):
            known = filled.get(slot)
            if known is None:
                if slot[1] not in self._types[id] or id in filled.values():
                    return None
                filled = {**filled, slot: id}
            elif known != id:
                return None
        return filled


@functools.lru_cache(maxsize=1 << 16)
def read_atom(text: str) -> Fact:
    """Fast Downward's 'Atom at(agent1, desk)' or 'NegatedAtom …' → fact.

    A negated one becomes a fact of its own, not_NAME, as TextWorld has it.
    """
    sign, rest = text.split(" ", 1)
    name, ids = rest.rstrip(")").split("(", 1)
    parts = tuple(part for part in ids.split(", ") if part)
    return ("not_" + name if sign == "NegatedAtom" else name, parts)


def negated(fact: Fact) -> Fact:
    name, ids = fact
    return (name[4:] if name.startswith("not_") else "not_" + name, ids)
