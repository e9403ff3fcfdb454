"""Methods: which equations a name stands for. docs/your_method.md adds one."""

from skillsd_jax.losses.objective.advantage import (
    Episodes,
    group_advantage,
)
from skillsd_jax.losses.objective.methods import OBJECTIVES, listing, recipe
from skillsd_jax.losses.objective.recipe import Recipe
from skillsd_jax.losses.signals import PER_TOKEN, Output, Signals

__all__ = [
    "OBJECTIVES",
    "PER_TOKEN",
    "Episodes",
    "Output",
    "Recipe",
    "Signals",
    "group_advantage",
    "listing",
    "recipe",
]
