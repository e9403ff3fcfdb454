"""Automata over tokens: they follow the text of a reply while the device draws it."""

import dataclasses
from collections import deque
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

LARGEST = 2**28  # entries of a table: states × vocabulary


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Automaton:
    """A reply begins in state 0, or in that of its language (see `stack`).

    Args:
      next: state after a token.
      final: states that end the reply when they are entered.
      allowed: tokens that may be drawn; None: every one, everywhere.
    """

    next: Int[Array, "Q V"]
    final: Bool[Array, "Q"]
    allowed: Bool[Array, "Q V"] | None = None


def advance(
    automaton: Automaton, state: Int[Array, "B"], token: Int[Array, "B"]
) -> Int[Array, "B"]:
    """The states after one more token."""
    return automaton.next[state, token].astype(state.dtype)


def mask(
    automaton: Automaton, logits: Float[Array, "B V"], state: Int[Array, "B"]
) -> Float[Array, "B V"]:
    """−∞ for what may not be drawn: its softmax is that of the rest."""
    if automaton.allowed is None:
        return logits
    return jnp.where(automaton.allowed[state], logits, -jnp.inf)


def ended(automaton: Automaton, state: Int[Array, "B"]) -> Bool[Array, "B"]:
    """Whether the reply is over."""
    return automaton.final[state]


def stopping(pieces: Sequence[bytes], texts: Sequence[str]) -> Automaton:
    """Ends a reply with the token that completes one of `texts`, wherever it began.

    Args:
      pieces: bytes that each token adds; none for control tokens, which leave the state
        as it is.
      texts: none of them empty.
    """
    words = _encoded(texts)
    step, complete = _aho_corasick(words)
    found = len(step)  # a state of its own, for good
    step = np.where(complete[step], found, step)
    step = np.concatenate([step, np.full((1, 256), found)])
    table = _over_tokens(step, pieces)
    final = np.arange(found + 1) == found
    return Automaton(jnp.asarray(table), jnp.asarray(final))


def choices(pieces: Sequence[bytes], texts: Sequence[str], stop_id: int) -> Automaton:
    """The reply is one of `texts`, however it is cut into tokens, then the stop token.

    Args:
      pieces: bytes that each token adds; those that add none are never drawn.
      texts: none of them empty.
      stop_id: of the token that ends the reply.

    Raises:
      ValueError: no texts, an empty one, or one the tokens cannot spell.
    """
    words = _encoded(texts)
    step, complete = _trie(words)
    ending, dead = len(step), len(step) + 1
    step = np.where(step < 0, dead, step)
    step = np.concatenate([step, np.full((2, 256), dead)])
    table = _over_tokens(step, pieces)
    silent = np.array([not piece for piece in pieces])
    table[:, silent] = dead
    table[:ending, stop_id] = np.where(complete, ending, dead)
    allowed = table != dead
    alive = _leading_to(table, allowed, ending)
    allowed &= alive[table]
    reached = _reached(table, allowed)
    for word, text in zip(words, texts):
        state = 0
        for byte in word:
            state = step[state, byte]
        if not reached[state]:
            raise ValueError(f"the vocabulary cannot spell {text!r}")
    allowed[ending:] = True  # nobody is drawn for there
    final = np.arange(len(table)) == ending
    return Automaton(*map(jnp.asarray, (table, final, allowed)))


def stack(automata: Sequence[Automaton]) -> tuple[Automaton, list[int]]:
    """Several languages in one batch, and the state in which each of them begins."""
    starts, tables, count = [], [], 0
    for each in automata:
        starts.append(count)
        tables.append(np.asarray(each.next, np.int32) + count)
        count += len(tables[-1])
    allowed = None
    if any(each.allowed is not None for each in automata):
        parts = [
            np.ones(each.next.shape, bool) if each.allowed is None else each.allowed
            for each in automata
        ]
        allowed = jnp.concatenate(parts)
    final = jnp.concatenate([each.final for each in automata])
    return Automaton(jnp.asarray(np.concatenate(tables)), final, allowed), starts


def _encoded(texts: Sequence[str]) -> list[bytes]:
    if not texts or not all(texts):
        raise ValueError(f"texts={list(texts)!r} must name texts, none of them empty")
    return [text.encode() for text in texts]


def _trie(words: Sequence[bytes]) -> tuple[np.ndarray, np.ndarray]:
    """Node after a byte [Q, 256], −1 where there is none, and where a word is complete."""
    step, complete = [[-1] * 256], [False]
    for word in words:
        node = 0
        for byte in word:
            if step[node][byte] < 0:
                step[node][byte] = len(step)
                step.append([-1] * 256)
                complete.append(False)
            node = step[node][byte]
        complete[node] = True
    return np.array(step), np.array(complete)


def _aho_corasick(words: Sequence[bytes]) -> tuple[np.ndarray, np.ndarray]:
    """The trie with every missing step replaced by that of the longest suffix."""
    step, complete = _trie(words)
    suffix = np.zeros(len(step), int)
    waiting = deque([0])
    while waiting:
        node = waiting.popleft()
        back = suffix[node]
        complete[node] |= complete[back]
        for byte in range(256):
            child = step[node, byte]
            if child < 0:
                step[node, byte] = step[back, byte] if node else 0
            else:
                suffix[child] = step[back, byte] if node else 0
                waiting.append(child)
    return step, complete


def _over_tokens(step: np.ndarray, pieces: Sequence[bytes]) -> np.ndarray:
    """From a table over bytes [Q, 256] to one over tokens [Q, V].

    Raises:
      ValueError: the table would be too large.
    """
    states, words = len(step), len(pieces)
    if states * words > LARGEST:
        raise ValueError(
            f"{states} states × {words} tokens are more than {LARGEST} entries; give "
            "fewer or shorter texts"
        )
    lengths = np.array([len(piece) for piece in pieces])
    order = np.argsort(-lengths, kind="stable")
    table = np.tile(np.arange(states)[:, None], (1, words))
    for place in range(lengths.max(initial=0)):
        longer = order[: np.searchsorted(-lengths[order], -place)]
        byte = np.array([pieces[v][place] for v in longer])
        table[:, longer] = step[table[:, longer], byte]
    return table.astype(np.int16 if states < 2**15 else np.int32)


def _leading_to(table: np.ndarray, allowed: np.ndarray, target: int) -> np.ndarray:
    """States from which allowed tokens lead to `target`."""
    alive = np.arange(len(table)) == target
    while True:
        more = alive | (allowed & alive[table]).any(1)
        if (more == alive).all():
            return alive
        alive = more


def _reached(table: np.ndarray, allowed: np.ndarray) -> np.ndarray:
    """States that allowed tokens reach from state 0."""
    reached = np.arange(len(table)) == 0
    while True:
        more = reached.copy()
        more[np.unique(table[reached][allowed[reached]])] = True
        if (more == reached).all():
            return reached
        reached = more
