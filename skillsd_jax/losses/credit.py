"""The teacher as a judge of tokens: it reshapes advantages, not the loss."""

import jax.numpy as jnp
from jax.lax import stop_gradient
from jaxtyping import Array, Float

from skillsd_jax.losses.arguments import widen


def rlsd_advantage(
    advantage: Float[Array, "..."],
    teacher: Float[Array, "..."],
    old: Float[Array, "..."],
    mix: float,
    clip: float,
) -> Float[Array, "..."]:
    """A_t = A [(1 − l) + l clip(exp(sign(A) (log π_T − log π_old)), 1−ε, 1+ε)].

    The sign of A never flips. Detached.

    Args:
      advantage: A, of the shape of the log-probs or broadcast to it.
      teacher: log-probs of the skilled view, nats.
      old: log-probs at sampling time, nats.
      mix: l in [0, 1]; 0 leaves A as it is. Published: 0.5 → 0 over 100 iterations.
      clip: ε < 1. Published: 0.2.

    Source: RLSD, arXiv 2604.03128; github.com/ZJU-REAL/SDAR at 8b85c23.
    """
    advantage, teacher, old = widen(advantage, teacher, old)
    evidence = jnp.exp(jnp.sign(advantage) * (teacher - old))
    weight = (1 - mix) + mix * jnp.clip(evidence, 1 - clip, 1 + clip)
    return stop_gradient(advantage * weight)
