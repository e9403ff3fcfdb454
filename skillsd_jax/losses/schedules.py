"""How a coefficient changes over a run: its value times a factor in [0, 1].

Written as `NAME=KIND:ITERATIONS`, comma-separated: `rlsd_mix=linear:100` takes it to 0
in a hundred iterations.
"""

import dataclasses
from collections.abc import Collection

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from skillsd_jax.losses.arguments import choose, widen


def constant(step: Int[Array, ""], n: int) -> Float[Array, ""]:
    """1 for ever."""
    return jnp.ones((), jnp.float32)


def linear(step: Int[Array, ""], n: int) -> Float[Array, ""]:
    """1 − step/n, from 1 to 0 in n iterations: a warm-down."""
    return 1 - _progress(step, n)


def cosine(step: Int[Array, ""], n: int) -> Float[Array, ""]:
    """½ (1 + cos π step/n), from 1 to 0 in n iterations."""
    return (1 + jnp.cos(jnp.pi * _progress(step, n))) / 2


def growing(step: Int[Array, ""], n: int) -> Float[Array, ""]:
    """step/n, from 0 to 1 in n iterations: a warm-up."""
    return _progress(step, n)


def retired(stalled: Int[Array, ""], n: int) -> Float[Array, ""]:
    """1 until the gap has not shrunk for n iterations in a row, then 0 for good."""
    return (stalled < n).astype(jnp.float32)


def _progress(step: Int[Array, ""], n: int) -> Float[Array, ""]:
    (step,) = widen(step)
    return jnp.clip(step / n, 0, 1)


KINDS = {
    "constant": constant,
    "linear": linear,
    "cosine": cosine,
    "growing": growing,
    "plateau": retired,
}


@dataclasses.dataclass(frozen=True)
class Schedule:
    """A kind of KINDS and its number of iterations."""

    kind: str
    n: int

    def factor(
        self, step: Int[Array, ""], stalled: Int[Array, ""] | None
    ) -> Float[Array, ""]:
        """What the coefficient is multiplied by.

        Args:
          step: iterations done.
          stalled: see Plateau; needed by 'plateau' alone.
        """
        if self.kind == "plateau":
            if stalled is None:
                raise ValueError("a plateau schedule needs the signal 'stalled'")
            return retired(stalled, self.n)
        return choose(KINDS, self.kind, "schedule")(step, self.n)


def parse(text: str, names: Collection[str]) -> dict[str, Schedule]:
    """Reads `NAME=KIND:ITERATIONS,…`.

    Args:
      text: '' is no schedule at all.
      names: the coefficients there are.

    Raises:
      ValueError: with what was wanted and what came.
    """
    found = {}
    for part in filter(None, (piece.strip() for piece in text.split(","))):
        name, _, rest = part.partition("=")
        kind, _, n = rest.partition(":")
        if name not in names:
            raise ValueError(f"no coefficient {name!r}; choose {', '.join(names)}")
        if kind not in KINDS:
            raise ValueError(f"no schedule {kind!r}; choose {', '.join(KINDS)}")
        if kind != "constant" and not (n.isdecimal() and int(n)):
            raise ValueError(
                f"{part!r} wants a number of iterations > 0: {name}={kind}:100"
            )
        found[name] = Schedule(kind, int(n or 1))
    return found


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Plateau:
    """Whether the gap to the teacher still shrinks.

    Args:
      best: the least gap so far, nats.
      since: iterations since it was met.
      stalled: the largest `since` so far: what is retired stays so.
    """

    best: Float[Array, ""]
    since: Int[Array, ""]
    stalled: Int[Array, ""]

    @classmethod
    def start(cls) -> "Plateau":
        zero = jnp.zeros((), jnp.int32)
        # Arrays of their own: a state that is donated must not hold one buffer twice.
        return cls(jnp.full((), jnp.inf, jnp.float32), zero, jnp.zeros((), jnp.int32))

    def follow(self, gap: Float[Array, ""], tolerance: float) -> "Plateau":
        """After an iteration whose gap was `gap` (its root mean square, nats).

        Args:
          gap: what is not finite, as in a batch without skilled rows, changes nothing.
          tolerance: relative decrease below `best` that counts as shrinking.
        """
        shrunk = gap < self.best * (1 - tolerance)
        since = jnp.where(shrunk, 0, self.since + 1)
        following = Plateau(
            jnp.where(shrunk, gap, self.best),
            since,
            jnp.maximum(self.stalled, since),
        )
        seen = jnp.isfinite(gap)
        return jax.tree.map(lambda new, old: jnp.where(seen, new, old), following, self)
