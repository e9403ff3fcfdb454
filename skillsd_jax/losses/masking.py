"""From one value per token to one number.

A masked slot is left out by selection, not by multiplication: a NaN there would
survive a product with 0.
"""

import jax.numpy as jnp
from jaxtyping import Array, Float

from skillsd_jax.losses.arguments import choose, widen


def _tokens(mask: Float[Array, "B R"]) -> Float[Array, ""]:
    return jnp.sum(mask)


def _rows(mask: Float[Array, "B R"]) -> Float[Array, ""]:
    return jnp.sum(jnp.any(mask != 0, axis=1), dtype=mask.dtype)


def _per_length(mask: Float[Array, "B R"]) -> Float[Array, ""]:
    return jnp.ones((), mask.dtype)


COUNTS = {
    "token-mean": _tokens,
    "seq-mean-token-sum": _rows,
    "seq-mean-token-mean": _rows,
    "seq-mean-token-sum-norm": _per_length,
}


def count_of(mask: Float[Array, "B R"], mode: str) -> Float[Array, ""]:
    """What `mode` divides by: tokens, or rows with a token; additive over row splits.

    `seq-mean-token-sum-norm` divides by the length alone, so its count is 1 and of no
    effect.
    """
    (mask,) = widen(mask)
    return choose(COUNTS, mode, "loss_agg_mode")(mask)


def token_mean(
    values: Float[Array, "..."],
    mask: Float[Array, "..."],
    count: Float[Array, ""] | float | None = None,
) -> Float[Array, ""]:
    """Σ m·x / count; 0 for an empty mask.

    Args:
      values: one per token; anything, NaN too, where the mask is 0.
      mask: 1 on the tokens that count.
      count: the divisor; Σ m of these very tokens by default. A micro-batch passes
        the whole batch's, then the parts add up to the mean of the whole.
    """
    values, mask = widen(values, mask)
    if count is None:
        count = jnp.sum(mask)
    return _divide(jnp.sum(_selected(values, mask)), count)


def aggregate(
    values: Float[Array, "B R"],
    mask: Float[Array, "B R"],
    mode: str,
    count: Float[Array, ""] | float | None = None,
    max_length: int | None = None,
) -> Float[Array, ""]:
    """One number from one value per token; additive over rows for a given `count`.

    token-mean: Σ m·x / tokens. seq-mean-token-sum: Σ_b Σ_r m·x / rows.
    seq-mean-token-mean: Σ_b (Σ_r m·x / Σ_r m) / rows.
    seq-mean-token-sum-norm: Σ m·x / max_length. Like the released code it does not
    divide by the rows, whatever the name says: its scale grows with the batch.

    Args:
      values: one per token; anything where the mask is 0.
      mask: 1 on the tokens that count.
      mode: one of the four.
      count: tokens or rows of the whole batch; by default those of this one, where a
        row counts if it has a token. Not used by seq-mean-token-sum-norm.
      max_length: divisor of seq-mean-token-sum-norm; R by default.

    Source: github.com/ZJU-REAL/SDAR at 8b85c23, agg_loss; the norm is Dr. GRPO's
    (arXiv 2503.20783).
    """
    local = count_of(mask, mode)
    values, mask = widen(values, mask)
    sums = jnp.sum(_selected(values, mask), axis=1)
    if mode == "seq-mean-token-sum-norm":
        return jnp.sum(sums) / (max_length or values.shape[1])
    if mode == "seq-mean-token-mean":
        sums = _divide(sums, jnp.sum(mask, axis=1))
    return _divide(jnp.sum(sums), local if count is None else count)


def _selected(
    values: Float[Array, "..."], mask: Float[Array, "..."]
) -> Float[Array, "..."]:
    return jnp.where(mask != 0, values, 0) * mask


def _divide(
    total: Float[Array, "..."], count: Float[Array, "..."] | float
) -> Float[Array, "..."]:
    count = jnp.asarray(count, total.dtype)
    return total / jnp.where(count > 0, count, 1)
