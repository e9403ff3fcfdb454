"""Log-probs of given tokens; the logits of a batch never exist at once.

Only hidden states at scored positions meet the head. With x a state, w_v the head's
row of word v and T the temperature,

    z_v = x·w_v / T,   log p(y) = z_y − log Σ_v e^{z_v},   h = log Σ_v e^{z_v} − Σ_v p_v z_v

are made a part of the vocabulary at a time, and again on the way back. That costs one
matmul more than keeping z: four instead of three. Where the logits are few, they are
kept. On a mesh the tokens are spread over all devices, and the parts of the head are
gathered one after the other.
"""

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from skillsd_jax import sharding
from skillsd_jax.models import qwen
from skillsd_jax.tokens import TokenView

TILE = 1 << 21  # logits that exist at once, on a device
WIDE_TILE = 1 << 23  # the same of a divergence, which needs whole distributions
LANES = 128  # a part holds a multiple of so many words


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Scores:
    """In nats and float32; exactly 0 outside the mask.

    Args:
      logprob: of the token at view.scored, given everything before it.
      entropy: of the distribution it was drawn from; 0 where it was not asked for.
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

    @property
    def kernel(self) -> Float[Array, "V D"]:
        return qwen.head_kernel(self.config, self.params)

    def logits(self, states: Float[Array, "... D"]) -> Float[Array, "... V"]:
        return qwen.head(self.config, self.params, states)

    @property
    def flat(self) -> Float[Array, "C D"]:
        """The states row by row, in the type of the matmuls."""
        flat = self.states.reshape(-1, self.config.width).astype(self.config.dtype)
        return sharding.split(flat, sharding.AXES)


def read(config: qwen.ModelConfig, params: qwen.Params, view: TokenView) -> Voice:
    """Reads a view once, for `scores`, `likeliest` and `divergence`."""
    states = qwen.hidden(config, params, view.tokens)
    states = jnp.take_along_axis(states, view.scored[..., None] - 1, axis=1)
    return Voice(config, params, sharding.rows(states))


def score(
    config: qwen.ModelConfig,
    params: qwen.Params,
    view: TokenView,
    temperature: float | Float[Array, ""],
    mask: Float[Array, "B R"],
    entropy: bool = False,
) -> Scores:
    """Scores the tokens at view.scored from the logits at view.scored − 1.

    Args:
      temperature: > 0; the distribution is softmax(logits / temperature). No gradient
        goes into it.
      mask: 1 where a token counts.
      entropy: asks for it too.
    """
    return scores(read(config, params, view), view, temperature, mask, entropy)


def scores(
    voice: Voice,
    view: TokenView,
    temperature: float | Float[Array, ""],
    mask: Float[Array, "B R"],
    entropy: bool = False,
) -> Scores:
    """`score` of a view that has been read."""
    token = jnp.take_along_axis(view.tokens, view.scored, axis=1)
    if mask.size * voice.config.vocab <= TILE:
        logprob, spread = _kept(voice, token, temperature, entropy)
    else:
        parts = _Parts(voice.config.vocab, _width(mask.size), entropy)
        inverse = _inverse(temperature)
        found = _tiled(parts, voice.flat, voice.kernel, token.reshape(-1), inverse)
        logprob, spread = (x.reshape(mask.shape) for x in found)
    return Scores(
        logprob=jnp.where(mask > 0, logprob, 0.0),
        entropy=jnp.where(mask > 0, spread, 0.0),
    )


def likeliest(
    voice: Voice, k: int, temperature: float | Float[Array, ""]
) -> tuple[Float[Array, "B R k"], Int[Array, "B R k"]]:
    """The k most probable next words: their log-probs, falling, and their ids.

    No gradient: it is for looking.
    """
    states, kernel = jax.lax.stop_gradient((voice.flat, voice.kernel))
    parts = _Parts(voice.config.vocab, max(_width(len(states)), -(-k // LANES) * LANES))

    def part(carry, start, width):
        best, words, total = carry
        z = _logits(states, _rows(kernel, start, width)) / temperature
        total = jnp.logaddexp(total, jax.nn.logsumexp(z, -1))
        ids = jnp.broadcast_to(start + jnp.arange(width), z.shape)
        best, place = jax.lax.top_k(jnp.concatenate([best, z], -1), k)
        words = jnp.concatenate([words, ids], -1)
        return best, jnp.take_along_axis(words, place, -1), total

    none = jnp.full((len(states), k), -jnp.inf)
    carry = none, jnp.zeros(none.shape, jnp.int32), none[:, 0]
    best, words, total = parts.over(part, carry)
    shape = (*voice.states.shape[:2], k)
    return (best - total[:, None]).reshape(shape), words.reshape(shape)


def divergence(
    measure: Callable[[Array, Array], Array],
    student: Voice,
    teacher: Voice,
    temperature: float | Float[Array, ""],
    mask: Float[Array, "B R"],
    chunk: int | None = None,
) -> Float[Array, "B R"]:
    """measure(student's logits, teacher's logits) at every scored position.

    [B, R, V] never exists: the logits are made `chunk` tokens at a time, and again on
    the way back. Gradients go into the student alone.

    Args:
      measure: from two [… V] to [...]; hashable.
      student, teacher: of one vocabulary, but for padding; the networks may differ.
      temperature: > 0; both distributions are softmax(logits / temperature).
      mask: 1 where a token counts; 0 comes back elsewhere.
      chunk: None: as many as WIDE_TILE allows.
    """
    # Embeddings of one family are padded to different sizes; no text has those ids.
    words = min(student.config.vocab, teacher.config.vocab)
    devices = sharding.ways(sharding.AXES)
    chunk = min(mask.size, chunk or max(1, WIDE_TILE // words) * devices)
    chunk = -(-chunk // devices) * devices
    count = -(-mask.size // chunk)

    def pieces(flat: Float[Array, "C D"]) -> Float[Array, "m c D"]:
        padded = jnp.pad(flat, ((0, count * chunk - mask.size), (0, 0)))
        return sharding.split(padded.reshape(count, chunk, -1), None, sharding.AXES)

    values = _diverging(
        _Comparison(measure, words, student.config.vocab),
        pieces(student.flat),
        student.kernel,
        (pieces(teacher.flat), teacher.kernel),
        _inverse(temperature),
    )
    return jnp.where(mask > 0, values.reshape(-1)[: mask.size].reshape(mask.shape), 0.0)


def pick(
    values: Float[Array, "... V"], token: Int[Array, "..."]
) -> Float[Array, "..."]:
    """values[…, token] as a masked sum: its gradient needs no scatter."""
    vocabulary = jnp.arange(values.shape[-1])
    return jnp.sum(jnp.where(vocabulary == token[..., None], values, 0.0), axis=-1)


def _kept(voice: Voice, token, temperature, entropy: bool):
    """Log-prob and entropy from logits that stay in memory."""
    logits = voice.logits(voice.states) * _inverse(temperature)
    logs = jax.nn.log_softmax(logits, axis=-1)
    logprob = pick(logs, token)
    if not entropy:
        return logprob, jnp.zeros_like(logprob)
    return logprob, -jnp.sum(jnp.exp(logs) * logs, axis=-1)


def _inverse(temperature) -> Float[Array, ""]:
    return 1 / jax.lax.stop_gradient(jnp.asarray(temperature, jnp.float32))


def _width(tokens: int) -> int:
    """Words of a part, so that its logits of so many tokens fill a tile."""
    near = -(-tokens // sharding.ways(sharding.AXES))
    return max(1, TILE // near // LANES) * LANES


def _logits(
    states: Float[Array, "C D"], kernel: Float[Array, "W D"]
) -> Float[Array, "C W"]:
    kernel = _gathered(kernel, states.dtype)
    return jnp.einsum("nd,wd->nw", states, kernel, preferred_element_type=jnp.float32)


def _gathered(kernel: Float[Array, "W D"], dtype) -> Float[Array, "W D"]:
    """Whole on every device, in the type of the matmuls, which is the smaller one."""
    return sharding.split(kernel.astype(dtype))


@dataclasses.dataclass(frozen=True)
class _Parts:
    """How a vocabulary is walked through.

    Args:
      vocabulary: V.
      width: W, words of a part; the last part is shorter where W does not divide V.
      entropy: whether it is computed on the way.
    """

    vocabulary: int
    width: int
    entropy: bool = False

    def over(self, body, carry):
        """carry ← body(carry, first word, number of words), part by part."""
        count, rest = divmod(self.vocabulary, self.width)

        def part(i, carry):
            return body(carry, i * self.width, self.width)

        if count:
            carry = jax.lax.fori_loop(0, count, part, carry)
        return body(carry, count * self.width, rest) if rest else carry


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _tiled(
    parts: _Parts,
    states: Float[Array, "C D"],
    kernel: Float[Array, "V D"],
    token: Int[Array, "C"],
    inverse: Float[Array, ""],
) -> tuple[Float[Array, "C"], Float[Array, "C"]]:
    """Log-prob of each token and entropy; `inverse` is 1 / T."""
    return _tiled_fwd(parts, states, kernel, token, inverse)[0]


def _tiled_fwd(parts, states, kernel, token, inverse):
    def part(carry, start, width):
        top, total, moment = carry
        z = _logits(states, _rows(kernel, start, width)) * inverse
        best = jnp.maximum(top, z.max(-1))
        shrink = jnp.exp(top - best)
        weight = jnp.exp(z - best[:, None])
        if parts.entropy:  # moment = Σ e^{z − top} (z − top)
            new = jnp.sum(weight * (z - best[:, None]), -1)
            moment = shrink * (moment + (top - best) * total) + new
        return best, shrink * total + weight.sum(-1), moment

    none = jnp.zeros(len(states))
    top, total, moment = parts.over(part, (none - 1e30, none, none))
    spread = jnp.log(total)
    entropy = spread - moment / total if parts.entropy else none
    chosen = sharding.looked_up(kernel[token].astype(states.dtype))
    chosen = jnp.einsum("nd,nd->n", states, chosen, preferred_element_type=jnp.float32)
    logprob = chosen * inverse - top - spread
    return (logprob, entropy), (states, kernel, token, inverse, top + spread, entropy)


def _tiled_bwd(parts, saved, slopes):
    """∂/∂z_v = g (1[v = y] − p_v) − f p_v (log p_v + h), for slopes g, f of log p, h."""
    states, kernel, token, inverse, normalizer, entropy = saved
    g, f = slopes
    constant, linear = -g, -f
    if parts.entropy:
        constant = constant - f * (entropy - normalizer)

    def part(carry, start, width):
        d_states, d_kernel = carry
        rows = _gathered(_rows(kernel, start, width), states.dtype)
        z = _logits(states, rows) * inverse
        slope = constant[:, None]
        if parts.entropy:
            slope = slope + linear[:, None] * z
        slope = jnp.exp(z - normalizer[:, None]) * slope
        # 1 − p before rounding: bfloat16 would lose it where a token is certain.
        said = start + jnp.arange(width) == token[:, None]
        slope = (slope + jnp.where(said, g[:, None], 0.0)) * inverse
        slope = slope.astype(states.dtype)
        d_states += _times(slope, rows)
        d_rows = _turned_times(slope, states)
        return d_states, _put(d_kernel, d_rows, start)

    carry = (jnp.zeros(x.shape, jnp.float32) for x in (states, kernel))
    d_states, d_kernel = parts.over(part, tuple(carry))
    return d_states.astype(states.dtype), d_kernel.astype(kernel.dtype), None, None


_tiled.defvjp(_tiled_fwd, _tiled_bwd)


def _rows(kernel: Float[Array, "V D"], start, width: int) -> Float[Array, "W D"]:
    return jax.lax.dynamic_slice_in_dim(kernel, start, width)


def _put(kernel: Float[Array, "V D"], rows: Float[Array, "W D"], start):
    put = jax.lax.dynamic_update_slice_in_dim(kernel, rows, start, 0)
    return sharding.split(put, None, sharding.HEAD)


def _times(slope: Float[Array, "C W"], rows: Float[Array, "W D"]):
    return jnp.einsum("nw,wd->nd", slope, rows, preferred_element_type=jnp.float32)


def _turned_times(slope: Float[Array, "C W"], states: Float[Array, "C D"]):
    return jnp.einsum("nw,nd->wd", slope, states, preferred_element_type=jnp.float32)


@dataclasses.dataclass(frozen=True)
class _Comparison:
    """A measure of two distributions over the first `words` of a vocabulary."""

    measure: Callable[[Array, Array], Array]
    words: int
    vocabulary: int  # of the student, padding included

    def __call__(self, student: Float[Array, "c V"], teacher, inverse):
        cut = (x[..., : self.words] * inverse for x in (student, teacher))
        return self.measure(*cut)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _diverging(
    comparison: _Comparison,
    states: Float[Array, "m c D"],
    kernel: Float[Array, "V D"],
    teacher: tuple[Float[Array, "m c E"], Float[Array, "U E"]],
    inverse: Float[Array, ""],
) -> Float[Array, "m c"]:
    """The comparison at every token, m chunks one after the other."""

    def chunk(both):
        return comparison(
            _logits(both[0], kernel), _logits(both[1], teacher[1]), inverse
        )

    return jax.lax.map(chunk, (states, teacher[0]))


def _diverging_fwd(comparison, states, kernel, teacher, inverse):
    values = _diverging(comparison, states, kernel, teacher, inverse)
    return values, (states, kernel, teacher, inverse)


def _diverging_bwd(comparison, saved, slopes):
    states, kernel, teacher, inverse = saved
    parts = _Parts(comparison.vocabulary, _width(states.shape[1]))

    def chunk(d_kernel, scanned):
        x, y, g = scanned
        fixed = _logits(y, teacher[1])
        _, pull = jax.vjp(lambda z: comparison(z, fixed, inverse), _logits(x, kernel))
        slope = pull(g)[0].astype(x.dtype)
        d_x = _times(slope, _gathered(kernel, x.dtype))

        def part(d_kernel, start, width):
            near = jax.lax.dynamic_slice_in_dim(slope, start, width, axis=1)
            d_rows = _rows(d_kernel, start, width) + _turned_times(near, x)
            return _put(d_kernel, d_rows, start)

        return parts.over(part, d_kernel), d_x

    d_kernel = jnp.zeros(kernel.shape, jnp.float32)
    d_kernel, d_states = jax.lax.scan(chunk, d_kernel, (states, teacher[0], slopes))
    return d_states.astype(states.dtype), d_kernel.astype(kernel.dtype), None, None


_diverging.defvjp(_diverging_fwd, _diverging_bwd)
