"""From segments to arrays: the only bridge between host text and device batches."""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from skillsd_jax.config import Optimizer
from skillsd_jax.trajectory import Segment

PyTree = Any


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TokenView:
    """One prompting of the same replies, right-padded.

    `scored[b, r]` is the index t ≥ 1 of a scored token; it is read from the logits at
    t − 1. Padded entries are 1.
    """

    tokens: Int[Array, "B L"]
    length: Int[Array, "B"]
    scored: Int[Array, "B R"]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TokenBatch:
    """Rows as the learner sees them. The two views differ in prompt and agree on R.

    Args:
      student: the plain view.
      teacher: the skilled view; equal to the plain one where `skilled` is 0.
      old: log-probs at sampling time, nats; 0 outside `mask`.
      mask: 1 on sampled tokens, the stop token included.
      segment: 0 none, 1 reason, 2 action.
      turn: index of the turn, −1 none.
      anchor: id of the observation the turn answered.
      returns: discounted return from the turn on.
      skilled: 1 where the teacher sees a skill.
      reward: return of the row's episode.
      group: index of the task within the batch, < B.
      trajectory: index of the episode within the batch, < B; padded rows −1.
      success: 1 where the episode was solved.
    """

    student: TokenView
    teacher: TokenView
    old: Float[Array, "B R"]
    mask: Float[Array, "B R"]
    segment: Int[Array, "B R"]
    turn: Int[Array, "B R"]
    anchor: Int[Array, "B R"]
    returns: Float[Array, "B R"]
    skilled: Float[Array, "B"]
    reward: Float[Array, "B"]
    group: Int[Array, "B"]
    trajectory: Int[Array, "B"]
    success: Float[Array, "B"]


@dataclasses.dataclass(frozen=True)
class Bucket:
    """The shape of a micro-batch: rows, and tokens of a row in each of its views."""

    rows: int
    student: int
    teacher: int


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Arranged:
    """The rows of an iteration, dealt to minibatches and cut into micro-batches.

    Args:
      rows: [M, S, …]; the rest of a minibatch is padding.
      first: its first row of each micro-batch.
      chosen: index of each micro-batch's bucket.
      used: micro-batches with real rows.
      buckets: the shapes there are, rising; part of what is compiled.
    """

    rows: TokenBatch
    first: Int[Array, "M K"]
    chosen: Int[Array, "M K"]
    used: Int[Array, "M"]
    buckets: tuple[Bucket, ...] = dataclasses.field(metadata={"static": True})


@dataclasses.dataclass(frozen=True)
class Row:
    """One context with its replies, before packing.

    Args:
      student: segments of the plain view.
      teacher: segments of the skilled view, or None where no skill is shown.
      turns: turn index of each scored segment.
      labels: int8 labels (1 reason, 2 action) of each scored segment's tokens.
      anchors: observation id of each scored segment.
      returns: discounted return from each scored segment on.
      reward, group, trajectory, success: see TokenBatch.
    """

    student: Sequence[Segment]
    teacher: Sequence[Segment] | None
    turns: Sequence[int]
    labels: Sequence[np.ndarray]
    anchors: Sequence[int]
    returns: Sequence[float]
    reward: float
    group: int
    trajectory: int
    success: bool


def bucket(length: int, buckets: Sequence[int]) -> int:
    """The smallest bucket that holds `length`.

    Raises:
      ValueError: none does.
    """
    for size in sorted(buckets):
        if length <= size:
            return size
    raise ValueError(f"length {length} exceeds the largest bucket {max(buckets)}")


def _view(
    contexts: Sequence[Sequence[Segment]], rows: int, length: int, scored: int
) -> TokenView:
    tokens = np.zeros((rows, length), np.int32)
    lengths = np.ones(rows, np.int32)
    positions = np.ones((rows, scored), np.int32)
    for b, segments in enumerate(contexts):
        ids = np.concatenate([segment.tokens for segment in segments])
        if len(ids) > length:
            raise ValueError(f"a context of {len(ids)} tokens does not fit {length}")
        tokens[b, : len(ids)] = ids
        lengths[b] = len(ids)
        start, where = 0, []
        for segment in segments:
            end = start + len(segment.tokens)
            if segment.scored:
                where.extend(range(start, end))
            start = end
        positions[b, : len(where)] = where
    return TokenView(tokens=tokens, length=lengths, scored=positions)


def pack(
    rows: Sequence[Row], size: int, length: int, skilled_length: int, scored: int
) -> TokenBatch:
    """Packs rows into one right-padded batch of static shape, as numpy arrays.

    Args:
      rows: at most `size`; the rest of the batch is padding with mask 0.
      size: B.
      length: L of the plain view.
      skilled_length: L of the skilled view.
      scored: R.

    Raises:
      ValueError: something does not fit, or the two views disagree on what is scored.
    """
    if len(rows) > size:
        raise ValueError(f"{len(rows)} rows do not fit a batch of {size}")
    old, mask, returns = np.zeros((3, size, scored), np.float32)
    segment = np.zeros((size, scored), np.int32)
    turn = np.full((size, scored), -1, np.int32)
    anchor = np.zeros((size, scored), np.int32)
    skilled, reward, success = np.zeros((3, size), np.float32)
    group = np.zeros(size, np.int32)
    trajectory = np.full(size, -1, np.int32)
    for b, row in enumerate(rows):
        replies, count = _replies(row, scored)
        n = sum(count)
        old[b, :n] = np.concatenate([reply.logprobs for reply in replies])
        mask[b, :n] = 1
        segment[b, :n] = np.concatenate(list(row.labels))
        turn[b, :n] = np.repeat(row.turns, count)
        anchor[b, :n] = np.repeat(row.anchors, count)
        returns[b, :n] = np.repeat(row.returns, count)
        skilled[b] = row.teacher is not None
        reward[b], group[b], success[b] = row.reward, row.group, row.success
        trajectory[b] = row.trajectory
    student = [row.student for row in rows]
    teacher = [row.student if row.teacher is None else row.teacher for row in rows]
    return TokenBatch(
        student=_view(student, size, length, scored),
        teacher=_view(teacher, size, skilled_length, scored),
        old=old,
        mask=mask,
        segment=segment,
        turn=turn,
        anchor=anchor,
        returns=returns,
        skilled=skilled,
        reward=reward,
        group=group,
        trajectory=trajectory,
        success=success,
    )


def buckets(
    lengths: Sequence[tuple[int, int]], size: int, config: Optimizer, ways: int = 1
) -> tuple[Bucket, ...]:
    """The shapes of micro-batches whose views have these lengths.

    Args:
      lengths: of the plain view and of the skilled one, rising in both.
      size: B, rows of a batch.
      config: micro_rows or micro_tokens, and what share of B a minibatch may have.
      ways: a multiple of so many rows is scored at once, see sharding.ways.

    Raises:
      ValueError: micro_tokens holds no row of the longest.
    """
    if not config.micro_tokens:
        return tuple(Bucket(config.micro_rows, *pair) for pair in lengths)
    needed = ways * sum(lengths[-1])
    if config.micro_tokens < needed:
        raise ValueError(
            f"optimizer.micro_tokens={config.micro_tokens} must hold both views of "
            f"{ways} of the longest rows, which are {needed} tokens; set it to {needed} "
            "or more"
        )
    share = -(-_share(size, config) // ways) * ways
    fits = [config.micro_tokens // sum(pair) // ways * ways for pair in lengths]
    return tuple(Bucket(min(n, share), *pair) for n, pair in zip(fits, lengths))


def arrange(
    batch: TokenBatch,
    order: np.ndarray,
    config: Optimizer,
    shapes: Sequence[Bucket] = (),
) -> Arranged:
    """Deals rows to minibatches and cuts those into micro-batches: [B, …] → [M, S, …].

    Rows are dealt round-robin in `order`, so that minibatches differ by one row at
    most; the rest of each is padding with mask 0. With `minibatch_rows` set, as many
    minibatches are filled as rows need and the others stay empty: no update.

    Among several buckets the longest rows come first, and every micro-batch takes the
    smallest bucket of its longest row with as many rows as that has, shorter ones too:
    only the last micro-batch of a minibatch holds padding rows.

    Args:
      batch: numpy arrays [B, …] whose last row is padding.
      order: permutation of the real rows, which come first.
      config: minibatches or minibatch_rows.
      shapes: of micro-batches, rising; (): as long as the batch, micro_rows or
        micro_tokens of it.
    """
    size = len(batch.reward)
    if not shapes:
        longest = batch.student.tokens.shape[1], batch.teacher.tokens.shape[1]
        shapes = buckets([longest], size, config)
    share, rows = _share(size, config), [shape.rows for shape in shapes]
    most = used = config.minibatches
    if config.minibatch_rows:
        most = -(-size // config.minibatch_rows)
        used = max(1, round(len(order) / config.minibatch_rows))
    # A slice of any bucket that begins at a real row ends within the array.
    width = share + max(rows) if len(rows) > 1 else -(-share // rows[0]) * rows[0]
    index = np.full((most, width), size - 1)
    first, chosen = np.zeros((2, most, -(-share // min(rows))), np.int32)
    filled, smallest = np.zeros(most, np.int32), _smallest(batch, shapes)
    for m in range(used):
        dealt = order[m::used]
        dealt = dealt[np.argsort(-smallest[dealt], kind="stable")]
        index[m, : len(dealt)] = dealt
        at = 0
        while at < len(dealt):
            k, filled[m] = filled[m], filled[m] + 1
            first[m, k], chosen[m, k] = at, smallest[dealt[at]]
            at += rows[chosen[m, k]]
    return Arranged(
        rows=jax.tree.map(lambda x: x[index], batch),
        first=first,
        chosen=chosen,
        used=filled,
        buckets=tuple(shapes),
    )


def by_micro_batch(
    minibatch: Arranged, visit: Callable[..., tuple[PyTree, PyTree]], *beside: PyTree
) -> tuple[PyTree, PyTree]:
    """Visits the micro-batches of one minibatch that hold real rows, in order.

    One program per bucket; which of them runs is decided on the device.

    Args:
      minibatch: an Arranged without its dimension M.
      visit: (its rows, theirs of `beside`) → (what is added up, what stands by row).
      beside: [S, …], by row.

    Returns:
      The sums, and what stands by row, [S, …]; 0 where nobody was.
    """
    whole = (minibatch.rows, *beside)
    size = len(minibatch.rows.reward)

    def one(shape: Bucket, first):
        def cut(x):
            return jax.lax.dynamic_slice_in_dim(x, first, shape.rows)

        def put(x):
            zeros = jnp.zeros((size, *x.shape[1:]), x.dtype)
            return jax.lax.dynamic_update_slice_in_dim(zeros, x, first, 0)

        rows, *others = jax.tree.map(cut, whole)
        sums, by_row = visit(_shortened(rows, shape), *others)
        return sums, jax.tree.map(put, by_row)

    branches = [functools.partial(one, shape) for shape in minibatch.buckets]

    def micro(k):
        # All is added up: what stands by row is added to zeros.
        return jax.lax.switch(minibatch.chosen[k], branches, minibatch.first[k])

    shapes = jax.eval_shape(branches[0], minibatch.first[0])
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)

    def body(k, total):
        return jax.tree.map(jnp.add, total, micro(k))

    return jax.lax.fori_loop(0, minibatch.used, body, zeros)


def _share(size: int, config: Optimizer) -> int:
    """Rows that a minibatch of a batch of `size` has at most."""
    if config.minibatch_rows:
        return -(-3 * config.minibatch_rows // 2)
    return -(-size // config.minibatches)


def _smallest(batch: TokenBatch, shapes: Sequence[Bucket]) -> Int[np.ndarray, "B"]:
    """The index of the smallest bucket that holds both views of each row."""
    needs = [
        np.searchsorted([getattr(shape, name) for shape in shapes], view.length)
        for name, view in (("student", batch.student), ("teacher", batch.teacher))
    ]
    return np.maximum(*needs)


def _shortened(batch: TokenBatch, shape: Bucket) -> TokenBatch:
    """The same rows with views as long as the bucket's."""

    def view(whole: TokenView, length: int) -> TokenView:
        return dataclasses.replace(whole, tokens=whole.tokens[:, :length])

    return dataclasses.replace(
        batch,
        student=view(batch.student, shape.student),
        teacher=view(batch.teacher, shape.teacher),
    )


def _replies(row: Row, scored: int) -> tuple[list[Segment], list[int]]:
    """The scored segments of a row and their lengths, checked."""
    replies = [s for s in row.student if s.scored]
    if row.teacher is not None:
        _check_same(replies, [s for s in row.teacher if s.scored])
    count = [len(reply.tokens) for reply in replies]
    if sum(count) > scored:
        raise ValueError(f"a row with {sum(count)} scored tokens does not fit {scored}")
    return replies, count


def _check_same(student: Sequence[Segment], teacher: Sequence[Segment]) -> None:
    same = len(student) == len(teacher) and all(
        np.array_equal(a.tokens, b.tokens) for a, b in zip(student, teacher)
    )
    if not same:
        raise ValueError("the two views of a row score different tokens")
