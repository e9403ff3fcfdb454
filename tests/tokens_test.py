"""tokens.pack: both views are aligned by data, padding is inert."""

import jax
import numpy as np
import pytest

from skillsd_jax import config as settings
from skillsd_jax import tokens
from skillsd_jax.trajectory import Role, Segment


def segment(role, *ids, logprob=None):
    logprobs = None if logprob is None else np.full(len(ids), logprob, np.float32)
    return Segment(role, np.array(ids, np.int32), logprobs)


def row(student, teacher=None, turns=(0,), **kwargs):
    replies = [s for s in student if s.scored]
    defaults = {"reward": 1.0, "group": 0, "trajectory": 0, "success": True}
    return tokens.Row(
        student=student,
        teacher=teacher,
        turns=turns,
        labels=[np.full(len(s.tokens), 2, np.int8) for s in replies],
        anchors=[7] * len(replies),
        returns=[7] * len(replies),
        **{**defaults, **kwargs},
    )


TASK = segment(Role.TASK, 10, 11)
SKILL = segment(Role.SKILL, 90, 91, 92)
REPLY = segment(Role.AGENT, 20, 21, 22, logprob=-0.5)


def test_scored_positions_name_the_same_tokens_in_both_views():
    plain = [TASK, REPLY]
    batch = tokens.pack([row(plain, [TASK, SKILL, REPLY])], 2, 8, 10, 4)
    for view in (batch.student, batch.teacher):
        at = view.scored[0][batch.mask[0] > 0]
        np.testing.assert_array_equal(view.tokens[0][at], [20, 21, 22])
    assert batch.student.scored[0, 0] == 2
    assert batch.teacher.scored[0, 0] == 5
    assert batch.skilled[0] == 1


def test_padding_has_mask_zero_position_one_and_no_trajectory():
    batch = tokens.pack([row([TASK, REPLY])], 3, 8, 8, 5)
    assert batch.mask.sum() == 3
    assert (batch.student.scored[0, 3:] == 1).all()
    assert (batch.student.scored[1:] == 1).all()
    np.testing.assert_array_equal(batch.trajectory, [0, -1, -1])
    np.testing.assert_array_equal(batch.old[batch.mask == 0], 0)
    np.testing.assert_array_equal(batch.turn[batch.mask == 0], -1)


def test_a_whole_history_row_scores_every_reply_and_no_observation():
    world = segment(Role.ENVIRONMENT, 30)
    late = segment(Role.AGENT, 40, logprob=-0.1)
    batch = tokens.pack([row([TASK, REPLY, world, late], turns=(0, 1))], 1, 8, 8, 4)
    np.testing.assert_array_equal(batch.student.scored[0], [2, 3, 4, 6])
    np.testing.assert_array_equal(batch.turn[0], [0, 0, 0, 1])
    np.testing.assert_allclose(batch.old[0], [-0.5, -0.5, -0.5, -0.1])


def test_history_shown_as_text_is_not_scored():
    told = segment(Role.AGENT, 50, 51)
    batch = tokens.pack([row([TASK, told, REPLY])], 1, 8, 8, 4)
    np.testing.assert_array_equal(batch.student.scored[0], [4, 5, 6, 1])


def test_views_that_score_different_tokens_are_refused():
    other = segment(Role.AGENT, 20, 21, 23, logprob=-0.5)
    with pytest.raises(ValueError, match="score different tokens"):
        tokens.pack([row([TASK, REPLY], [TASK, SKILL, other])], 1, 8, 8, 4)


@pytest.mark.parametrize("shape", [(0, 8, 8, 4), (1, 4, 8, 4), (1, 8, 4, 4)])
def test_what_does_not_fit_is_refused(shape):
    with pytest.raises(ValueError, match="fit"):
        tokens.pack([row([TASK, REPLY], [TASK, SKILL, REPLY])], *shape)
    with pytest.raises(ValueError, match="fit"):
        tokens.pack([row([TASK, REPLY])], 1, 8, 8, 2)


def test_bucket_is_the_smallest_that_holds():
    assert tokens.bucket(17, (64, 16, 32)) == 32
    assert tokens.bucket(16, (64, 16, 32)) == 16
    with pytest.raises(ValueError, match="65"):
        tokens.bucket(65, (64, 16, 32))


LENGTHS = ((4, 6), (6, 10), (12, 16))


def many(count, seed=0):
    """Rows of many lengths, up to 12 and 16 tokens, half of them shown a skill."""
    rng, rows = np.random.default_rng(seed), []
    for index in range(count):
        task = segment(Role.TASK, *range(10, 10 + rng.integers(1, 10)))
        plain = [task, REPLY]
        skilled = [task, SKILL, REPLY] if rng.random() < 0.5 else None
        rows.append(row(plain, skilled, trajectory=index))
    return tokens.pack(rows, count + 1, 12, 16, 4)


def cut(arranged):
    """(bucket, rows) of every micro-batch that is used."""
    for m, used in enumerate(arranged.used):
        for first, chosen in zip(arranged.first[m, :used], arranged.chosen[m]):
            shape = arranged.buckets[chosen]
            part = slice(first, first + shape.rows)
            yield shape, jax.tree.map(lambda x, m=m, at=part: x[m, at], arranged.rows)


CUTS = [
    {"micro_rows": 4},
    {"micro_tokens": 70},
    {"micro_tokens": 10_000},
    {"micro_tokens": 70, "minibatch_rows": 7},
]


@pytest.mark.parametrize("lengths", [LENGTHS[-1:], LENGTHS])
@pytest.mark.parametrize("changes", CUTS)
@pytest.mark.parametrize("count", [1, 9, 40])
def test_every_row_is_in_one_micro_batch_that_holds_it(lengths, changes, count):
    config = settings.Optimizer(**{"minibatches": 3, **changes})
    batch, order = many(40), np.random.default_rng(1).permutation(40)[:count]
    shapes = tokens.buckets(lengths, 41, config)
    arranged = tokens.arrange(batch, order, config, shapes)
    seen = []
    for shape, rows in cut(arranged):
        assert len(rows.trajectory) == shape.rows
        assert (rows.student.length <= shape.student).all()
        assert (rows.teacher.length <= shape.teacher).all()
        assert rows.trajectory.max() >= 0
        seen += rows.trajectory[rows.trajectory >= 0].tolist()
    assert sorted(seen) == sorted(order)
    full = [rows.trajectory.min() >= 0 for _, rows in cut(arranged)]
    ends = np.cumsum(arranged.used[arranged.used > 0]) - 1
    assert all(full[k] for k in range(len(full)) if k not in ends)


def test_shapes_do_not_depend_on_the_rows():
    config = settings.Optimizer(minibatches=2, micro_tokens=70)
    shapes = tokens.buckets(LENGTHS, 41, config)
    made = [
        tokens.arrange(many(40, seed), np.arange(count), config, shapes)
        for seed, count in ((0, 40), (1, 2))
    ]
    a, b = ([x.shape for x in jax.tree.leaves(arranged)] for arranged in made)
    assert a == b


def test_micro_tokens_are_not_exceeded_and_ways_divide_the_rows():
    config = settings.Optimizer(minibatches=2, micro_tokens=70)
    rows = [shape.rows for shape in tokens.buckets(LENGTHS, 41, config)]
    assert rows == [7, 4, 2]  # 70 / (4 + 6), 70 / (6 + 10), 70 / (12 + 16)
    rows = [shape.rows for shape in tokens.buckets(LENGTHS, 41, config, ways=2)]
    assert rows == [6, 4, 2]
    with pytest.raises(ValueError, match="84 tokens; set it to 84"):
        tokens.buckets(LENGTHS, 41, config, ways=3)
    few = [shape.rows for shape in tokens.buckets(LENGTHS, 7, config)]
    assert few == [4, 4, 2]  # no more than a minibatch has


def test_with_one_length_rows_keep_the_order_they_are_dealt_in():
    config = settings.Optimizer(minibatches=2, micro_rows=4)
    order = np.random.default_rng(3).permutation(40)
    arranged = tokens.arrange(many(40), order, config)
    assert arranged.buckets == (tokens.Bucket(4, 12, 16),)
    assert arranged.rows.trajectory.shape == (2, 24)
    np.testing.assert_array_equal(arranged.rows.trajectory[1, :20], order[1::2])


def test_what_stands_by_row_and_what_is_added_up_are_those_of_all_rows():
    config = settings.Optimizer(minibatches=2, micro_tokens=70)
    shapes = tokens.buckets(LENGTHS, 41, config)
    arranged = tokens.arrange(many(40), np.arange(33), config, shapes)
    for m in range(2):
        minibatch = jax.tree.map(lambda x, m=m: x[m], arranged)
        rows = minibatch.rows

        def visit(part, beside):
            words = (part.student.tokens * part.mask.max(1, keepdims=True)).sum(1)
            return words.sum() + beside.sum(), words

        total, words = jax.jit(tokens.by_micro_batch, static_argnums=1)(
            minibatch, visit, rows.mask
        )
        wanted = (rows.student.tokens * rows.mask.max(1, keepdims=True)).sum(1)
        np.testing.assert_array_equal(words, wanted)
        assert total == wanted.sum() + rows.mask.sum()
