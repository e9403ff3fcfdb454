"""The lengths that rows are padded to: chosen for the first rows of a run, then kept."""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float, Int

from skillsd_jax import sharding, tokens
from skillsd_jax.config import Optimizer

UNIT = 8  # lengths are multiples of it, as tensor cores like them,
FINE = 32  # but steps are no longer than such a part of the longest
LATER, STEPS = 0.01, 4  # rows longer than any so far: a share of rows for each step

Lengths = tuple[tuple[int, int], ...]


class Packer:
    """Turns the rows of an iteration into what the learner takes.

    The first rows decide on the buckets: a new length is a new program. Later rows that
    are longer take the longest, which holds any.

    Args:
      config: how rows are dealt and cut.
      size: B, one more than the most rows of an iteration.
      longest: tokens of the plain view and of the skilled one, at most.
      scored: R.
    """

    def __init__(
        self, config: Optimizer, size: int, longest: tuple[int, int], scored: int
    ):
        self.config, self.size = config, size
        self.longest, self.scored = longest, scored
        self.lengths: Lengths = ()  # () until there were rows; a checkpoint keeps it

    def arranged(
        self, rows: Sequence[tokens.Row], order: np.ndarray
    ) -> tokens.Arranged:
        """See tokens.arrange."""
        batch = tokens.pack(rows, self.size, *self.longest, self.scored)
        views = batch.student.length[order], batch.teacher.length[order]
        lengths = self.lengths or fitted(
            *views, self.longest, self.config.length_buckets
        )
        self.lengths = lengths if len(rows) else self.lengths
        ways = sharding.ways()
        shapes = tokens.buckets(lengths, self.size, self.config, ways)
        return tokens.arrange(batch, order, self.config, shapes)


def padding(arranged: tokens.Arranged) -> float:
    """Share of the tokens of all micro-batches that no row has; 0 where there are none."""
    real = arranged.rows.trajectory >= 0
    lengths = arranged.rows.student.length + arranged.rows.teacher.length
    sizes = np.array([b.rows * (b.student + b.teacher) for b in arranged.buckets])
    used = np.arange(arranged.chosen.shape[1]) < arranged.used[:, None]
    computed = np.sum(sizes[arranged.chosen] * used)
    return float(1 - np.sum(lengths * real) / computed) if computed else 0.0


def fitted(
    student: Int[np.ndarray, " n"],
    teacher: Int[np.ndarray, " n"],
    longest: tuple[int, int],
    count: int,
) -> Lengths:
    """At most `count` pairs of lengths that pad these rows least; the last is longest.

    Rows in the order of their length are cut into runs, each padded to what holds all
    of it and of the runs before, so that a longer bucket always holds a shorter row.
    Where to cut is solved exactly. A few rows are imagined beyond the longest that is
    there: what comes later may be longer.

    Args:
      student, teacher: tokens of each row's views.
      longest: that any row may have.
      count: of buckets.
    """
    if count == 1 or not len(student):
        return (longest,)
    at, held = _candidates(student, teacher, longest)
    weight = at.sum(1)
    rows = np.concatenate([[0.0], np.cumsum(held)])
    best = rows[1:] * weight  # the first k candidates in one run
    cuts = []
    for _ in range(count - 1):
        before = np.concatenate([[0.0], best])
        total = np.array(
            [
                np.min(before[: j + 1] + (rows[j + 1] - rows[: j + 1]) * weight[j])
                for j in range(len(weight))
            ]
        )
        cuts.append(before)
        best = total
    return _traced(at, rows, cuts)


def _candidates(
    student: np.ndarray, teacher: np.ndarray, longest: tuple[int, int]
) -> tuple[Int[np.ndarray, "u 2"], Float[np.ndarray, " u"]]:
    """Lengths that a bucket may have, rising, and the rows that each is the first for."""
    pairs = np.stack([student, teacher], axis=1)
    pairs = np.maximum.accumulate(pairs[np.argsort(pairs.sum(1), kind="stable")])
    steps = np.arange(1, STEPS + 1)[:, None] / STEPS
    beyond = pairs[-1] + (np.array(longest) - pairs[-1]) * steps
    pairs = np.concatenate([pairs, np.ceil(beyond).astype(int)])
    units = [max(1, min(UNIT, length // FINE)) for length in longest]
    pairs = np.minimum(-(-pairs // units) * units, longest)
    held = np.ones(len(pairs))
    held[len(student) :] = LATER * len(student)
    at, which = np.unique(pairs, axis=0, return_inverse=True)
    return at, np.bincount(which.reshape(-1), weights=held)


def _traced(at: np.ndarray, rows: np.ndarray, cuts: Sequence[np.ndarray]) -> Lengths:
    """The runs of least padding, from the last to the first."""
    end, found = len(at), []
    for before in reversed(cuts):
        if not end:
            break
        found.append(tuple(map(int, at[end - 1])))
        held = (rows[end] - rows[:end]) * at[end - 1].sum()
        end = int(np.argmin(before[:end] + held))
    if end:
        found.append(tuple(map(int, at[end - 1])))
    return tuple(reversed(found))
