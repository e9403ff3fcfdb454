"""tokens.pack: both views are aligned by data, padding is inert."""

import numpy as np
import pytest

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
