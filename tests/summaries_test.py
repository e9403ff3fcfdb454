"""Who writes skills, when they enter the bank, and what becomes of what is no skill."""

import collections
import dataclasses
import json
import sys
import time
import types
from pathlib import Path

import jax
import pytest

from skillsd_jax import config as settings
from skillsd_jax import (
    experience,
    metrics,
    preflight,
    presets,
    summaries,
    train,
    validation,
)
from skillsd_jax.prompts import Prompter
from skillsd_jax.skills import summarizer
from skillsd_jax.skills.bank import Bank
from skillsd_jax.trajectory import Task, Trajectory, Turn
from skillsd_jax.validation import Refused
from tests.skills.server import CYCLE, KEY, serving

ROOT = Path(__file__).parent.parent
PATIENCE_S = 10.0  # of a busy machine


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


def writing(say=lambda text: None, **options):
    config = settings.Config(prompt=PROMPT)
    config.iterations = options.pop("iterations", config.iterations)
    for name, value in options.items():
        section = config.skills
        if hasattr(config.skills.endpoint, name):
            section = config.skills.endpoint
        setattr(section, name, value)
    return summaries.Summaries(config, PLAYER, lambda iteration: jax.random.key(0), say)


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
        ("slow", {"failed": 3, "server": {"timeout": 3}}),
        ("hangs_up", {"failed": 3, "server": {"network": 3}}),
        ("not_json", {"failed": 3, "server": {"not_json": 3}}),
        ("html", {"failed": 3, "server": {"not_json": 3}}),
        ("ten_megabytes", {"failed": 3, "server": {"too_large": 3}}),
        ("no_choices", {"failed": 3, "server": {"no_choice": 3}}),
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
    ("late", "counts"),
    [("wait", {"failed": 1, "server": {"timeout": 1}}), ("drop", {"late": 1})],
)
def test_what_is_late_is_waited_for_or_dropped(late, counts):
    with serving("slow") as server:
        made = asking(server, late=late)
        got = made.take(played(tasks=1), Bank(8), None)
        made.close()
    assert counted(got) == {"asked": 1} | counts


def test_dropping_what_is_late_does_not_make_everything_late():
    with serving("gated") as server:
        made = asking(server, late="drop", lag=1, timeout_s=60.0, concurrency=1)
        for iteration in range(5):
            got = made.take(played(iteration), Bank(8), None)
            assert counted(got) == {
                "asked": 3,
                "waiting": 3,
                **({"late": 3} if iteration else {}),
            }
            while not server.asked:
                time.sleep(0.005)
        server.gate.set()
        now = [each.handle for each in made._pending]
        assert all(handle.result(PATIENCE_S)[0] for handle in now)
        # An iteration's are alike and sent once: the one under way, and the last.
        assert len(server.asked) == 2
        made.close()


def test_an_asynchronous_backlog_is_bounded_and_the_oldest_is_dropped():
    with serving("slow") as server:
        made = asking(server, asynchronous=True, timeout_s=60.0)
        assert made.backlog == 64  # of 16 tasks with two skills each, twice
        made.backlog = 4
        made.take(played(0), Bank(8), None)
        got = made.take(played(1), Bank(8), None)
        assert counted(got) == {"asked": 3, "waiting": 4, "late": 2}
        left = [each.request.source for each in made._pending]
        assert left == ["0/4", "1/0", "1/2", "1/4"]
        made.close()


def test_a_backlog_has_room_for_two_iterations_and_for_all_that_is_sent_at_once():
    config = settings.Config()
    config.rollout.prompts, config.skills.per_group = 100, 3
    assert summaries.backlog(config) == 600
    config.skills.endpoint.concurrency = 200
    assert summaries.backlog(config) == 800


@pytest.mark.parametrize("late", ["wait", "drop"])
def test_a_server_that_gives_nothing_is_told_once(late):
    said = []
    with serving("denies") as server:
        made = asking(server, say=said.append, late=late, lag=1, timeout_s=5.0)
        for iteration in range(3):
            if late == "drop":
                [each.handle.result(PATIENCE_S) for each in made._pending]
            counts = made.take(played(iteration), Bank(8), None).counts
            assert len(said) == min(iteration, 1)
        assert counts["failed"] == 3
        assert "all 3 that were due none came" in said[0] and "denied" in said[0]
        assert KEY not in said[0]
        server.behaviour = "good"
        for iteration in range(3, 6):
            if late == "drop":
                [each.handle.result(PATIENCE_S) for each in made._pending]
            got = made.take(played(iteration), Bank(8), None)
        assert len(got.skills) == 3 and len(said) == 1
        server.behaviour = "hangs_up"
        for iteration in range(6, 8):
            made.take(played(iteration), Bank(8), None)
        assert len(said) == 2
        made.close()


def test_a_server_that_is_too_slow_is_told():
    said = []
    with serving("slow") as server:
        made = asking(server, say=said.append, late="drop", timeout_s=60.0)
        made.take(played(), Bank(8), None)
        made.close()
    assert "no failures, it is slow" in said[0]


def test_why_requests_failed_is_counted_once():
    with serving("fails_then_works", times=2) as server:
        made = asking(server, retries=1, timeout_s=5.0)
        first = made.take(played(0, tasks=1), Bank(8), None).counts
        second = made.take(played(1, tasks=1), Bank(8), None).counts
        made.close()
    assert first["server"] == {"status": 1, "retried": 1} and first["failed"] == 1
    assert second["server"] == {} and second["made"] == 1
    assert "server" not in writing().take(played(), Bank(8), None).counts


@pytest.mark.parametrize(
    ("options", "asked"),
    [
        ({"lag": 2, "late": "drop"}, [3, 0, 0]),
        ({"lag": 1, "late": "drop"}, [3, 3, 0]),
        ({"lag": 9, "asynchronous": True}, [3, 3, 0]),
    ],
)
def test_what_could_enter_after_the_last_iteration_alone_is_not_asked(options, asked):
    with serving("slow") as server:
        made = asking(server, iterations=3, timeout_s=60.0, **options)
        taken = [made.take(played(i), Bank(8), None).counts for i in range(3)]
        made.close()
    assert [counts["asked"] for counts in taken] == asked
    ended = sum(counts["late"] for counts in taken) + taken[-1]["waiting"]
    assert ended == sum(asked)


@pytest.mark.parametrize(
    ("maker", "skill", "answer", "words"),
    [
        ("policy", 1024, 1024, 341),
        ("policy", 100, 1024, 50),
        ("policy", 100, 30, 20),
        ("endpoint", 1024, 512, 170),
        ("endpoint", 1024, 2048, 512),
        ("template", 1024, 9, 512),
    ],
)
def test_the_words_asked_for_leave_room_for_the_json_around_them(
    maker, skill, answer, words
):
    config = settings.Skills(maker=maker)
    config.author.max_answer_length = answer if maker == "policy" else 9
    config.endpoint.max_tokens = answer if maker == "endpoint" else 9
    assert summaries.words(config, skill) == words


@pytest.mark.parametrize("name", ["alfworld", "sokoban"])
@pytest.mark.parametrize("maker", ["policy", "endpoint"])
def test_published_settings_have_room_for_a_whole_skill(name, maker):
    config = presets.load(str(ROOT / "configs" / f"{name}.py")).get_config("qwen3-4b")
    config.skills.maker = maker
    room = config.prompt.max_skill_length
    assert summaries.words(config.skills, room) >= room // 4


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


def filled(record):
    """A recording of what the requests of two iterations are answered."""
    with serving("tells_apart") as asked:
        made = asking(asked, record=str(record), lag=1, timeout_s=5.0, concurrency=1)
        made.take(played(0), Bank(8), None)
        made.take(played(1), Bank(8), None)
        made.take(played(2, tasks=0), Bank(8), None)
        made.close()


def replaying(record, interrupted, **options):
    """The skills of four iterations, after a restart before each one that is named."""
    options |= {"lag": 2, "replay": str(record), "maker": "endpoint", "model": "m"}
    made, skills = writing(**options), []
    for iteration in range(4):
        if iteration in interrupted:
            state = json.loads(json.dumps(made.state()))
            assert len(state) == 3 * min(iteration, 2)
            made.close()
            made = writing(**options)
            made.restore(state)
        # Only what iterations 0 and 1 saw is recorded.
        seen = dataclasses.replace(played(iteration % 2), iteration=iteration)
        skills += made.take(seen, Bank(8), None).skills
    made.close()
    return skills


def test_a_replayed_run_has_the_same_skills_wherever_it_is_interrupted(tmp_path):
    filled(record := tmp_path / "recording.jsonl")
    whole = replaying(record, ())
    assert len({skill.success_analysis for skill in whole}) == 2
    assert [skill.source for skill in whole[2:5]] == ["0/4", "1/0", "1/2"]
    for interrupted in ((1,), (2,), (3,), (1, 2, 3)):
        assert replaying(record, interrupted) == whole


def test_a_run_that_was_killed_has_the_recorded_answers_again(tmp_path):
    filled(record := tmp_path / "recording.jsonl")
    before, again = record.read_bytes(), []
    with serving("denies") as server:
        made = asking(server, record=str(record), lag=0)
        for iteration in (0, 1):
            again += made.take(played(iteration), Bank(8), None).skills
        made.close()
        assert server.asked == [] and record.read_bytes() == before
    assert [skill.success_analysis for skill in again] == ["number 1"] * 3 + [
        "number 2"
    ] * 3


@pytest.mark.parametrize("behaviour", ["tells_the_key", "spells_the_key"])
def test_no_field_of_a_skill_holds_the_key(behaviour, tmp_path, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    record = tmp_path / "recording.jsonl"
    with serving(behaviour) as server:
        made = asking(server, record=str(record), timeout_s=5.0)
        skills = made.take(played(), Bank(8), None).skills
        made.close()
    assert server.headers[0]["Authorization"] == f"Bearer {KEY}"  # it was sent
    assert len(skills) == 3
    for skill in skills:
        assert skill.success_analysis in ("(key)", "the key is (key)")
        assert KEY not in json.dumps(dataclasses.asdict(skill))
    answer = json.loads(record.read_text())["answer"]
    assert KEY not in answer and KEY not in str(json.loads(answer)["golden_workflow"])


def test_an_endpoint_without_a_server_or_model_is_refused_before_anything_starts():
    for options in ({"model": "m"}, {"url": "http://localhost:1/v1"}):
        with pytest.raises(ValueError, match="needs a server; set skills.endpoint.url"):
            writing(maker="endpoint", **options)


URL = "http://localhost:1/v1"


@pytest.mark.parametrize(
    ("maker", "options", "message"),
    [
        ("template", {"url": f"http://me:{KEY}@h/v1"}, "endpoint.url holds a user"),
        ("policy", {"url": f"me:{KEY}@h/v1"}, "skills.endpoint.url holds a user"),
        ("endpoint", {"url": f"http://me:{KEY}@h"}, "skills.endpoint.url holds a user"),
        ("template", {"url": f"{URL}?api_key={KEY}"}, "endpoint.url holds .* a query"),
        ("template", {"url": KEY}, "skills.endpoint.url must be http://HOST"),
        ("template", {"key_variable": KEY}, "skills.endpoint.key_variable is no name"),
        ("endpoint", {"url": URL}, "needs a server; set skills.endpoint.url"),
        ("endpoint", {"replay": "none"}, "skills.endpoint.replay: there is no record"),
        ("endpoint", {"url": URL, "record": "/proc/a"}, "skills.endpoint.record: /pro"),
        ("endpoint", {"url": URL, "timeout_s": 1e6}, "skills.endpoint.timeout_s=1000"),
        ("endpoint", {"url": URL, "key_variable": "ODD"}, "key_variable: ODD holds sp"),
        ("endpoint", {"url": URL, "late": "drop", "lag": 0}, "endpoint.lag=1 or more"),
        (
            "endpoint",
            {"url": URL, "lag": 40},
            "iterations=40 are over .*iterations=41",
        ),
    ],
)
def test_an_endpoint_that_cannot_be_asked_is_refused_before_anything_starts(
    maker, options, message, tmp_path, monkeypatch
):
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    monkeypatch.setenv("ODD", f"{KEY} {KEY}")
    monkeypatch.setattr(train, "Run", None)  # nothing starts if it is not refused
    config = settings.Config()
    config.skills.maker = maker
    if "needs a server" not in message:
        config.skills.endpoint.model = "m"
    for name, value in options.items():
        setattr(config.skills.endpoint, name, value)
    with pytest.raises(validation.Refused, match=message) as caught:
        train.run(config, str(tmp_path / "work"))
    assert KEY not in str(caught.value)
    assert not (tmp_path / "work").exists()


@pytest.mark.parametrize("maker", ["endpoint", "policy"])
@pytest.mark.parametrize(
    ("name", "hinted", "reads"),
    [("grpo", 0, False), ("sdpo", 0, False), ("hdpo", 0, False), ("opd", 0, False)]
    + [("grpo", 1, True), ("skill_grpo", 0, True), ("sdar", 0, True)],
)
def test_nobody_writes_skills_that_nobody_is_shown(maker, name, hinted, reads):
    config = settings.Config()
    config.objective.name, config.rollout.hinted_groups = name, hinted
    preflight.check(config)
    config.skills.maker = maker
    config.skills.endpoint.url, config.skills.endpoint.model = URL, "m"
    if not reads:
        cost = {"endpoint": "pays a server", "policy": "takes the time"}[maker]
        wanted = f"{cost} .* objective.name={name} reads none"
        with pytest.raises(validation.Refused, match=wanted):
            preflight.check(config)
        return
    preflight.check(config)
    config.skills.retrieval = "none+global:ucb"
    preflight.check(config)
    config.skills.retrieval = "none+global:none"
    with pytest.raises(
        validation.Refused, match=r"retrieval=none\+global:none shows no"
    ):
        preflight.check(config)
    config.skills.maker = "template"
    preflight.check(config)


def test_a_library_is_counted_by_the_families_of_the_environment(tmp_path):
    """Two names of one family: together they are more than its shelf holds."""
    path, config = tmp_path / "a.md", settings.Config()
    path.write_text("# Family: pick_and_place\n## a\nb\n# Family: pick\n## c\nd\n")
    config.skills.library, config.skills.family_capacity = str(path), 2
    preflight.check(config)
    config.skills.family_capacity = 1
    with pytest.raises(Refused, match="has 2 skills for family pick and"):
        preflight.check(config)


def test_a_model_that_cannot_be_had_for_retrieval_is_refused(monkeypatch):
    def missing(name):
        raise OSError(f"no repository {name}")

    module = types.SimpleNamespace(SentenceTransformer=missing, __spec__=missing)
    monkeypatch.setitem(sys.modules, "sentence_transformers", module)
    config = settings.Config()
    config.skills.embedding = "sentence-transformers:misspelled"
    preflight.check(config)  # nothing asks it
    config.skills.retrieval = "ucb+embedding"
    with pytest.raises(Refused, match="skills.embedding=.* cannot be loaded: no repos"):
        preflight.check(config)


def hostile(server, tmp: Path) -> settings.Config:
    """Sokoban at toy size, its skills by a server; nothing here learns anything."""
    config = settings.Config(iterations=6, checkpoint_every=3, cache=str(tmp / "cache"))
    config.environment.name, config.environment.train_tasks = "sokoban", 32
    config.environment.sokoban.max_steps = 4
    config.model.width, config.model.layers, config.model.hidden = 16, 1, 32
    config.model.heads = config.model.kv_heads = 2
    config.prompt.max_prompt_length, config.prompt.max_skill_length = 64, 400
    config.rollout.prompts, config.rollout.group_size = 4, 2
    config.rollout.rows = 8
    config.optimizer.minibatches, config.optimizer.micro_rows = 1, 16
    config.imitate.steps, config.imitate.rows = 5, 4
    config.imitate.episodes = config.imitate.tasks = 30
    config.evaluate.tasks = config.evaluate.teacher_tasks = 2
    config.evaluate.every, config.evaluate.greedy = 0, False
    config.skills.maker = "endpoint"
    asked = config.skills.endpoint
    asked.url, asked.model, asked.retries, asked.timeout_s = server.url, "m", 0, 3.0
    asked.record = str(tmp / "work" / "recording.jsonl")
    return config


@pytest.mark.slow
def test_a_run_finishes_whatever_its_server_does_and_every_request_is_accounted_for(
    tmp_path, monkeypatch
):
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    asked: list[list[str]] = []
    take, ask = summaries.Summaries.take, summaries.Summaries._ask

    def taken(self, *arguments):
        asked.append([])
        return take(self, *arguments)

    def heard(self, request, due):
        asked[-1].append(request.text)
        ask(self, request, due)

    monkeypatch.setattr(summaries.Summaries, "take", taken)
    monkeypatch.setattr(summaries.Summaries, "_ask", heard)
    with serving("cycles") as server:
        train.run(hostile(server, tmp_path), str(tmp_path / "work"))
    rows = metrics.read(tmp_path / "work" / "metrics.jsonl")
    assert len(rows) == 6 and set(server.treated.values()) == set(CYCLE)
    due: list[str] = []
    for row, texts in zip(rows, asked, strict=True):
        ends = collections.Counter(CYCLE[server.treated[text]] for text in due)
        wanted = collections.Counter(asked=len(texts), waiting=len(texts)) | ends
        found = {name: row["skills"][name] for name in summaries.FIGURES}
        assert {name: count for name, count in found.items() if count} == wanted
        assert row["seconds"]["skills"] < 60
        due = texts
    files = [path for path in (tmp_path / "work").rglob("*") if path.is_file()]
    assert {"recording.jsonl", "skills.jsonl"} <= {path.name for path in files}
    for path in files:
        assert KEY.encode() not in path.read_bytes(), path
    shown = (tmp_path / "work" / "skills.jsonl").read_text()
    assert "(key)" in shown and "Ignore previous" in shown
    assert "<|" not in shown and "</" not in shown and "\\u001b" not in shown


def test_a_bank_begins_with_what_can_be_shown_of_the_libraries(tmp_path):
    path, said = tmp_path / "a.md", []
    path.write_text("# Family: heat\n## a\nb\n## c\n" + "d " * 200)
    bank = writing(said.append, library=str(path)).open_bank(("pick",))
    assert [skill.success_analysis for skill in bank.for_family("heat")] == ["a: b"]
    assert (
        "1 of 2 skills are longer than" in said[0] and "for heat, which no" in said[1]
    )
    path.write_text("## c\n" + "d " * 200)
    with pytest.raises(Refused, match="none of the 1 skills"):
        writing(library=str(path)).open_bank(())


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
