"""Divergences over the whole vocabulary, reduced over V.

The teacher is detached. A word that a distribution excludes (logit −inf) adds 0 to its
side of the sum. These hold [..., V] twice: call them on chunks of a batch.
"""

import jax
import jax.numpy as jnp
from jax.lax import stop_gradient
from jaxtyping import Array, Bool, Float

from skillsd_jax.losses.arguments import choose, widen


def forward_kl(
    student_logits: Float[Array, "... V"], teacher_logits: Float[Array, "... V"]
) -> Float[Array, "..."]:
    """KL(T‖S) = Σ_v p_T (log p_T − log p_S)."""
    student, teacher = _log_probs(student_logits, teacher_logits)
    return _kl(teacher, student)


def reverse_kl(
    student_logits: Float[Array, "... V"], teacher_logits: Float[Array, "... V"]
) -> Float[Array, "..."]:
    """KL(S‖T) = Σ_v p_S (log p_S − log p_T)."""
    student, teacher = _log_probs(student_logits, teacher_logits)
    return _kl(student, teacher)


def jsd(
    student_logits: Float[Array, "... V"],
    teacher_logits: Float[Array, "... V"],
    alpha: float = 0.5,
) -> Float[Array, "..."]:
    """α KL(T‖M) + (1−α) KL(S‖M), M = αT + (1−α)S.

    Args:
      student_logits: differentiated.
      teacher_logits: detached.
      alpha: in (0, 1); towards either end the value vanishes. ½ is symmetric and at
        most log 2.

    Source: generalised JSD, arXiv 2306.13649; ½ in OPSD, arXiv 2601.18734.
    """
    student, teacher = _log_probs(student_logits, teacher_logits)
    return _jsd(student, teacher, alpha)


def topk_tail(
    student_logits: Float[Array, "... V"],
    teacher_logits: Float[Array, "... V"],
    k: int,
    kind: str,
    select: str = "teacher",
) -> Float[Array, "..."]:
    """A divergence over k words and one bucket for all the others.

    Merging words never raises a divergence, so it is a lower bound; exact at k = V.

    Args:
      student_logits: differentiated.
      teacher_logits: detached.
      k: how many words stay apart; k ≥ V keeps all.
      kind: forward_kl, reverse_kl or jsd (α = ½).
      select: whose likeliest words, 'teacher' or 'student'.

    Source: SDPO, arXiv 2601.20802 (k = 100, jsd).
    """
    divergence = choose(KINDS, kind, "kind")
    student, teacher = _log_probs(student_logits, teacher_logits)
    views = {"teacher": teacher, "student": student}
    ranking = choose(views, select, "select")
    if k >= ranking.shape[-1]:
        return divergence(student, teacher)
    _, top = jax.lax.top_k(ranking, k)
    kept = jnp.zeros(ranking.shape, bool)
    kept = jnp.put_along_axis(kept, top, True, axis=-1, inplace=False)

    def buckets(log_p: Float[Array, "... V"]) -> Float[Array, "... k+1"]:
        tail = _tail(log_p, kept)[..., None]
        return jnp.concatenate([jnp.take_along_axis(log_p, top, -1), tail], axis=-1)

    return divergence(buckets(student), buckets(teacher))


def _tail(
    log_p: Float[Array, "... V"], kept: Bool[Array, "... V"]
) -> Float[Array, "..."]:
    """Log-mass of the words not kept, summed: 1 − Σ kept would cancel."""
    present = ~kept & (log_p > -jnp.inf)
    empty = ~jnp.any(present, axis=-1)
    # The log of an empty sum has an infinite slope, NaN even where unselected.
    safe = jnp.where(empty[..., None], 0.0, jnp.where(present, log_p, -jnp.inf))
    return jnp.where(empty, -jnp.inf, jax.nn.logsumexp(safe, axis=-1))


def _log_probs(
    student_logits: Float[Array, "... V"], teacher_logits: Float[Array, "... V"]
) -> tuple[Float[Array, "... V"], Float[Array, "... V"]]:
    student, teacher = widen(student_logits, stop_gradient(teacher_logits))
    return jax.nn.log_softmax(student), jax.nn.log_softmax(teacher)


def _kl(p: Float[Array, "... V"], q: Float[Array, "... V"]) -> Float[Array, "..."]:
    """KL(p‖q) of log-probs."""
    present = p > -jnp.inf
    # Replaced before the arithmetic, not after: 0·inf in the gradient is NaN.
    p, q = jnp.where(present, p, 0), jnp.where(present, q, 0)
    return jnp.sum(jnp.exp(p) * (p - q), axis=-1)


def _jsd(
    student: Float[Array, "... V"], teacher: Float[Array, "... V"], alpha: float = 0.5
) -> Float[Array, "..."]:
    weight = jnp.asarray(alpha, student.dtype)
    # A word both exclude is no part of either sum; logaddexp has no slope there.
    absent = (student == -jnp.inf) & (teacher == -jnp.inf)
    s, t = jnp.where(absent, 0, student), jnp.where(absent, 0, teacher)
    mixture = jnp.logaddexp(jnp.log(weight) + t, jnp.log1p(-weight) + s)
    return alpha * _kl(teacher, mixture) + (1 - alpha) * _kl(student, mixture)


KINDS = {
    "forward_kl": lambda student, teacher: _kl(teacher, student),
    "reverse_kl": _kl,
    "jsd": _jsd,
}
