import dataclasses
import unicodedata

import pytest

from skillsd_jax.environments import bounds
from skillsd_jax.environments.base import TimeStep
from skillsd_jax.environments.household import Household
from skillsd_jax.trajectory import Task

STEP = TimeStep("a room,\n\tand more", admissible=("look", "go"), feedback="…ok")


def test_a_step_with_nothing_wrong_is_the_very_same_object():
    for step in (STEP, Household().reset(0), TimeStep("é" * 100)):
        kept, changed = bounds.bounded(step, 1000)
        assert kept is step
        assert not changed


def test_texts_are_cut_to_the_limit():
    step = TimeStep("o" * 101, feedback="f" * 100, action="a" * 200)
    kept, changed = bounds.bounded(step, 100)
    assert changed
    assert kept == TimeStep("o" * 100, feedback="f" * 100, action="a" * 100)


@pytest.mark.parametrize("name", ["observation", "feedback", "action"])
def test_exactly_control_characters_and_surrogates_are_replaced(name):
    every = "".join(map(chr, range(0xE000)))
    step, _ = bounds.bounded(dataclasses.replace(STEP, **{name: every}), 1 << 20)
    wanted = "".join(
        "\ufffd" if unicodedata.category(c) in ("Cc", "Cs") and c not in "\n\t" else c
        for c in every
    )
    assert getattr(step, name) == wanted
    getattr(step, name).encode()


def test_commands_are_cut_cleaned_and_few():
    long, odd = "x" * 11, "go\x00 \x1b[2J"
    step = dataclasses.replace(STEP, admissible=("look", long, odd))
    kept, changed = bounds.bounded(step, 10)
    assert changed
    assert kept.admissible == ("look", "x" * 10, "go\ufffd \ufffd[2J")
    many = dataclasses.replace(STEP, admissible=("a",) * 5000)
    assert len(bounds.bounded(many, 1000)[0].admissible) == bounds.MAX_COMMANDS
    # Ten observations of 20 characters are 200: twenty commands of ten.
    wide = dataclasses.replace(STEP, admissible=("a" * 10,) * 21)
    assert len(bounds.bounded(wide, 20)[0].admissible) == 20


def test_what_is_no_text_is_refused():
    with pytest.raises(TypeError):
        bounds.bounded(TimeStep(observation=None), 100)
    with pytest.raises(TypeError):
        bounds.bounded(TimeStep("", admissible=(1,)), 100)


def test_a_task_is_bounded_as_well():
    task = Task("household", 3, "train", "pick", "move it")
    assert bounds.bounded_task(task, 100) == (task, False)
    assert bounds.bounded_task(task, 100)[0] is task
    odd = dataclasses.replace(task, instruction="move\r" + "x" * 200)
    kept, changed = bounds.bounded_task(odd, 10)
    assert changed
    assert kept == dataclasses.replace(task, instruction="move\ufffdxxxxx")
