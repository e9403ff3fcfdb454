"""Who writes skills, when they enter the bank, and what becomes of what is no skill."""

import dataclasses
import json
import time
import types
from pathlib import Path

import jax
import pytest

from skillsd_jax import config as settings
from skillsd_jax import experience, metrics, presets, summaries, train
from skillsd_jax.prompts import Prompter
from skillsd_jax.skills import summarizer
from skillsd_jax.skills.bank import Bank
from skillsd_jax.trajectory import Task, Trajectory, Turn
from skillsd_jax.validation import Refused
from tests.skills.server import KEY, serving

ROOT = Path(__file__).parent.parent


class Words:
    """One id per word: all that measuring a skill needs of a tokenizer."""

    stop_id, default_system, no_thought = 1, "", ""

    def encode(self, text):
        return [10] * len(text.split())

    def open_turn(self, role):
        return [2]

    def close_turn(self):
        return [1]


PROMPT = settings.Prompt(max_skill_length=200)
PLAYER = types.SimpleNamespace(prompter=Prompter(Words(), PROMPT))


def episode(seed, actions, success):
    task = Task("household", seed, "train", "pick", "put some apple in shelf 1")
    turns = tuple(Turn("at: middle", a, a, True, True, 0.0) for a in actions)
    ending = "success" if success else "limit"
    return Trajectory(task, turns, (), float(success), success, ending)


def played(iteration=0, tasks=3):
    """Of each task a solved and a failed episode."""
    solved = "take apple 1 from fridge 1", "move apple 1 to shelf 1"
    episodes = []
    for seed in range(tasks):
        episodes.append(episode(seed, (f"go to fridge {iteration + 1}", *solved), True))
        episodes.append(episode(seed, ("go to cabinet 1", "look"), False))
    groups = [seed for seed in range(tasks) for _ in range(2)]
    return experience.Experience(episodes, groups, iteration)


def writing(**options):
    config = settings.Config(prompt=PROMPT)
    for name, value in options.items():
        section = config.skills
        if hasattr(config.skills.endpoint, name):
            section = config.skills.endpoint
        setattr(section, name, value)
    return summaries.Summaries(config, PLAYER, lambda iteration: jax.random.key(0))


def asking(server, **options):
    usual = {"maker": "endpoint", "model": "m", "timeout_s": 0.3, "retries": 0}
    return writing(**usual | {"url": server.url, "lag": 0} | options)


def counted(made):
    return {name: count for name, count in made.counts.items() if count}


def test_the_template_makes_a_skill_of_each_solved_task_at_once():
    made = writing().take(played(4), Bank(8), None)
    assert counted(made) == {"asked": 3, "made": 3}
    assert [skill.source for skill in made.skills] == ["4/0", "4/2", "4/4"]
    assert {(skill.born, skill.policy) for skill in made.skills} == {(4, 4)}


def test_compared_episodes_make_one_skill_with_the_failed_ones_mistakes():
    made = writing(comparative=True).take(played(), Bank(8), None)
    assert [skill.source for skill in made.skills] == ["0/0+0/1", "0/2+0/3", "0/4+0/5"]
    for skill in made.skills:
        assert skill.success_analysis == "solved in 3 steps"
        assert skill.mistake_analysis == "wasted cabinet 1"


@pytest.mark.parametrize(
    ("behaviour", "counts"),
    [
        ("good", {"made": 3}),
        ("injects", {"made": 3}),
        ("slow", {"failed": 3}),
        ("hangs_up", {"failed": 3}),
        ("not_json", {"failed": 3}),
        ("html", {"failed": 3}),
        ("ten_megabytes", {"failed": 3}),
        ("no_choices", {"failed": 3}),
        ("counts", {"not_json": 3}),
    ],
)
def test_whatever_a_server_does_is_a_skill_or_is_counted(behaviour, counts):
    with serving(behaviour) as server:
        made = asking(server)
        begun = time.monotonic()
        got = made.take(played(), Bank(8), None)
        made.close()
    assert counted(got) == {"asked": 3} | counts
    assert len(got.skills) == counts.get("made", 0)
    assert time.monotonic() - begun < 5
    for skill in got.skills:
        shown = summarizer.render(skill)
        assert shown.count("</skill>") == 1 and shown.count("\n") == 4


def test_a_skill_enters_so_many_iterations_after_its_episode():
    with serving("good") as server:
        made = asking(server, lag=2, timeout_s=5.0)
        bank, entered = Bank(8), []
        for iteration in range(4):
            got = made.take(played(iteration), bank, None)
            entered.append([(s.born, s.policy) for s in got.skills])
            assert got.counts["waiting"] == 3 * min(iteration + 1, 2)
        made.close()
    assert entered == [[], [], [(2, 0)] * 3, [(3, 1)] * 3]


@pytest.mark.parametrize(
    ("late", "counts"), [("wait", {"failed": 1}), ("drop", {"late": 1})]
)
def test_what_is_late_is_waited_for_or_dropped(late, counts):
    with serving("slow") as server:
        made = asking(server, late=late)
        got = made.take(played(tasks=1), Bank(8), None)
        made.close()
    assert counted(got) == {"asked": 1} | counts


def test_an_asynchronous_loop_never_waits_and_takes_what_is_there():
    with serving("slow") as server:
        made = asking(server, asynchronous=True, timeout_s=60.0)
        begun = time.monotonic()
        for iteration in range(3):
            got = made.take(played(iteration), Bank(8), None)
        assert time.monotonic() - begun < 1
        assert counted(got) == {"asked": 3, "waiting": 9}
        made.close()
    with serving("good") as server:
        made = asking(server, asynchronous=True, timeout_s=60.0)
        skills = list(made.take(played(0), Bank(8), None).skills)
        nobody = dataclasses.replace(played(1), trajectories=[], groups=[])
        while len(skills) < 3 and time.monotonic() - begun < 30:
            time.sleep(0.01)
            skills += made.take(nobody, Bank(8), None).skills
        made.close()
    assert len(skills) == 3


def test_what_was_under_way_is_asked_again_after_a_restart():
    with serving("good") as server:
        first = asking(server, lag=1, timeout_s=5.0)
        first.take(played(0), Bank(8), None)
        state = json.loads(json.dumps(first.state()))
        first.close()
        second = asking(server, lag=1, timeout_s=5.0)
        second.restore(state)
        got = second.take(played(1), Bank(8), None)
        second.close()
    assert [(s.born, s.policy, s.source) for s in got.skills] == [
        *((1, 0, f"0/{number}") for number in (0, 2, 4))
    ]


def test_an_endpoint_without_a_server_or_model_is_refused_before_anything_starts():
    for options in ({"model": "m"}, {"url": "http://localhost:1/v1"}):
        with pytest.raises(ValueError, match="needs a server; set skills.endpoint.url"):
            writing(maker="endpoint", **options)


def test_a_bank_begins_with_what_can_be_shown_of_the_libraries(tmp_path):
    path, said = tmp_path / "a.md", []
    path.write_text("# Family: heat\n## a\nb\n## c\n" + "d " * 200)
    bank = writing(library=str(path)).open_bank(("pick",), said.append)
    assert [skill.success_analysis for skill in bank.for_family("heat")] == ["a: b"]
    assert (
        "1 of 2 skills are longer than" in said[0] and "for heat, which no" in said[1]
    )
    path.write_text("## c\n" + "d " * 200)
    with pytest.raises(Refused, match="none of the 1 skills"):
        writing(library=str(path)).open_bank((), said.append)


def smoke(name: str, tmp: Path) -> settings.Config:
    config = presets.load(str(ROOT / "configs" / f"{name}.py")).get_config("smoke")
    config.cache = str(tmp / "cache")
    return config


@pytest.mark.slow
@pytest.mark.parametrize("maker", ["template", "policy", "endpoint"])
def test_sokoban_runs_with_each_maker(maker, tmp_path_factory, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    tmp = tmp_path_factory.getbasetemp() / "makers"
    config = smoke("sokoban", tmp)
    config.skills.maker = maker
    work = tmp / maker
    with serving("good") as server:
        config.skills.endpoint.url, config.skills.endpoint.model = server.url, "m"
        config.skills.endpoint.record = str(work / "summaries.jsonl")
        train.run(config, str(work))
    rows = metrics.read(work / "metrics.jsonl")
    skills = [row["skills"] for row in rows]
    for now, before in zip(skills, [{"waiting": 0}, *skills]):
        ended = [now[name] for name in summaries.FIGURES if name not in ("asked",)]
        assert now["asked"] + before["waiting"] == sum(ended)
    if maker != "policy":
        assert sum(now["made"] + now["too_long"] for now in skills) > 0
    for path in work.rglob("*"):
        assert not path.is_file() or KEY.encode() not in path.read_bytes()
