"""Seconds by phase add up; a compilation is counted, a cached program is not."""

import types

import jax
import jax.numpy as jnp
import pytest

from skillsd_jax import timing


@pytest.fixture
def now(monkeypatch):
    """A clock on the wall that only moves when told to: now.s += 1."""
    wall = types.SimpleNamespace(s=100.0)
    wall.monotonic = lambda: wall.s
    monkeypatch.setattr(timing, "time", wall)
    return wall


def spend(clock, now, phase, seconds):
    with clock(phase):
        now.s += seconds


def test_a_lap_holds_what_came_since_the_last_one_and_the_total_everything(now):
    clock = timing.Clock()
    spend(clock, now, "rollout", 2)
    spend(clock, now, "update", 1)
    now.s += 50  # in no phase
    spend(clock, now, "rollout", 3)
    assert clock.lap() == {"rollout": 5, "update": 1}
    spend(clock, now, "update", 4)
    assert clock.lap() == {"update": 4}
    assert clock.lap() == {}
    assert clock.total == {"rollout": 5, "update": 5}


def test_a_total_goes_on_from_an_earlier_part_of_the_run(now):
    earlier = {"rollout": 10.0}
    clock = timing.Clock(earlier)
    spend(clock, now, "rollout", 2)
    spend(clock, now, "update", 1)
    assert clock.total == {"rollout": 12, "update": 1}
    assert clock.lap() == {"rollout": 2, "update": 1}
    assert earlier == {"rollout": 10.0}
    assert timing.Clock().total == {}


def test_a_phase_that_fails_is_timed_too(now):
    clock = timing.Clock()
    with pytest.raises(KeyError), clock("rollout"):
        now.s += 2
        raise KeyError
    assert clock.total == {"rollout": 2}


@pytest.fixture
def compilations():
    counter = timing.Compilations()
    yield counter
    counter.close()


def test_a_new_shape_is_counted_and_a_known_one_is_not(compilations):
    double = jax.jit(lambda x: 2 * x + 1)
    three, four = jnp.zeros(3), jnp.zeros(4)
    before = compilations.count
    double(three)
    assert compilations.count == before + 1
    double(three + 0)
    after = compilations.count  # the sum is a program of its own
    double(three)
    assert compilations.count == after
    double(four)
    assert compilations.count == after + 1


def test_a_closed_counter_hears_nothing_and_others_go_on(compilations):
    closed = timing.Compilations()
    closed.close()
    before = compilations.count
    jax.jit(lambda x: 3 * x - 1)(1.0)
    assert closed.count == 0
    assert compilations.count == before + 1
