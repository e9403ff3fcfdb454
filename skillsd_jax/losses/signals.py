"""What an objective may see, and what it gives back."""

import dataclasses
from collections.abc import Mapping

import jax
import jax.numpy as jnp
from jax.lax import stop_gradient
from jaxtyping import Array, Float, Int

from skillsd_jax.losses.arguments import widen


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
      old: log-probs of who played: the sampler's, or the scorer's under its weights.
      correction: weight of the policy gradient for who sampled; None: off.
      reference: log-probs of the initial policy, plain view.
      entropy: of the student.
      divergence: vocabulary-wide, student to teacher, in the kind the recipe names.
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
      group_success: share of the group's episodes that were solved.
      step: iterations done.
      stalled: iterations, at most so far, in a row in which the gap did not shrink.
      vocabulary: V.
      token_count: sampled tokens of the whole batch.
      skilled_count: those of them on skilled rows.
      row_count: rows with a sampled token of the whole batch.
    """

    student: Float[Array, "B R"]
    old: Float[Array, "B R"]
    advantage: Float[Array, "B R"]
    mask: Float[Array, "B R"]
    teacher: Float[Array, "B R"] | None = None
    teacher_step: Float[Array, "B R"] | None = None
    correction: Float[Array, "B R"] | None = None
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
    group_success: Float[Array, "B"] | None = None
    step: Int[Array, ""] | None = None
    stalled: Int[Array, ""] | None = None
    vocabulary: int | Int[Array, ""] | None = None
    token_count: Float[Array, ""] | None = None
    skilled_count: Float[Array, ""] | None = None
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

    @property
    def gap(self) -> Float[Array, "B R"]:
        """Δ = log π_T − log π_θ, nats; not detached."""
        return self.given("teacher") - self.student

    def inside(self) -> "Signals":
        """The same with 0 outside the mask, whatever came there, −inf and NaN too.

        A row that is shown nothing has the student for its teacher: no gap. All this
        comes before the equations: selecting afterwards leaves 0·inf in gradients.
        """
        (mask,) = widen(self.mask)
        given = {name: getattr(self, name) for name in PER_TOKEN}
        clean = {
            name: jnp.where(mask != 0, widen(value)[0], 0)
            for name, value in given.items()
            if value is not None
        }
        if self.skilled is not None and "teacher" in clean:
            shown = self.skilled[..., None] != 0
            own = stop_gradient(clean["student"])
            clean["teacher"] = jnp.where(shown, clean["teacher"], own)
        return dataclasses.replace(self, mask=mask, **clean)


PER_TOKEN = (
    "student",
    "old",
    "correction",
    "advantage",
    "teacher",
    "teacher_step",
    "reference",
    "entropy",
    "divergence",
)


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
