"""How the weights of a stored teacher follow the student's."""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

from skillsd_jax import config as settings

Params = Any


def follow(
    kind: str,
    config: settings.Teacher,
    step: Int[Array, ""],
    learned: Bool[Array, ""],
    teacher: Params | None,
    student: Params,
) -> Params | None:
    """The teacher after an iteration.

    Args:
      kind: 'periodic' is a copy of the student now and then, 'ema' a moving average;
        any other stays as it is.
      config: how often, how fast.
      step: iterations done.
      learned: whether any update counted: an average goes on with those iterations alone.
      teacher: None: there is none of its own.
      student: what was trained.
    """
    if teacher is None or kind not in ("periodic", "ema"):
        return teacher
    due = step % config.every == 0

    def copied(old, new):
        return jnp.where(due, new, old)

    def mixed(old, new):
        return jnp.where(learned, old + config.rate * (new - old), old)

    return jax.tree.map(copied if kind == "periodic" else mixed, teacher, student)
