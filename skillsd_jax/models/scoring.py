"""Log-probs of given tokens; logits exist at scored positions only."""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from skillsd_jax.models import qwen
from skillsd_jax.tokens import TokenView

CHUNK = 1024  # tokens whose logits, the student's and the teacher's, exist at once


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


@dataclasses.dataclass(frozen=True)
class Voice:
    """A network that has read a view: what the next word's distribution comes from.

    Args:
      config: shape of the network.
      params: its weights.
      states: hidden states at view.scored − 1.
    """

    config: qwen.ModelConfig
    params: qwen.Params
    states: Float[Array, "B R D"]

    def logits(self, states: Float[Array, "... D"]) -> Float[Array, "... V"]:
        return qwen.head(self.config, self.params, states)


def read(config: qwen.ModelConfig, params: qwen.Params, view: TokenView) -> Voice:
    """Reads a view once, for `scores` and `divergence`."""
    states = qwen.hidden(config, params, view.tokens)
    states = jnp.take_along_axis(states, view.scored[..., None] - 1, axis=1)
    return Voice(config, params, states)


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
    return scores(read(config, params, view), view, temperature, mask)


def scores(
    voice: Voice,
    view: TokenView,
    temperature: float | Float[Array, ""],
    mask: Float[Array, "B R"],
) -> Scores:
    """`score` of a view that has been read."""
    logits = voice.logits(voice.states) / temperature
    token = jnp.take_along_axis(view.tokens, view.scored, axis=1)
    logs = jax.nn.log_softmax(logits, axis=-1)
    entropy = -jnp.sum(jnp.exp(logs) * logs, axis=-1)
    return Scores(
        logprob=jnp.where(mask > 0, pick(logs, token), 0.0),
        entropy=jnp.where(mask > 0, entropy, 0.0),
    )


def divergence(
    measure: Callable[[Array, Array], Array],
    student: Voice,
    teacher: Voice,
    temperature: float | Float[Array, ""],
    mask: Float[Array, "B R"],
    chunk: int = CHUNK,
) -> Float[Array, "B R"]:
    """measure(student's logits, teacher's logits) at every scored position.

    [B, R, V] never exists: the logits are made `chunk` tokens at a time, and again on
    the way back.

    Args:
      measure: from two [… V] to [...].
      student, teacher: of one vocabulary, but for padding; the networks may differ.
      temperature: > 0; both distributions are softmax(logits / temperature).
      mask: 1 where a token counts; 0 comes back elsewhere.
    """
    size = mask.size
    # Embeddings of one family are padded to different sizes; no text has those ids.
    words = min(student.config.vocab, teacher.config.vocab)
    count = -(-size // chunk)

    def pieces(states: Float[Array, "B R D"]) -> Float[Array, "n c D"]:
        flat = states.reshape(size, -1)
        padded = jnp.pad(flat, ((0, count * chunk - size), (0, 0)))
        return padded.reshape(count, chunk, -1)

    @jax.checkpoint
    def part(both):
        s, t = (v.logits(x) / temperature for v, x in zip((student, teacher), both))
        return measure(s[..., :words], t[..., :words])

    values = jax.lax.map(part, (pieces(student.states), pieces(teacher.states)))
    values = values.reshape(-1)[:size].reshape(mask.shape)
    return jnp.where(mask > 0, values, 0.0)


def pick(
    values: Float[Array, "... V"], token: Int[Array, "..."]
) -> Float[Array, "..."]:
    """values[…, token] as a masked sum: its gradient needs no scatter."""
    vocabulary = jnp.arange(values.shape[-1])
    return jnp.sum(jnp.where(vocabulary == token[..., None], values, 0.0), axis=-1)
