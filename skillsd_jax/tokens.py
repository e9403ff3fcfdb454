"""From segments to arrays: the only bridge between host text and device batches."""

import dataclasses
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from skillsd_jax.config import Optimizer
from skillsd_jax.trajectory import Segment


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


def arrange(batch: TokenBatch, order: np.ndarray, config: Optimizer) -> TokenBatch:
    """Deals rows to minibatches: [B, …] → [M, K, micro_rows, …].

    Rows are dealt round-robin in `order`, so that minibatches differ by one row at
    most; the rest of each is padding with mask 0. With `minibatch_rows` set, as many
    minibatches are filled as rows need and the others stay empty: no update.

    Args:
      batch: numpy arrays [B, …] whose last row is padding.
      order: permutation of the real rows, which come first.
      config: minibatches or minibatch_rows, and micro_rows.
    """
    size, micro = batch.reward.shape[0], config.micro_rows
    most = used = config.minibatches
    if config.minibatch_rows:
        most = -(-size // config.minibatch_rows)
        used = max(1, round(len(order) / config.minibatch_rows))
    share = (
        -(-size // used)
        if not config.minibatch_rows
        else -(-3 * config.minibatch_rows // 2)
    )
    share = -(-share // micro) * micro
    index = np.full((most, share), size - 1)
    for m in range(used):
        dealt = order[m::used]
        index[m, : len(dealt)] = dealt
    index = index.reshape(most, -1, micro)
    return jax.tree.map(lambda x: x[index], batch)


def by_micro_batch(
    batch: TokenBatch, score: Callable[[TokenBatch], Float[Array, "b R"]]
) -> Float[Array, "M K b R"]:
    """score(micro-batch) of every one of an iteration; padding is passed over."""

    def one(part):
        filled = jnp.any(part.mask > 0)
        nothing = jnp.zeros_like(part.mask)
        return jax.lax.cond(filled, lambda: score(part), lambda: nothing)

    return jax.lax.map(lambda minibatch: jax.lax.map(one, minibatch), batch)


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
