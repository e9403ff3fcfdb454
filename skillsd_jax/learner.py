"""Learning: both views are scored, one jitted update, teacher kept in step."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int

from skillsd_jax import config as settings
from skillsd_jax import guard, optimizers, sharding, teachers, tokens
from skillsd_jax.losses import masking, mismatch, objective, schedules
from skillsd_jax.models import lora, qwen, scoring
from skillsd_jax.tokens import Arranged, TokenBatch

Params = Any


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LearnerState:
    """Everything that learning changes.

    Args:
      step: iterations done.
      params: what is trained, float32: the student, or its adapters.
      frozen: the student's base, beside adapters; else None.
      teacher: weights of the teacher, or its adapters on the same base; None when it is
        live or not needed.
      reference: the initial policy likewise; None without a KL term to it.
      optimizer: optax state.
      plateau: how long the gap to the teacher has not shrunk.
    """

    step: Int[Array, ""]
    params: Params
    frozen: Params | None
    teacher: Params | None
    reference: Params | None
    optimizer: Any
    plateau: schedules.Plateau

    @property
    def weights(self) -> Params:
        """The whole student: who plays."""
        return self.whole(self.params)

    def whole(self, params: Params) -> Params:
        """`params` on the base, if they are adapters."""
        return params if self.frozen is None else lora.join(params, self.frozen)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Whole:
    """What takes a whole iteration to know, by row.

    Args:
      old: log-probs of who played: the sampler's, or the scorer's of the same weights.
      correction: of the policy gradient for who sampled; None: off.
      advantage: of each token.
      group_success: share of the group's episodes that were solved.
      teacher: its log-probs, where credits needed them: a live teacher is then the
        student as the iteration found it.
    """

    old: Float[Array, "*rows R"]
    correction: Float[Array, "*rows R"] | None
    advantage: Float[Array, "*rows R"]
    group_success: Float[Array, "*rows"]
    teacher: Float[Array, "*rows R"] | None


def teacher_kind(recipe: objective.Recipe, config: settings.Teacher) -> str:
    """What the method means, else what is set, else frozen; 'none' without a teacher."""
    return (recipe.teacher or config.kind or "frozen") if recipe.shown else "none"


class Learner:
    """Binds the static settings to one jitted update.

    Args:
      model: shape of the network.
      config: the run's settings.
      updates: optimiser steps of the whole run (not iterations), for the schedule.
      external: shape of an external teacher of the same vocabulary.
    """

    def __init__(
        self,
        model: qwen.ModelConfig,
        config: settings.Config,
        updates: int,
        external: qwen.ModelConfig | None = None,
    ):
        self.model, self.config = model, config
        self.recipe = objective.recipe(config.objective.name)
        self.teacher_kind = teacher_kind(self.recipe, config.teacher)
        self.teacher_model = model if external is None else external
        self.optimizer = optimizers.make(config.optimizer, updates)
        required = self.recipe.required(config.objective)
        self.needs_teacher = "teacher" in required
        self.needs_reference = "reference" in required
        self.measure = self.recipe.wide(config.objective)
        self.rescores = config.rollout.old_logprobs == "recomputed"
        self._update = jax.jit(self._iteration, donate_argnums=(0,))

    def init(self, params: Params, external: Params | None = None) -> LearnerState:
        """State at step 0; the teacher and the reference are copies of what is trained.

        Args:
          params: become the student's own and go with its first update.
          external: weights of an external teacher.

        Raises:
          ValueError: the teacher is external and there is none, or the weights are not
            float32: a small step changes nothing in a bfloat16 number.
        """
        kinds = {str(leaf.dtype) for leaf in jax.tree.leaves(params)} - {"float32"}
        if kinds:
            raise ValueError(f"weights to train must be float32, not {kinds.pop()}")
        params, external, frozen = *sharding.put((params, external)), None
        if self.model.lora is not None:
            params, frozen = lora.split(params)
        copy = functools.partial(jax.tree.map, jnp.copy)
        stored = self.needs_teacher and self.teacher_kind != "live"
        if stored and self.teacher_kind == "external" and external is None:
            raise ValueError("an external teacher needs weights: pass external=")
        teacher = external if self.teacher_kind == "external" else params
        state = LearnerState(
            step=jnp.zeros((), jnp.int32),
            params=params,
            frozen=frozen,
            teacher=copy(teacher) if stored else None,
            reference=copy(params) if self.needs_reference else None,
            optimizer=sharding.made(self.optimizer.init, params),
            plateau=schedules.Plateau.start(),
        )
        return sharding.put(state)

    def update(
        self, state: LearnerState, batch: Arranged
    ) -> tuple[LearnerState, dict[str, tuple[Array, Array]]]:
        """One iteration: an optimiser step per minibatch whose gradient is finite.

        Args:
          state: donated.
          batch: as `tokens.arrange` leaves it.

        Returns:
          The next state and metrics as (Σ value·weight, Σ weight) over the batch.
        """
        return self._update(state, sharding.put_whole(batch))

    def _iteration(self, state: LearnerState, batch: Arranged):
        whole = self._whole(state, batch)

        def minibatch(carry, part):
            params, moments = carry
            gradient, sums, scored = self._gradient(state, params, *part)
            filled = jnp.any(part[0].rows.mask > 0)
            norm = optax.global_norm(gradient)
            sound = guard.sound(norm, sums)
            sums["grad_norm"] = (norm, jnp.float32(filled))
            sums["minibatches"] = (jnp.float32(filled), jnp.zeros(()))
            sums["skipped_updates"] = (jnp.float32(filled & ~sound), jnp.zeros(()))

            def apply():
                change, following = self.optimizer.update(gradient, moments, params)
                return optax.apply_updates(params, change), following

            following = jax.lax.cond(filled & sound, apply, lambda: (params, moments))
            return following, (sums, scored)

        (params, moments), (sums, scored) = jax.lax.scan(
            minibatch, (state.params, state.optimizer), (batch, whole)
        )
        sums = jax.tree.map(lambda x: x.sum(0), sums)
        sums |= self._mismatch(batch.rows, whole, scored)
        step, skipped = state.step + 1, sums["skipped_updates"][0]
        learned = (skipped == 0) | (skipped < sums["minibatches"][0])
        kind, setting = self.teacher_kind, self.config.teacher
        following = dataclasses.replace(
            state,
            step=step,
            params=params,
            optimizer=moments,
            teacher=teachers.follow(
                kind, setting, step, learned, state.teacher, params
            ),
            plateau=self._follow(state.plateau, sums),
        )
        return sharding.laid(following), sharding.replicated(sums)

    def _follow(self, plateau: schedules.Plateau, sums) -> schedules.Plateau:
        if "gap_squared" not in sums:
            return plateau
        total, weight = sums["gap_squared"]
        gap = jnp.where(weight > 0, jnp.sqrt(total / weight), jnp.nan)
        return plateau.follow(gap, self.config.objective.plateau_tolerance)

    def _whole(self, state: LearnerState, batch: Arranged) -> Whole:
        """Advantages need the whole iteration, before it is split."""
        rows, teacher, correction = batch.rows, None, None
        old = rows.old
        if self.recipe.credits:
            teacher = self._everywhere(
                batch, lambda part: self._taught(state, state.params, part)[0]
            )
        if self.rescores:
            old = self._everywhere(batch, functools.partial(self._rescored, state))
        if cap := self.config.rollout.correction_cap:
            correction = mismatch.correction(old, rows.old, cap)
        flat = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), rows)
        shape = rows.mask.shape
        episodes = objective.Episodes(
            reward=flat.reward,
            group=flat.group,
            trajectory=flat.trajectory,
            success=flat.success,
            skilled=flat.skilled,
            turn=flat.turn,
            anchor=flat.anchor,
            returns=flat.returns,
            mask=flat.mask,
            old=old.reshape(flat.mask.shape),
            teacher=None if teacher is None else teacher.reshape(flat.mask.shape),
            step=state.step,
        )
        setting = self.config.objective
        advantage = self.recipe.advantage(episodes, setting, state.plateau.stalled)
        solved = episodes.mean_of_group(flat.success)[:, 0]
        return Whole(
            old=old,
            correction=correction,
            advantage=advantage.reshape(shape),
            group_success=solved.reshape(shape[:-1]),
            teacher=teacher,
        )

    def _everywhere(self, batch: Arranged, score) -> Float[Array, "M S R"]:
        """score(micro-batch) of every one of an iteration, 0 elsewhere."""

        def visit(part):
            return (), score(jax.tree.map(sharding.rows, part))

        found = jax.lax.map(lambda part: tokens.by_micro_batch(part, visit)[1], batch)
        return sharding.replicated(found)

    def _mismatch(self, batch: TokenBatch, whole: Whole, scored) -> mismatch.Figures:
        """How the sampler differs from the scorer, and what that is corrected by.

        Args:
          scored: by the student, [M S R], each minibatch by the weights it met: those
            of the first are the ones that played.
        """
        mask = batch.mask
        if self.recipe.data != "rollouts":
            return {}  # nobody sampled
        if self.recipe.shown == "rescued":  # those were sampled in the other view
            mask = mask * (1 - batch.skilled[..., None])
        if not self.rescores:
            return mismatch.agreement(scored[0], batch.old[0], mask[0])
        figures = mismatch.agreement(whole.old, batch.old, mask)
        if whole.correction is not None:
            cap = self.config.rollout.correction_cap
            figures |= mismatch.corrected(whole.correction, mask, cap)
        return figures

    def _gradient(self, state: LearnerState, params, batch: Arranged, whole):
        """Gradient of one minibatch, micro-batch by micro-batch.

        The loop runs over the micro-batches that hold real rows, so padding to a
        static shape costs memory but no time.
        """
        mode = self.config.objective.loss_agg_mode
        mask = batch.rows.mask
        filled = (mask.sum(-1) > 0).astype(jnp.float32)
        count = mask.sum() if mode == "token-mean" else filled.sum()
        counts = {
            "token_count": mask.sum(),
            "skilled_count": (mask * batch.rows.skilled[..., None]).sum(),
            "row_count": filled.sum(),
        }
        loss = functools.partial(self._loss, state, counts, jnp.maximum(count, 1.0))

        def visit(part, share):
            part, share = jax.tree.map(sharding.rows, (part, share))
            found, (sums, scored) = jax.grad(loss, has_aux=True)(params, part, share)
            return (sharding.laid(found), sums), scored

        (found, sums), scored = tokens.by_micro_batch(batch, visit, whole)
        return found, sums, sharding.replicated(scored)

    def _loss(self, state: LearnerState, counts, count, params, batch, whole):
        signals = self._signals(state, params, batch, whole)
        signals = dataclasses.replace(signals, **counts)
        output = self.recipe.loss(signals, self.config.objective)
        mode = self.config.objective.loss_agg_mode
        parts = {
            name: masking.aggregate(term, batch.mask, mode, count=count)
            for name, term in output.terms.items()
        }
        sums = {
            name: (jnp.sum(value * weight), jnp.sum(weight))
            for name, (value, weight) in output.metrics.items()
        }
        total = sum(parts.values())
        # Micro-batches add up to their minibatch's loss; `means` averages those.
        sums |= {f"loss_{k}": (v, jnp.zeros(())) for k, v in parts.items()}
        return total, jax.lax.stop_gradient((sums, signals.student))

    def _signals(self, state: LearnerState, params, batch: TokenBatch, whole):
        temperature, mask = self.config.rollout.temperature, batch.mask
        view = batch.student
        voice = scoring.read(self.model, state.whole(params), view)
        student = scoring.scores(voice, view, temperature, mask, entropy=True)
        teacher = reference = divergence = None
        if self.needs_teacher and (whole.teacher is None or self.measure is not None):
            teacher, taught = self._taught(state, params, batch)
            if self.measure is not None:
                divergence = scoring.divergence(
                    self.measure, voice, taught, temperature, mask
                )
        if whole.teacher is not None:
            teacher = whole.teacher
        if self.needs_reference:
            initial = state.whole(state.reference)
            fixed = scoring.score(self.model, initial, view, temperature, mask)
            reference = fixed.logprob
        return objective.Signals(
            student=student.logprob,
            teacher=teacher,
            old=whole.old,
            correction=whole.correction,
            reference=reference,
            entropy=student.entropy,
            divergence=divergence,
            advantage=whole.advantage,
            mask=mask,
            segment=batch.segment,
            turn=batch.turn,
            anchor=batch.anchor,
            skilled=batch.skilled,
            reward=batch.reward,
            group=batch.group,
            trajectory=batch.trajectory,
            success=batch.success,
            group_success=whole.group_success,
            step=state.step,
            stalled=state.plateau.stalled,
            vocabulary=self.model.vocab,
        )

    def _taught(self, state: LearnerState, params, batch: TokenBatch):
        """The teacher's log-probs and its voice; no gradient goes into either."""
        weights = params if state.teacher is None else state.teacher
        if self.teacher_kind != "external":
            weights = state.whole(weights)
        weights = jax.lax.stop_gradient(weights)
        voice = scoring.read(self.teacher_model, weights, batch.teacher)
        voice = dataclasses.replace(voice, states=jax.lax.stop_gradient(voice.states))
        temperature = self.config.rollout.temperature
        found = scoring.scores(voice, batch.teacher, temperature, batch.mask)
        return found.logprob, voice

    def _rescored(self, state: LearnerState, batch: TokenBatch) -> Float[Array, "b R"]:
        """The student's log-probs, under the weights that played."""
        view, temperature = batch.student, self.config.rollout.temperature
        weights = state.weights
        return scoring.score(self.model, weights, view, temperature, batch.mask).logprob


def means(sums: dict[str, tuple[Array, Array]]) -> dict[str, float]:
    """Divides the sums of `Learner.update`, once, on the host.

    Losses are means over minibatches; everything else is weighted by tokens. A gap of
    no tokens is left out where it is that of a place, and 0 where it is that of all.
    """
    values = jax.device_get(sums)
    minibatches = float(values.pop("minibatches")[0])
    out = {"skipped_updates": float(values.pop("skipped_updates")[0])}
    for name, (total, weight) in sorted(values.items()):
        if name.startswith("gap_") and name != "gap_squared" and not weight:
            continue  # of turns that nobody reached, of words that nobody thought
        divisor = minibatches if name.startswith("loss_") else float(weight)
        out[name] = float(total) / max(divisor, 1e-9)
    out["loss"] = sum(v for name, v in out.items() if name.startswith("loss_"))
    if "gap_squared" in out:
        out["gap_rms"] = out.pop("gap_squared") ** 0.5
    return out
