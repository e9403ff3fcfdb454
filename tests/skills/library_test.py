"""Claims about skills that were written beforehand."""

import json

import numpy as np
import pytest

from skillsd_jax import config as settings
from skillsd_jax.skills import library, retrieval
from skillsd_jax.skills.bank import Bank
from skillsd_jax.skills.skill import Skill, skill_id
from skillsd_jax.trajectory import Task

PUBLISHED = {
    "general_skills": [
        {
            "skill_id": "gen_001",
            "title": "Search in order",
            "principle": "Look at every surface once.",
            "when_to_apply": "The object is not seen yet.",
            "category": "exploration",
        },
        {"principle": "Act."},
    ],
    "task_specific_skills": {
        "pick": [{"skill_id": "p1", "title": "Carry", "principle": "One at a time."}],
        "heat": [],
    },
    "common_mistakes": [
        {
            "mistake_id": "err_001",
            "description": "Opens an open door.",
            "why_it_happens": "The state was forgotten.",
            "how_to_avoid": "Read the observation.",
        },
        {"mistake": "Gives up."},
    ],
    "metadata": {"version": 1},
}
MARKDOWN = """\
---
name: kitchen
---
# Kitchen skills

A title's text is passed over.

## Look around
First look, <|im_end|>
then act.

- open the fridge
  * close it

```
# no heading
```

# Family: heat

### Use the microwave ###
1. take it
2) heat it

# Others
## Last
Finish.
"""


@pytest.fixture
def write(tmp_path):
    def write(name, content):
        path = tmp_path / name
        text = content if isinstance(content, str) else json.dumps(content)
        path.write_text(text, encoding="utf-8")
        return path

    return write


def said(skill):
    texts = (skill.success_analysis, skill.mistake_analysis, skill.golden_workflow)
    return (skill.scope, skill.family, *texts)


def test_the_published_layout_is_read(write):
    skills = library.load(write("bank.json", PUBLISHED))
    assert [said(skill) for skill in skills] == [
        (
            *("global", "", "Search in order: Look at every surface once.", "none"),
            ("when: The object is not seen yet.",),
        ),
        ("global", "", "Act.", "none", ()),
        ("family", "pick", "Carry: One at a time.", "none", ()),
        (
            *("global", "", "none"),
            "Opens an open door. Why: The state was forgotten.",
            ("Read the observation.",),
        ),
        ("global", "", "none", "Gives up.", ()),
    ]
    assert [skill.source for skill in skills] == [
        "bank.json gen_001",
        "bank.json general_skills[1]",
        "bank.json p1",
        "bank.json err_001",
        "bank.json common_mistakes[1]",
    ]
    assert {skill.maker for skill in skills} == {"library"}
    assert {skill.reward for skill in skills} == {0.5}
    assert len({skill.id for skill in skills}) == 5


@pytest.mark.parametrize("part", PUBLISHED)
def test_a_part_may_be_missing(part, write):
    content = {name: value for name, value in PUBLISHED.items() if name != part}
    assert library.load(write("bank.json", content))


def test_headings_of_markdown_are_skills(write):
    skills = library.load(write("kitchen.md", MARKDOWN))
    first, second, third = skills
    text = "Look around: First look, <|im_end|> then act. ``` # no heading ```"
    assert said(first) == (
        *("global", "", text, "none"),
        ("open the fridge", "close it"),
    )
    assert said(second) == (
        *("family", "heat", "Use the microwave", "none"),
        ("take it", "heat it"),
    )
    assert said(third) == ("global", "", "Last: Finish.", "none", ())
    assert second.source == "kitchen.md Use the microwave"


def test_what_a_bank_saved_is_a_library(tmp_path):
    bank = Bank(4)
    workflow = ("go\u2028home", "stop")
    id = skill_id("fake/train/3", "won", "none", workflow)
    held = Skill(
        *(id, "won", "none", workflow, "fake/train/3", "fetch", "7/2", 7, 1.0),
        *(7, "policy"),
    )
    bank.absorb([held])
    bank.credit([(id, 0.0)], 9)
    bank.save(tmp_path / "skills.jsonl")
    (skill,) = library.load(tmp_path / "skills.jsonl")
    assert said(skill) == ("task", "fetch", "won", "none", ("go home", "stop"))
    assert (skill.task, skill.reward) == ("fake/train/3", 1.0)
    assert (skill.born, skill.policy, skill.maker) == (0, 0, "library")
    assert skill.source == f"skills.jsonl {id}"


def test_a_folder_is_read_by_name_and_a_setting_names_several(write, tmp_path):
    second, first = write("b.md", MARKDOWN), write("a.json", PUBLISHED)
    write("notes.txt", "no library")
    both = library.load(first) + library.load(second)
    assert library.load(tmp_path) == both
    assert library.paths(f"{first}, {second},") == [str(first), str(second)]
    assert library.paths("") == []


def test_texts_are_single_lines_without_control_characters(write):
    entry = {"title": "a\n</skill>\x1b[31m", "principle": "b\u2028c\ud800 \x00d"}
    (skill,) = library.load(write("bank.json", {"general_skills": [entry]}))
    assert skill.success_analysis == "a </skill> [31m: b c d"


def test_what_was_loaded_is_shown(write):
    bank = Bank(4)
    bank.absorb(library.load(write("bank.json", PUBLISHED)))
    task = Task("fake", 0, "test", "pick")
    config = settings.Skills(retrieval="ucb+global:full")
    found = retrieval.retrieve(bank, task, "", np.random.default_rng(0), config)
    assert [skill.family for skill in found] == ["pick", "", "", "", ""]


LONG = "x" * 4001


@pytest.mark.parametrize(
    "name, content, fault",
    [
        ("a.txt", "x", "a.txt is no library; wanted a file .json, .md, .jsonl or"),
        ("a.json", "{", "a.json is no JSON"),
        ("a.json", "[" * 100_000, "a.json is no JSON"),
        ("a.json", [], "a.json must be an object, not"),
        ("a.json", {}, "no skills in .*a.json"),
        ("a.json", {"general_skills": {}}, "general_skills must be a list"),
        ("a.json", {"general_skills": [1]}, r"general_skills\[0\] must be an object"),
        (
            "a.json",
            {"general_skills": [{"title": "t"}]},
            r"general_skills\[0\] has no principle; wanted a text",
        ),
        (
            "a.json",
            {"general_skills": [{"principle": 3}]},
            r"general_skills\[0\].principle must be a text, not 3",
        ),
        (
            "a.json",
            {"task_specific_skills": {"pick": [{"principle": LONG}]}},
            r"pick\[0\].principle has 4001 characters; at most 4000",
        ),
        ("a.json", {"task_specific_skills": []}, "must be an object"),
        (
            "a.json",
            {"task_specific_skills": {" ": []}},
            "task_specific_skills has a family without a name",
        ),
        ("a.json", {"common_mistakes": [{}]}, r"\[0\] has no description"),
        ("a.md", "# Title\n", "no skills in .*a.md"),
        ("a.md", "\n## Empty\n## Next\nText\n", "a.md, line 2: 'Empty' has neither"),
        ("a.md", "# Family:\n", "a.md, line 1: wanted '# Family: NAME'"),
        ("a.md", f"## T\n{LONG}", "a.md, line 1 has .* characters"),
        ("a.md", "## T\n" + "- x\n" * 101, "101 list items; at most 100"),
        ("a.jsonl", "{}\n", "a.jsonl, line 1 has no id"),
    ],
)
def test_what_is_wrong_is_named(name, content, fault, write):
    with pytest.raises(ValueError, match=fault):
        library.load(write(name, content))


def test_a_library_of_an_evaluation_task_is_refused(write):
    line = {
        "id": "x",
        "success_analysis": "won",
        "mistake_analysis": "",
        "golden_workflow": [],
        "task": "fake/test/0",
        "family": "f",
        "source": "s",
        "born": 0,
        "reward": 1,
    }
    with pytest.raises(ValueError, match="line 1: task='fake/test/0' is not one of"):
        library.load(write("a.jsonl", line))


def test_a_missing_file_and_an_empty_folder_say_so(tmp_path):
    with pytest.raises(ValueError, match=r"from .*nowhere.md: .*No such file"):
        library.load(tmp_path / "nowhere.md")
    with pytest.raises(ValueError, match="no skills in"):
        library.load(tmp_path)


def test_a_file_without_end_is_not_read(write, monkeypatch):
    monkeypatch.setattr(library, "MAX_BYTES", 10)
    with pytest.raises(ValueError, match="bytes; at most 10 are read"):
        library.load(write("a.json", PUBLISHED))
