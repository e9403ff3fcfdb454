"""The sampler against the scorer and against the softmax it draws from."""

import dataclasses
import functools
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from skillsd_jax import sampler
from skillsd_jax.models import automaton, qwen, scoring
from skillsd_jax.tokens import TokenView

CONFIG = qwen.ModelConfig(
    vocab=13,
    width=16,
    layers=2,
    heads=4,
    kv_heads=2,
    head_size=4,
    hidden=24,
    tie_embeddings=False,  # tied and untrained, it repeats its last token
)
STOP = 5
SLOTS = 40

apply = jax.jit(qwen.apply, static_argnums=0)
extend = jax.jit(sampler.extend, static_argnums=0)
generate = jax.jit(sampler.generate, static_argnums=(0, 5))
score = jax.jit(scoring.score, static_argnums=0)


@functools.partial(jax.jit, static_argnums=(0, 7), donate_argnums=2)
def turned(config, params, state, tokens, length, ask, temperature, how, guide):
    state = sampler.extend(config, params, state, tokens, length)
    return sampler.generate(config, params, state, ask, temperature, how, guide)


@functools.cache
def params():
    return qwen.init(CONFIG, jax.random.key(0))


def prompts(rows, width, seed=0):
    rng = np.random.default_rng(seed)
    tokens = rng.integers(0, CONFIG.vocab, (rows, width)).astype(np.int32)
    return tokens, rng.integers(1, width + 1, rows).astype(np.int32)


def row_keys(rows, seed=0):
    return jax.random.split(jax.random.key(seed), rows)


def turn(
    state,
    tokens,
    length,
    keys,
    live=None,
    temperature=1.0,
    limit=None,
    guide=None,
    begin=None,
    **how,
):
    live = np.ones(len(length), bool) if live is None else live
    ask = sampler.Ask(keys, live, limit, begin)
    how = sampler.Decoding(**{"max_new": 4, "stop_ids": (STOP,)} | how)
    return turned(CONFIG, params(), state, tokens, length, ask, temperature, how, guide)


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_sampled_logprobs_equal_the_scorer_over_ragged_turns(temperature):
    rows, rng = 5, np.random.default_rng(0)
    state = sampler.start(CONFIG, rows, SLOTS)
    context, sampled = [[] for _ in range(rows)], [[] for _ in range(rows)]
    for step in range(4):
        text, length = prompts(rows, 5, seed=step)
        live = rng.random(rows) < 0.8
        tokens = np.zeros((rows, 6), np.int32)
        fed = np.zeros(rows, np.int32)
        for b in np.flatnonzero(live):
            new = text[b, : length[b]].tolist()
            # the last sampled token was not read yet
            pending = context[b][-1:] if context[b] else []
            fed[b] = len(pending + new)
            tokens[b, : fed[b]] = pending + new
            context[b] += new
        state, reply = turn(state, tokens, fed, row_keys(rows, step), live, temperature)
        for b in range(rows):
            count = int(reply.count[b])
            assert (count > 0) == live[b]
            for token, logprob in zip(reply.tokens[b, :count], reply.logprob[b]):
                sampled[b].append((len(context[b]), float(logprob)))
                context[b].append(int(token))
    width = max(map(len, context))
    assert len({len(c) for c in context}) > 1
    tokens = np.array([c + [0] * (width - len(c)) for c in context], np.int32)
    many = max(map(len, sampled))
    scored, mask = np.ones((rows, many), np.int32), np.zeros((rows, many), np.float32)
    drawn = np.zeros((rows, many))
    for b, pairs in enumerate(sampled):
        scored[b, : len(pairs)] = [t for t, _ in pairs]
        drawn[b, : len(pairs)] = [logprob for _, logprob in pairs]
        mask[b, : len(pairs)] = 1
    view = TokenView(tokens, np.array(list(map(len, context)), np.int32), scored)
    scores = score(CONFIG, params(), view, temperature, mask)
    np.testing.assert_allclose(scores.logprob, drawn, atol=1e-4)


def test_temperature_zero_is_greedy_and_reports_logprobs_at_one():
    rows = 6
    tokens, length = prompts(rows, 5)
    _, reply = turn(
        sampler.start(CONFIG, rows, SLOTS), tokens, length, row_keys(rows), None, 0.0
    )
    for b in range(rows):
        ids = tokens[b, : length[b]].tolist()
        for r in range(int(reply.count[b])):
            padded = np.array([ids + [0] * (SLOTS - len(ids))], np.int32)
            logs = jax.nn.log_softmax(apply(CONFIG, params(), padded)[0, len(ids) - 1])
            assert reply.tokens[b, r] == jnp.argmax(logs)
            np.testing.assert_allclose(reply.logprob[b, r], logs.max(), atol=1e-4)
            ids.append(int(reply.tokens[b, r]))


def test_a_reply_depends_on_its_own_key_alone():
    rows = 6
    tokens, length = prompts(rows, 5)
    keys = row_keys(rows)
    _, together = turn(sampler.start(CONFIG, rows, SLOTS), tokens, length, keys)
    order = np.array([4, 1, 5])
    _, apart = turn(
        sampler.start(CONFIG, 3, SLOTS), tokens[order], length[order], keys[order]
    )
    np.testing.assert_array_equal(apart.tokens, together.tokens[order])
    np.testing.assert_array_equal(apart.count, together.count[order])
    np.testing.assert_allclose(apart.logprob, together.logprob[order], atol=1e-5)
    # and members of a group with one prompt differ
    same = np.tile(tokens[:1], (rows, 1)), np.tile(length[:1], rows)
    _, group = turn(sampler.start(CONFIG, rows, SLOTS), *same, keys)
    assert len({tuple(row.tolist()) for row in np.asarray(group.tokens)}) > 1


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_frequencies_match_the_softmax(temperature):
    """Chi-square of 20,000 first tokens and of as many second ones.

    The seed is fixed, so the outcome is too; a right sampler would fail for one seed in
    ten thousand per case (quantile 0.9999 of 12 degrees of freedom: 39.1).
    """
    rows = 20_000
    tokens, length = np.full((rows, 2), 3, np.int32), np.full(rows, 2, np.int32)
    _, reply = turn(
        sampler.start(CONFIG, rows, 4),
        tokens,
        length,
        row_keys(rows),
        None,
        temperature,
        max_new=2,
        stop_ids=(),
    )
    first, second = np.asarray(reply.tokens).T
    after = np.array([[3, 3, v] for v in range(CONFIG.vocab)], np.int32)
    logits = apply(CONFIG, params(), after) / temperature
    p_first = np.asarray(jax.nn.softmax(logits[0, 1]))
    p_second = p_first @ np.asarray(jax.nn.softmax(logits[:, 2]))
    for drawn, p in ((first, p_first), (second, p_second)):
        count = np.bincount(drawn, minlength=CONFIG.vocab)
        expected = rows * p
        assert expected.min() > 5
        assert ((count - expected) ** 2 / expected).sum() < 39.1


def test_finished_rows_stop_and_the_stop_token_counts():
    rows = 64
    tokens, length = prompts(rows, 4)
    live = np.arange(rows) % 4 != 0
    state = sampler.start(CONFIG, rows, SLOTS)
    state, reply = turn(state, tokens, length, row_keys(rows), live, max_new=6)
    count, drawn = np.asarray(reply.count), np.asarray(reply.tokens)
    assert (count[~live] == 0).all()
    stopped = 0
    for b in np.flatnonzero(live):
        assert STOP not in drawn[b, : count[b] - 1]
        ended = drawn[b, count[b] - 1] == STOP
        stopped += ended
        assert ended or count[b] == 6
        assert (drawn[b, count[b] :] == 0).all()
        assert (np.asarray(reply.logprob)[b, count[b] :] == 0).all()
    assert 0 < stopped < live.sum() and len(set(count)) > 3
    # all but the last sampled token were read
    read = length + np.maximum(count - 1, 0)
    np.testing.assert_array_equal(state.cache.length, read)


def test_decoding_ends_with_the_last_live_row():
    """A loop that ran on would take half a minute of CPU time for 300,000 steps."""
    tokens, length = prompts(2, 4)
    keys, live, many = row_keys(2), np.array([True, False]), 300_000
    _, one = turn(sampler.start(CONFIG, 2, 4), tokens, length, keys, live, max_new=1)
    how = sampler.Decoding(many, (int(one.tokens[0, 0]),))
    state, ask = sampler.start(CONFIG, 2, 4), sampler.Ask(keys, live)
    compiled = turned.lower(
        CONFIG, params(), state, tokens, length, ask, 1.0, how, None
    ).compile()
    began = time.process_time()
    _, reply = compiled(params(), state, tokens, length, ask, 1.0, None)
    assert reply.count.tolist() == [1, 0]
    assert time.process_time() - began < 2


def test_rows_without_new_tokens_stay_as_they_are():
    rows = 3
    tokens, length = prompts(rows, 4)
    before = extend(
        CONFIG, params(), sampler.start(CONFIG, rows, SLOTS), tokens, length
    )
    none, still = np.array([0, 2, 0], np.int32), np.array([0, 2])
    after = extend(CONFIG, params(), before, tokens, none)
    for name in ("keys", "values"):
        for old, new in zip(getattr(before.cache, name), getattr(after.cache, name)):
            np.testing.assert_array_equal(old[still], new[still])
    np.testing.assert_array_equal(before.logits[still], after.logits[still])
    assert np.abs(before.logits[1] - after.logits[1]).max() > 1e-3


def test_a_prompt_read_once_serves_a_group():
    tokens, length = prompts(1, 5)
    one = sampler.start(CONFIG, 1, SLOTS)
    one = extend(CONFIG, params(), one, tokens, length)
    index, keys, live = np.zeros(4, int), row_keys(4), np.ones(4, bool)
    shared = sampler.gather(one, index)
    how = sampler.Decoding(4, (STOP,))
    _, copied = generate(CONFIG, params(), shared, sampler.Ask(keys, live), 1.0, how)
    whole = sampler.start(CONFIG, 4, SLOTS)
    _, read = turn(whole, tokens[index], length[index], keys)
    np.testing.assert_array_equal(copied.tokens, read.tokens)


def test_turn_consumes_its_state_and_compiles_once():
    rows = 4
    state = sampler.start(CONFIG, rows, SLOTS)
    sizes = []
    for step in range(5):
        tokens, length = prompts(rows, 4, seed=step)
        live = np.arange(rows) < 4 - step % 2
        given = state
        state, _ = turn(
            state, tokens, length, row_keys(rows, step), live, 1.0 / (1 + step)
        )
        sizes.append(turned._cache_size())
        assert given.cache.keys[0].is_deleted()
    assert len(set(sizes)) == 1


def test_bfloat16_models_report_float32_logprobs():
    config = dataclasses.replace(CONFIG, dtype="bfloat16")
    tokens, length = prompts(3, 4)
    state = sampler.start(config, 3, SLOTS)
    state = extend(config, params(), state, tokens, length)
    assert state.cache.keys[0].dtype == jnp.bfloat16
    assert state.logits.dtype == jnp.float32
    live = np.ones(3, bool)
    ask, how = sampler.Ask(row_keys(3), live), sampler.Decoding(1, (STOP,))
    _, reply = generate(config, params(), state, ask, 1.0, how)
    logs = np.asarray(jax.nn.log_softmax(state.logits))
    expected = np.take_along_axis(logs, np.asarray(reply.tokens), axis=1)
    np.testing.assert_allclose(reply.logprob, expected, atol=1e-6)


def test_shrinking_changes_nothing_but_the_rows_that_are_computed():
    rows = 16
    tokens, length = prompts(rows, 5)
    live, keys = np.arange(rows) % 5 != 0, row_keys(rows)
    outcomes = []
    for shrink in ((), (8, 4, 2)):
        state = sampler.start(CONFIG, rows, SLOTS)
        state, reply = turn(
            state, tokens, length, keys, live, max_new=12, shrink=shrink
        )
        more = np.full((rows, 1), 7, np.int32)
        state = extend(CONFIG, params(), state, more, np.ones(rows, np.int32))
        outcomes.append((reply, state.logits, state.cache.length))
    (plain, logits, read), (shrunk, same_logits, same_read) = outcomes
    assert len(set(np.asarray(plain.count).tolist())) > 4  # rows end one by one
    np.testing.assert_array_equal(plain.tokens, shrunk.tokens)
    np.testing.assert_array_equal(plain.count, shrunk.count)
    np.testing.assert_array_equal(read, same_read)
    np.testing.assert_allclose(plain.logprob, shrunk.logprob, atol=1e-5)
    # and the caches hold the same: what is read next is answered alike
    np.testing.assert_allclose(logits, same_logits, atol=1e-5)


def test_a_row_stops_at_its_own_limit():
    rows = 8
    tokens, length = prompts(rows, 4)
    limit = np.array([0, 1, 2, 3, 4, 5, 6, 99], np.int32)
    state = sampler.start(CONFIG, rows, SLOTS)
    _, reply = turn(
        state, tokens, length, row_keys(rows), limit=limit, max_new=6, stop_ids=()
    )
    assert reply.count.tolist() == [0, 1, 2, 3, 4, 5, 6, 6]


def test_any_of_several_stop_ids_ends_a_reply():
    rows = 64
    tokens, length = prompts(rows, 4)
    state = sampler.start(CONFIG, rows, SLOTS)
    _, reply = turn(
        state, tokens, length, row_keys(rows), max_new=9, stop_ids=(STOP, 2)
    )
    last = np.asarray(reply.tokens)[np.arange(rows), np.asarray(reply.count) - 1]
    full = np.asarray(reply.count) == 9
    assert set(last[~full].tolist()) == {STOP, 2}
    for row, count in zip(np.asarray(reply.tokens), np.asarray(reply.count)):
        assert not {STOP, 2} & set(row[: count - 1].tolist())


def truncated(p, top_k, top_p):
    """The distribution that top-k, then top-p leave of `p`, word by word."""
    order, kept, before = np.argsort(-p), [], 0.0
    allowed = order[: top_k or len(p)]
    for word in allowed:
        if before < top_p:
            kept.append(word)
        before += p[word] / p[allowed].sum()
    out = np.zeros_like(p)
    out[kept] = p[kept] / p[kept].sum()
    return out


@pytest.mark.parametrize(("top_k", "top_p"), [(4, 1.0), (0, 0.6), (5, 0.7), (1, 1.0)])
def test_log_probs_are_those_of_the_words_that_could_be_drawn(top_k, top_p):
    """Chi-square of 20,000 draws: false alarm once in ten thousand per case.

    (Quantile 0.9999 of at most 4 degrees of freedom: 23.5.)
    """
    rows = 20_000
    tokens, length = np.full((rows, 2), 3, np.int32), np.full(rows, 2, np.int32)
    state = sampler.start(CONFIG, rows, 4)
    how = {"max_new": 1, "stop_ids": (), "top_k": top_k, "top_p": top_p}
    _, reply = turn(state, tokens, length, row_keys(rows), None, 0.9, **how)
    logits = apply(CONFIG, params(), tokens[:1])[0, 1] / 0.9
    expected = truncated(np.asarray(jax.nn.softmax(logits)), top_k, top_p)
    drawn = np.asarray(reply.tokens)[:, 0]
    assert set(drawn.tolist()) <= set(np.flatnonzero(expected).tolist())
    np.testing.assert_allclose(
        np.asarray(reply.logprob)[:, 0], np.log(expected[drawn]), atol=1e-5
    )
    kept = expected > 0
    count = np.bincount(drawn, minlength=CONFIG.vocab)[kept]
    wanted = rows * expected[kept]
    assert ((count - wanted) ** 2 / wanted).sum() < 23.5


@pytest.mark.parametrize(
    "wrong", [{"max_new": 0}, {"top_k": -1}, {"top_p": 0.0}, {"shrink": (2, 4)}]
)
def test_settings_of_decoding_that_make_no_sense_are_refused(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        sampler.Decoding(**{"max_new": 4} | wrong)


def draws(logits, rows, temperature=1.0, seed=0):
    """(words, log-probs) of `rows` draws by inversion."""

    def invert(keys, logits):
        return sampler._invert(keys, logits, jnp.asarray(temperature) == 0)

    wide = np.broadcast_to(logits, (rows, len(logits)))
    return map(np.asarray, jax.jit(invert)(row_keys(rows, seed), wide))


@pytest.mark.parametrize("words", [13, 128, 300])
def test_inversion_draws_from_the_softmax(words):
    """Chi-square of 50,000 draws; rare words are counted together.

    False alarm for one seed in ten thousand per case: with k bins the quantile 0.9999
    lies below k + 4 √(2 k) + 12.
    """
    rng, rows = np.random.default_rng(words), 50_000
    logits = (2 * rng.normal(size=words)).astype(np.float32)
    logits[3] = -np.inf
    p = np.asarray(jax.nn.softmax(logits), np.float64)
    drawn, logprob = draws(logits, rows)
    assert 3 not in drawn
    np.testing.assert_allclose(logprob, np.log(p[drawn]), atol=1e-5)
    often = rows * p > 10
    count = np.bincount(drawn, minlength=words)
    seen = np.append(count[often], count[~often].sum())
    wanted = np.append(rows * p[often], rows * p[~often].sum())
    seen, wanted = seen[wanted > 10], wanted[wanted > 10]
    bins = len(seen)
    chi_square = ((seen - wanted) ** 2 / wanted).sum()
    assert chi_square < bins + 4 * np.sqrt(2 * bins) + 12


def test_inversion_is_greedy_at_temperature_zero():
    logits = np.random.default_rng(0).normal(size=700).astype(np.float32)
    drawn, logprob = draws(logits, 5, temperature=0.0)
    assert set(drawn.tolist()) == {int(logits.argmax())}
    top = np.asarray(jax.nn.log_softmax(logits)).max()
    np.testing.assert_allclose(logprob, top, atol=1e-5)


def test_a_word_that_is_ruled_out_is_never_drawn_however_long_the_sums():
    """Rounding lets a cumulative sum over 1187 places rise where nothing is added."""
    words, rng = 151_936, np.random.default_rng(0)
    logits = np.full(words, -np.inf, np.float32)
    kept = rng.choice(words, 4000, replace=False)
    logits[kept] = rng.normal(size=4000)
    # Numbers that land right behind a word's own stretch, where there is one.
    wide = jnp.asarray(np.broadcast_to(logits, (32, words)))
    invert = jax.jit(lambda keys: sampler._invert(keys, wide, jnp.asarray(False)))
    for seed in range(8):
        drawn, logprob = map(np.asarray, invert(row_keys(32, seed)))
        assert np.isin(drawn, kept).all() and np.isfinite(logprob).all()


def test_large_vocabularies_are_drawn_from_by_inversion():
    """One word of 5,000 holds half of the weight; 400 draws, 7 deviations."""
    words, rows = 5000, 400
    logits = np.zeros((rows, words), np.float32)
    logits[:, 4321] = np.log(words - 1)
    how = sampler.Decoding(1)
    draw = jax.jit(lambda keys: sampler._draw(how, keys, logits, 1.0))
    drawn, logprob = map(np.asarray, draw(row_keys(rows)))
    half = drawn == 4321
    assert abs(half.mean() - 0.5) < 7 * 0.5 / np.sqrt(rows)
    np.testing.assert_allclose(logprob[half], np.log(0.5), atol=1e-4)
    assert len(set(drawn[~half].tolist())) > 150


PIECES = [b"", *(bytes([letter]) for letter in b"abcd"), b"", *(b"ab bc ca".split())]
PIECES += [b""] * (CONFIG.vocab - len(PIECES))


def said(reply):
    """The replies as bytes and as ids, without padding."""
    for row, count in zip(np.asarray(reply.tokens), np.asarray(reply.count)):
        ids = row[:count].tolist()
        yield b"".join(PIECES[token] for token in ids), ids


@pytest.mark.parametrize("shrink", [(), (32, 8)])
def test_a_reply_ends_where_it_says_a_stop_text(shrink):
    rows = 64
    tokens, length = prompts(rows, 4)
    guide = automaton.stopping(PIECES, ["ca", "bb"])
    state = sampler.start(CONFIG, rows, SLOTS)
    how = {"max_new": 20, "shrink": shrink, "guide": guide, "stop_ids": ()}
    _, reply = turn(state, tokens, length, row_keys(rows), **how)
    ended = 0
    for text, ids in said(reply):
        before = b"".join(PIECES[token] for token in ids[:-1])
        assert b"ca" not in before and b"bb" not in before
        assert b"ca" in text or b"bb" in text or len(ids) == 20
        ended += len(ids) < 20
    assert 16 < ended < rows


def test_a_reply_is_one_of_its_own_choices_and_its_log_probs_those_of_the_rest():
    rows = 48
    tokens, length = prompts(1, 4)
    tokens, length = np.tile(tokens, (rows, 1)), np.tile(length, rows)
    languages = ["abc", "cab"], ["d"], ["bca", "bcad", "a"]
    guide, starts = automaton.stack(
        [automaton.choices(PIECES, texts, STOP) for texts in languages]
    )
    begin = np.array(starts, np.int32)[np.arange(rows) % 3]
    state = sampler.start(CONFIG, rows, SLOTS)
    _, reply = turn(
        state, tokens, length, row_keys(rows), max_new=9, guide=guide, begin=begin
    )
    spoken = [set(), set(), set()]
    for row, (text, ids) in enumerate(said(reply)):
        assert ids[-1] == STOP
        spoken[row % 3].add(text.decode())
        if row % 3 == 1:  # a single way to say it
            np.testing.assert_allclose(reply.logprob[row], 0, atol=1e-6)
    assert spoken == [set(texts) for texts in languages]
    # The first word of the third language: its probability among a, b and bc.
    logits = apply(CONFIG, params(), tokens[:1, : length[0]])[0, -1]
    open_to = np.array([1, 2, PIECES.index(b"bc")])
    logs = dict(zip(open_to.tolist(), jax.nn.log_softmax(logits[open_to]).tolist()))
    for row in range(2, rows, 3):
        first = int(reply.tokens[row, 0])
        assert float(reply.logprob[row, 0]) == pytest.approx(logs[first], abs=1e-5)
