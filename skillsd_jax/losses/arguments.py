"""What every loss does to its arguments: widen arrays, look names up."""

from collections.abc import Callable, Mapping
from typing import TypeVar

import jax.numpy as jnp
from jaxtyping import Array, Float

Choice = TypeVar("Choice")
Function = TypeVar("Function", bound=Callable)


def widen(*arrays: Array) -> tuple[Float[Array, "..."], ...]:
    """Each array in float32, or float64 where it came so.

    Differences of log-probs and sums over a batch lose everything in bfloat16.
    """
    arrays = tuple(jnp.asarray(a) for a in arrays)
    return tuple(a.astype(jnp.promote_types(a.dtype, jnp.float32)) for a in arrays)


def uses(*coefficients: str) -> Callable[[Function], Function]:
    """Names the coefficients that a term, a credit or a baseline reads."""

    def mark(function: Function) -> Function:
        function.uses = coefficients
        return function

    return mark


def choose(table: Mapping[str, Choice], name: str, setting: str) -> Choice:
    """`table[name]`.

    Raises:
      ValueError: no such name; the message lists those that exist.
    """
    if name not in table:
        raise ValueError(f"{setting}={name!r} is unknown; choose {', '.join(table)}")
    return table[name]
