import dataclasses
from pathlib import Path
from types import SimpleNamespace

import jax.numpy as jnp
import numpy as np
import pytest

from skillsd_jax import checkpoint, learner, savepoint, validation
from skillsd_jax import config as settings
from skillsd_jax.losses import schedules
from skillsd_jax.models import qwen
from skillsd_jax.skills import bank

SHAPE = qwen.ModelConfig(19, 8, 1, 2, 1, 4, 8)


def state(value: float, teacher: float = 0.0) -> learner.LearnerState:
    weights = {"w": jnp.full(3, value)}
    return learner.LearnerState(
        step=jnp.zeros((), jnp.int32),
        params=weights,
        frozen=None,
        teacher={"w": jnp.full(2, teacher)},
        reference=None,
        optimizer=(),
        plateau=schedules.Plateau.start(),
    )


def standing(value: float) -> savepoint.Standing:
    return savepoint.Standing(
        state=state(value),
        bank=bank.Bank(4),
        pending=[],
        figures={"before": {"success": 0.1 + 0.2}},
        environment_steps=7,
        seconds={"rollout": 1.5},
        faults={"errors": 2},
        skipped=1,
        lengths=[[8, 16]],
    )


@pytest.fixture
def opened(tmp_path):
    """Opens the savepoints of the run in `tmp_path`, closing them where they are open."""
    open_ones = []

    def open_(shape=SHAPE, words="a", external=False):
        for each in open_ones:
            each.close()
        encoder = SimpleNamespace(fingerprint=words)
        player = SimpleNamespace(encoder=encoder, model=shape)
        config = settings.Config()
        parts = config, player, state(0.0), external, lambda line: None
        open_ones.append(savepoint.Savepoints(tmp_path, *parts))
        return open_ones[-1]

    yield open_
    for each in open_ones:
        each.close()


def test_a_standing_comes_back_as_it_was(opened):
    opened().save(3, before := standing(2.0), score=None)
    done, found = opened().restore(state(0.0))
    assert done == 3
    np.testing.assert_array_equal(found.state.params["w"], 2.0)
    np.testing.assert_array_equal(found.state.teacher["w"], 0.0)
    assert found.bank.state() == before.bank.state()
    for field in dataclasses.fields(found):
        if field.name not in ("state", "bank"):
            assert getattr(found, field.name) == getattr(before, field.name)


def test_an_external_teacher_is_not_saved_but_must_be_the_same(opened):
    opened(external=True).save(1, standing(2.0), score=None)
    now = state(0.0, teacher=0.0)
    _, found = opened(external=True).restore(now)
    assert found.state.teacher is now.teacher
    folder = opened()._workdir / "checkpoints"
    assert checkpoint.read(folder, "teacher")[1] is None


@pytest.mark.parametrize(
    "change, said",
    [
        ({"words": "b"}, "another tokenizer; give the same files in model.path"),
        ({"shape": dataclasses.replace(SHAPE, layers=2)}, "layers: 1 there, 2 now"),
    ],
)
def test_another_tokenizer_or_network_is_refused(opened, change, said):
    opened().save(1, standing(1.0), score=None)
    with pytest.raises(validation.Refused, match=f"(?s){said}"):
        opened(**change).restore(state(0.0))


def test_where_every_savepoint_is_damaged_the_run_is_refused(opened, tmp_path):
    opened().save(1, standing(1.0), score=None)
    opened().close()
    (tmp_path / "checkpoints" / "1" / "host.json").unlink()
    with pytest.raises(validation.Refused, match="damaged; .*\n  1: host.json is miss"):
        opened().restore(state(0.0))


def test_what_the_folder_cannot_take_ends_the_run_in_one_message(tmp_path):
    for fault in (
        OSError(28, "No space left on device", str(tmp_path / "x")),
        checkpoint.Unsaved("no space left; 2 is still whole"),
    ):
        stopped = pytest.raises(validation.Stopped, match="^stopped: .*no space left")
        with stopped, savepoint.ending(Path(tmp_path)):
            raise fault
    with pytest.raises(OSError, match="Input"), savepoint.ending(tmp_path):
        raise OSError(5, "Input/output error")
