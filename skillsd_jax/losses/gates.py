"""How much of a sampled token is learned: weights in (0, 1), detached."""

import jax
from jax.lax import stop_gradient
from jaxtyping import Array, Float

from skillsd_jax.losses.arguments import widen


def gap_gate(
    student: Float[Array, "..."], teacher: Float[Array, "..."], beta: float
) -> Float[Array, "..."]:
    """g = sg[σ(β Δ)], Δ = log π_T − log π_θ.

    Args:
      student: log-probs, nats.
      teacher: log-probs, nats.
      beta: steepness; 0 gives ½ everywhere. Published: 5.

    Source: SDAR, arXiv 2605.15155.
    """
    student, teacher = widen(student, teacher)
    return stop_gradient(jax.nn.sigmoid(beta * (teacher - student)))


def entropy_gate(entropy: Float[Array, "..."], beta: float) -> Float[Array, "..."]:
    """g = sg[σ(β h)]: learn where the student is unsure.

    Whether the authors divide h by log V is not established; for that form pass
    `entropy / log V`.

    Args:
      entropy: h ≥ 0 of the student, nats.
      beta: steepness.

    Source: secondary notes on arXiv 2605.15155, not confirmed.
    """
    (entropy,) = widen(entropy)
    return stop_gradient(jax.nn.sigmoid(beta * entropy))


def soft_or_gate(
    entropy: Float[Array, "..."],
    student: Float[Array, "..."],
    teacher: Float[Array, "..."],
    beta: float,
) -> Float[Array, "..."]:
    """g = sg[σ(β [1 − (1 − h)(1 − Δ)])]: the student is unsure or the teacher agrees.

    Args:
      entropy: h of the student, nats; see entropy_gate.
      student: log-probs, nats.
      teacher: log-probs, nats.
      beta: steepness.

    Source: secondary notes on arXiv 2605.15155, not confirmed.
    """
    entropy, student, teacher = widen(entropy, student, teacher)
    gap = teacher - student
    return stop_gradient(jax.nn.sigmoid(beta * (1 - (1 - entropy) * (1 - gap))))
