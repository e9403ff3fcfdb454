"""packing: bucket lengths that pad least, fitted once."""

import itertools

import jax
import numpy as np
import pytest

from skillsd_jax import config as settings
from skillsd_jax import packing, preflight, sharding, tokens, validation
from skillsd_jax.trajectory import Role, Segment

LONGEST = 128, 160


def padded(student, teacher, lengths) -> int:
    """Tokens of all rows, each in the smallest bucket that holds it."""
    total = 0
    for a, b in zip(student, teacher):
        total += min(sum(pair) for pair in lengths if a <= pair[0] and b <= pair[1])
    return total


def test_no_other_buckets_pad_less(monkeypatch):
    """Against every choice of two lengths beside the longest."""
    monkeypatch.setattr(packing, "LATER", 0.0)
    rng = np.random.default_rng(0)
    for _ in range(5):
        student = rng.integers(5, 60, 12)
        teacher = student + rng.choice([0, 20], 12)
        found = packing.fitted(student, teacher, LONGEST, 3)
        at, _ = packing._candidates(student, teacher, LONGEST)
        every = itertools.combinations([tuple(pair) for pair in at[:-1]], 2)
        best = min(padded(student, teacher, [*two, LONGEST]) for two in every)
        assert padded(student, teacher, found) == best


@pytest.mark.parametrize("count", [1, 2, 5, 50])
def test_lengths_rise_are_as_many_as_asked_at_most_and_end_with_the_longest(count):
    rng = np.random.default_rng(1)
    student = rng.integers(1, 129, 300)
    teacher = np.minimum(student + rng.integers(0, 33, 300), 160)
    found = packing.fitted(student, teacher, LONGEST, count)
    assert len(found) <= count and found[-1] == LONGEST
    assert (np.diff(found, axis=0) >= 0).all()
    assert (np.diff(np.sum(found, axis=1)) > 0).all()
    assert all(a % 4 == 0 and b % 5 == 0 for a, b in found)


def test_some_lengths_are_kept_for_rows_longer_than_any_so_far():
    rows = np.full(200, 10)
    found = packing.fitted(rows, rows, (1024, 1024), 4)
    assert sum(a > 16 for a, _ in found) == 3 and found[0] == (16, 16)


def rows_of(lengths):
    """Rows of so many tokens, of which the last is sampled."""
    rows = []
    for index, length in enumerate(lengths):
        task = Segment(Role.TASK, np.zeros(length - 1, np.int32))
        reply = Segment(Role.AGENT, np.ones(1, np.int32), np.zeros(1, np.float32))
        labels = [np.full(1, 2, np.int8)]
        context = [task, reply]
        row = tokens.Row(context, None, [0], labels, [0], [0.0], 0.0, 0, index, False)
        rows.append(row)
    return rows


def test_the_first_rows_decide_and_an_iteration_without_rows_does_not():
    config = settings.Optimizer(minibatches=1, micro_rows=2, length_buckets=3)
    packer = packing.Packer(config, 9, LONGEST, 4)
    nothing = packer.arranged([], np.arange(0))
    assert len(nothing.buckets) == 1 and packer.lengths == ()
    first = packer.arranged(rows_of([8, 8, 40, 40]), np.arange(4))
    later = packer.arranged(rows_of([100, 120, 9]), np.arange(3))
    assert later.buckets == first.buckets and len(first.buckets) == 3
    again = packing.Packer(config, 9, LONGEST, 4)
    again.lengths = [list(pair) for pair in packer.lengths]  # as JSON has them
    resumed = again.arranged(rows_of([100, 120, 9]), np.arange(3))
    assert resumed.buckets == first.buckets


def test_padding_is_what_no_row_has_of_all_that_is_computed():
    config = settings.Optimizer(minibatches=1, micro_rows=2, length_buckets=1)
    packer = packing.Packer(config, 9, (40, 60), 4)
    # Two micro-batches of two rows of 40 + 60; a row without a skill has one view twice.
    three = packer.arranged(rows_of([8, 16, 40]), np.arange(3))
    assert packing.padding(three) == pytest.approx(1 - 2 * (8 + 16 + 40) / 400)
    assert packing.padding(packer.arranged([], np.arange(0))) == 0


@pytest.mark.parametrize(
    "hinted, parts, needed", [(0, 1, 140), (1, 1, 168), (0, 4, 560)]
)
def test_micro_tokens_that_hold_no_longest_row_are_refused_with_what_does(
    hinted, parts, needed, monkeypatch
):
    """Views have up to 48 + 8 and 28 more tokens; a hinted student's has all of them."""
    mesh = jax.sharding.AbstractMesh((parts, 1, 1), sharding.AXES)
    monkeypatch.setattr(sharding, "make", lambda _: mesh if parts > 1 else None)
    config = settings.Config()
    config.rollout.hinted_groups = hinted
    config.optimizer.micro_rows = 1  # is not used, so it may be what it wants
    config.optimizer.micro_tokens = needed
    preflight.check(config)
    config.optimizer.micro_tokens = needed - 1
    with pytest.raises(validation.Refused, match=f"which are {needed} tokens; set it"):
        preflight.check(config)
