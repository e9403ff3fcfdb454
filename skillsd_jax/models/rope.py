"""Rotary positions: how fast each pair of dimensions turns."""

import dataclasses
import math

import jax.numpy as jnp
from jaxtyping import Array, Float, Int


@dataclasses.dataclass(frozen=True)
class Scaling:
    """How a model reads longer texts than it was first trained on.

    Args:
      kind: 'linear' (every pair turns `factor` times slower) or 'yarn' (fast pairs keep
        their pace, slow ones turn slower, those between are mixed; arXiv 2309.00071).
      factor: how many times longer.
      original_length: yarn: tokens of the first training.
      beta_fast, beta_slow: yarn: turns over `original_length` from which on a pair
        keeps its pace, and up to which it is slowed in full.
      attention_factor: yarn: of cos and sin; None: 0.1 ln(factor) + 1.
      truncate: yarn: the bounds between pairs are rounded outwards.
    """

    kind: str
    factor: float
    original_length: int = 0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float | None = None
    truncate: bool = True

    def __post_init__(self):
        if self.kind not in ("linear", "yarn"):
            raise ValueError(
                f"rope scaling of type {self.kind!r} is not known: default, linear, yarn"
            )
        if self.factor < 1:
            raise ValueError(f"rope scaling: factor={self.factor} must be ≥ 1")
        if self.kind == "yarn" and self.original_length < 1:
            raise ValueError(
                f"yarn: original_length={self.original_length} must be ≥ 1 tokens"
            )


def rotation(
    theta: float, size: int, scaling: Scaling | None, position: Int[Array, "B L"]
) -> tuple[Float[Array, "B L 1 E/2"], Float[Array, "B L 1 E/2"]]:
    """cos and sin of position · θ^(−2i/E) for i < E/2, in float32.

    Args:
      theta: base of the frequencies.
      size: E.
      scaling: None: as above.
      position: ≥ 0.
    """
    half = jnp.arange(size // 2)
    frequency, gain = theta ** (-2.0 * half / size), 1.0
    if scaling is not None and scaling.kind == "linear":
        frequency = frequency / scaling.factor
    if scaling is not None and scaling.kind == "yarn":
        slowed = _slowed(theta, size, scaling)
        frequency = frequency * (1 - slowed + slowed / scaling.factor)
        gain = scaling.attention_factor
        gain = 0.1 * math.log(scaling.factor) + 1.0 if gain is None else gain
    angle = (position[..., None] * frequency)[:, :, None]
    cos, sin = jnp.cos(angle), jnp.sin(angle)
    return (cos, sin) if gain == 1 else (cos * gain, sin * gain)


def _slowed(theta: float, size: int, scaling: Scaling) -> Float[Array, "E/2"]:
    """0 on pairs that keep their pace, 1 on those slowed in full."""

    def pair(turns: float) -> float:
        """The pair (not whole) that makes so many turns over the first training."""
        wavelengths = scaling.original_length / (turns * 2 * math.pi)
        return size * math.log(wavelengths) / (2 * math.log(theta))

    low, high = pair(scaling.beta_fast), pair(scaling.beta_slow)
    if scaling.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, size - 1)
    high += 0.001 * (high == low)  # as the reference code avoids 0 / 0
    return jnp.clip((jnp.arange(size // 2) - low) / (high - low), 0, 1)
