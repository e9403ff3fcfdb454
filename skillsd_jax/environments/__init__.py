"""Environments by name. A class can be imported without its engine."""

from skillsd_jax.environments.alfworld import Alfworld
from skillsd_jax.environments.base import Environment
from skillsd_jax.environments.household import Household
from skillsd_jax.environments.sokoban import Sokoban

ENVIRONMENTS: dict[str, type[Environment]] = {
    "household": Household,
    "sokoban": Sokoban,
    "alfworld": Alfworld,
}
