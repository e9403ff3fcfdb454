import jax
import jax.numpy as jnp
import numpy as np
import pytest

from skillsd_jax.losses import schedules

NAMES = ("a", "b")


@pytest.mark.parametrize(
    "kind, factors",  # at 0, 1, 2, 4 and 9 of 4 iterations
    [
        ("constant", [1, 1, 1, 1, 1]),
        ("linear", [1, 0.75, 0.5, 0, 0]),
        ("growing", [0, 0.25, 0.5, 1, 1]),
        # ½ (1 + cos π/4) = 0.8535534
        ("cosine", [1, 0.8535534, 0.5, 0, 0]),
    ],
)
def test_factors_as_derived_by_hand(kind, factors):
    schedule = schedules.Schedule(kind, 4)
    found = [schedule.factor(jnp.int32(s), None) for s in (0, 1, 2, 4, 9)]
    np.testing.assert_allclose(found, factors, atol=1e-7)


def test_a_plateau_retires_after_its_iterations_and_for_good():
    schedule = schedules.Schedule("plateau", 2)
    found = [schedule.factor(jnp.int32(0), jnp.int32(n)) for n in (0, 1, 2, 3)]
    assert found == [1, 1, 0, 0]
    with pytest.raises(ValueError, match="needs the signal 'stalled'"):
        schedule.factor(jnp.int32(0), None)


def test_schedules_are_read_as_written():
    read = schedules.parse(" a=linear:10, b=plateau:3,", NAMES)
    assert read == {
        "a": schedules.Schedule("linear", 10),
        "b": schedules.Schedule("plateau", 3),
    }
    assert schedules.parse("", NAMES) == {}
    assert schedules.parse("a=constant", NAMES)["a"].factor(jnp.int32(9), None) == 1


@pytest.mark.parametrize(
    "text, message",
    [
        ("c=linear:10", "no coefficient 'c'; choose a, b"),
        ("a=square:10", "no schedule 'square'; choose constant, linear, cosine"),
        ("a=linear", "'a=linear' wants a number of iterations > 0: a=linear:100"),
        ("a=linear:0", "wants a number of iterations > 0"),
        ("a=cosine:-3", "wants a number of iterations > 0"),
        ("a", "no schedule ''"),
    ],
)
def test_what_cannot_be_read_is_refused(text, message):
    with pytest.raises(ValueError, match=message):
        schedules.parse(text, NAMES)


def test_the_gap_stalls_while_it_does_not_shrink():
    plateau, seen = schedules.Plateau.start(), []
    # 0.995 is no decrease by 1 %; NaN is a batch without skilled rows.
    for gap in (1.0, 0.9, 0.895, np.nan, 0.95, 0.5, 0.6):
        plateau = jax.jit(schedules.Plateau.follow, static_argnums=2)(
            plateau, jnp.float32(gap), 0.01
        )
        seen.append((float(plateau.best), int(plateau.since), int(plateau.stalled)))
    h = float(jnp.float32(0.9))
    assert seen == [
        (1.0, 0, 0),
        (h, 0, 0),
        (h, 1, 1),
        (h, 1, 1),
        (h, 2, 2),
        (0.5, 0, 2),
        (0.5, 1, 2),
    ]


def test_a_fresh_plateau_holds_no_buffer_twice():
    leaves = jax.tree.leaves(schedules.Plateau.start())
    pointers = {leaf.unsafe_buffer_pointer() for leaf in leaves}
    assert len(pointers) == len(leaves) == 3
