"""Claims about which skill a row's teacher is shown."""

import collections
import math

import numpy as np
import pytest

from skillsd_jax import config as settings
from skillsd_jax.skills.bank import Bank
from skillsd_jax.skills.retrieval import RETRIEVAL, retrieve
from skillsd_jax.skills.skill import Skill, skill_id
from skillsd_jax.trajectory import Task

TASK = Task("fake", 0, "train", "fetch")
OTHER = Task("fake", 1, "train", "fetch")


def skill(word, task=TASK, source="", reward=0.0, born=0):
    id = skill_id(task.key, word, "none", ())
    source = source or f"episode of {word}"
    return Skill(id, word, "none", (), task.key, task.family, source, born, reward)


def bank_of(*skills):
    bank = Bank(100)
    bank.absorb(skills)
    return bank


def ask(bank, task=TASK, source="mine", rng=0, **options):
    rng = np.random.default_rng(rng)
    config = settings.Skills(**{"retrieval": "ucb"} | options)
    found = retrieve(bank, task, source, rng, config)
    return found[0].success_analysis if found else None


def test_an_empty_bank_has_nothing():
    assert [ask(Bank(3), retrieval=name) for name in RETRIEVAL] == [None] * 6


def test_none_never_shows_a_skill():
    assert ask(bank_of(skill("a", reward=1.0)), retrieval="none") is None


def test_ucb_shows_untried_skills_first_best_then_newest():
    bank = bank_of(
        skill("old", reward=1.0, born=1),
        skill("poor", reward=0.5, born=9),
        skill("tried", reward=1.0, born=3),
        skill("new", reward=1.0, born=2),
        skill("newer twin", reward=1.0, born=2),
    )
    order = ["newer twin", "new", "old", "poor"]
    ids = {s.success_analysis: s.id for s in bank.for_task(TASK.key)}
    bank.credit([(ids["tried"], 1.0)] * 3)
    for expected in order:
        assert ask(bank) == expected
        bank.credit([(ids[expected], 0.0)])
    assert ask(bank) == "tried"


def test_ucb_follows_the_formula():
    # a: 0.75 after 8 uses, b: 0.5 after 2; N = 10, ln 10 = 2.303.
    # Bonus √(2.303 / 8) = 0.536 and √(2.303 / 2) = 1.073: they tie at
    # c = 0.25 / (1.073 − 0.536) = 0.466.
    bank = bank_of(skill("a"), skill("b"))
    a, b = (s.id for s in bank.for_task(TASK.key))
    bank.credit([(a, 0.75)] * 8 + [(b, 0.5)] * 2)
    assert ask(bank, exploration=0.0) == "a"
    assert ask(bank, exploration=0.46) == "a"
    assert ask(bank, exploration=0.47) == "b"


def test_ucb_counts_the_shows_of_the_whole_task():
    # N counts a skill that this row may not see. a: 0.4 after 1, b: 0.9 after 4, own:
    # 95 uses. With N = 100: bonus √ln 100 (1 − 1/2) = 1.073 > 0.5 / c at c = 0.5;
    # with N = 5 it would be 0.634 and b would win.
    bank = bank_of(skill("a"), skill("b"), skill("own", source="mine"))
    a, b, own = (s.id for s in bank.for_task(TASK.key))
    bank.credit([(a, 0.4)] + [(b, 0.9)] * 4 + [(own, 1.0)] * 95)
    assert math.sqrt(math.log(100)) / 2 > 1.0 > math.sqrt(math.log(5)) / 2
    assert ask(bank, exploration=0.5) == "a"


def test_a_single_tried_skill_is_shown_again():
    bank = bank_of(skill("a"))
    bank.credit([(bank.for_task(TASK.key)[0].id, 0.0)])
    assert ask(bank) == "a"  # ln 1 = 0


def test_random_shows_every_skill_about_as_often():
    bank = bank_of(*(skill(word) for word in "abcd"))
    bank.credit([(bank.for_task(TASK.key)[0].id, 1.0)] * 9)
    rng = np.random.default_rng(0)
    config = settings.Skills(retrieval="random")
    drawn = collections.Counter(
        retrieve(bank, TASK, "mine", rng, config)[0].success_analysis
        for _ in range(2000)
    )
    # Binomial(2000, 1/4): 500 ± 19; eight deviations, odds of a false alarm < 1e-14.
    assert set(drawn) == set("abcd") and all(345 < n < 655 for n in drawn.values())


def test_random_depends_on_the_generator_alone():
    bank = bank_of(*(skill(word) for word in "abcdefgh"))
    one = [ask(bank, rng=seed, retrieval="random") for seed in range(20)]
    assert one == [ask(bank, rng=seed, retrieval="random") for seed in range(20)]
    assert len(set(one)) > 3


@pytest.mark.parametrize("rule", ["random", "ucb"])
def test_a_row_never_sees_the_skill_of_its_own_episode(rule):
    rng = np.random.default_rng(1)
    for trial in range(300):
        bank = Bank(4)
        for number in range(rng.integers(1, 12)):
            task = (TASK, OTHER)[rng.integers(2)]
            word, source = f"w{rng.integers(4)}", f"e{rng.integers(3)}"
            bank.absorb([skill(word, task, source, float(rng.random()), number)])
        for s in bank.for_family("fetch"):
            bank.credit([(s.id, float(rng.random()))] * int(rng.integers(3)))
        for source in ("e0", "e1", "e2"):
            config = settings.Skills(retrieval=rule)
            found = retrieve(bank, TASK, source, rng, config)
            pool = bank.for_task(TASK.key) or bank.for_family("fetch")
            free = [s for s in pool if set(bank.sources(s.id)) != {source}]
            assert bool(found) == bool(free)
            assert set(found) <= set(free)


def test_a_skill_that_a_sibling_wrote_as_well_is_the_siblings():
    bank = bank_of(skill("a", source="1"), skill("a", source="2"))
    assert ask(bank, source="1") == ask(bank, source="2") == "a"
    assert ask(bank_of(skill("a", source="1")), source="1") is None


def test_allow_own_shows_it():
    bank = bank_of(skill("own", source="mine", reward=1.0))
    assert ask(bank) is None
    assert ask(bank, allow_own=True) == "own"


def test_a_task_without_skills_falls_back_to_its_family():
    bank = bank_of(skill("a", OTHER))
    assert ask(bank) == "a"
    stranger = Task("fake", 2, "train", "another family")
    assert ask(bank, stranger) is None
    bank.absorb([skill("b"), skill("own", source="mine", reward=1.0)])
    assert ask(bank) == "b"  # its own task's comes first
    bank = bank_of(skill("a", OTHER), skill("own", source="mine"))
    assert ask(bank) is None  # its task has one, the row's own


def test_an_unknown_rule_is_named():
    with pytest.raises(ValueError, match="'best'; set one of none, random, ucb"):
        ask(Bank(1), retrieval="best")
