import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

from skillsd_jax import guard
from skillsd_jax.validation import Stopped


@dataclasses.dataclass
class Batch:
    mask: np.ndarray
    inner: "Batch | None" = None


@pytest.mark.parametrize(
    "norm, loss, sound",
    [
        (1.0, 0.5, True),
        (0.0, 0.0, True),
        (np.nan, 0.5, False),
        (np.inf, 0.5, False),
        (1.0, np.nan, False),
        (1.0, -np.inf, False),
    ],
)
def test_norm_and_losses_must_be_finite(norm, loss, sound):
    sums = {
        "loss_policy": (jnp.float32(loss), jnp.float32(0)),
        "gap": (jnp.float32(np.nan), jnp.float32(0)),  # a figure, no loss
    }
    assert bool(guard.sound(jnp.float32(norm), sums)) is sound


def test_three_iterations_in_a_row_end_the_run_and_leave_the_batch(tmp_path):
    watch = guard.Watch(tmp_path)
    batch = Batch(np.arange(3), Batch(np.ones((2, 2))))
    for iteration, skipped in enumerate([1, 1, 0, 2, 1]):
        watch.see(iteration, skipped, batch)
    assert list(tmp_path.iterdir()) == [] and watch.row == 2
    with pytest.raises(Stopped, match="in iterations 4 to 6.*not-finite-000005.npz"):
        watch.see(5, 1, batch)
    with np.load(tmp_path / "not-finite-000005.npz") as saved:
        assert set(saved) == {"mask", "inner.mask"}
        np.testing.assert_array_equal(saved["mask"], np.arange(3))


def test_a_resumed_watch_goes_on_counting(tmp_path):
    with pytest.raises(Stopped):
        guard.Watch(tmp_path, row=2).see(9, 1, Batch(np.zeros(1)))
