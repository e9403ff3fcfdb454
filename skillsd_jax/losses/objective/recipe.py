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
    without_rewards,
)
from skillsd_jax.losses.objective.terms import WIDE, Distil, Term, policy, reference_kl
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
        the task; 'rescued', the expert's that an episode was played with, where a
        whole group had failed; 'plain', nothing: it is another model; '': there is no
        teacher.
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
        objective = self.meant(objective)
        needs = {"entropy"} | ({"teacher"} if self.shown else set())
        if objective.kl_coefficient and reference_kl in self.terms:
            needs.add("reference")
        return frozenset(needs | ({"divergence"} if self.wide(objective) else set()))

    def wide(self, objective: config.Objective) -> Callable | None:
        """The vocabulary-wide divergence of the logits [… V], if it has one.

        Raises:
          ValueError: it has several; the learner computes one.
        """
        objective = self.meant(objective)
        names = {t.chosen(objective) for t in self.terms if isinstance(t, Distil)}
        wide = sorted(names & WIDE.keys())
        if len(wide) > 1:
            raise ValueError(f"one vocabulary-wide estimator at most, not {wide}")
        return WIDE[wide[0]](objective) if wide else None

    def meant(self, objective: config.Objective) -> config.Objective:
        """The settings with those that the name fixes."""
        return dataclasses.replace(objective, **self.settings)

    @property
    def tunable(self) -> frozenset[str]:
        """The coefficients that something in the recipe reads."""
        parts = [*self.terms, *self.credits, self.baseline]
        return frozenset(SEGMENTS).union(*(getattr(p, "uses", ()) for p in parts))

    def scheduled(self, objective: config.Objective) -> dict[str, schedules.Schedule]:
        """The schedule of each coefficient that has one.

        Raises:
          ValueError: objective.schedules cannot be read.
        """
        known = sorted(self.tunable)
        own = schedules.parse(self.schedule, known)
        return own | schedules.parse(objective.schedules, known)

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
        objective = self.meant(objective)
        changed = {
            name: getattr(objective, name) * schedule.factor(step, stalled)
            for name, schedule in self.scheduled(objective).items()
            if getattr(objective, name)  # 0 stays 0: what it is of is not computed
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

    @property
    def hinted(self) -> bool:
        """Whether some rollouts have a skill in their prompt."""
        return self.student_skill or self.shown == "rescued"

    @property
    def rewarded(self) -> bool:
        """Whether rewards of rollouts are what it learns from."""
        return self.baseline is not without_rewards and policy in self.terms

    def ignored(self, objective: config.Objective) -> str:
        """What is set and would have no effect, in words; '' if nothing is."""
        default, meant = config.Objective(), self.meant(objective)
        for name, value in self.settings.items():
            if getattr(objective, name) not in (value, getattr(default, name)):
                return f"objective.{name}: the name means {value!r}"
        distils = [term for term in self.terms if isinstance(term, Distil)]
        if objective.estimator and not any(term.open for term in distils):
            return "objective.estimator: it has its own"
        by_row = objective.loss_agg_mode != "token-mean"
        if meant.per_skilled_token and distils and by_row:
            return "per_skilled_token without loss_agg_mode=token-mean"
        kinds = {s.kind for s in self.scheduled(objective).values()}
        if "plateau" in kinds and not self.shown:
            return "a plateau schedule: without a teacher there is no gap"
        return ""

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
            for name, where in _places(signals).items():
                metrics[f"gap_{name}"] = (signals.gap, weight * where)
        weight = by_segment(signals, objective.reason_weight, objective.action_weight)
        terms: dict[str, Array] = {}
        for term in self.terms:
            output = term(signals, objective)
            for name, value in output.terms.items():
                inside = jnp.where(signals.mask != 0, weight * value, 0)
                terms[name] = terms.get(name, 0) + inside
            metrics.update(output.metrics)
        return Output(terms, stop_gradient(_as_float(metrics)))


TURNS = (1, 2, 4, 8, 16, 32)  # last turn of a span, counted from 1


def _places(signals: Signals) -> dict[str, Float[Array, "B R"]]:
    """1 on reasoning or action tokens, and on those of spans of turns."""
    places: dict[str, Array] = {}
    if signals.segment is not None:
        places |= {"reason": signals.segment == 1, "action": signals.segment == 2}
    if signals.turn is not None:
        turn, before = signals.turn + 1, 0
        for last in TURNS:
            first = before + 1
            name = f"turn_{first}" if first == last else f"turn_{first}_{last}"
            places[name] = (turn >= first) & (turn <= last)
            before = last
        places[f"turn_{before + 1}_on"] = turn > before
    return places


SEGMENTS = (
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
