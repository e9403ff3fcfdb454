"""Claims about what the bank keeps, merges and forgets."""

import dataclasses
import json
import random
import subprocess
import sys

import numpy as np
import pytest

from skillsd_jax.skills.bank import Bank
from skillsd_jax.skills.similarity import jaccard
from skillsd_jax.skills.skill import Skill, Stats, skill_id

T, U, V = (f"fake/train/{number}" for number in range(3))


def skill(word, task=T, family="f", source="s", reward=0.0, born=0, **more):
    workflow = (f"take {word}", "go home")
    id = skill_id(task, word, "none", workflow, family)
    return Skill(id, word, "none", workflow, task, family, source, born, reward, **more)


def held(bank, task=T):
    return words(bank.for_task(task))


def words(skills):
    return [skill.success_analysis for skill in skills]


def test_skills_are_found_by_task_and_by_family():
    bank = Bank(4)
    made = [skill("a"), skill("b", task=U), skill("c", task=V, family="g")]
    bank.absorb(made)
    assert bank.for_task(T) == (made[0],)
    assert bank.for_family("f") == (made[0], made[1])
    assert bank.for_family("g") == (made[2],)
    assert bank.for_task("nowhere") == bank.for_family("nowhere") == ()
    assert len(bank) == 3


def test_an_equal_skill_of_a_task_is_merged():
    bank = Bank(4)
    first = skill("a", source="1", reward=0.5, born=2)
    bank.absorb([first, skill("a", source="2", reward=1.0, born=3)])
    bank.absorb([skill("a", source="1", reward=0.0, born=1)])
    assert bank.for_task(T) == (dataclasses.replace(first, reward=1.0, born=3),)
    assert bank.sources(first.id) == ("1", "2")
    assert bank.counts == {"held": 1, "absorbed": 1, "merged": 2, "evicted": 0}


def test_equal_words_of_two_tasks_are_two_skills():
    bank = Bank(1)
    bank.absorb([skill("a"), skill("a", task=U)])
    assert len(bank) == 2


@pytest.mark.parametrize("field", ["task", "success", "mistake", "workflow"])
def test_a_skill_id_tells_every_field_apart(field):
    fields = {"task": "t", "success": "s", "mistake": "m", "workflow": ("a", "b")}
    other = fields | {field: ("a b",) if field == "workflow" else "x"}
    assert skill_id(**fields) == skill_id(**fields | {"workflow": ["a", "b"]})
    assert skill_id(**fields) != skill_id(**other)


def test_a_skill_id_is_the_same_in_another_process():
    code = (
        "from skillsd_jax.skills.skill import skill_id\n"
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
    other = skill("other", task=U, reward=0.0)
    bank.absorb([other, skill("a", reward=1.0), skill("b", reward=0.2)])
    bank.absorb([skill("c", reward=0.5)])
    assert held(bank) == ["a", "c"]
    assert held(bank, U) == ["other"]
    assert bank.for_family("f") == (other, *bank.for_task(T))
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
    bank.absorb([skill("c", task=U, family="g", reward=0.3), skill("d", reward=0.9)])
    bank.credit([(bank.for_task(T)[0].id, 0.25), (bank.for_task(U)[0].id, 1.0)])
    return bank


def test_state_survives_json():
    bank = used_bank()
    again = Bank.from_state(json.loads(json.dumps(bank.state())))
    assert again.state() == bank.state()
    assert again.counts == bank.counts
    for one in (bank, again):  # and both go on alike
        one.absorb([skill("e", reward=0.95), skill("d", source="9")])
        one.credit([(one.for_task(T)[0].id, 1.0)])
    assert again.state() == bank.state()
    assert again.for_task(T) == bank.for_task(T)
    assert again.for_family("g") == bank.for_family("g")


def test_state_does_not_change_with_the_bank():
    bank = used_bank()
    before = bank.state()
    text = json.dumps(before)
    bank.absorb([skill("d", source="later")])
    bank.credit([(bank.for_task(T)[0].id, 1.0)])
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
    first = bank.for_task(T)[0]
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
    bank.absorb([skill("new", task=V)])

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


def test_a_shelf_for_the_family_and_one_for_all():
    bank = Bank(1, family_capacity=2, global_capacity=1)
    of_task, of_family = skill("a"), skill("b", task="")
    of_all = skill("c", task="", family="")
    bank.absorb([of_task, of_family, of_all])
    assert [s.scope for s in (of_task, of_family, of_all)] == [
        "task",
        "family",
        "global",
    ]
    assert bank.for_task(T) == (of_task,)
    assert bank.for_family("f") == (of_task, of_family)
    assert bank.for_all() == (of_all,)
    assert bank.for_task("") == bank.for_family("") == ()
    assert bank.skills(bank.all_rows()) == (of_task, of_family, of_all)


def test_every_shelf_has_its_own_capacity():
    bank = Bank(1, family_capacity=2, global_capacity=3)
    for scope in ({"task": T}, {"task": ""}, {"task": "", "family": ""}):
        bank.absorb([skill(word, **scope, reward=0.5) for word in "abcde"])
    assert held(bank) == ["e"]
    assert words(bank.for_family("f")) == ["e", "d", "e"]
    assert words(bank.for_all()) == ["c", "d", "e"]
    assert bank.counts == {"held": 6, "absorbed": 15, "merged": 0, "evicted": 9}


@pytest.mark.parametrize("name", ["family_capacity", "global_capacity"])
def test_a_shelf_without_room_is_refused(name):
    with pytest.raises(ValueError, match=f"skills.{name}=0 must be at least 1"):
        Bank(1, **{name: 0})


def test_equal_words_for_two_families_are_two_skills():
    bank = Bank(1)
    bank.absorb([skill("a", task=""), skill("a", task="", family="g")])
    bank.absorb([skill("a", task="", family="")])
    assert len(bank) == 3


def test_one_id_on_two_shelves_is_refused():
    bank, first = Bank(1), skill("a", task="")
    bank.absorb([first])
    with pytest.raises(ValueError, match="make ids with skill_id"):
        bank.absorb([dataclasses.replace(first, family="g")])


@pytest.mark.parametrize("task", ["fake/test/0", "fake/validation/3", "train", "t"])
def test_a_skill_of_an_evaluation_task_never_enters(task, tmp_path):
    bank = Bank(4)
    with pytest.raises(ValueError, match=f"task='{task}' is not one of"):
        bank.absorb([skill("a"), skill("b", task=task)])
    assert len(bank) == 0
    bank.absorb([skill("a")])
    state = json.loads(json.dumps(bank.state()))
    state["entries"][0]["skill"]["task"] = task
    with pytest.raises(ValueError, match="must not enter"):
        Bank.from_state(state)
    bank.save(tmp_path / "skills.jsonl")
    text = (tmp_path / "skills.jsonl").read_text().replace(T, task)
    (tmp_path / "skills.jsonl").write_text(text)
    with pytest.raises(ValueError, match="line 1: task="):
        Bank.load(tmp_path / "skills.jsonl", 4)


def near(word, reward=0.5, born=0, **more):
    """Nine words: two of them that differ in one share at most 6 of 8 trigrams."""
    text = f"{word} the apple to the shelf and close it"
    id = skill_id(T, text, "", ())
    source = more.pop("source", word)
    return Skill(id, text, "", (), T, "f", source, born, reward, **more)


def test_near_duplicates_merge_from_the_similarity_on():
    # Nine words have 7 trigrams; another first word changes 1: 6 shared of 8.
    for similarity, count in ((0.75, 1), (0.76, 2), (1.0, 2)):
        bank = Bank(8, similarity=similarity)
        bank.absorb([near("move", policy=3), near("take", policy=5)])
        assert len(bank) == count
    bank = Bank(8, similarity=0.75)
    bank.absorb([near("move", policy=3), near("take", policy=5)])
    (kept,) = bank.for_task(T)
    assert kept == near("move", policy=5)
    assert bank.sources(kept.id) == ("move", "take")
    bank.absorb([dataclasses.replace(near("take"), task=U, id="another task's")])
    assert len(bank) == 2


@pytest.mark.parametrize(
    "rewards, kept", [((0.5, 0.7), 1), ((0.7, 0.5), 0), ((1, 1), 0)]
)
def test_of_near_duplicates_the_text_of_the_better_reward_stays(rewards, kept):
    bank = Bank(8, similarity=0.75)
    made = near("move", rewards[0], 4, policy=2), near("take", rewards[1], 3, policy=3)
    bank.absorb([made[0]])
    bank.credit([(made[0].id, 1.0), (made[0].id, 0.5)], 4)
    bank.absorb([made[1]])
    (found,) = bank.for_task(T)
    assert found == dataclasses.replace(made[kept], born=4, policy=3)
    assert bank.sources(found.id) == ("move", "take")
    assert bank.stats(found.id) == Stats(2, 0.75, 4)
    bank.credit([(made[0].id, 0.0)], 5)  # shown before its text was replaced
    assert bank.stats(found.id) == Stats(3, 0.5, 5)
    assert bank.counts == {"held": 1, "absorbed": 1, "merged": 1, "evicted": 0}
    # A text that comes back is the old one again.
    bank.absorb([dataclasses.replace(made[1 - kept], reward=1.0, source="later")])
    bank.credit([(found.id, 1.0)])
    (again,) = bank.for_task(T)
    assert again.text == made[1 - kept if max(rewards) < 1 else kept].text
    assert bank.stats(again.id).uses == 4
    assert bank.sources(again.id) == ("move", "take", "later")


def test_near_duplicates_of_a_file_are_merged_with_the_uses_of_both(tmp_path):
    bank = Bank(8)
    bank.absorb([near("move"), near("take", 0.9), skill("other")])
    bank.credit([(near("move").id, 1.0)] * 3, 7)
    bank.credit([(near("take").id, 0.5)], 2)
    bank.save(tmp_path / "skills.jsonl")
    again = Bank.load(tmp_path / "skills.jsonl", 8, similarity=0.75)
    found, other = again.for_task(T)
    assert (found, other) == (near("take", 0.9), skill("other"))
    assert again.stats(found.id) == Stats(4, 3.5 / 4, 7)
    assert again.sources(found.id) == ("move", "take")
    assert again.counts == {"held": 2, "absorbed": 2, "merged": 1, "evicted": 0}


class Alike:
    """One shelf that merges what is alike, as a list of dicts, oldest text first."""

    def __init__(self, capacity, similarity):
        self.capacity, self.similarity, self.entries = capacity, similarity, []

    def absorb(self, new):
        entry = {"skill": new, "sources": [new.source], "uses": 0, "total": 0.0}
        entry["authors"] = {new.source}
        indices = [jaccard(e["skill"].text, new.text) for e in self.entries]
        same = [i for i, e in enumerate(self.entries) if e["skill"].id == new.id]
        if not same and indices and max(indices) >= self.similarity:
            same = [indices.index(max(indices))]
        for i in same:
            held = self.entries[i]
            if new.source not in held["sources"]:
                held["sources"].append(new.source)
            if new.id == held["skill"].id:
                held["authors"].add(new.source)
            if new.reward > held["skill"].reward:
                held["skill"], old = new, held["skill"]
                if new.id != old.id:
                    held["authors"] = {new.source}
                if new.id != old.id:
                    self.entries.append(self.entries.pop(i))
        if not same:
            self.entries.append(entry)
        if len(self.entries) > self.capacity:
            self.entries.remove(min(self.entries, key=self.value))

    @staticmethod
    def value(entry):
        return (entry["skill"].reward + entry["total"]) / (1 + entry["uses"])


def test_random_near_duplicates_agree_with_a_list(monkeypatch):
    monkeypatch.setattr("skillsd_jax.skills.bank.SPARE", 3)
    replaced = renumbered = 0
    for seed in range(20):
        draw = random.Random(seed)
        bank, naive = Bank(4, similarity=0.5), Alike(4, 0.5)
        for step in range(120):
            text = " ".join(draw.choices("ab", k=5) + draw.choices("abc", k=2))
            id, reward = skill_id(T, text, "", ()), draw.randrange(5) / 4
            new = Skill(id, text, "", (), T, "f", str(draw.randrange(3)), 0, reward)
            before, rows = ids(bank.for_task(T)), len(bank.columns)
            bank.absorb([new])
            naive.absorb(new)
            shown = draw.choice(naive.entries)
            shown["uses"] += 1
            shown["total"] += reward
            bank.credit([(shown["skill"].id, reward)])
            found = bank.for_task(T)
            assert [s.text for s in found] == [e["skill"].text for e in naive.entries]
            assert [s.reward for s in found] == [
                e["skill"].reward for e in naive.entries
            ]
            for held, entry in zip(found, naive.entries):
                assert bank.sources(held.id) == tuple(entry["sources"])
                assert set(bank.authors(held.id)) == entry["authors"]
                mean = entry["total"] / entry["uses"] if entry["uses"] else 0.0
                assert bank.stats(held.id) == Stats(entry["uses"], mean)
            for source in ("0", "1", "2"):
                only = [e for e in naive.entries if e["authors"] == {source}]
                own = bank.skills(bank.only_rows(source))
                assert [s.text for s in own] == [e["skill"].text for e in only]
            replaced += set(before) != set(ids(found)) and len(before) == len(found)
            renumbered += len(bank.columns) < rows
            if step == 60:
                bank = Bank.from_state(json.loads(json.dumps(bank.state())))
    assert replaced > 100 and renumbered > 20


def test_equal_texts_alone_merge_at_similarity_one():
    bank = Bank(8)
    shout = dataclasses.replace(near("move"), id="louder")
    shout = dataclasses.replace(shout, success_analysis=shout.text.upper())
    bank.absorb([near("move"), shout])
    assert len(bank) == 2


def test_a_similarity_of_nothing_is_refused():
    with pytest.raises(ValueError, match="skills.similarity=0 must be in"):
        Bank(1, similarity=0)


def test_credit_remembers_the_latest_iteration():
    bank, a = Bank(4), skill("a")
    bank.absorb([a])
    bank.credit([(a.id, 1.0)])
    assert bank.stats(a.id) == Stats(1, 1.0, -1)
    bank.credit([(a.id, 1.0)], 7)
    bank.credit([(a.id, 1.0)])
    assert bank.stats(a.id).last_shown == 7


# As written before skills had a scope, a policy and a maker.
OLD_SKILL = {
    "id": "x",
    "success_analysis": "solved",
    "mistake_analysis": "none",
    "golden_workflow": ["go"],
    "task": T,
    "family": "f",
    "source": "1/2",
    "born": 1,
    "reward": 0.5,
}


def test_a_state_of_an_older_run_is_read():
    entry = {"skill": OLD_SKILL, "sources": ["1/2", "1/3"], "uses": 2, "total": 1.5}
    counts = {"absorbed": 5, "merged": 1, "evicted": 4}
    bank = Bank.from_state({"capacity": 3, **counts, "entries": [entry]})
    assert bank.counts == {"held": 1, **counts}
    assert bank.stats("x") == Stats(2, 0.75, -1)
    (skill,) = bank.for_task(T)
    assert (skill.policy, skill.maker) == (0, "template")
    assert bank.sources("x") == ("1/2", "1/3")
    assert bank.state()["family_capacity"] == 64


def test_a_file_of_an_older_run_is_read(tmp_path):
    line = OLD_SKILL | {"sources": ["1/2"], "uses": 4, "mean_reward": 0.25}
    (tmp_path / "old.jsonl").write_text(json.dumps(line) + "\n")
    bank = Bank.load(tmp_path / "old.jsonl", 3)
    assert bank.stats("x") == Stats(4, 0.25)


def test_what_was_saved_is_loaded_uses_and_all(tmp_path):
    bank = Bank(2, family_capacity=3, global_capacity=4, similarity=0.9)
    odd = "line\u2028end \x85 <|im_end|>\n\ud800"
    bank.absorb([skill(odd, source="1", policy=4, maker="policy"), skill("b")])
    bank.absorb([skill("c", task=""), skill("d", task="", family="")])
    first = bank.for_task(T)[0]
    bank.absorb([dataclasses.replace(first, source="2")])
    bank.credit([(first.id, 0.1)] * 3, 5)
    path = tmp_path / "skills.jsonl"
    bank.save(path)
    again = Bank.load(
        path, 2, family_capacity=3, global_capacity=4, similarity=0.9
    ).state()
    state = bank.state()
    # The surrogate, which no file can hold, is the only loss.
    text = again["entries"][0]["skill"].pop("success_analysis")
    assert text == odd.replace("\ud800", "?")
    workflow = again["entries"][0]["skill"].pop("golden_workflow")
    assert workflow[0] == f"take {text}"
    for name in ("success_analysis", "golden_workflow"):
        del state["entries"][0]["skill"][name]
    assert again["entries"] == state["entries"]


def test_loading_into_a_smaller_bank_keeps_the_best(tmp_path):
    bank = Bank(4)
    bank.absorb([skill(word, reward=r) for word, r in zip("abcd", (0.9, 0.1, 0.3, 1))])
    bank.save(tmp_path / "skills.jsonl")
    again = Bank.load(tmp_path / "skills.jsonl", 2)
    assert held(again) == ["a", "d"]
    assert again.counts["evicted"] == 2


@pytest.mark.parametrize(
    "line, fault",
    [
        ("{", "line 2 is no JSON"),
        ("[1]", "line 2 has no id; a skill has id, success_analysis"),
        ({"reward": "good"}, "line 2: reward='good' must be a number"),
        ({"reward": float("nan")}, "line 2: reward=nan must be finite"),
        ({"born": 1.5}, "line 2: born=1.5 must be a whole number"),
        ({"uses": True}, "line 2: uses=True must be a whole number"),
        ({"uses": -1}, "line 2: uses=-1 must be at least 0"),
        ({"golden_workflow": "go"}, "line 2: golden_workflow='go' must be a list"),
        ({"golden_workflow": [1]}, "must be a list of texts"),
        ({"family": None}, "line 2: family=None must be a text"),
        ({"sources": "x"}, "line 2: sources='x' must be a list of texts"),
        ({"authors": [1]}, r"line 2: authors=\[1\] must be a list of texts"),
        ({"id": "x"}, "line 2: x was there before"),
    ],
)
def test_a_damaged_line_is_named(line, fault, tmp_path):
    if isinstance(line, dict):
        line = json.dumps(OLD_SKILL | {"id": "y"} | line)
    path = tmp_path / "skills.jsonl"
    path.write_text(json.dumps(OLD_SKILL) + "\n" + line + "\n")
    with pytest.raises(ValueError, match=f"skills.jsonl, {fault}|{fault}"):
        Bank.load(path, 3)


def test_a_missing_file_says_so(tmp_path):
    with pytest.raises(ValueError, match=r"from .*nowhere.jsonl: .*No such file"):
        Bank.load(tmp_path / "nowhere.jsonl", 3)


class Naive:
    """The bank as lists and dicts, for tasks and families alike."""

    def __init__(self, rooms):
        self.rooms, self.shelves, self.evicted = rooms, {}, 0

    def absorb(self, skill):
        name = (skill.task, "" if skill.task else skill.family)
        shelf = self.shelves.setdefault(name, {})
        if skill.id in shelf:
            entry = shelf[skill.id]
            entry["sources"] |= {skill.source: None}
            entry["reward"] = max(entry["reward"], skill.reward)
            return
        shelf[skill.id] = {
            "sources": {skill.source: None},
            "reward": skill.reward,
            "family": skill.family,
            "uses": 0,
            "total": 0.0,
            "age": self.evicted + sum(map(len, self.shelves.values())),
        }
        if len(shelf) > self.rooms[skill.scope]:
            values = {
                id: (e["reward"] + e["total"]) / (1 + e["uses"])
                for id, e in shelf.items()
            }
            del shelf[min(shelf, key=values.get)]
            self.evicted += 1

    def credit(self, id, reward):
        for shelf in self.shelves.values():
            if id in shelf:
                shelf[id]["uses"] += 1
                shelf[id]["total"] += reward

    def ids(self, wanted):
        found = {
            id: e["age"]
            for name, shelf in self.shelves.items()
            for id, e in shelf.items()
            if wanted(name, e)
        }
        return sorted(found, key=found.get)


def ids(skills):
    return [skill.id for skill in skills]


def agree(bank, naive):
    for task in (T, U, V):
        wanted = naive.ids(lambda name, e, task=task: name[0] == task)
        assert ids(bank.for_task(task)) == wanted
    for family in "fg":
        wanted = naive.ids(lambda _, e, family=family: e["family"] == family)
        assert ids(bank.for_family(family)) == wanted
    assert ids(bank.for_all()) == naive.ids(lambda name, e: name == ("", ""))
    assert bank.counts["evicted"] == naive.evicted
    only = {}
    for shelf in naive.shelves.values():
        for id, entry in shelf.items():
            mean = entry["total"] / entry["uses"] if entry["uses"] else 0.0
            assert bank.stats(id) == Stats(entry["uses"], mean)
            assert bank.sources(id) == tuple(entry["sources"])
            if len(entry["sources"]) == 1:
                only.setdefault(next(iter(entry["sources"])), set()).add(id)
    for source in ("0", "1", "2"):
        rows = bank.only_rows(source)
        assert list(rows) == sorted(rows)
        assert set(ids(bank.skills(rows))) == only.get(source, set())


def test_random_histories_agree_with_a_dict(monkeypatch):
    monkeypatch.setattr("skillsd_jax.skills.bank.SPARE", 3)  # compact often
    scopes = [(T, "f"), (U, "f"), (V, "g"), ("", "f"), ("", "g"), ("", "")]
    for seed in range(15):
        draw = random.Random(seed)
        rooms = {"task": 2, "family": 3, "global": 4}
        bank, naive = Bank(*rooms.values()), Naive(rooms)
        seen = []
        for step in range(150):
            if draw.random() < 0.6 or not seen:
                task, family = draw.choice(scopes)
                new = skill(
                    f"w{draw.randrange(12)}",
                    task,
                    family,
                    source=str(draw.randrange(3)),
                    reward=draw.randrange(3) / 2,
                )
                seen.append(new.id)
                bank.absorb([new])
                naive.absorb(new)
            else:
                id, reward = draw.choice(seen), draw.random()
                bank.credit([(id, reward)])
                naive.credit(id, reward)
            if step % 10 == 0:
                agree(bank, naive)
            if step == 75:
                bank = Bank.from_state(json.loads(json.dumps(bank.state())))
        agree(bank, naive)
        assert bank.counts["evicted"] > 20


def test_ten_thousand_skills_on_one_shelf_or_over_tasks():
    many = [skill(f"w{i}", task="", family="", reward=i / 2e4) for i in range(12_000)]
    bank = Bank(8, global_capacity=10_000)
    bank.absorb(many)
    assert bank.for_all() == tuple(many[2_000:])
    assert len(bank.columns) <= 2 * len(bank) + 64
    bank = Bank(8)
    bank.absorb(
        skill(f"w{i}", f"fake/train/{i % 1250}", reward=0.5) for i in range(12_500)
    )
    assert len(bank) == 10_000
    assert words(bank.for_task(T)) == [f"w{i * 1250}" for i in range(2, 10)]
    rows = bank.family_rows("f")
    assert len(rows) == 10_000 and (np.diff(rows) > 0).all()


def test_absorbing_and_crediting_touch_their_own_shelf_alone(monkeypatch):
    bank = Bank(2, global_capacity=1000)
    bank.absorb([skill(f"w{i}", task="", family="") for i in range(900)])
    looked = []
    value = type(bank.columns).value

    def watched(self, rows):
        looked.append(len(rows))
        return value(self, rows)

    monkeypatch.setattr(type(bank.columns), "value", watched)
    bank.absorb([skill(word) for word in "abc"])
    bank.credit([(bank.for_task(T)[0].id, 1.0)])
    assert looked == [3]


# A child that does nothing but save, killed again and again; each time the file must
# load. What a kill in the middle of writing leaves is a part beside the file.
KILLING = """
import os, pathlib, random, signal, sys, time
from skillsd_jax.skills.bank import Bank
from skillsd_jax.skills.skill import Skill
folder = pathlib.Path(sys.argv[1])
path = folder / "skills.jsonl"
banks = [Bank(8, global_capacity=10_000) for _ in range(2)]
for count, bank in zip((200, 500), banks):
    bank.absorb(
        Skill(str(i), "word " * 2000, "", ("go",), "", "", "s", 0, 0.5)
        for i in range(count)
    )
began = time.monotonic()
for bank in banks:
    bank.save(path)
both = time.monotonic() - began
draw, found, parts = random.Random(0), [], 0
for _ in range(30):
    child = os.fork()
    while not child:
        for bank in banks:
            bank.save(path)
    time.sleep(draw.uniform(0, 2 * both))
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    found.append(len(Bank.load(path, 8, global_capacity=10_000)))
    parts += any(name != path for name in folder.iterdir())
    for name in folder.iterdir():
        name == path or name.unlink()
print(parts, *found)
"""


@pytest.mark.slow
def test_a_kill_during_save_never_leaves_a_damaged_file(tmp_path):
    """Thirty kills; at least three hit a file that was being written."""
    killing = [sys.executable, "-c", KILLING, str(tmp_path)]
    told = subprocess.run(killing, capture_output=True, text=True, check=True).stdout
    parts, *found = map(int, told.split())
    assert len(found) == 30 and set(found) == {200, 500}
    assert parts >= 3


def test_a_comparison_is_the_own_skill_of_each_of_its_episodes():
    bank = Bank(4)
    bank.absorb([skill("a", source="1/0+1/3")])
    for source, count in (("1/0", 1), ("1/3", 1), ("1/1", 0)):
        assert len(bank.only_rows(source)) == count
    bank.absorb([skill("a", source="1/1")])
    assert not any(len(bank.only_rows(f"1/{n}")) for n in range(4))


def owners(bank):
    """Episodes that alone wrote the one text that is held."""
    return [source for source in ("0/0", "0/1", "0/2") if len(bank.only_rows(source))]


@pytest.mark.parametrize("rewards, owner", [((0.5, 0.9), "0/1"), ((0.9, 0.5), "0/0")])
def test_a_near_duplicate_is_the_own_of_whoever_wrote_the_text_that_is_held(
    rewards, owner, tmp_path
):
    bank = Bank(8, similarity=0.75)
    made = [
        near(word, reward, source=source)
        for word, reward, source in zip(("move", "take"), rewards, ("0/0", "0/1"))
    ]
    bank.absorb(made)
    bank.save(tmp_path / "skills.jsonl")
    state = json.loads(json.dumps(bank.state()))
    loaded = Bank.load(tmp_path / "skills.jsonl", 8, similarity=0.75)
    for one in (bank, Bank.from_state(state), loaded):
        (kept,) = one.for_task(T)
        assert one.sources(kept.id) == ("0/0", "0/1")
        assert owners(one) == [owner] and one.authors(kept.id) == (owner,)
        # Whoever writes it word for word shares it.
        one.absorb([dataclasses.replace(kept, source="0/2", reward=0.0)])
        assert owners(one) == [] and one.authors(kept.id) == (owner, "0/2")
        again = Bank.from_state(json.loads(json.dumps(one.state())))
        assert again.state() == one.state() and owners(again) == []
    for entry in state["entries"]:  # as an older run wrote it
        del entry["authors"]
    assert owners(Bank.from_state(state)) == [owner]


def test_a_text_that_replaces_a_shared_one_is_its_authors_own():
    bank = Bank(8, similarity=0.75)
    bank.absorb([near("move", source="0/0"), near("move", source="0/1")])
    assert owners(bank) == []
    bank.absorb([near("take", 0.9, source="0/2")])
    assert owners(bank) == ["0/2"]
    bank.absorb([near("move", 1.0, source="0/1")])
    assert owners(bank) == ["0/1"]
