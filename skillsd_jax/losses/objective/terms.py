"""Loss terms: from signals and settings to one value per token."""

import dataclasses
import functools
from collections.abc import Callable

import jax.numpy as jnp
from jax.lax import stop_gradient
from jaxtyping import Array, Float

from skillsd_jax import config
from skillsd_jax.losses import distillation, divergence, gates, policy_gradient
from skillsd_jax.losses.arguments import choose, uses, widen
from skillsd_jax.losses.objective.weights import by_segment, on_skilled
from skillsd_jax.losses.signals import Output, Signals

Term = Callable[[Signals, config.Objective], Output]
Weight = Callable[[Signals, config.Objective], Float[Array, "#B #R"]]


def policy(signals: Signals, objective: config.Objective) -> Output:
    """The clipped surrogate of GRPO; ratio='sequence' is GSPO's.

    Times the correction for who sampled, where there is one: outside the clips, which
    are about how far the student has moved, not about who sampled. Distillation is not
    corrected: its ρ divides by `old`, and a term without one takes tokens as they come.
    """
    s, o = signals, objective
    student, old = choose(RATIOS, o.ratio, "ratio")(s)
    views, clips = (student, old, s.advantage), (o.clip_low, o.clip_high)
    dual_clip = o.dual_clip or None
    metrics = {
        "ratio": (policy_gradient.ratio(student, old), s.mask),
        "clip_fraction": (policy_gradient.clipped(*views, *clips), s.mask),
    }
    if dual_clip is not None:
        held = policy_gradient.dual_clipped(*views, dual_clip)
        metrics["dual_clip_fraction"] = (held, s.mask)
    loss = policy_gradient.clipped_surrogate(*views, *clips, dual_clip)
    if s.correction is not None:
        loss = stop_gradient(s.correction) * loss
    return Output({"policy": loss}, metrics)


def _by_sequence(s: Signals) -> tuple[Float[Array, "B R"], Float[Array, "B R"]]:
    log_ratio = policy_gradient.sequence_log_ratio(s.student, s.old, s.mask)
    return jnp.broadcast_to(log_ratio[:, None], s.mask.shape), jnp.zeros_like(s.mask)


RATIOS = {"token": lambda s: (s.student, s.old), "sequence": _by_sequence}


@uses("kl_coefficient")
def reference_kl(signals: Signals, objective: config.Objective) -> Output:
    """kl_coefficient · KL to the initial policy; absent at coefficient 0."""
    if _off(objective.kl_coefficient):
        return Output({}, {})
    kl = policy_gradient.reference_kl(
        signals.student, signals.given("reference"), objective.kl_kind
    )
    return Output(
        {"reference_kl": objective.kl_coefficient * kl},
        {"reference_kl": (kl, signals.mask)},
    )


@uses("entropy_coefficient")
def entropy_bonus(signals: Signals, objective: config.Objective) -> Output:
    """−entropy_coefficient · h; absent at coefficient 0."""
    if _off(objective.entropy_coefficient):
        return Output({}, {})
    bonus = objective.entropy_coefficient * signals.given("entropy")
    return Output({"entropy_bonus": -bonus}, {})


def _off(coefficient: float | Array) -> bool:
    """Whether it is 0 for good; one that is scheduled is an array."""
    return isinstance(coefficient, int | float) and coefficient == 0


@dataclasses.dataclass(frozen=True)
class Distil:
    """The loss term coefficient · weights · estimator.

    per_skilled_token divides by the tokens of skilled rows instead of by all; with
    loss_agg_mode=token-mean alone.

    Args:
      estimator: a name of ESTIMATORS.
      coefficient: a setting of config.Objective, or a number.
      weights: where it counts; multiplied.
      open: objective.estimator, where set, takes the place of `estimator`.
    """

    estimator: str
    coefficient: str | float
    weights: tuple[Weight, ...] = (on_skilled,)
    open: bool = False

    @property
    def uses(self) -> tuple[str, ...]:
        named = (self.coefficient,) if isinstance(self.coefficient, str) else ()
        return named + (("gate_beta",) if self.estimator == "gated" else ())

    def chosen(self, objective: config.Objective) -> str:
        """The estimator's name under these settings.

        Raises:
          ValueError: there is none of that name.
        """
        name = (objective.estimator if self.open else "") or self.estimator
        choose(ESTIMATORS, name, "objective.estimator")
        return name

    def __call__(self, signals: Signals, objective: config.Objective) -> Output:
        o = objective
        output = ESTIMATORS[self.chosen(o)](signals, o)
        scale = self.coefficient
        if isinstance(scale, str):
            scale = getattr(o, scale)
        if o.per_skilled_token:
            tokens, skilled = widen(
                signals.given("token_count"), signals.given("skilled_count")
            )
            scale = scale * tokens / jnp.maximum(skilled, 1)
        weight = by_segment(signals, o.distill_reason_weight, o.distill_action_weight)
        for where in self.weights:
            weight = weight * where(signals, o)
        loss = scale * weight * output.terms["value"]
        return Output({"distillation": loss}, output.metrics)


def _sampled(function: Callable[..., Array], *names: str) -> Term:
    """An estimate at the sampled tokens from the named log-probs."""

    def estimate(signals: Signals, objective: config.Objective) -> Output:
        return Output({"value": function(*(signals.given(n) for n in names))}, {})

    return estimate


def _weighted(signals: Signals, objective: config.Objective) -> Output:
    loss = distillation.weighted_reverse_kl(
        signals.student,
        signals.given("teacher"),
        signals.old,
        max_log_ratio=objective.max_log_ratio,
        max_gap=objective.max_gap,
    )
    return Output({"value": loss}, {})


def _gated(signals: Signals, objective: config.Objective) -> Output:
    gate = choose(GATES, objective.gate, "gate")(signals, objective)
    loss = distillation.gated(signals.student, signals.given("teacher"), gate)
    weight = on_skilled(signals, objective) * signals.mask
    metrics = {"gate": (gate, weight), "gate_above_half": (gate > 0.5, weight)}
    return Output({"value": loss}, metrics)


def _entropy(signals: Signals, objective: config.Objective) -> Float[Array, "B R"]:
    """h in nats, or divided by log V."""
    if objective.gate_entropy == "nats":
        return signals.given("entropy")
    size = jnp.asarray(signals.given("vocabulary"), jnp.float32)
    return signals.given("entropy") / jnp.log(size)


GATES = {
    "gap": lambda s, o: gates.gap_gate(s.student, s.given("teacher"), o.gate_beta),
    "entropy": lambda s, o: gates.entropy_gate(_entropy(s, o), o.gate_beta),
    "soft_or": lambda s, o: gates.soft_or_gate(
        _entropy(s, o), s.student, s.given("teacher"), o.gate_beta
    ),
}
_PAIR = ("student", "teacher")
ESTIMATORS: dict[str, Term] = {
    "k1": _sampled(distillation.k1, *_PAIR),
    "k1_reward": _sampled(distillation.k1_reward, *_PAIR, "old"),
    "k2": _sampled(distillation.k2, *_PAIR),
    "k3": _sampled(distillation.k3, *_PAIR),
    "iw_k3": _weighted,
    "gated": _gated,
}
# Over the whole vocabulary: the learner computes them where the logits are.
WIDE: dict[str, Callable[[config.Objective], Callable]] = {
    "topk_tail": lambda o: functools.partial(
        divergence.topk_tail, k=o.topk, kind=o.topk_kind, select=o.topk_select
    ),
    "full_forward_kl": lambda o: divergence.forward_kl,
    "full_reverse_kl": lambda o: divergence.reverse_kl,
    "full_jsd": lambda o: functools.partial(divergence.jsd, alpha=o.jsd_alpha),
}
ESTIMATORS |= dict.fromkeys(WIDE, _sampled(lambda d: d, "divergence"))
