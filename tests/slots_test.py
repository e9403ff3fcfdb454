"""Rows that keep what they have read: they say what a reader of everything would say."""

import dataclasses
import functools

import jax
import numpy as np
import pytest

from skillsd_jax import sampler, slots, timing
from skillsd_jax.models import qwen, scoring
from skillsd_jax.tokens import TokenView

CONFIG = qwen.ModelConfig(
    vocab=23,
    width=16,
    layers=2,
    heads=4,
    kv_heads=2,
    head_size=4,
    hidden=24,
    tie_embeddings=False,
)
STOP, ROWS, LIMIT, WINDOW = 5, 16, 7, 600

score = jax.jit(scoring.score, static_argnums=0)


@functools.cache
def params():
    return qwen.init(CONFIG, jax.random.key(0))


def speaker(room, seed=0, temperature=1.0):
    how = sampler.Decoding(LIMIT, (STOP,), shrink=room.shrink)
    weights = jax.jit(qwen.unstack, static_argnums=0)(CONFIG, params())
    key = jax.random.key(seed)
    return slots.Voice(CONFIG, weights, how, key, temperature)


def make(rows=ROWS, window=WINDOW, seed=0, temperature=1.0):
    room = slots.Room(rows, window)
    return slots.Slots(speaker(room, seed, temperature), room)


def words(rng, most, least=1):
    return rng.integers(0, CONFIG.vocab, rng.integers(least, most + 1)).astype(np.int32)


def ask(slot, context, episode, turn, limit=LIMIT):
    return slots.Ask(slot, np.asarray(context, np.int32), episode, turn, limit)


def logprobs(context, reply, temperature):
    """What the scorer gives the reply's tokens after the context."""
    whole = np.zeros((1, WINDOW), np.int32)
    scored, mask = np.ones((1, LIMIT), np.int32), np.zeros((1, LIMIT), np.float32)
    total = len(context) + len(reply)
    whole[0, :total] = [*context, *reply]
    scored[0, : len(reply)] = np.arange(len(context), total)
    mask[0, : len(reply)] = 1
    view = TokenView(whole, np.array([total], np.int32), scored)
    found = score(CONFIG, params(), view, temperature, mask)
    return np.asarray(found.logprob)[0, : len(reply)]


def play(voice, episodes, rng, temperature=1.0):
    """Ragged whole histories whose slots go from episode to episode.

    Yields (context, ids, log-probs) of every reply.
    """
    waiting = list(range(episodes))[::-1]
    live: dict[int, list] = {}
    while waiting or live:
        for slot in range(ROWS):
            if slot not in live and waiting:
                live[slot] = [waiting.pop(), 0, words(rng, 60, 5)]
        asks = [ask(s, c, e, t) for s, (e, t, c) in live.items()]
        for one, (ids, values) in zip(asks, voice.ask(asks).result()):
            yield one.context, ids, values
            episode, turn, context = live.pop(one.slot)
            if rng.random() < 0.8:
                new = np.concatenate([context, ids, words(rng, 30)])
                live[one.slot] = [episode, turn + 1, new]
                if len(new) + LIMIT > WINDOW:
                    del live[one.slot]


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_log_probs_equal_the_scorers_over_turns_and_reused_slots(temperature):
    voice = make(temperature=temperature)
    spoken = list(play(voice, 3 * ROWS, np.random.default_rng(0), temperature))
    longest = max(len(context) for context, _, _ in spoken)
    assert longest > 256 and voice.state.cache.slots > 256  # the cache has grown
    for context, ids, values in spoken[::7]:
        expected = logprobs(context, ids, temperature)
        np.testing.assert_allclose(values, expected, atol=1e-4)


def test_a_turn_reads_only_what_is_new():
    voice, rng = make(), np.random.default_rng(1)
    context = words(rng, 100, 100)
    ((ids, _),) = voice.ask([ask(3, context, 0, 0)]).result()
    assert voice.read == 100
    longer = np.concatenate([context, ids, words(rng, 9, 9)])
    voice.ask([ask(3, longer, 0, 1)]).result()
    # nine new words, and the reply's last token, which was drawn and not read
    assert voice.read == 100 + 1 + 9
    other = np.concatenate([context[:40], words(rng, 20, 20)])
    other[40] = (context[40] + 1) % CONFIG.vocab
    voice.ask([ask(3, other, 1, 0)]).result()
    assert voice.read == 110 + 20


def test_the_same_is_said_wherever_the_context_was_read():
    """A fresh row, one that goes on, one that was another's, and one that copies."""
    rng = np.random.default_rng(2)
    context = words(rng, 50, 50)
    expected = slots.Fresh(speaker(slots.Room(4, 64)), (4,), 64)
    ((ids, values),) = expected.ask([ask(0, context, 7, 2)]).result()
    beginnings = [], context[:30], words(rng, 90, 90), [*context[:20], 1, 2, 3]
    for before in beginnings:
        voice = make()
        if len(before):
            voice.ask([ask(5, before, 0, 0)]).result()
        others = [ask(8, words(rng, 40), 1, 0), ask(9, context, 2, 0)]
        said = voice.ask([*others, ask(5, context, 7, 2)]).result()[-1]
        assert said[0].tolist() == ids.tolist()
        np.testing.assert_allclose(said[1], values, atol=1e-5)


def test_a_prompt_shared_by_a_group_is_read_once():
    voice, rng = make(), np.random.default_rng(3)
    first, second = words(rng, 80, 80), words(rng, 70, 70)
    asks = [ask(s, first if s < 8 else second, s, 0) for s in range(ROWS)]
    said = voice.ask(asks).result()
    assert voice.read == 150
    replies = {tuple(ids.tolist()) for ids, _ in said}
    assert len(replies) > ROWS // 2  # members of a group differ
    for one, (ids, values) in list(zip(asks, said))[::5]:
        expected = logprobs(one.context, ids, 1.0)
        np.testing.assert_allclose(values, expected, atol=1e-4)


def test_the_key_episode_and_turn_decide_what_is_said():
    context = words(np.random.default_rng(4), 30, 30)

    def said(seed, episode, turn):
        voice = make(seed=seed)
        ((ids, _),) = voice.ask([ask(2, context, episode, turn)]).result()
        return ids.tolist()

    assert said(0, 1, 1) == said(0, 1, 1)
    others = [said(1, 1, 1), said(0, 2, 1), said(0, 1, 2)]
    assert all(other != said(0, 1, 1) for other in others)


def test_a_context_longer_than_a_piece_is_read_in_several():
    voice, rng = make(), np.random.default_rng(5)
    context = words(rng, 570, 570)
    assert len(context) > 2 * voice.room.pieces[-1]
    asks = [ask(0, context, 0, 0), ask(1, context[:300], 1, 0)]
    for one, (ids, values) in zip(asks, voice.ask(asks).result()):
        expected = logprobs(one.context, ids, 1.0)
        np.testing.assert_allclose(values, expected, atol=1e-4)


def test_nothing_is_compiled_after_the_warm_up():
    make().warm_up()
    rng = np.random.default_rng(6)
    compiled = timing.Compilations()
    replies = list(play(make(), 200, rng))
    # A first prompt may need more than the next size of the cache.
    make().ask([ask(0, words(rng, 590, 590), 0, 0)]).result()
    compiled.close()
    assert len(replies) > 200 and compiled.count == 0


@pytest.mark.parametrize("still", [False, True])
def test_the_warm_up_runs_every_loop_of_decoding(still):
    room = slots.Room(ROWS, 40, still=still)
    voice, rows = slots.Slots(speaker(room), room), []
    fresh, speak = slots.Fresh(voice.voice, [8, ROWS], 16), voice._speak
    read = fresh._reply

    def heard(reply):
        # The first token is drawn before any loop, the second in one.
        rows.append(int((np.asarray(reply.count) == 2).sum()))
        return reply

    voice._speak = lambda asked: heard(speak(asked))
    fresh._reply = lambda prompt, asked: heard(read(prompt, asked))
    voice.warm_up()
    assert rows == [ROWS, 12, 8, 4][: 1 if still else 4]
    rows.clear()
    fresh.warm_up()
    assert rows == ([8, ROWS] if still else [8, 4, ROWS, 12, 8, 4])


def test_fewer_rows_decode_in_memory_that_is_kept_between_turns():
    voice, rng = make(), np.random.default_rng(7)

    def turn():
        asks = [ask(s, words(rng, 200), s, 0) for s in range(ROWS)]
        voice.ask(asks).result()
        arrays = jax.tree.leaves([(x.keys, x.values) for x in voice.spare])
        return sorted(x.unsafe_buffer_pointer() for x in arrays)

    rows = [x.keys[0].shape[0] for x in voice.spare]
    assert rows == list(voice.room.shrink) and len(rows) > 1
    assert turn() == turn()
    voice.ask([ask(0, words(rng, 500, 400), 0, 1)]).result()  # the cache has grown
    slots_held = {x.slots for x in voice.spare}
    assert slots_held == {voice.state.cache.slots} and min(slots_held) > 256
    assert turn() == turn()
    assert make(window=255).spare == ()


def test_a_context_that_leaves_no_room_is_refused():
    voice = make(window=64)
    with pytest.raises(ValueError, match="takes 65 tokens, the window is 64"):
        voice.ask([ask(0, np.ones(64 - LIMIT + 1), 0, 0)])


@pytest.mark.parametrize("fine", [True, False])
@pytest.mark.parametrize(("rows", "window"), [(1, 9), (3, 40), (32, 1000), (128, 300)])
def test_rooms_of_any_size_have_buckets_that_end_at_the_window(rows, window, fine):
    room = slots.Room(rows, window, fine)
    for sizes in (room.slots, room.pieces):
        assert list(sizes) == sorted(set(sizes))
    assert room.slots[-1] == window and room.pieces[-1] <= slots.LONGEST
    assert list(room.shrink) == sorted(set(room.shrink), reverse=True)
    assert all(size < rows for size in room.shrink)


def test_a_reply_has_its_own_limit():
    voice = make()
    voice = slots.Slots(
        dataclasses.replace(voice.voice, how=sampler.Decoding(LIMIT)), voice.room
    )
    context = words(np.random.default_rng(8), 20)
    asks = [ask(s, context, s, 0, limit=1 + s) for s in range(LIMIT)]
    assert [len(ids) for ids, _ in voice.ask(asks).result()] == [*range(1, LIMIT + 1)]
