"""The teacher, or the state, as a judge of tokens: it reshapes advantages, not the loss.

What comes out is detached. Rows are pieces of episodes: a turn is named by its episode
and its index, and figures of a turn are spread over its tokens.
"""

import jax
import jax.numpy as jnp
from jax.lax import stop_gradient
from jaxtyping import Array, Float, Int

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


def grsd_multiplier(
    advantage: Float[Array, "B R"],
    gap: Float[Array, "B R"],
    mask: Float[Array, "B R"],
    ids: tuple[Int[Array, "B R"], Int[Array, "B R"]],
    mix: float,
    clip: float,
) -> Float[Array, "B R"]:
    """max(0.1, 1 + λ clip(e_k / (mean_group |e| + 1e-6), ±g)), e = expm1(sign(A) δ_k).

    δ_k is the mean gap of the turn's tokens; the mean of |e| runs over the turns of
    the group, each counted once.

    Args:
      advantage: A.
      gap: log π_T − log π_old, nats.
      mask: 1 on the tokens whose teacher was shown something.
      ids: of each token's turn, unique over the batch, and of its task; see ranks.
      mix: λ. Published: 0.5.
      clip: g. Scripts: 0.2.

    Source: GRSD, arXiv 2607.28076; github.com/BinbZheng1/GRSD at 38f9787.
    """
    advantage, gap, mask = widen(advantage, gap, mask)
    turn, group = ids
    delta = mean_of(gap, mask, turn)
    surprise = jnp.expm1(jnp.clip(jnp.sign(advantage) * delta, -20, 20))
    scale = mean_of(jnp.abs(surprise), per_turn(mask, turn), group)
    bounded = jnp.clip(surprise / (scale + 1e-6), -clip, clip)
    return stop_gradient(jnp.maximum(0.1, 1 + mix * bounded))


def belief_multiplier(
    advantage: Float[Array, "B R"],
    gap: Float[Array, "B R"],
    mask: Float[Array, "B R"],
    order: tuple[Int[Array, "B R"], Int[Array, "B R"]],
    prior: Float[Array, "B R"],
    settings: tuple[float, float],
) -> Float[Array, "B R"]:
    """clip(1 + b sign(A) z_k, 1 ± b), z_k the standardised step of a belief in success.

    B_k = σ(logit B_0 + c_k), c_k = γ c_{k−1} + e_k, e_k the summed gap of turn k. z is
    B_k − B_{k−1} standardised over the turns of the episode (biased std + 1e-6).

    Args:
      advantage: A.
      gap: log π_T − log π_old, nats.
      mask: 1 on the tokens that count.
      order: (trajectory, turn) of each token; −1 is padding.
      prior: B_0, the group's mean return in [0, 1]; clipped to [1e-4, 1 − 1e-4].
      settings: γ and b. Released script: 1 and 0.2.

    Source: AgentOPSD, arXiv 2608.05987; github.com/zhangdw156/AgentOPSD at e0c0f09.
    """
    advantage, gap, mask, prior = widen(advantage, gap, mask, prior)
    (trajectory, turn), (discount, bound) = order, settings
    unit, episode = ranks(trajectory, turn), ranks(trajectory)
    once = per_turn(mask, unit)
    evidence = sum_of(gap, mask, unit)
    through, before = _discounted_sums(evidence * once, trajectory, turn, discount)
    through, before = (sum_of(c, 1.0 * at, unit) for c, at in (through, before))
    safe = jnp.clip(prior, 1e-4, 1 - 1e-4)
    start = jnp.log(safe) - jnp.log1p(-safe)
    believed, before = (
        jnp.clip(jax.nn.sigmoid(start + c), 1e-6, 1 - 1e-6) for c in (through, before)
    )
    step = believed - before
    mean = mean_of(step, once, episode)
    deviation = jnp.sqrt(mean_of((step - mean) ** 2, once, episode))
    z = jnp.sign(advantage) * (step - mean) / (deviation + 1e-6)
    return stop_gradient(jnp.clip(1 + bound * z, 1 - bound, 1 + bound))


def _discounted_sums(values, trajectory, turn, discount):
    """Σ_{j ≤ k} γ^{k−j} Σ values of turn j, up to the turn's end and before its start.

    Both as (sums, where they hold): at the last and at the first token of a turn.
    """
    flat = [x.ravel() for x in (values, trajectory, turn)]
    order = jnp.lexsort((flat[2], flat[1]))
    value, episode, k = (x[order] for x in flat)
    passed = jnp.diff(k, prepend=k[:1])
    same = jnp.diff(episode, prepend=episode[:1] - 1) == 0

    def chain(a, b):
        return a[0] * b[0], a[1] * b[0] + b[1]

    decay = jnp.where(same, discount**passed, 0.0)
    _, total = jax.lax.associative_scan(chain, (decay, value))
    earlier = jnp.where(same, jnp.roll(total, 1), 0)
    first = ~same | (passed != 0)
    last = jnp.roll(first, -1)  # a first one follows the last of all

    def back(x):
        return jnp.zeros_like(x).at[order].set(x).reshape(values.shape)

    return (back(total), back(last)), (back(earlier), back(first))


def step_advantage(
    step_return: Float[Array, "B R"],
    mask: Float[Array, "B R"],
    turn: Int[Array, "B R"],
    state: Int[Array, "B R"],
    normalize_std: bool,
) -> Float[Array, "B R"]:
    """A_S = (G_t − mean_S) / (std_S + 1e-6) over the turns that answered one screen.

    Unbiased std; a turn alone with its screen gets 0.

    Args:
      step_return: G_t, the discounted return from the turn on.
      mask: 1 on the tokens that count.
      turn: an id of each token's turn, unique over the batch; see ranks.
      state: an id of (task, observation); see ranks.
      normalize_std: divide by the deviation.

    Source: GiGPO, arXiv 2505.10978, equations 6 and 7.
    """
    step_return, mask = widen(step_return, mask)
    once = per_turn(mask, turn)
    count = sum_of(jnp.ones_like(mask), once, state)
    lone = count < 1.5  # whole but for rounding
    # Measured from the least first: equal returns give exactly 0.
    least = -_reduce(-step_return, mask, state, jax.ops.segment_max)
    shifted = step_return - least
    advantage = shifted - mean_of(shifted, once, state)
    if normalize_std:
        squares = sum_of(advantage**2, once, state)
        deviation = jnp.sqrt(squares / jnp.where(lone, 1, count - 1))
        advantage = advantage / (deviation + 1e-6)
    return stop_gradient(jnp.where(lone | (mask == 0), 0, advantage))


def ranks(*keys: Int[Array, "B R"]) -> Int[Array, "B R"]:
    """Equal tuples of keys share an id; ids are dense from 0, as all of these want."""
    flat = [key.ravel() for key in keys]
    order = jnp.lexsort(flat)
    new = [jnp.diff(key[order], prepend=key[order[:1]]) != 0 for key in flat]
    dense = jnp.cumsum(jnp.any(jnp.stack(new), axis=0))
    return jnp.zeros_like(dense).at[order].set(dense).reshape(keys[0].shape)


def sum_of(
    values: Float[Array, "B R"], weight: Float[Array, "B R"], ids: Int[Array, "B R"]
) -> Float[Array, "B R"]:
    """Σ w·x over the tokens that share an id, at each of them."""
    return _reduce(values, weight, ids, jax.ops.segment_sum)


def mean_of(
    values: Float[Array, "B R"], weight: Float[Array, "B R"], ids: Int[Array, "B R"]
) -> Float[Array, "B R"]:
    """Σ w·x / Σ w over the tokens that share an id; 0 where they weigh nothing."""
    total = sum_of(jnp.ones_like(values), weight, ids)
    return sum_of(values, weight, ids) / jnp.where(total > 0, total, 1)


def per_turn(mask: Float[Array, "B R"], turn: Int[Array, "B R"]) -> Float[Array, "B R"]:
    """Weights that add up to 1 over the tokens of each turn."""
    count = sum_of(jnp.ones_like(mask), mask, turn)
    return mask / jnp.where(count > 0, count, 1)


def _reduce(values, weight, ids, reduction):
    """One figure per id from the tokens of weight > 0, at each of its tokens.

    Where an id has no such token, a sum is 0 and a maximum −∞.
    """
    if reduction is jax.ops.segment_max:
        chosen = jnp.where(weight > 0, values, -jnp.inf)
    else:
        chosen = jnp.where(weight != 0, values, 0) * weight
    total = reduction(chosen.ravel(), ids.ravel(), num_segments=ids.size)
    return total[ids]
