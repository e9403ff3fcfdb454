"""Claims about what the bank keeps, merges and forgets."""

import dataclasses
import json
import subprocess
import sys

import pytest

from skillsd_jax.skills.bank import Bank, Skill, Stats, skill_id


def skill(word, task="t", family="f", source="s", reward=0.0, born=0):
    workflow = (f"take {word}", "go home")
    id = skill_id(task, word, "none", workflow)
    return Skill(id, word, "none", workflow, task, family, source, born, reward)


def held(bank, task="t"):
    return [skill.success_analysis for skill in bank.for_task(task)]


def test_skills_are_found_by_task_and_by_family():
    bank = Bank(4)
    made = [skill("a"), skill("b", task="u"), skill("c", task="v", family="g")]
    bank.absorb(made)
    assert bank.for_task("t") == (made[0],)
    assert bank.for_family("f") == (made[0], made[1])
    assert bank.for_family("g") == (made[2],)
    assert bank.for_task("nowhere") == bank.for_family("nowhere") == ()
    assert len(bank) == 3


def test_an_equal_skill_of_a_task_is_merged():
    bank = Bank(4)
    first = skill("a", source="1", reward=0.5, born=2)
    bank.absorb([first, skill("a", source="2", reward=1.0, born=3)])
    bank.absorb([skill("a", source="1", reward=0.0, born=1)])
    assert bank.for_task("t") == (dataclasses.replace(first, reward=1.0, born=3),)
    assert bank.sources(first.id) == ("1", "2")
    assert bank.counts == {"held": 1, "absorbed": 1, "merged": 2, "evicted": 0}


def test_equal_words_of_two_tasks_are_two_skills():
    bank = Bank(1)
    bank.absorb([skill("a"), skill("a", task="u")])
    assert len(bank) == 2


@pytest.mark.parametrize("field", ["task", "success", "mistake", "workflow"])
def test_a_skill_id_tells_every_field_apart(field):
    fields = {"task": "t", "success": "s", "mistake": "m", "workflow": ("a", "b")}
    other = fields | {field: ("a b",) if field == "workflow" else "x"}
    assert skill_id(**fields) == skill_id(**fields | {"workflow": ["a", "b"]})
    assert skill_id(**fields) != skill_id(**other)


def test_a_skill_id_is_the_same_in_another_process():
    code = (
        "from skillsd_jax.skills.bank import skill_id\n"
        "print(skill_id('t', 's', 'm', ('a', 'b')))"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True)
    assert out.stdout.decode().strip() == skill_id("t", "s", "m", ("a", "b"))


def test_credit_averages_the_rewards_of_uses():
    bank = Bank(4)
    a, b = skill("a", reward=1.0), skill("b")
    bank.absorb([a, b])
    assert bank.stats(a.id) == Stats(0, 0.0)
    bank.credit([(a.id, 1.0), (a.id, 0.0), ("evicted long ago", 1.0)])
    bank.credit([(a.id, 0.5)])
    assert bank.stats(a.id) == Stats(3, 0.5)
    assert bank.stats(b.id) == Stats(0, 0.0)


def test_capacity_evicts_the_least_value_of_the_same_task():
    bank = Bank(2)
    other = skill("other", task="u", reward=0.0)
    bank.absorb([other, skill("a", reward=1.0), skill("b", reward=0.2)])
    bank.absorb([skill("c", reward=0.5)])
    assert held(bank) == ["a", "c"]
    assert held(bank, "u") == ["other"]
    assert bank.for_family("f") == (other, *bank.for_task("t"))
    assert bank.counts == {"held": 3, "absorbed": 4, "merged": 0, "evicted": 1}


def test_value_is_the_mean_reward_with_the_source_as_one_use():
    bank = Bank(2)
    praised, failing = skill("praised", reward=0.1), skill("failing", reward=1.0)
    bank.absorb([praised, failing])
    bank.credit([(praised.id, 1.0)] * 2)  # (0.1 + 2) / 3 = 0.70
    bank.credit([(failing.id, 0.0)] * 2)  # (1 + 0) / 3 = 0.33
    bank.absorb([skill("new", reward=0.5)])
    assert held(bank) == ["praised", "new"]


def test_a_new_skill_may_be_the_one_that_goes():
    bank = Bank(1)
    bank.absorb([skill("good", reward=1.0), skill("bad", reward=0.0)])
    assert held(bank) == ["good"]


def test_of_equal_values_the_oldest_goes():
    bank = Bank(2)
    bank.absorb([skill(word, reward=1.0) for word in "abcd"])
    assert held(bank) == ["c", "d"]


def used_bank():
    bank = Bank(2)
    bank.absorb(
        [skill("é", source="1", reward=1.0), skill("b"), skill("b", source="2")]
    )
    bank.absorb([skill("c", task="u", family="g", reward=0.3), skill("d", reward=0.9)])
    bank.credit([(bank.for_task("t")[0].id, 0.25), (bank.for_task("u")[0].id, 1.0)])
    return bank


def test_state_survives_json():
    bank = used_bank()
    again = Bank.from_state(json.loads(json.dumps(bank.state())))
    assert again.state() == bank.state()
    assert again.counts == bank.counts
    for one in (bank, again):  # and both go on alike
        one.absorb([skill("e", reward=0.95), skill("d", source="9")])
        one.credit([(one.for_task("t")[0].id, 1.0)])
    assert again.state() == bank.state()
    assert again.for_task("t") == bank.for_task("t")
    assert again.for_family("g") == bank.for_family("g")


def test_state_does_not_change_with_the_bank():
    bank = used_bank()
    before = bank.state()
    text = json.dumps(before)
    bank.absorb([skill("d", source="later")])
    bank.credit([(bank.for_task("t")[0].id, 1.0)])
    again = Bank.from_state(before)
    again.absorb([skill("d", source="later")])
    assert json.dumps(before) == text


def test_save_writes_one_line_per_skill(tmp_path):
    bank = used_bank()
    path = tmp_path / "run" / "skills.jsonl"
    bank.save(path)
    text = path.read_text("utf-8")
    assert "é" in text  # readable as it is
    lines = [json.loads(line) for line in text.splitlines()]
    assert len(lines) == len(bank) == 3
    first = bank.for_task("t")[0]
    assert lines[0]["id"] == first.id
    assert lines[0]["success_analysis"] == "é"
    assert lines[0]["golden_workflow"] == list(first.golden_workflow)
    assert (lines[0]["uses"], lines[0]["mean_reward"]) == (1, 0.25)
    assert lines[0]["sources"] == ["1"]


def test_a_save_that_breaks_leaves_the_old_file(tmp_path, monkeypatch):
    bank = used_bank()
    path = tmp_path / "skills.jsonl"
    bank.save(path)
    before = path.read_bytes()
    bank.absorb([skill("new", task="w")])

    def broken(*_):
        raise OSError("disk full")

    monkeypatch.setattr("os.replace", broken)
    with pytest.raises(OSError, match="disk full"):
        bank.save(path)
    assert path.read_bytes() == before
    assert [entry.name for entry in tmp_path.iterdir()] == ["skills.jsonl"]


def test_a_bank_without_room_is_refused():
    with pytest.raises(ValueError, match="skills.capacity=0 must be at least 1"):
        Bank(0)
