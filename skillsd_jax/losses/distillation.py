"""Estimates, at the sampled tokens, of how far the student is from the teacher.

ℓ = log π_θ − sg[log π_T] throughout. What a loss does is its expected gradient, which
its value does not tell; each docstring says it. The expectation is over tokens drawn
from the student ("on policy") unless π_old is named.
"""

import jax.numpy as jnp
from jax.lax import stop_gradient
from jaxtyping import Array, Float

from skillsd_jax.losses.arguments import widen
from skillsd_jax.losses.policy_gradient import ratio


def k1(
    student: Float[Array, "..."], teacher: Float[Array, "..."]
) -> Float[Array, "..."]:
    """ℓ. Expected gradient 0: right as a reward, useless as a loss."""
    student, teacher = widen(student, teacher)
    return student - stop_gradient(teacher)


def k1_reward(
    student: Float[Array, "..."],
    teacher: Float[Array, "..."],
    old: Float[Array, "..."] | None = None,
) -> Float[Array, "..."]:
    """sg[ℓ] · log π_θ, or sg[ℓ] · ρ off policy: Δ = −ℓ as an advantage.

    The gradient is ℓ ∇log π_θ (times ρ), so that its expectation is ∇KL(π_θ‖π_T), off
    policy too if `old` is given.

    Args:
      student: log-probs, nats, differentiated.
      teacher: log-probs, nats.
      old: log-probs at sampling time, nats; None: sampled from the student.

    Source: on-policy distillation, thinkingmachines.ai/blog/on-policy-distillation.
    """
    ell = stop_gradient(k1(student, teacher))
    (student,) = widen(student)
    return ell * (student if old is None else ratio(student, old))


def k2(
    student: Float[Array, "..."], teacher: Float[Array, "..."]
) -> Float[Array, "..."]:
    """ℓ²/2. Expected gradient ∇KL(π_θ‖π_T)."""
    return k1(student, teacher) ** 2 / 2


def k3(
    student: Float[Array, "..."], teacher: Float[Array, "..."]
) -> Float[Array, "..."]:
    """e^{−ℓ} − 1 + ℓ. Expected gradient ∇KL(π_T‖π_θ): the forward KL."""
    ell = k1(student, teacher)
    return jnp.expm1(-ell) + ell


def weighted_reverse_kl(
    student: Float[Array, "..."],
    teacher: Float[Array, "..."],
    old: Float[Array, "..."],
    max_log_ratio: float | None = None,
    max_gap: float | None = None,
) -> Float[Array, "..."]:
    """ρ (e^{−ℓ} − 1 + ℓ), ρ = π_θ / sg[π_old], differentiated through ρ and ℓ.

    The gradient is ρ ℓ ∇log π_θ, so that E_{π_old} = ∇KL(π_θ‖π_T) at each position
    for any π_old > 0 on the support of π_θ. With ρ detached it would be the gradient
    of the forward KL.

    Args:
      student: log-probs, nats, differentiated.
      teacher: log-probs of the skilled view, nats.
      old: log-probs at sampling time, nats.
      max_log_ratio: cap on log ρ against overflow; beyond it ρ has no gradient.
        Released: 10.
      max_gap: cap on −ℓ inside the exponential only; the linear ℓ stays. Released: 20.

    Source: Skill-SD, arXiv 2604.10674; caps: github.com/ZJU-REAL/SDAR at 8b85c23.
    """
    ell = k1(student, teacher)
    log_rho = k1(student, old)
    if max_log_ratio is not None:
        log_rho = jnp.minimum(log_rho, max_log_ratio)
    exponent = -ell if max_gap is None else jnp.minimum(-ell, max_gap)
    return jnp.exp(log_rho) * (jnp.expm1(exponent) + ell)


def gated(
    student: Float[Array, "..."],
    teacher: Float[Array, "..."],
    gate: Float[Array, "..."],
) -> Float[Array, "..."]:
    """sg[g] (sg[log π_T] − log π_θ).

    The gradient is −g ∇log π_θ: every sampled token is pushed up, and the teacher acts
    only through the gate. The value is not a divergence. A constant gate has expected
    gradient 0; the gap gate's is (β/4) ∇KL(π_θ‖π_T) for small gaps.

    Source: SDAR, arXiv 2605.15155.
    """
    (gate,) = widen(stop_gradient(gate))
    return -gate * k1(student, teacher)
