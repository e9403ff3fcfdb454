"""Which skills of the bank are shown for an episode.

`skills.retrieval` is a mixture: parts joined by '+', each `shelf:rule` or a rule alone,
which looks at the nearest shelf that has anything. 'ucb' is one skill of the task's;
'global:random+ucb' shows one for every task before it.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence

import numpy as np

from skillsd_jax import config as settings
from skillsd_jax.skills import embedding
from skillsd_jax.skills.bank import Bank
from skillsd_jax.skills.columns import Rows
from skillsd_jax.skills.skill import Skill
from skillsd_jax.trajectory import Task

NEAREST = "nearest"
WORDS = 256  # different words of an instruction that are looked up


def retrieve(
    bank: Bank,
    task: Task,
    source: str,
    rng: np.random.Generator,
    config: settings.Skills,
) -> tuple[Skill, ...]:
    """What one row is to be shown, in this order.

    Args:
      bank: where to look.
      task: the row's task.
      source: id of the row's own episode. A skill whose text only this episode wrote
        is not shown to it unless `config.allow_own`: it would tell the teacher what
        the row itself did next. Where the task has no other, nothing is shown: a skill
        of another task may mislead. One that a sibling wrote as well, word for word, is
        the sibling's.
      rng: source of every random choice.
      config: which rules, and their constants.

    Returns:
      Nothing twice; () where the bank holds nothing for the row.

    Raises:
      ValueError: an unknown shelf or rule.
    """
    shown: dict[int, None] = {}
    query = Query(task, rng, config)
    own = () if config.allow_own else bank.only_rows(source)
    for shelf, rule in _parts(config.retrieval):
        rows = next(filter(len, SHELVES[shelf](bank, task)), ())
        allowed = _without(rows, own) if len(own) and len(rows) else rows
        if len(allowed):
            chosen = RETRIEVAL[rule](Pool(bank, allowed, rows), query)
            shown |= dict.fromkeys(allowed[np.asarray(chosen, int)].tolist())
    return bank.skills(shown)


def check(text: str, vectors: str = "hashed") -> None:
    """Raises ValueError for a mixture of unknown parts, or an unknown embedding.

    A model that a part will ask is loaded: what is wrong with it shows now.
    """
    rules = {rule for _, rule in _parts(text)}
    if "embedding" in rules:
        embedding.load(vectors)
    embedding.check(vectors)


def shows(text: str) -> bool:
    """Whether a mixture ever shows a skill.

    Raises:
      ValueError: an unknown shelf or rule.
    """
    return any(rule != "none" for _, rule in _parts(text))


@dataclasses.dataclass(frozen=True)
class Pool:
    """The skills that a rule chooses among, n of them, oldest first.

    Args:
      bank: where they are held.
      rows: their rows there [n].
      shelf: the same with those that this episode must not see.
    """

    bank: Bank
    rows: np.ndarray
    shelf: np.ndarray

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def uses(self) -> np.ndarray:
        """[n] times shown."""
        return self.bank.columns.uses[self.rows]

    @property
    def mean_reward(self) -> np.ndarray:
        """[n] mean reward of the episodes each was shown on; NaN for an untried one."""
        with np.errstate(invalid="ignore"):
            return self.bank.columns.total[self.rows] / self.uses

    @property
    def value(self) -> np.ndarray:
        """[n] the same with the source episode counted as one use: never NaN."""
        return self.bank.columns.value(self.rows)

    @property
    def reward(self) -> np.ndarray:
        """[n] of the source episodes."""
        return self.bank.columns.reward[self.rows]

    @property
    def born(self) -> np.ndarray:
        """[n] iterations they were written in."""
        return self.bank.columns.born[self.rows]

    @property
    def shows(self) -> int:
        """How often the skills of the shelf were shown together."""
        return int(self.bank.columns.uses[self.shelf].sum())


@dataclasses.dataclass(frozen=True)
class Query:
    """Who asks.

    Args:
      task: the row's task.
      rng: source of every random choice.
      config: constants of the rules.
    """

    task: Task
    rng: np.random.Generator
    config: settings.Skills


def _none(pool: Pool, query: Query) -> Sequence[int]:
    return ()


def _random(pool: Pool, query: Query) -> Sequence[int]:
    return (int(query.rng.integers(len(pool))),)


def _full(pool: Pool, query: Query) -> Sequence[int]:
    """All, the best value first; of equal ones the oldest."""
    return np.argsort(-pool.value, kind="stable")


def _ucb(pool: Pool, query: Query) -> Sequence[int]:
    """Upper confidence bound: argmax of mean_reward + c √(ln N / n).

    n is how often the skill was shown, N how often any of the shelf was. An untried
    skill goes first: of several the one from the best episode, then the newest.
    """
    uses = pool.uses
    untried = np.flatnonzero(uses == 0)
    if len(untried):
        best = np.lexsort((untried, pool.born[untried], pool.reward[untried]))[-1]
        return (int(untried[best]),)
    bonus = np.sqrt(math.log(pool.shows) / uses)
    return (int(np.argmax(pool.mean_reward + query.config.exploration * bonus)),)


def _keyword(pool: Pool, query: Query) -> Sequence[int]:
    """Most words of the instruction: argmax of Σ ln(1 + N / n) over the shared ones.

    n of the N skills in the pool have the word: a rare one weighs more.
    """
    index = pool.bank.indices.setdefault("words", _Words())
    return _first(index.shared(pool, query.task.instruction), pool)


def _embedding(pool: Pool, query: Query) -> Sequence[int]:
    """The nearest by cosine to the instruction."""
    name = query.config.embedding
    indices = pool.bank.indices
    if f"vectors {name}" not in indices:
        indices[f"vectors {name}"] = embedding.Vectors(name)
    index = indices[f"vectors {name}"]
    text = query.task.instruction
    return _first(index.cosine(pool.bank, pool.rows, text), pool)


# Name → rule: which of the pool are shown, as positions in it, in order. The pool is
# never empty. A rule of your own is a function and an entry here:
#   def newest(pool, query):
#       return [int(pool.born.argmax())]
#   RETRIEVAL["newest"] = newest
RETRIEVAL: dict[str, Callable[[Pool, Query], Sequence[int]]] = {
    "none": _none,
    "random": _random,
    "full": _full,
    "ucb": _ucb,
    "keyword": _keyword,
    "embedding": _embedding,
}


# Name → where it looks: rows of the bank, oldest first; the first that are any are
# taken.
SHELVES: dict[str, Callable[[Bank, Task], Sequence[np.ndarray]]] = {
    NEAREST: lambda bank, task: (
        bank.task_rows(task.key),
        bank.family_rows(task.family),
        bank.global_rows(),
    ),
    "task": lambda bank, task: (bank.task_rows(task.key),),
    "family": lambda bank, task: (bank.family_rows(task.family),),
    "global": lambda bank, task: (bank.global_rows(),),
    "bank": lambda bank, task: (bank.all_rows(),),
}
SHORT = {"family": "family:ucb"}


def _parts(text: str) -> list[tuple[str, str]]:
    """Shelf and rule of each part of a mixture."""
    parts = []
    for part in text.split("+"):
        shelf, colon, rule = SHORT.get(part, part).partition(":")
        if not colon:
            shelf, rule = NEAREST, shelf
        for kind, name, known in (("shelf", shelf, SHELVES), ("rule", rule, RETRIEVAL)):
            if name not in known:
                raise ValueError(
                    f"skills.retrieval={text!r}: unknown {kind} {name!r}; set one of "
                    f"{', '.join(known)}, as in 'global:random+nearest:ucb'"
                )
        parts.append((shelf, rule))
    return parts


def _without(rows: np.ndarray, left_out: np.ndarray) -> np.ndarray:
    """Both ascending; `left_out` is short."""
    at = np.searchsorted(rows, left_out)
    there = at < len(rows)
    at, left_out = at[there], left_out[there]
    return np.delete(rows, at[rows[at] == left_out])


def _first(scores: np.ndarray, pool: Pool) -> Sequence[int]:
    """Position of the greatest score; of equal ones the best value, then the oldest."""
    best = np.flatnonzero(scores == scores.max())
    return (int(best[np.argmax(pool.value[best])]),)


class _Words:
    """Which skills of a bank have a word; each skill is read once."""

    def __init__(self):
        self._holders: dict[str, Rows] = {}
        self._known = 0

    def shared(self, pool: Pool, text: str) -> np.ndarray:
        """[n] weight of the words that each has in common with the text."""
        self._follow(pool.bank)
        inside = np.zeros(self._known, bool)
        inside[pool.rows] = True
        scores = np.zeros(self._known)
        # In the order of the text: a sum must not depend on that of a set.
        for word in list(dict.fromkeys(embedding.words(text)))[:WORDS]:
            if word in self._holders:
                holders = self._holders[word].array
                count = int(np.count_nonzero(inside[holders]))
                if count:
                    scores[holders] += math.log1p(len(pool) / count)
        return scores[pool.rows]

    def keep(self, rows: np.ndarray) -> None:
        """See bank.Index."""
        known = rows[rows < self._known]
        new = np.full(self._known, -1)
        new[known] = np.arange(len(known))
        for holders in self._holders.values():
            holders.renumber(new)
        self._holders = {word: held for word, held in self._holders.items() if held}
        self._known = len(known)

    def _follow(self, bank: Bank) -> None:
        new = np.arange(self._known, len(bank.columns))
        new = new[bank.columns.alive[new]]
        for row, skill in zip(new.tolist(), bank.skills(new)):
            for word in dict.fromkeys(embedding.words(skill.text)):
                self._holders.setdefault(word, Rows()).append(row)
        self._known = len(bank.columns)
