"""GRPO: advantages within a group, the clipped surrogate, the pull to a reference."""

import jax.numpy as jnp
from jax.lax import stop_gradient
from jaxtyping import Array, Bool, Float, Int

from skillsd_jax.losses.arguments import choose, widen

# A sampled token's `old` is hardly below −20 nats, so the cap is not met in training;
# without it exp overflows, and 0·inf makes the gradient of a clipped token NaN.
MAX_LOG_RATIO = 20.0
SINGLES = {"released": 1.0, "zero": 0.0}  # advantage of a lone episode in units of R


def group_advantage(
    reward: Float[Array, "B"],
    group: Int[Array, "B"],
    normalize_std: bool,
    trajectory: Int[Array, "B"] | None = None,
    single: str = "released",
) -> Float[Array, "B"]:
    """A = (R − mean_group R) / (std_group R + 1e-6), unbiased std.

    Equal rewards give exactly 0: rewards are first measured from the group's least,
    for the mean of equal ones may be off by rounding, and 1e-6 would blow that up.

    Args:
      reward: return of each row's episode.
      group: id of each row's task; a negative one marks padding, which counts nowhere
        and gets 0.
      normalize_std: divide by the deviation; without it, Dr. GRPO.
      trajectory: id of each row's episode, negative for padding. Given, an episode
        counts once, with the mean reward of its rows; None, every row counts, as in
        the released code, so that long episodes weigh more.
      single: a group of one has nothing to be compared with. 'released': mean 0 and
        std 1, hence R itself; 'zero': 0.

    Source: arXiv 2402.03300; github.com/ZJU-REAL/SDAR at 8b85c23.
    """
    alone = choose(SINGLES, single, "single")
    (reward,) = widen(reward)
    real = group >= 0 if trajectory is None else (group >= 0) & (trajectory >= 0)
    peers = _same(group, real)
    mates = _same(jnp.arange(group.size) if trajectory is None else trajectory, real)
    mates = mates & peers
    least = jnp.min(jnp.where(peers, reward, jnp.inf), axis=1)
    mean, deviation, lone = _statistics(reward - least, peers, mates)
    advantage = reward - least - mean
    if normalize_std:
        advantage = advantage / (deviation + 1e-6)
    advantage = jnp.where(lone, alone * reward, advantage)
    return stop_gradient(jnp.where(real, advantage, 0))


def _statistics(
    reward: Float[Array, "B"], peers: Bool[Array, "B B"], mates: Bool[Array, "B B"]
) -> tuple[Float[Array, "B"], Float[Array, "B"], Bool[Array, "B"]]:
    """Mean and unbiased std over the episodes of each row's group; if it is but one.

    Args:
      reward: of each row.
      peers: which rows share a group.
      mates: which rows share an episode.
    """
    share = 1 / jnp.sum(mates, axis=1)  # of its episode that a row stands for
    value = share * _sum(reward, mates)
    n = _sum(share, peers)
    lone = n < 1.5  # whole but for rounding
    mean = _sum(share * value, peers) / n
    squares = _sum(share * (value - mean) ** 2, peers)
    return mean, jnp.sqrt(squares / jnp.where(lone, 1, n - 1)), lone


def _same(ids: Int[Array, "B"], real: Bool[Array, "B"]) -> Bool[Array, "B B"]:
    """Which real rows share an id; padding is like itself alone."""
    same = (ids[:, None] == ids[None, :]) & real[:, None] & real[None, :]
    return same | jnp.eye(ids.size, dtype=bool)


def _sum(values: Float[Array, "B"], same: Bool[Array, "B B"]) -> Float[Array, "B"]:
    # Not same @ values: accelerators multiply matrices in lower precision.
    return jnp.sum(jnp.where(same, values, 0), axis=1)


def ratio(
    student: Float[Array, "..."], old: Float[Array, "..."]
) -> Float[Array, "..."]:
    """r = π_θ / π_old, differentiated through π_θ alone."""
    student, old = widen(student, old)
    return jnp.exp(jnp.minimum(student - stop_gradient(old), MAX_LOG_RATIO))


def clipped_surrogate(
    student: Float[Array, "..."],
    old: Float[Array, "..."],
    advantage: Float[Array, "..."],
    clip_low: float,
    clip_high: float,
    dual_clip: float | None = None,
) -> Float[Array, "..."]:
    """max(−A r, −A clip(r, 1−ε_lo, 1+ε_hi)); where A < 0 at most −A c.

    Args:
      student: log-probs, nats, differentiated.
      old: log-probs at sampling time, nats.
      advantage: A; detached.
      clip_low: ε_lo.
      clip_high: ε_hi.
      dual_clip: c > 1; None switches it off.

    Source: arXiv 1707.06347; the dual clip is arXiv 1912.09729's.
    """
    (advantage,) = widen(stop_gradient(advantage))
    r = ratio(student, old)
    clipped = jnp.clip(r, 1 - clip_low, 1 + clip_high)
    loss = jnp.maximum(-advantage * r, -advantage * clipped)
    if dual_clip is None:
        return loss
    return jnp.where(advantage < 0, jnp.minimum(loss, -advantage * dual_clip), loss)


def clipped(
    student: Float[Array, "..."],
    old: Float[Array, "..."],
    advantage: Float[Array, "..."],
    clip_low: float,
    clip_high: float,
) -> Bool[Array, "..."]:
    """Where the clip, not the ratio, gives the surrogate (before the dual clip)."""
    (advantage,) = widen(advantage)
    r = ratio(student, old)
    return -advantage * jnp.clip(r, 1 - clip_low, 1 + clip_high) > -advantage * r


def dual_clipped(
    student: Float[Array, "..."],
    old: Float[Array, "..."],
    advantage: Float[Array, "..."],
    dual_clip: float,
) -> Bool[Array, "..."]:
    """Where the dual clip holds the surrogate: A < 0 and r > c."""
    return (advantage < 0) & (ratio(student, old) > dual_clip)


def sequence_log_ratio(
    student: Float[Array, "B R"], old: Float[Array, "B R"], mask: Float[Array, "B R"]
) -> Float[Array, "B"]:
    """s = Σ_r m (log π_θ − log π_old) / Σ_r m, one per row; 0 for an empty row.

    As the log-ratio of all tokens of a row: clipped_surrogate(s[:, None], 0, A, …).

    Source: GSPO, arXiv 2507.18071.
    """
    student, old, mask = widen(student, old, mask)
    log_ratio = jnp.where(mask != 0, student - stop_gradient(old), 0)
    return jnp.sum(log_ratio, axis=1) / jnp.maximum(jnp.sum(mask, axis=1), 1)


def _k3(d: Float[Array, "..."]) -> Float[Array, "..."]:
    return jnp.expm1(d) - d


def _k3_clamped(d: Float[Array, "..."]) -> Float[Array, "..."]:
    # The inner clip changes nothing: k3 is beyond 10 there. It keeps exp finite.
    return jnp.minimum(_k3(jnp.clip(d, -20, 20)), 10)


KINDS = {
    "k1": jnp.negative,
    "k2": lambda d: d**2 / 2,
    "k3": _k3,
    "k3_clamped": _k3_clamped,
    "abs": jnp.abs,
}


def reference_kl(
    student: Float[Array, "..."], reference: Float[Array, "..."], kind: str
) -> Float[Array, "..."]:
    """Estimate of KL(π_θ‖π_ref) at a sampled token, d = log π_ref − log π_θ.

    k1 = −d, k2 = d²/2, k3 = e^d − d − 1, k3_clamped = min(k3, 10) with zero gradient
    beyond (the released low_var_kl), abs = |d|.

    Source: joschu.net/blog/kl-approx.html; github.com/ZJU-REAL/SDAR at 8b85c23.
    """
    student, reference = widen(student, reference)
    return choose(KINDS, kind, "kl_kind")(stop_gradient(reference) - student)
