"""Updates that are not finite: told apart on the device, watched on the host."""

import dataclasses
import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from skillsd_jax import artifacts, cluster
from skillsd_jax.validation import Stopped

LIMIT = 3  # iterations in a row


def sound(
    norm: Float[Array, ""], sums: Mapping[str, tuple[Array, Array]]
) -> Bool[Array, ""]:
    """Whether a gradient of this norm and its losses, `loss_…` in `sums`, are finite."""
    losses = [total for name, (total, _) in sums.items() if name.startswith("loss_")]
    return jnp.isfinite(norm + sum(losses))


class Watch:
    """Ends a run that has skipped updates in LIMIT iterations in a row.

    Args:
      workdir: takes the batch of the last of them.
      row: iterations in a row so far.
    """

    def __init__(self, workdir: Path, row: int = 0):
        self._workdir, self.row = workdir, row

    def see(self, iteration: int, skipped: float, batch: Any) -> None:
        """After an iteration that skipped so many updates.

        Args:
          iteration: counted from 0.
          skipped: of its updates, those that were not finite.
          batch: a tree of dataclasses and arrays, what it learned from.

        Raises:
          Stopped: it is the last of LIMIT in a row.
        """
        self.row = self.row + 1 if skipped else 0
        if self.row < LIMIT:
            return
        path = self._workdir / f"not-finite-{iteration:06d}.npz"
        if cluster.first():
            file = io.BytesIO()
            np.savez(file, **_arrays(batch, ""))
            artifacts.write_atomic(path, file.getvalue())
        raise Stopped(
            f"stopped: loss or gradient was not finite in iterations {iteration - 1} to "
            f"{iteration + 1}, and those updates were skipped; the last batch lies in "
            f"{path}. Look for what is not finite in it, or start anew with a smaller "
            "optimizer.learning_rate"
        )


def _arrays(value: Any, name: str) -> dict[str, np.ndarray]:
    """The arrays of a tree by dotted name; None is left out."""
    if not dataclasses.is_dataclass(value):
        return {} if value is None else {name: np.asarray(value)}
    found = {}
    for field in dataclasses.fields(value):
        inner = f"{name}.{field.name}" if name else field.name
        found |= _arrays(getattr(value, field.name), inner)
    return found
