"""Claims about how many skills a prompt is given."""

import random

import pytest

from skillsd_jax import config as settings
from skillsd_jax import showing
from skillsd_jax.models import tokenizer
from skillsd_jax.prompts import Prompter
from skillsd_jax.skills import summarizer
from skillsd_jax.skills.skill import Skill, skill_id
from tests.experience_test import Words
from tests.prompts_test import FakeEncoder

WORDS = ("go to", "fridge 1", "apple", "é", "☃☃", "shelf", ">", ";", "\n", "a" * 20)


def skill(rng, longest):
    texts = [" ".join(rng.choices(WORDS, k=rng.randrange(longest))) for _ in "abc"]
    id = skill_id("", *texts[:2], texts[2:])
    return Skill(id, *texts[:2], tuple(texts[2:]), "", "", "s", 0, 0.5)


def naive(skills, prompter):
    """Measures after every skill."""
    chosen = []
    for each in skills:
        if prompter.fits(summarizer.render(*chosen, each)):
            chosen.append(each)
    return tuple(chosen)


@pytest.fixture(scope="module")
def encoders():
    rng = random.Random(0)
    corpus = [summarizer.render(skill(rng, 9)) for _ in range(50)]
    trained = tokenizer.train(corpus, summarizer.lexicon())
    return [Words(), trained, *(FakeEncoder(width) for width in (1, 2, 3, 7))]


def test_what_fits_is_what_measuring_all_together_finds(encoders):
    rng, kinds = random.Random(0), {"all": 0, "some": 0, "none": 0, "over a gap": 0}
    for _ in range(300):
        config = settings.Prompt(
            system=rng.choice(["", "be brief"]),
            skill_turn=rng.choice(["task", "system"]),
            max_skill_length=rng.choice([rng.randrange(40, 200), rng.randrange(4000)]),
        )
        prompter = Prompter(rng.choice(encoders), config)
        fitting = showing.Fitting(prompter)
        longest = rng.choice([2, 4, 40])
        held = [skill(rng, longest) for _ in range(30)]
        for _ in range(2):
            asked = rng.sample(held, rng.randrange(1, 30))
            found = fitting(asked)
            assert found == naive(asked, prompter)
            kind = "all" if len(found) == len(asked) else "some" if found else "none"
            kinds[kind] += 1
            kinds["over a gap"] += found != tuple(asked[: len(found)])
    assert min(kinds.values()) > 20, kinds


@pytest.mark.parametrize("room", [1_000, 10_000, 1_000_000])
def test_each_skill_is_measured_once_and_few_together(room, monkeypatch):
    rng, measured = random.Random(0), []
    held = [skill(rng, 20) for _ in range(500)]
    prompter = Prompter(FakeEncoder(3), settings.Prompt(max_skill_length=room))
    size = prompter.size
    monkeypatch.setattr(prompter, "size", lambda t: measured.append(t) or size(t))
    fitting = showing.Fitting(prompter)
    found = fitting(held)
    alone = [text for text in measured if text.count("<skill>") == 1]
    assert len(alone) == len(set(alone)) == 500
    assert len(measured) - 501 < 40
    measured.clear()
    assert fitting(held) == found
    assert len(measured) < 40
