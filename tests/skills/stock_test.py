"""Claims about what of its libraries a run begins with."""

import json

import numpy as np
import pytest

from skillsd_jax import config as settings
from skillsd_jax.environments.alfworld_games import TASKS
from skillsd_jax.skills import library, retrieval, stock
from skillsd_jax.skills.bank import Bank
from skillsd_jax.skills.skill import Skill, skill_id
from skillsd_jax.skills.summarizer import render
from skillsd_jax.skills.written import Room
from skillsd_jax.trajectory import Task


@pytest.fixture
def write(tmp_path):
    """Writes a library; texts for all, and by family."""

    def written(name, general=(), **families):
        content = {
            "general_skills": [{"principle": text} for text in general],
            "task_specific_skills": {
                family: [{"principle": text} for text in texts]
                for family, texts in families.items()
            },
        }
        (tmp_path / name).write_text(json.dumps(content))
        return str(tmp_path / name)

    return written


def opened(path, tokens=None, families=(), **options):
    """The texts of the bank, and what was said; a token is a word."""
    said = []
    room = None if tokens is None else Room(tokens, lambda text: len(text.split()))
    config = settings.Skills(library=str(path), **options)
    bank = stock.open_bank(config, room, families, said.append)
    held = bank.skills(bank.all_rows())
    return [skill.success_analysis for skill in held], said


# What a prompt shows of a skill of one word beside that word.
FRAME = len(render(Skill("", "", "none", (), "", "", "", 0, 0.5)).split())


def test_without_a_library_the_bank_is_empty_and_nothing_is_said():
    assert opened("", 1, ["pick"]) == ([], [])


def test_what_could_never_be_shown_is_left_out_and_said(write):
    path = write("a.json", ["one", "two words", "now three words"])
    assert opened(path) == (["one", "two words", "now three words"], [])
    assert opened(path, FRAME + 3) == opened(path)
    kept, said = opened(path, FRAME + 1)
    assert kept == ["one"]
    (line,) = said
    assert line == (
        f"library {path}: 2 of 3 skills are longer than prompt.max_skill_length="
        f"{FRAME + 1} tokens and left out; {FRAME + 3} would hold all"
    )


def test_a_library_of_which_nothing_fits_is_refused(write):
    long = write("long.json", ["two words", "now three words"])
    both = f"{write('short.json', ['one'])}, {long}"
    message = (
        rf"none of the 2 skills of {long} can be shown in prompt.max_skill_length="
        rf"{FRAME + 1} tokens; the shortest needs {FRAME + 2}, all of them fit {FRAME + 3}"
    )
    with pytest.raises(ValueError, match=message):
        opened(both, FRAME + 1)


@pytest.mark.parametrize(
    "setting, scope, whose",
    [
        ("global_capacity", "general", "for all"),
        ("family_capacity", "heat", "for family heat"),
    ],
)
def test_a_library_over_capacity_is_refused(write, setting, scope, whose):
    path = write("a.json", **{scope: list("abcc")}, cool=["a"])
    message = rf"has 3 skills {whose} and skills.{setting}=2; set it to at least 3"
    with pytest.raises(ValueError, match=message):
        opened(path, **{setting: 2})
    assert len(opened(path, **{setting: 3})[0]) == 4  # an equal text is no other skill
    with pytest.raises(ValueError, match=message):  # what is too long to show counts
        opened(path, FRAME + 1, **{setting: 2})


def test_a_bank_that_was_saved_is_refused_by_a_smaller_one(tmp_path):
    task, bank = "fake/train/3", Bank(9)
    for word in "abc":
        id = skill_id(task, word, "", ())
        bank.absorb([Skill(id, word, "", (), task, "pick", "0/1", 0, 1.0)])
    bank.save(tmp_path / "skills.jsonl")
    message = (
        "3 skills of task fake/train/3 and skills.capacity=2; set it to at least 3"
    )
    with pytest.raises(ValueError, match=message):
        opened(tmp_path / "skills.jsonl", capacity=2)
    assert opened(tmp_path / "skills.jsonl", capacity=3)[0] == list("abc")


def test_families_that_no_task_is_of_are_said(write):
    path = write("a.json", ["x"], heat=["a"], slice=["b", "c"], **{"a" * 90: ["d"]})
    assert (
        opened(path)[1] == opened(path, families=["heat", "slice", "a" * 90])[1] == []
    )
    kept, said = opened(path, families=["pick", "heat"])
    assert kept == list("xabcd")
    (line,) = said
    assert line == (
        f"library: 3 skills are for {'a' * 40}, slice, which no training task is of; "
        "tasks are of pick, heat. Only the shelf 'bank' of skills.retrieval shows them"
    )
    many = write("b.json", **{f"f{n}": ["a"] for n in range(10)})
    assert "f6, f7 and 2 more, which" in opened(many, families=["pick"])[1][0]


def test_the_names_of_alfworlds_task_types_are_those_of_our_families(write):
    names = dict.fromkeys([*TASKS.values(), "pick_and_place"])
    path = write("a.json", **{name: [name] for name in names})
    config = settings.Skills(library=path, retrieval="family:full")
    bank = stock.open_bank(config, families=tuple(TASKS))
    for family, name in TASKS.items():
        task = Task("alfworld", 0, "train", family)
        rng = np.random.default_rng(0)
        found = retrieval.retrieve(bank, task, "", rng, config)
        texts = [skill.success_analysis for skill in found]
        assert texts == [name] + ["pick_and_place"] * (family == "pick")
        ids = [skill_id("", text, "none", (), family) for text in texts]
        assert [skill.id for skill in found] == ids
    assert opened(path, families=tuple(TASKS))[1] == []


def test_a_name_that_a_family_has_is_left_alone(write):
    (skill,) = library.load(write("a.json", examine=["x"]))
    assert library.renamed(skill, ("examine", "look")) == skill
    assert library.renamed(skill, ("heat",)) == skill
    assert library.renamed(skill, ("look",)).family == "look"
