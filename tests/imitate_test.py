"""Demonstrations repeat, rows score replies, cloning learns them."""

import dataclasses
import re
from types import SimpleNamespace

import jax
import numpy as np
import pytest

from skillsd_jax import config as settings
from skillsd_jax import imitate, rollout
from skillsd_jax.environments import ENVIRONMENTS, household
from skillsd_jax.models import qwen, tokenizer
from skillsd_jax.prompts import Prompter
from skillsd_jax.skills import summarizer
from skillsd_jax.trajectory import Role

FEW = settings.Imitate(episodes=12, tasks=8)
PLAYED = 20  # expert skills that are tried out


def demonstrated(config=FEW, seed=0):
    return list(imitate.demonstrations(household.Household(), config, seed))


@pytest.fixture(scope="module")
def episodes():
    return demonstrated()


@pytest.fixture(scope="module")
def encoder(episodes):
    lexicon = [*household.Household.lexicon(), *summarizer.lexicon()]
    return tokenizer.train(imitate.texts(episodes), lexicon)


@pytest.fixture(params=["windowed", "whole"])
def prompter(request, encoder):
    return Prompter(encoder, settings.Prompt(context=request.param))


def test_demonstrations_repeat_with_their_seed(episodes):
    assert demonstrated() == episodes
    other = demonstrated(seed=1)
    assert [plain.task for plain, _, _ in other] == [p.task for p, _, _ in episodes]
    assert imitate.texts(other) != imitate.texts(episodes)


def test_demonstrations_are_drawn_from_the_first_training_tasks_in_turn(episodes):
    for index, (plain, _, skilled) in enumerate(episodes):
        assert plain.task == skilled.task
        assert (plain.task.split, plain.task.seed) == ("train", index % FEW.tasks)


def test_skilled_episodes_gain_from_their_skill():
    """A skill is worth following: 60 pairs, and the gap is about 0.5."""
    config = settings.Imitate(episodes=60, misled=0.0, noise=0.0, skilled_noise=0.0)
    made = demonstrated(config)
    plain, skilled = (np.mean([x[i].success for x in made]) for i in (0, 2))
    assert skilled == 1 and plain < 0.9


def test_the_corpus_holds_whatever_an_episode_shows_or_says(episodes):
    corpus = set(imitate.texts(episodes))
    for plain, skill, skilled in episodes:
        assert skill in corpus
        for episode in (plain, skilled):
            shown = {x for t in episode.turns for x in (t.observation, t.reply)}
            assert {episode.task.instruction, *shown} <= corpus


def test_a_row_scores_the_replies_with_their_stop_token_and_nothing_else(
    episodes, prompter
):
    encoder = prompter.encoder
    for episode, _, _ in episodes:
        rows = imitate.cloned_rows(prompter, episode, None)
        whole = prompter.config.context == "whole"
        assert len(rows) == (1 if whole else len(episode.turns))
        scored = [s.tokens.tolist() for r in rows for s in r.student if s.scored]
        said = [[*encoder.encode(t.reply), encoder.stop_id] for t in episode.turns]
        assert scored == said
        assert [i for row in rows for i in row.turns] == list(range(len(said)))
        for row in rows:
            assert all(s.scored == (s.role == Role.AGENT) for s in row.student)


def test_a_reply_follows_what_it_answers(episodes, prompter):
    for episode, _, _ in episodes:
        turns = iter(episode.turns)
        for row in imitate.cloned_rows(prompter, episode, None):
            for words, reply in zip(row.student, row.student[1:]):
                if reply.scored:
                    shown = prompter.encoder.decode(words.tokens)
                    assert next(turns).observation in shown


def test_skilled_rows_carry_the_skill_whole(episodes, prompter):
    shown = [(s, e) for _, s, e in episodes if prompter.fits(s)]
    assert shown
    for skill, episode in shown:
        wanted = prompter.encoder.encode(skill + "\n")
        plain = imitate.cloned_rows(prompter, episode, None)
        for row, bare in zip(imitate.cloned_rows(prompter, episode, skill), plain):
            carried = [s for s in row.student if s.role == Role.SKILL]
            assert [s.tokens.tolist() for s in carried] == [wanted]
            rest = [s.tokens.tolist() for s in row.student if s.role != Role.SKILL]
            assert rest == [s.tokens.tolist() for s in bare.student]


def test_recorded_rows_mask_exactly_the_replies(episodes, encoder):
    player = rollout.Player(None, encoder, settings.Prompt(), rows=1)
    rows = imitate.cloned_rows(player.prompter, episodes[0][0], None)
    data = imitate.record(rows, player.scored(9))
    assert data.mask.shape == (len(rows), settings.Prompt().max_response_length)
    tokens, scored = np.asarray(data.view.tokens), np.asarray(data.view.scored)
    for b, turn in enumerate(episodes[0][0].turns):
        at = scored[b][np.asarray(data.mask[b]) > 0]
        assert tokens[b, at[-1]] == encoder.stop_id
        assert encoder.decode(tokens[b, at]) == turn.reply


@pytest.fixture(scope="module")
def cloned(episodes, encoder):
    """Two calls of the jitted loop on a few rows; a closure that clones once more."""
    prompter = Prompter(encoder, settings.Prompt())
    kinds = (
        (episodes[:2], lambda plain, skill, skilled: (plain, None)),
        (
            [x for x in episodes if prompter.fits(x[1])][:2],
            lambda plain, skill, skilled: (skilled, skill),
        ),
    )
    data = []
    for some, kind in kinds:
        rows = [row for x in some for row in imitate.cloned_rows(prompter, *kind(*x))]
        data.append(imitate.record(rows, 8))
    model = qwen.ModelConfig(
        vocab=encoder.vocab_size,
        width=16,
        layers=1,
        heads=2,
        kv_heads=1,
        head_size=8,
        hidden=32,
    )
    config = dataclasses.replace(FEW, steps=50, rows=8, learning_rate=1e-2)
    params = qwen.init(model, jax.random.key(0))

    def clone():
        key = jax.random.key(1)
        return list(imitate.clone(model, params, data, config, key))

    return SimpleNamespace(clone=clone, made=clone())


def test_cloning_lowers_the_loss(cloned):
    (half, _, first), (steps, _, last) = cloned.made
    assert (half, steps) == (25, 50)
    assert 0 < last < 0.6 * first < np.log(512)  # about as many words


def test_cloning_repeats_to_the_bit(cloned):
    for (_, a, loss), (_, b, again) in zip(cloned.made, cloned.clone(), strict=True):
        assert loss == again
        jax.tree.map(np.testing.assert_array_equal, a, b)


@pytest.mark.parametrize("name", ["household", "sokoban"])
def test_the_workflow_of_an_expert_skill_solves_its_task(name):
    environment = ENVIRONMENTS[name]("teacher")
    for seed in range(PLAYED):
        text = summarizer.render(imitate.expert_skill(environment, seed))
        (listed,) = re.findall("^golden_workflow: (.*)$", text, re.MULTILINE)
        environment.reset(seed)
        for entry in listed.split("; "):
            # An entry of Sokoban is a state and the move to make there.
            command = entry if name == "household" else entry.split()[-1]
            step = environment.step(f"<action>{command}</action>")
        assert step.success, text
