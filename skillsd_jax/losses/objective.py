"""Methods: which equations a name stands for.

A method is a tuple of terms. A term is a function from what may be seen (`Signals`) and
what was set (`config.Objective`) to one value per token, its coefficient applied. A
new method is a term, if its equation is new, and an entry in OBJECTIVES.
"""

import dataclasses
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
from jax.lax import stop_gradient
from jaxtyping import Array, Float, Int

from skillsd_jax import config
from skillsd_jax.losses import distillation, gates, policy_gradient
from skillsd_jax.losses.arguments import choose, widen


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Signals:
    """All that an objective may see. Log-probs and entropies in nats.

    `student`, `entropy` and `divergence` carry gradients. What a recipe does not need
    may be None.

    Args:
      student: log-probs of the sampled tokens in the plain view.
      teacher: the same in the skilled view.
      teacher_step: the same in a second skilled view.
      old: log-probs at sampling time.
      reference: log-probs of the initial policy, plain view.
      entropy: of the student.
      divergence: vocabulary-wide, student to teacher.
      advantage: A of each token.
      mask: 1 on sampled tokens; all else counts only there.
      segment: 0 none, 1 reason, 2 action.
      turn: index of the turn, −1 none.
      anchor: id of the observation the turn answered.
      skilled: 1 where the teacher sees a skill; None: everywhere.
      reward: return of the row's episode.
      group: index of the task.
      trajectory: index of the episode, −1 padding.
      success: 1 where the episode was solved.
      step: iterations done.
      vocabulary: V.
      token_count: sampled tokens of the whole batch.
      row_count: rows with a sampled token of the whole batch.
    """

    student: Float[Array, "B R"]
    old: Float[Array, "B R"]
    advantage: Float[Array, "B R"]
    mask: Float[Array, "B R"]
    teacher: Float[Array, "B R"] | None = None
    teacher_step: Float[Array, "B R"] | None = None
    reference: Float[Array, "B R"] | None = None
    entropy: Float[Array, "B R"] | None = None
    divergence: Float[Array, "B R"] | None = None
    segment: Int[Array, "B R"] | None = None
    turn: Int[Array, "B R"] | None = None
    anchor: Int[Array, "B R"] | None = None
    skilled: Float[Array, "B"] | None = None
    reward: Float[Array, "B"] | None = None
    group: Int[Array, "B"] | None = None
    trajectory: Int[Array, "B"] | None = None
    success: Float[Array, "B"] | None = None
    step: Int[Array, ""] | None = None
    vocabulary: Int[Array, ""] | None = None
    token_count: Float[Array, ""] | None = None
    row_count: Float[Array, ""] | None = None

    def given(self, name: str) -> Array:
        """The optional signal of that name.

        Raises:
          ValueError: it is None.
        """
        value = getattr(self, name)
        if value is None:
            raise ValueError(
                f"the objective needs the signal {name!r}, which came as None; "
                "compute every signal in recipe.required(objective)"
            )
        return value


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Output:
    """What a term or a whole objective gives back.

    Args:
      terms: loss per token by name, coefficient applied, 0 outside the mask. The loss
        is the sum over names of `aggregate(term, mask, …)`.
      metrics: (values, weight) by name, detached. The figure is Σ v·w / Σ w over the
        whole batch.
    """

    terms: Mapping[str, Float[Array, "B R"]]
    metrics: Mapping[str, tuple[Float[Array, "B R"], Float[Array, "B R"]]]


Term = Callable[[Signals, config.Objective], Output]


@dataclasses.dataclass(frozen=True)
class Recipe:
    """A named method.

    Args:
      summary: one line.
      terms: summed.
      needs: optional signals that must be there. `reference` is needed besides
        where kl_coefficient is not 0: see `required`.
    """

    summary: str
    terms: tuple[Term, ...]
    needs: frozenset[str] = frozenset({"entropy"})

    def required(self, objective: config.Objective) -> frozenset[str]:
        """Optional signals that must be computed under these settings."""
        return self.needs | ({"reference"} if objective.kl_coefficient else set())

    def loss(self, signals: Signals, objective: config.Objective) -> Output:
        """Every term's loss per token, and what to log.

        Raises:
          ValueError: a required signal is None.
        """
        inside = _inside(signals)
        terms: dict[str, Array] = {}
        metrics: dict[str, tuple[Array, Array]] = {}
        for term in self.terms:
            output = term(inside, objective)
            for name, value in output.terms.items():
                terms[name] = terms.get(name, 0) + value
            metrics.update(output.metrics)
        return Output(terms, stop_gradient(metrics))


PER_TOKEN = (
    "student",
    "old",
    "advantage",
    "teacher",
    "teacher_step",
    "reference",
    "entropy",
    "divergence",
)


def _inside(signals: Signals) -> Signals:
    """Float signals with 0 outside the mask, whatever came there, −inf and NaN too.

    Before the equations, since selecting afterwards leaves 0·inf in their gradients.
    """
    (mask,) = widen(signals.mask)
    given = {n: getattr(signals, n) for n in PER_TOKEN}
    clean = {
        n: jnp.where(mask != 0, widen(x)[0], 0)
        for n, x in given.items()
        if x is not None
    }
    return dataclasses.replace(signals, mask=mask, **clean)


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


def policy(signals: Signals, objective: config.Objective) -> Output:
    """The clipped surrogate of GRPO."""
    s, o = signals, objective
    views, clips = (s.student, s.old, s.advantage), (o.clip_low, o.clip_high)
    dual_clip = o.dual_clip or None
    metrics = {
        "ratio": (policy_gradient.ratio(s.student, s.old), s.mask),
        "clip_fraction": (policy_gradient.clipped(*views, *clips), s.mask),
        "entropy": (s.given("entropy"), s.mask),
    }
    if dual_clip is not None:
        held = policy_gradient.dual_clipped(*views, dual_clip)
        metrics["dual_clip_fraction"] = (held, s.mask)
    loss = policy_gradient.clipped_surrogate(*views, *clips, dual_clip)
    return Output({"policy": loss}, _as_float(metrics))


def reference_kl(signals: Signals, objective: config.Objective) -> Output:
    """kl_coefficient · KL to the initial policy; absent at coefficient 0."""
    if not objective.kl_coefficient:
        return Output({}, {})
    kl = policy_gradient.reference_kl(
        signals.student, signals.given("reference"), objective.kl_kind
    )
    return Output(
        {"reference_kl": objective.kl_coefficient * kl},
        {"reference_kl": (kl, signals.mask)},
    )


def skill_kl(signals: Signals, objective: config.Objective) -> Output:
    """λ ρ (e^{−ℓ} − 1 + ℓ) on skilled rows: Skill-SD."""
    loss = distillation.weighted_reverse_kl(
        signals.student,
        signals.given("teacher"),
        signals.old,
        max_log_ratio=objective.max_log_ratio,
        max_gap=objective.max_gap,
    )
    return Output(
        {"distillation": objective.sdl_lambda * _skilled(signals) * loss},
        gap_metrics(signals),
    )


GATES = {
    "gap": lambda s, beta: gates.gap_gate(s.student, s.given("teacher"), beta),
    "entropy": lambda s, beta: gates.entropy_gate(s.given("entropy"), beta),
    "soft_or": lambda s, beta: gates.soft_or_gate(
        s.given("entropy"), s.student, s.given("teacher"), beta
    ),
}


def gated_gap(signals: Signals, objective: config.Objective) -> Output:
    """λ g (sg[log π_T] − log π_θ) on skilled rows: SDAR."""
    gate = choose(GATES, objective.gate, "gate")(signals, objective.gate_beta)
    loss = distillation.gated(signals.student, signals.given("teacher"), gate)
    weight = _skilled(signals) * signals.mask
    metrics = {"gate": (gate, weight), "gate_above_half": (gate > 0.5, weight)}
    return Output(
        {"distillation": objective.sdar_coef * _skilled(signals) * loss},
        gap_metrics(signals) | _as_float(metrics),
    )


def gap_metrics(
    signals: Signals,
) -> dict[str, tuple[Float[Array, "B R"], Float[Array, "B R"]]]:
    """Δ = log π_T − log π_θ and its square, over skilled tokens."""
    gap = signals.given("teacher") - signals.student
    weight = _skilled(signals) * signals.mask
    return {"gap": (gap, weight), "gap_squared": (gap**2, weight)}


def _skilled(signals: Signals) -> Float[Array, "B 1"] | float:
    if signals.skilled is None:
        return 1.0
    return widen(signals.skilled)[0][..., None]


def _as_float(
    metrics: Mapping[str, tuple[Array, Array]],
) -> dict[str, tuple[Float[Array, "B R"], Float[Array, "B R"]]]:
    return {
        name: (value.astype(weight.dtype), weight)
        for name, (value, weight) in metrics.items()
    }


GRPO = (policy, reference_kl)
DISTILLED = frozenset({"entropy", "teacher"})

OBJECTIVES = {
    "grpo": Recipe("reward only: clipped policy gradient within groups", GRPO),
    "skill_sd": Recipe(
        "GRPO + λ ρ(e^−ℓ − 1 + ℓ): reverse KL to the skilled view (2604.10674)",
        terms=(*GRPO, skill_kl),
        needs=DISTILLED,
    ),
    "sdar": Recipe(
        "GRPO + λ g(Δ)·Δ: tokens the skilled view endorses, gated (2605.15155)",
        terms=(*GRPO, gated_gap),
        needs=DISTILLED,
    ),
}


def recipe(name: str) -> Recipe:
    """The method of that name.

    Raises:
      ValueError: there is none; the message lists all, one line each.
    """
    if name not in OBJECTIVES:
        known = "\n".join(f"  {n}: {r.summary}" for n, r in OBJECTIVES.items())
        raise ValueError(f"objective.name={name!r} is unknown; choose one of\n{known}")
    return OBJECTIVES[name]
