"""Where in a batch a term or a credit counts."""

import jax.numpy as jnp
from jax.lax import stop_gradient
from jaxtyping import Array, Float

from skillsd_jax import config
from skillsd_jax.losses.arguments import widen
from skillsd_jax.losses.signals import Signals


def on_skilled(signals: Signals, objective: config.Objective) -> Float[Array, "#B 1"]:
    """Rows whose teacher is shown something."""
    if signals.skilled is None:
        return jnp.ones((1, 1))
    return widen(signals.skilled)[0][..., None]


def on_segments(signals: Signals, objective: config.Objective) -> Float[Array, "B R"]:
    """Tokens of reasoning or action, not what stands between."""
    return (signals.given("segment") > 0).astype(signals.mask.dtype)


def on_failed_groups(
    signals: Signals, objective: config.Objective
) -> Float[Array, "B 1"]:
    """Rows of tasks that no episode of the group solved."""
    failed = signals.given("group_success") == 0
    return failed.astype(signals.mask.dtype)[..., None]


def up_to_two(signals: Signals, objective: config.Objective) -> Float[Array, "B R"]:
    """sg[min(ρ, 2)]: an importance weight, cut off."""
    return stop_gradient(jnp.minimum(jnp.exp(signals.student - signals.old), 2.0))


def by_segment(signals: Signals, reason: float, action: float) -> Float[Array, "#B #R"]:
    """`reason` or `action` on the tokens of either kind, 1 on the others."""
    if signals.segment is None:
        return jnp.ones((1, 1))
    kinds = [signals.segment == 1, signals.segment == 2]
    return jnp.select(kinds, [jnp.asarray(reason), jnp.asarray(action)], 1.0)
