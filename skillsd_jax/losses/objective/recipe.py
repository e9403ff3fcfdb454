"""A method as data: what each episode is worth, what is added up, who teaches."""

import dataclasses
from collections.abc import Callable, Mapping

import jax.numpy as jnp
from jax.lax import stop_gradient
from jaxtyping import Array, Float, Int

from skillsd_jax import config
from skillsd_jax.losses import schedules
from skillsd_jax.losses.objective.advantage import (
    Baseline,
    Credit,
    Episodes,
    by_group,
)
from skillsd_jax.losses.objective.terms import WIDE, Distil, Term, reference_kl
from skillsd_jax.losses.objective.weights import by_segment, on_skilled
from skillsd_jax.losses.signals import Output, Signals


@dataclasses.dataclass(frozen=True)
class Recipe:
    """A named method.

    Args:
      summary: one line.
      source: paper or code.
      terms: losses, summed.
      credits: applied to the advantage in order, detached.
      baseline: advantage of the whole iteration.
      shown: what the teacher is shown: 'skill' of the bank; 'sibling', a skill written
        from a solved episode of the group; 'expert', one from an expert's episode of
        the task; 'plain', nothing: it is another model; '': there is no teacher.
      teacher: the kind of teacher the name means; '' leaves it to teacher.kind.
      student_skill: the student acts and learns with a skill in its own prompt.
      data: 'rollouts', or 'expert': recorded episodes of the scripted expert.
      settings: values of config.Objective that the name means, whatever is set.
      schedule: schedules of coefficients unless objective.schedules names them.
    """

    summary: str
    source: str
    terms: tuple[Term, ...]
    credits: tuple[Credit, ...] = ()
    baseline: Baseline = by_group
    shown: str = ""
    teacher: str = ""
    student_skill: bool = False
    data: str = "rollouts"
    settings: Mapping[str, object] = dataclasses.field(default_factory=dict)
    schedule: str = ""

    def required(self, objective: config.Objective) -> frozenset[str]:
        """Optional signals that must be computed under these settings."""
        needs = {"entropy"} | ({"teacher"} if self.shown else set())
        if objective.kl_coefficient and reference_kl in self.terms:
            needs.add("reference")
        return frozenset(needs | ({"divergence"} if self.wide(objective) else set()))

    def wide(self, objective: config.Objective) -> Callable | None:
        """The vocabulary-wide divergence of the logits [… V], if it has one."""
        for term in self.terms:
            if isinstance(term, Distil) and term.chosen(objective) in WIDE:
                return WIDE[term.chosen(objective)](objective)
        return None

    def scheduled(self, objective: config.Objective) -> dict[str, schedules.Schedule]:
        """The schedule of each coefficient that has one.

        Raises:
          ValueError: objective.schedules cannot be read.
        """
        own = schedules.parse(self.schedule, COEFFICIENTS)
        return own | schedules.parse(objective.schedules, COEFFICIENTS)

    def settled(
        self,
        objective: config.Objective,
        step: Int[Array, ""] | None,
        stalled: Int[Array, ""] | None,
    ) -> tuple[config.Objective, dict[str, Array]]:
        """The settings that hold now: what the name means, schedules applied.

        Returns:
          The settings, and the coefficients that a schedule changed, by name.
        """
        objective = dataclasses.replace(objective, **self.settings)
        changed = {
            name: getattr(objective, name) * schedule.factor(step, stalled)
            for name, schedule in self.scheduled(objective).items()
        }
        return dataclasses.replace(objective, **changed), changed

    def advantage(
        self,
        episodes: Episodes,
        objective: config.Objective,
        stalled: Int[Array, ""] | None = None,
    ) -> Float[Array, "B R"]:
        """A of each token of a whole iteration: the baseline, then the credits."""
        objective, _ = self.settled(objective, episodes.step, stalled)
        advantage = self.baseline(episodes, objective)
        for shape in self.credits:
            advantage = shape(episodes, objective, advantage)
        return stop_gradient(jnp.where(episodes.mask > 0, advantage, 0))

    def loss(self, signals: Signals, objective: config.Objective) -> Output:
        """Every term's loss per token, and what to log.

        Args:
          signals: of some rows; `advantage` is what `self.advantage` made of all.
          objective: the settings.

        Raises:
          ValueError: a required signal is None.
        """
        signals = signals.inside()
        objective, changed = self.settled(objective, signals.step, signals.stalled)
        metrics = {"entropy": (signals.given("entropy"), signals.mask)}
        for name, value in changed.items():
            metrics[f"coefficient_{name}"] = (value, signals.mask)
        if signals.teacher is not None:
            weight = on_skilled(signals, objective) * signals.mask
            metrics["gap"] = (signals.gap, weight)
            metrics["gap_squared"] = (signals.gap**2, weight)
        weight = by_segment(signals, objective.reason_weight, objective.action_weight)
        terms: dict[str, Array] = {}
        for term in self.terms:
            output = term(signals, objective)
            for name, value in output.terms.items():
                terms[name] = terms.get(name, 0) + weight * value
            metrics.update(output.metrics)
        return Output(terms, stop_gradient(_as_float(metrics)))


# What a schedule may change.
COEFFICIENTS = (
    "sdl_lambda",
    "sdar_coef",
    "kl_coefficient",
    "entropy_coefficient",
    "gate_beta",
    "rlsd_mix",
    "turn_mix",
    "gap_weight",
    "step_weight",
    "reason_weight",
    "action_weight",
    "distill_reason_weight",
    "distill_action_weight",
)


def _as_float(
    metrics: Mapping[str, tuple[Array, Array]],
) -> dict[str, tuple[Float[Array, "B R"], Float[Array, "B R"]]]:
    return {
        name: (jnp.broadcast_to(value, weight.shape).astype(weight.dtype), weight)
        for name, (value, weight) in metrics.items()
    }
