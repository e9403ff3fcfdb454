"""The sampler and the scorer: one policy, two programs, two log-probs of one token."""

import jax.numpy as jnp
from jax.lax import stop_gradient
from jaxtyping import Array, Float

from skillsd_jax.losses import policy_gradient
from skillsd_jax.losses.arguments import widen

NOTICEABLE = 0.01  # nats

Figures = dict[str, tuple[Float[Array, ""], Float[Array, ""]]]


def agreement(
    scored: Float[Array, "..."], sampled: Float[Array, "..."], mask: Float[Array, "..."]
) -> Figures:
    """|Δ|, Δ = log π_scorer − log π_sampler: its mean, its maximum, how often > 0.01.

    Args:
      scored: log-probs of the scorer under the weights that sampled, nats.
      sampled: the sampler's own, nats.
      mask: 1 on the tokens that count; anything may stand elsewhere.

    Returns:
      By name (total, divisor), in nats or shares; 0 where no token counts.
    """
    scored, sampled, mask = widen(scored, sampled, mask)
    difference = jnp.where(mask != 0, jnp.abs(scored - sampled), 0)
    count = jnp.sum(mask)
    return {
        "old_difference_mean": (jnp.sum(difference), count),
        "old_difference_max": (jnp.max(difference), jnp.ones(())),
        "old_difference_share": (
            jnp.sum(difference > NOTICEABLE, dtype=mask.dtype),
            count,
        ),
    }


def correction(
    scored: Float[Array, "..."], sampled: Float[Array, "..."], cap: float
) -> Float[Array, "..."]:
    """w = sg[min(π_scorer / π_sampler, C)], of each token.

    A token's loss times w has the expectation it would have had if the scorer's policy
    had sampled, but for what C cuts off; C bounds the variance.

    Args:
      scored: log-probs of the scorer under the weights that sampled, nats.
      sampled: the sampler's own, nats.
      cap: C > 0.

    Source: truncated importance sampling, Yao et al. 2025, "Your efficient RL framework
    secretly brings you off-policy RL training".
    """
    return stop_gradient(jnp.minimum(policy_gradient.ratio(scored, sampled), cap))


def corrected(
    weight: Float[Array, "..."], mask: Float[Array, "..."], cap: float
) -> Figures:
    """Mean of `correction` and the share of tokens that the cap holds."""
    weight, mask = widen(weight, mask)
    count = jnp.sum(mask)
    held = (weight >= cap) & (mask != 0)
    return {
        "correction_mean": (jnp.sum(jnp.where(mask != 0, weight, 0)), count),
        "correction_capped": (jnp.sum(held, dtype=mask.dtype), count),
    }
