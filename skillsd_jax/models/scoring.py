"""Log-probs of given tokens; logits exist at scored positions only."""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from skillsd_jax.models import qwen
from skillsd_jax.tokens import TokenView


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Scores:
    """In nats and float32; exactly 0 outside the mask.

    Args:
      logprob: of the token at view.scored, given everything before it.
      entropy: of the distribution it was drawn from.
    """

    logprob: Float[Array, "B R"]
    entropy: Float[Array, "B R"]


def score(
    config: qwen.ModelConfig,
    params: qwen.Params,
    view: TokenView,
    temperature: float | Float[Array, ""],
    mask: Float[Array, "B R"],
) -> Scores:
    """Scores the tokens at view.scored from the logits at view.scored − 1.

    Args:
      temperature: > 0; the distribution is softmax(logits / temperature).
      mask: 1 where a token counts.
    """
    states = qwen.hidden(config, params, view.tokens)
    states = jnp.take_along_axis(states, view.scored[..., None] - 1, axis=1)
    logits = qwen.head(config, params, states) / temperature
    token = jnp.take_along_axis(view.tokens, view.scored, axis=1)
    logs = jax.nn.log_softmax(logits, axis=-1)
    entropy = -jnp.sum(jnp.exp(logs) * logs, axis=-1)
    return Scores(
        logprob=jnp.where(mask > 0, pick(logs, token), 0.0),
        entropy=jnp.where(mask > 0, entropy, 0.0),
    )


def pick(
    values: Float[Array, "... V"], token: Int[Array, "..."]
) -> Float[Array, "..."]:
    """values[…, token] as a masked sum: its gradient needs no scatter."""
    vocabulary = jnp.arange(values.shape[-1])
    return jnp.sum(jnp.where(vocabulary == token[..., None], values, 0.0), axis=-1)
