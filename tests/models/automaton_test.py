"""Automata against a search of the text itself."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from skillsd_jax.models import automaton

ALPHABET = "abé"  # é is two bytes
PIECES = [b"", b"a", b"b", b"ab", b"ba", b"\xc3", b"\xa9", "é".encode(), b"aab", b"bb"]
STOP = 0


def draw_texts(rng, count):
    sizes = rng.integers(1, 5, count)
    return ["".join(rng.choice(list(ALPHABET), n)) for n in sizes]


def walk(machine, tokens):
    """Tokens until the reply is over, all if it is not."""
    state = 0
    for place, token in enumerate(tokens):
        state = int(machine.next[state, token])
        if machine.final[state]:
            return place + 1
    return None


@pytest.mark.parametrize("seed", range(8))
def test_a_reply_ends_with_the_token_that_completes_a_text(seed):
    rng = np.random.default_rng(seed)
    texts = draw_texts(rng, 3)
    machine = automaton.stopping(PIECES, texts)
    ended = 0
    for _ in range(200):
        tokens = rng.integers(0, len(PIECES), 12)
        expected = None
        for place in range(len(tokens)):
            said = b"".join(PIECES[token] for token in tokens[: place + 1])
            if any(text.encode() in said for text in texts):
                expected = place + 1
                break
        assert walk(machine, tokens) == expected
        ended += expected is not None
    assert 10 < ended


@pytest.mark.parametrize("seed", range(4))
def test_what_may_be_drawn_is_exactly_the_choices(seed):
    texts = draw_texts(np.random.default_rng(seed), 4)
    machine = automaton.choices(PIECES, texts, STOP)
    next_, allowed = np.asarray(machine.next), np.asarray(machine.allowed)
    said = set()
    for length in range(1, 6):
        for tokens in itertools.product(range(len(PIECES)), repeat=length):
            state = 0
            for token in tokens:
                if not allowed[state, token] or machine.final[state]:
                    break
                state = next_[state, token]
            else:
                if machine.final[state]:
                    assert tokens[-1] == STOP
                    said.add(b"".join(PIECES[t] for t in tokens).decode())
    assert said == set(texts)


def test_every_token_that_may_be_drawn_leaves_a_way_to_the_end():
    """'b' alone would be one: no token spells the second byte of é."""
    pieces = [b"", b"a", b"ab", "bé".encode(), b"b", b"\xc3"]
    machine = automaton.choices(pieces, ["abé", "ab"], STOP)
    allowed, next_ = np.asarray(machine.allowed), np.asarray(machine.next)
    assert allowed[0].tolist() == [False, True, True, False, False, False]
    after_a = next_[0, 1]
    assert allowed[after_a].tolist() == [False, False, False, True, True, False]
    after_ab = next_[0, 2]
    assert allowed[after_ab].tolist() == [True, False, False, False, False, False]
    reached = automaton._reached(next_, allowed)
    assert not reached[3] and allowed[reached].any(1).all()  # 3: half of é


def test_masked_logits_are_a_distribution_over_the_rest():
    machine = automaton.choices(PIECES, ["ab", "ba"], STOP)
    logits = jax.random.normal(jax.random.key(0), (2, len(PIECES)))
    state = jnp.array([0, machine.next[0, 1]])
    logs = jax.nn.log_softmax(automaton.mask(machine, logits, state))
    p = np.exp(np.asarray(logs))
    np.testing.assert_allclose(p.sum(1), 1, rtol=1e-6)
    assert (p[~np.asarray(machine.allowed)[state]] == 0).all()
    plain = automaton.stopping(PIECES, ["ab"])
    assert automaton.mask(plain, logits, state) is logits


def test_stacked_languages_keep_to_themselves():
    languages = [
        automaton.choices(PIECES, ["ab"], STOP),
        automaton.choices(PIECES, ["ba", "é"], STOP),
        automaton.stopping(PIECES, ["bb"]),
    ]
    stacked, starts = automaton.stack(languages)
    rng = np.random.default_rng(0)
    for start, machine in zip(starts, languages):
        state, alone = jnp.array([start]), jnp.array([0])
        for token in rng.integers(0, len(PIECES), 30):
            logits = jnp.zeros((1, len(PIECES)))
            np.testing.assert_array_equal(
                automaton.mask(stacked, logits, state),
                automaton.mask(machine, logits, alone),
            )
            token = jnp.array([token])
            state = automaton.advance(stacked, state, token)
            alone = automaton.advance(machine, alone, token)
            assert automaton.ended(stacked, state) == automaton.ended(machine, alone)


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        ([], "must name texts"),
        (["ab", ""], "none of them empty"),
        (["ab", "ac"], "cannot spell 'ac'"),
    ],
)
def test_what_cannot_be_a_choice_is_refused(texts, message):
    with pytest.raises(ValueError, match=message):
        automaton.choices(PIECES, texts, STOP)


def test_a_table_that_would_not_fit_is_refused(monkeypatch):
    monkeypatch.setattr(automaton, "LARGEST", 30)
    with pytest.raises(ValueError, match="5 states × 10 tokens are more than 30"):
        automaton.stopping(PIECES, ["aba"])
