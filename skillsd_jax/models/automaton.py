"""Stop texts and constrained replies, followed on the device token by token.

Text is bytes here. An automaton is built on the host from what each token adds to the
text (`Tokenizer.pieces`), however a text is cut into tokens, inside of a character too;
on the device a step is one gather per row.

Tables are numpy arrays: `jax.device_put` an automaton that is used more than once.
"""

import dataclasses
from collections.abc import Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

ENTRIES = 1 << 28  # Q · V at most; an entry takes 2 or 4 bytes, 1 more if constrained


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Automaton:
    """State 0 is the start.

    Args:
      next: state after a token; a token that is not allowed leaves it as it is.
      final: the reply ends on entering such a state; no token leaves it.
      allowed: tokens that may be drawn; None: every token, in every state.
    """

    next: Int[Array, "Q V"]
    final: Bool[Array, "Q"]
    allowed: Bool[Array, "Q V"] | None


def stopping(pieces: Sequence[bytes], texts: Sequence[str]) -> Automaton:
    """Ends a reply with the token in which the first of `texts` is complete.

    It may be spread over tokens and end inside of one. Tokens without text, such as the
    stop token, leave the state as it is.

    Args:
      pieces: what each token adds to the text; as many as the model has rows.

    Raises:
      ValueError: no texts, an empty one, or too large a table (`ENTRIES`).

    Source: Aho and Corasick 1975, Efficient string matching, over UTF-8 bytes.
    """
    step = _matcher(_encoded(texts))
    _check_size(len(step), len(pieces))
    length = np.array([len(piece) for piece in pieces], int)
    longest_first = np.argsort(-length, kind="stable")
    start = np.cumsum(length) - length
    text = np.frombuffer(b"".join(pieces), np.uint8)
    # All states at once: reached[q, k] after the first bytes of the k-th longest piece.
    reached = np.repeat(_states(len(step))[:, None], len(pieces), axis=1)
    for n in range(max(length, default=0)):
        more = longest_first[: np.count_nonzero(length > n)]
        reached[:, : len(more)] = step[reached[:, : len(more)], text[start[more] + n]]
    table = np.empty_like(reached)
    table[:, longest_first] = reached
    final = np.arange(len(step)) == len(step) - 1
    return Automaton(next=table, final=final, allowed=None)


def choices(pieces: Sequence[bytes], texts: Sequence[str], stop_id: int) -> Automaton:
    """Lets a reply be one of `texts` and then `stop_id`, and nothing else.

    A token may be drawn if it keeps the reply the beginning of a text that tokens can
    complete, whether or not `Tokenizer.encode` would cut the text there. Tokens without
    text are never drawn. One text may begin another. Of the texts together, states are
    the beginnings that go on differently; Q times the vocabulary is bounded by
    `ENTRIES`: 1766 states for Qwen's 151936 rows.

    Args:
      pieces: what each token adds to the text; as many as the model has rows.
      stop_id: may be drawn where a text is complete; what it spells does not count.

    Raises:
      ValueError: no texts, an empty one, one that the pieces cannot spell, or too large
        a table.
    """
    if not 0 <= stop_id < len(pieces):
        raise ValueError(f"stop_id={stop_id} is not among {len(pieces)} pieces")
    encoded = _encoded(texts)
    longest = max(map(len, pieces))
    ids: dict[bytes, list[int]] = {}
    for id, piece in enumerate(pieces):
        if id != stop_id:
            ids.setdefault(piece, []).append(id)
    for text in sorted(encoded):
        if not _spellable(text, ids, longest):
            raise ValueError(
                f"no tokens spell {text.decode()!r}; leave it out, or use a tokenizer "
                "with a token for every byte"
            )
    onward, whole = _graph(encoded)
    end = len(onward)
    _check_size(end + 1, len(pieces))
    table = np.repeat(_states(end + 1)[:, None], len(pieces), axis=1)
    allowed = np.zeros(table.shape, bool)
    for state in reversed(range(end)):  # what follows a state has a larger number
        if whole[state]:
            table[state, stop_id], allowed[state, stop_id] = end, True
        for piece, after in _walks(onward, state, longest):
            if piece in ids and allowed[after].any():
                table[state, ids[piece]], allowed[state, ids[piece]] = after, True
    return Automaton(next=table, final=np.arange(end + 1) == end, allowed=allowed)


def stack(
    automata: Sequence[Automaton], states: int | None = None
) -> tuple[Automaton, Int[np.ndarray, "C"]]:
    """Several automata as one, so that each row of a batch may follow its own.

    Args:
      automata: of the same vocabulary.
      states: Q of the result, for a shape that does not change; as few as needed if
        None.

    Returns:
      The automaton, and the state in which each of `automata` starts there.

    Raises:
      ValueError: nothing to stack, vocabularies of different sizes, more than `states`
        states, or too large a table.
    """
    sizes = [len(automaton.final) for automaton in automata]
    words = {automaton.next.shape[1] for automaton in automata}
    if len(words) != 1:
        raise ValueError(f"automata of one vocabulary are needed, not of {words}")
    total = sum(sizes) if states is None else states
    if total < sum(sizes):
        raise ValueError(f"{sum(sizes)} states do not fit states={states}")
    _check_size(total, max(words))
    table = np.repeat(_states(total)[:, None], max(words), axis=1)
    allowed = np.ones(table.shape, bool)
    final = np.zeros(total, bool)
    starts = np.cumsum(sizes, dtype=np.int32) - np.array(sizes, np.int32)
    for start, size, automaton in zip(starts, sizes, automata):
        own = slice(start, start + size)
        table[own] = np.asarray(automaton.next) + start
        final[own] = automaton.final
        if automaton.allowed is not None:
            allowed[own] = automaton.allowed
    free = all(automaton.allowed is None for automaton in automata)
    return Automaton(table, final, None if free else allowed), starts


def advance(
    automaton: Automaton, state: Int[Array, "B"], token: Int[Array, "B"]
) -> Int[Array, "B"]:
    """The states after a token each, int32."""
    return jnp.asarray(automaton.next)[state, token].astype(jnp.int32)


def mask(
    automaton: Automaton, logits: Float[Array, "B V"], state: Int[Array, "B"]
) -> Float[Array, "B V"]:
    """Logits of the allowed tokens; −∞ for the others, which have probability 0.

    log_softmax of the result is the distribution that is sampled, and finite for every
    token that can be drawn; p · log p of a forbidden token is NaN. A state in which
    nothing is allowed, as after the end, leaves a row as it is.
    """
    if automaton.allowed is None:
        return logits
    allowed = jnp.asarray(automaton.allowed)[state]
    allowed |= ~allowed.any(-1, keepdims=True)
    return jnp.where(allowed, logits, -jnp.inf)


def ended(automaton: Automaton, state: Int[Array, "B"]) -> Bool[Array, "B"]:
    """Rows whose reply has come to its end."""
    return jnp.asarray(automaton.final)[state]


def _encoded(texts: Sequence[str]) -> set[bytes]:
    encoded = {text.encode() for text in texts}
    if not encoded or b"" in encoded:
        raise ValueError(f"texts of a character or more are needed, not {list(texts)}")
    return encoded


def _check_size(states: int, words: int) -> None:
    if states * words > ENTRIES:
        raise ValueError(
            f"{states} states of {words} words are more than {ENTRIES} entries; pass "
            "fewer or shorter texts"
        )


def _states(count: int) -> Int[np.ndarray, "Q"]:
    """Numbers of states, in the type of a table."""
    small = count <= np.iinfo(np.int16).max
    return np.arange(count, dtype=np.int16 if small else np.int32)


def _beginnings(texts: set[bytes]) -> list[bytes]:
    """Each once, b"" and the texts included, shortest first."""
    found = {text[:n] for text in texts for n in range(len(text) + 1)}
    return sorted(found, key=lambda beginning: (len(beginning), beginning))


def _matcher(texts: set[bytes]) -> Int[np.ndarray, "Q 256"]:
    """State after a byte; 0 is the start, and in the last state a text was found.

    A state is the longest beginning of a text that the bytes so far end with.
    """
    beginnings = [b for b in _beginnings(texts) if not any(t in b for t in texts)]
    number = {beginning: state for state, beginning in enumerate(beginnings)}
    found = len(beginnings)
    step = np.zeros((found + 1, 256), _states(found + 1).dtype)
    step[found] = found
    for beginning, state in number.items():
        # Where no text goes on, the longest beginning that ends this one decides.
        shorter = 0
        for byte in beginning[1:]:
            shorter = step[shorter, byte]
        if beginning:
            step[state] = step[shorter]
        for text in texts:
            if text.startswith(beginning):
                longer = text[: len(beginning) + 1]
                step[state, longer[-1]] = number.get(longer, found)
    return step


def _graph(texts: set[bytes]) -> tuple[list[dict[int, int]], list[bool]]:
    """The least acyclic automaton that accepts exactly `texts`, over bytes.

    Returns:
      Per state the state after each byte that goes on, which has a larger number; and
      whether a text is complete. State 0 is the start.
    """
    onward: dict[bytes, dict[int, bytes]] = {b: {} for b in _beginnings(texts)}
    for beginning in onward:
        if beginning:
            onward[beginning[:-1]][beginning[-1]] = beginning
    number: dict[bytes, int] = {}
    seen: dict[tuple, int] = {}  # beginnings that go on alike are one state
    for beginning in reversed(onward):
        edges = ((byte, number[longer]) for byte, longer in onward[beginning].items())
        alike = (beginning in texts, tuple(sorted(edges)))
        number[beginning] = seen.setdefault(alike, len(seen))
    last = len(seen) - 1
    states = [(whole, {b: last - s for b, s in edges}) for whole, edges in seen]
    states.reverse()
    return [edges for _, edges in states], [whole for whole, _ in states]


def _walks(
    onward: list[dict[int, int]], state: int, longest: int
) -> Iterator[tuple[bytes, int]]:
    """Bytes that go on from a state, at most `longest`, and the state after them."""
    todo = [(b"", state)]
    while todo:
        walked, state = todo.pop()
        if walked:
            yield walked, state
        if len(walked) < longest:
            todo += [(walked + bytes([b]), to) for b, to in onward[state].items()]


def _spellable(text: bytes, ids: dict[bytes, list[int]], longest: int) -> bool:
    """Whether some sequence of pieces, of `longest` bytes at most, joins to the text."""
    reached = [True] + [False] * len(text)
    for end in range(1, len(text) + 1):
        starts = range(max(0, end - longest), end)
        reached[end] = any(reached[a] and text[a:end] in ids for a in starts)
    return reached[-1]
