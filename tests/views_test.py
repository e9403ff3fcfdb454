"""The teacher's view from an episode to the batch: a thousand random ones."""

import collections
import dataclasses
import random

import numpy as np

from skillsd_jax import config as settings
from skillsd_jax import experience, prompts, tokens
from skillsd_jax.skills import summarizer
from skillsd_jax.skills.skill import Skill, skill_id
from skillsd_jax.trajectory import Role, Trajectory, Turn
from tests.prompts_test import (
    TASK,
    encoder,
    joined,
    random_contexts,
    random_prompter,
    random_text,
)


def skill(rng):
    texts = random_text(rng), random_text(rng), (random_text(rng),)
    return Skill(skill_id("", *texts), *texts, "", "", "s", 0, 0.5)


def episode(rng, player):
    contexts = random_contexts(rng, player)
    replies = sum(segment.scored for context in contexts for segment in context)
    turns = [Turn("saw", "r", "go", True, True, 0.0)] * replies
    return Trajectory(TASK, tuple(turns), tuple(contexts), 1.0, True, "success")


def wider(rng, player):
    """The player's prompter with more room for skills, its window at times tighter."""
    config = dataclasses.replace(player.config, max_skill_length=rng.randrange(40, 900))
    if rng.random() < 0.5:
        config = dataclasses.replace(
            config,
            max_prompt_length=rng.randrange(200, 500),
            max_length=rng.randrange(200, 1500),
        )
    return prompts.Prompter(encoder(), config)


def shown_ids(maker, skills, has_system):
    """What a view must hold in one piece: written out, not asked of the prompter."""
    text, ids = summarizer.render(*skills), maker.encoder.encode
    if maker.config.skill_turn == "task":
        return ids(text + "\n")
    if has_system:
        return ids("\n" + text)
    frame = maker.encoder
    return [*frame.open_turn("system"), *ids(text), *frame.close_turn()]


def holds(row, piece):
    row, piece = np.asarray(row), np.asarray(piece)
    starts = np.flatnonzero(row[: len(row) - len(piece) + 1] == piece[0])
    return any((row[s : s + len(piece)] == piece).all() for s in starts)


def test_a_skilled_row_has_the_skill_whole_and_both_views_score_the_same_tokens():
    """And a row that is not skilled has the student's view for its teacher's."""
    rng, seen = random.Random(0), collections.Counter()
    for _ in range(1000):
        context = rng.choice(["windowed", "whole"])
        player = random_prompter(rng, context)
        played = experience.Experience([episode(rng, player)], [0], 0)
        maker = wider(rng, player)
        chosen = [tuple(skill(rng) for _ in range(rng.randrange(4)))]
        views = experience.views(played, chosen, maker, settings.Objective())
        batch = tokens.pack(views.rows, len(views.rows) + 1, 3000, 3500, 1000)
        check(maker, views, batch)
        kind = context, maker.config.skill_turn, len(views.shown[0])
        seen[kind if views.shown[0] else "bare"] += 1
        fewer = len(views.shown[0]) < len(chosen[0])
        assert views.dropped == fewer * len(views.rows)
        seen["fewer"] += fewer
    assert len(seen) == 2 * 2 * 3 + 2 and min(seen.values()) > 10, seen


def check(maker, views, batch):
    (shown,) = views.shown
    for b, row in enumerate(views.rows):
        sampled = joined(row.student, Role.AGENT)
        count = int(batch.mask[b].sum())
        assert count == len(sampled)
        for view in (batch.student, batch.teacher):
            found = view.tokens[b][view.scored[b, :count]]
            assert found.tolist() == sampled
            assert view.scored[b, :count].max() < view.length[b]
        teacher = batch.teacher.tokens[b, : batch.teacher.length[b]]
        student = batch.student.tokens[b, : batch.student.length[b]]
        assert batch.skilled[b] == bool(shown)
        if shown:
            has_system = any(s.role == Role.SYSTEM for s in row.student)
            assert holds(teacher, shown_ids(maker, shown, has_system))
        else:
            assert teacher.tolist() == student.tolist()
    padded = len(views.rows)
    assert not batch.skilled[padded] and not batch.mask[padded].any()
