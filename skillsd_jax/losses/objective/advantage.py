"""What an episode is worth, and how the teacher shares that out over its tokens.

A baseline makes an advantage from the rewards of a whole iteration. Credits then
reshape it token by token, in order: as a multiplier or as an addend. Nothing here is
differentiated.
"""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from skillsd_jax import config
from skillsd_jax.losses import credit, policy_gradient
from skillsd_jax.losses.arguments import choose, uses, widen


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Episodes:
    """A whole iteration; see Signals. `returns` are discounted, from each turn on.

    `teacher` may be None; `step` is the count of iterations done.
    """

    reward: Float[Array, "B"]
    group: Int[Array, "B"]
    trajectory: Int[Array, "B"]
    success: Float[Array, "B"]
    skilled: Float[Array, "B"]
    turn: Int[Array, "B R"]
    anchor: Int[Array, "B R"]
    returns: Float[Array, "B R"]
    mask: Float[Array, "B R"]
    old: Float[Array, "B R"]
    teacher: Float[Array, "B R"] | None = None
    step: Int[Array, ""] | None = None

    @property
    def gap(self) -> Float[Array, "B R"]:
        """Δ = log π_T − log π_old on skilled tokens, 0 elsewhere; nats.

        Raises:
          ValueError: no teacher has scored the episodes.
        """
        if self.teacher is None:
            raise ValueError(
                "a credit needs the teacher's log-probs, which came as None; "
                "a recipe with credits says what its teacher is shown"
            )
        seen = (self.mask * self.skilled[:, None]) > 0
        teacher, old = widen(self.teacher, self.old)
        return jnp.where(seen, teacher - old, 0)

    @property
    def unit(self) -> Int[Array, "B R"]:
        """An id of each token's turn, unique over the batch."""
        return credit.ranks(self.spread(self.trajectory), self.turn)

    def mean_of_group(self, values: Float[Array, "B"]) -> Float[Array, "B R"]:
        """Mean over the group's episodes, each counted once."""
        ids = credit.ranks(self.spread(self.trajectory))
        tokens = credit.sum_of(jnp.ones_like(self.mask), self.mask, ids)
        once = self.mask / jnp.maximum(tokens, 1)
        (spread,) = widen(self.spread(values))
        return credit.mean_of(spread, once, credit.ranks(self.spread(self.group)))

    def spread(self, values: Array) -> Array:
        """A figure of each row at each of its tokens."""
        return jnp.broadcast_to(values[:, None], self.turn.shape)


Baseline = Callable[[Episodes, config.Objective], Float[Array, "B R"]]
Credit = Callable[
    [Episodes, config.Objective, Float[Array, "B R"]], Float[Array, "B R"]
]

# Rows are episodes cut in pieces: how each counts in the statistics of its group, and
# what a group of one gets. With a sibling lost to a crash, an episode has no baseline.
STATISTICS = {"trajectory": "zero", "row": "released"}


def group_advantage(
    reward: Float[Array, "B"],
    group: Int[Array, "B"],
    trajectory: Int[Array, "B"],
    objective: config.Objective,
) -> Float[Array, "B"]:
    """Advantages of a whole batch under the settings; 0 for padding.

    statistics='trajectory' counts an episode once, and a lone one gets 0; 'row' counts
    every row, and a lone one gets its reward, as in the released code.

    Args:
      reward: return of each row's episode, penalties taken off.
      group: index of the task.
      trajectory: index of the episode, −1 padding.
      objective: normalize_std, statistics.
    """
    single = choose(STATISTICS, objective.statistics, "statistics")
    by_episode = objective.statistics == "trajectory"
    return policy_gradient.group_advantage(
        reward,
        jnp.where(trajectory < 0, -1, group),
        objective.normalize_std,
        trajectory=trajectory if by_episode else None,
        single=single,
    )


def by_group(episodes: Episodes, objective: config.Objective) -> Float[Array, "B R"]:
    """GRPO's advantage, the same at every token of an episode."""
    e = episodes
    return e.spread(group_advantage(e.reward, e.group, e.trajectory, objective))


def without_rewards(
    episodes: Episodes, objective: config.Objective
) -> Float[Array, "B R"]:
    """Rewards do not count."""
    return jnp.zeros_like(episodes.mask)


@uses("step_weight")
def by_group_and_state(
    episodes: Episodes, objective: config.Objective
) -> Float[Array, "B R"]:
    """GiGPO: A_E + w A_S, A_S among the turns of a task that answered one screen."""
    e, o = episodes, objective
    state = credit.ranks(e.spread(e.group), e.anchor)
    step = credit.step_advantage(e.returns, e.mask, e.unit, state, o.normalize_std)
    return by_group(e, o) + o.step_weight * step


@uses("rlsd_mix")
def evidence(
    episodes: Episodes, objective: config.Objective, advantage: Float[Array, "B R"]
) -> Float[Array, "B R"]:
    """RLSD: A times how far the teacher agrees with the token."""
    gap, mix = episodes.gap, objective.rlsd_mix
    zero = jnp.zeros_like(gap)
    return credit.rlsd_advantage(advantage, gap, zero, mix, objective.rlsd_clip)


@uses("turn_mix")
def surprise(
    episodes: Episodes, objective: config.Objective, advantage: Float[Array, "B R"]
) -> Float[Array, "B R"]:
    """GRSD: A times a turn's mean gap against its group's, in groups of both ends."""
    e, o = episodes, objective
    ids = e.unit, credit.ranks(e.spread(e.group))
    shown = e.mask * e.skilled[:, None]
    multiplier = credit.grsd_multiplier(
        advantage, e.gap, shown, ids, o.turn_mix, o.turn_clip
    )
    solved = e.mean_of_group(e.success)
    mixed = (solved > 0) & (solved < 1)
    return jnp.where(mixed, advantage * multiplier, advantage)


@uses("turn_mix")
def belief(
    episodes: Episodes, objective: config.Objective, advantage: Float[Array, "B R"]
) -> Float[Array, "B R"]:
    """AgentOPSD: A [(1 − l) + l w_k], w_k from how a turn moved the belief."""
    e, o = episodes, objective
    multiplier = credit.belief_multiplier(
        advantage,
        e.gap,
        e.mask,
        (e.spread(e.trajectory), e.turn),
        e.mean_of_group(e.reward),
        (o.belief_discount, o.turn_clip),
    )
    return advantage * (1 - o.turn_mix + o.turn_mix * multiplier)


@uses("gap_weight")
def added_gap(
    episodes: Episodes, objective: config.Objective, advantage: Float[Array, "B R"]
) -> Float[Array, "B R"]:
    """OPID: A + w Δ."""
    return advantage + objective.gap_weight * episodes.gap


def early_gap(
    episodes: Episodes, objective: config.Objective, advantage: Float[Array, "B R"]
) -> Float[Array, "B R"]:
    """TCOD: Δ on the first 1 + ⌊step / η⌋ turns, nothing else."""
    if episodes.step is None:
        raise ValueError("TCOD's window grows with the step, which came as None")
    window = 1 + episodes.step // objective.window_every
    return episodes.gap * (episodes.turn < window)
