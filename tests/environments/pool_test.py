"""Stages of every kind; unruly.py asks for trouble in them."""

import importlib.util
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from skillsd_jax import config
from skillsd_jax.environments import pool
from skillsd_jax.environments.household import Household
from skillsd_jax.environments.stage import MAX_MESSAGE, Maker

HERE = Path(__file__).parent
KINDS = ("inline", "threads", "processes")
LOOK = "<action>go to fridge 1</action>"
HANG_S = 0.6  # time limit where something hangs
SLOTS = 4  # two workers: 0 and 2, 1 and 3


@pytest.fixture
def stage(monkeypatch):
    """Opens stages; closes them after the test."""
    monkeypatch.syspath_prepend(str(HERE))  # workers import what we can
    opened = []

    def build(kind, name="unruly:Unruly", count=SLOTS, options=(), **setting):
        make = Maker(name, options=options)
        chosen = config.Environment(workers=kind, **setting)
        opened.append(pool.open_stage(make, count, chosen))
        return opened[-1]

    yield build
    for each in opened:
        each.close()


def began(stage):
    """The stage with an episode in each slot."""
    outcomes = stage.reset(range(stage.count), range(stage.count)).result()
    assert not any(outcome.fault for outcome in outcomes)
    return stage


def play(stage, *texts):
    return stage.step(range(len(texts)), texts).result()


def faults(outcomes):
    return [outcome.fault for outcome in outcomes]


def numbers(stage):
    """Which instance plays in each slot."""
    outcomes = play(stage, *["number"] * stage.count)
    return [outcome.step.observation for outcome in outcomes]


def until(true, limit_s=10.0):
    """Whether it comes true in time."""
    end = time.monotonic() + limit_s
    while not true() and time.monotonic() < end:
        time.sleep(0.01)
    return true()


def alive(pid):
    """A process that nobody has waited for yet counts as ended."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return False
    return state not in "ZX"


def kill(worker):
    """Until it can be waited for: it looks dead before the last of its threads is."""
    os.kill(worker, signal.SIGKILL)
    assert until(lambda: waitable(worker))


def waitable(child):
    how = os.WEXITED | os.WNOHANG | os.WNOWAIT
    try:
        return os.waitid(os.P_PID, child, how) is not None
    except ChildProcessError:  # somebody has waited already
        return True


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_says_what_the_bare_environment_says(stage, kind):
    """Two cohorts under way at once; slots begin again with other seeds."""
    opened = stage(kind, "household")
    bare = [Household() for _ in range(SLOTS)]
    assert opened.max_steps == bare[0].max_steps
    assert opened.data == "generated"
    cohorts = ([2, 0], [3, 1])
    for seed in (0, 10):
        steps = {}
        under_way = [opened.reset(c, [seed + slot for slot in c]) for c in cohorts]
        for cohort, pending in zip(cohorts, under_way, strict=True):
            for slot, outcome in zip(cohort, pending.result(), strict=True):
                steps[slot] = bare[slot].reset(seed + slot)
                assert (outcome.step, outcome.task) == (steps[slot], bare[slot].task())
        for _ in range(opened.max_steps):
            texts = {s: f"<action>{steps[s].admissible[s]}</action>" for s in steps}
            texts[1] = "<action>\x00\ud800</action>"
            under_way = [opened.step(c, [texts[s] for s in c]) for c in cohorts]
            for cohort, pending in zip(cohorts, under_way, strict=True):
                for slot, outcome in zip(cohort, pending.result(), strict=True):
                    steps[slot] = bare[slot].step(texts[slot])
                    if slot != 1:
                        assert outcome.step == steps[slot]
                        assert outcome.task is None
                    assert (outcome.fault, outcome.bounded) == ("", slot == 1)
        assert all(step.done for step in steps.values())


@pytest.mark.parametrize("kind", KINDS)
def test_an_exception_ends_its_own_episode_only(stage, kind):
    opened = began(stage(kind))
    outcomes = play(opened, LOOK, "raise", LOOK, "nothing")
    assert faults(outcomes) == ["", "error", "", "error"]
    assert outcomes[1].message.startswith("RuntimeError('lostlost")
    assert len(outcomes[1].message) == MAX_MESSAGE
    assert outcomes[1].step is None
    outcomes = opened.reset([1, 3], [5, 666]).result()
    assert faults(outcomes) == ["", "error"]
    assert outcomes[0].step == Household().reset(5)
    assert faults(opened.reset([3], [6]).result()) == [""]
    assert faults(play(opened, LOOK, LOOK, LOOK, LOOK)) == [""] * 4
    assert opened.counts() == {"errors": 3, "timeouts": 0, "restarts": 0, "bounded": 0}


@pytest.mark.parametrize("kind", KINDS)
def test_an_environment_is_made_anew_after_a_fault(stage, kind):
    opened = began(stage(kind))
    before = numbers(opened)
    play(opened, LOOK, "raise")
    opened.reset([0, 1], [0, 1]).result()
    assert [a != b for a, b in zip(before, numbers(opened))] == [
        *(False, True, False, False)
    ]


def test_a_worker_outlives_an_exception_of_any_type(stage):
    opened = began(stage("processes"))
    assert faults(play(opened, "raise another", LOOK, LOOK)) == ["error", "", ""]


@pytest.mark.parametrize("kind", ["inline", "threads"])
def test_in_this_process_an_unknown_exception_is_a_bug_and_raised(stage, kind):
    opened = began(stage(kind))
    with pytest.raises(Exception, match="of its own"):
        play(opened, "raise another")
    assert faults(play(opened, LOOK, LOOK)) == ["", ""]


def test_a_hanging_thread_loses_its_own_episode_only(stage):
    opened = began(stage("threads", timeout_s=HANG_S))
    before = numbers(opened)
    assert faults(play(opened, "hang", LOOK, LOOK, LOOK)) == ["timeout", "", "", ""]
    assert faults(opened.reset([0], [9]).result()) == [""]
    assert [a != b for a, b in zip(before, numbers(opened))] == [True, *[False] * 3]
    assert opened.counts() == {"errors": 0, "timeouts": 1, "restarts": 1, "bounded": 0}


def test_a_hanging_worker_loses_what_it_had_not_answered(stage):
    opened = began(stage("processes", count=6, timeout_s=HANG_S))
    before = opened.pids
    outcomes = opened.step([0, 1, 2, 3], [LOOK, LOOK, "hang", LOOK]).result()
    assert faults(outcomes) == ["", "", "timeout", ""]
    assert f"{HANG_S} s" in outcomes[2].message
    # 0 and 4 were live in that worker: 0 learns of it now, 4 begins anew before.
    assert faults(opened.reset([2, 4], [9, 9]).result()) == ["", ""]
    outcomes = opened.step(range(6), [LOOK] * 6).result()
    assert faults(outcomes) == ["error", "", "", "", "", ""]
    assert faults(opened.reset([0], [9]).result()) == [""]
    assert faults(play(opened, *[LOOK] * 6)) == [""] * 6
    assert opened.counts() == {"errors": 1, "timeouts": 1, "restarts": 1, "bounded": 0}
    assert opened.pids[0] != before[0]
    assert opened.pids[1] == before[1]
    assert not alive(before[0])


def test_the_rest_of_a_call_ends_with_the_worker_that_hangs(stage):
    opened = began(stage("processes", timeout_s=HANG_S))
    outcomes = play(opened, "hang", LOOK, LOOK, LOOK)
    assert faults(outcomes) == ["timeout", "", "error", ""]


@pytest.mark.parametrize("kind", ["threads", "processes"])
def test_the_time_limit_is_of_each_step_not_of_all(stage, kind):
    opened = began(stage(kind, worker_count=1, timeout_s=0.9))
    assert faults(play(opened, *["slow"] * 4)) == [""] * 4  # 0.3 s each


@pytest.mark.parametrize("way, cause", [("die", "SIGKILL"), ("leave", "exit status 7")])
def test_a_worker_that_dies_in_a_call_loses_its_slots_only(stage, way, cause):
    opened = began(stage("processes"))
    outcomes = play(opened, way, LOOK, LOOK, LOOK)
    assert faults(outcomes) == ["error", "", "error", ""]
    assert cause in outcomes[0].message
    assert cause in outcomes[2].message
    assert faults(opened.reset([0, 2], [0, 2]).result()) == ["", ""]
    assert faults(play(opened, LOOK, LOOK, LOOK, LOOK)) == [""] * 4
    assert opened.counts() == {"errors": 2, "timeouts": 0, "restarts": 1, "bounded": 0}


def test_a_worker_killed_between_calls_ends_its_live_episodes_once(stage):
    opened = began(stage("processes", count=6))
    kill(opened.pids[0])
    assert faults(opened.reset([4], [1]).result()) == [""]
    outcomes = play(opened, LOOK, LOOK, LOOK)
    assert faults(outcomes) == ["error", "", "error"]
    assert "SIGKILL" in outcomes[2].message
    assert faults(opened.reset([0, 2], [1, 1]).result()) == ["", ""]
    assert faults(play(opened, *[LOOK] * 6)) == [""] * 6
    assert opened.counts()["errors"] == 2
    assert opened.counts()["restarts"] == 1


@pytest.mark.parametrize("kind", KINDS)
def test_megabytes_and_control_bytes_are_kept_out(stage, kind):
    opened = began(stage(kind, max_observation=1000))
    outcomes = play(opened, LOOK, "flood")
    assert faults(outcomes) == ["", ""]
    assert [outcome.bounded for outcome in outcomes] == [False, True]
    step = outcomes[1].step
    assert step.observation.startswith("\ufffd[2Jfive\ufffd\tbytes\no")
    assert (len(step.observation), len(step.feedback)) == (1000, 1000)
    assert step.admissible[0] == "go\ufffd"
    assert sum(map(len, step.admissible)) <= 10_000
    assert opened.counts()["bounded"] == 1


@pytest.mark.parametrize("kind", KINDS)
def test_an_engine_may_print(stage, kind):
    opened = began(stage(kind))
    assert faults(play(opened, "print", "print", LOOK, LOOK)) == [""] * 4


def test_numbers_of_numpy_come_through(stage):
    (outcome,) = play(began(stage("processes")), "numpy")
    assert (outcome.step.reward, outcome.step.success) == (0.5, False)


def test_a_worker_imports_no_jax_and_runs_no_main_of_ours(stage):
    opened = began(stage("processes"))
    outcomes = play(opened, *["modules"] * SLOTS)
    wanted = [f"skillsd_jax.environments.pool_worker [] {pid}" for pid in opened.pids]
    assert [outcome.step.observation for outcome in outcomes] == wanted * 2


def test_a_worker_leaves_an_interrupt_to_its_parent(stage):
    opened = began(stage("processes"))
    for pid in opened.pids:
        os.kill(pid, signal.SIGINT)
    assert faults(play(opened, *[LOOK] * SLOTS)) == [""] * SLOTS


SCRIPT = """
from skillsd_jax import config
from skillsd_jax.environments import pool
from skillsd_jax.environments.stage import Maker
print("the main module runs", flush=True)
setting = config.Environment(workers="processes")
stage = pool.open_stage(Maker("unruly:Unruly"), 4, setting)
stage.reset(range(4), range(4)).result()
pending = stage.step([0], ["{text}"])
print("pids", *stage.pids, flush=True)
if {stays}:
    input()
"""


@pytest.fixture
def script(tmp_path):
    """Runs a script without a main guard until it has workers."""
    path = os.pathsep.join([str(HERE), str(HERE.parent.parent)])
    started = []

    def start(text, stays=True):
        file = tmp_path / "script.py"
        file.write_text(SCRIPT.format(text=text, stays=stays))
        process = subprocess.Popen(
            [sys.executable, str(file)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": path},
        )
        started.append(process)
        said = []
        while not (said and said[-1].startswith("pids")):
            said.append(process.stdout.readline())
            assert said[-1], "the script ended"
        assert said.count("the main module runs\n") == 1
        return process, [int(pid) for pid in said[-1].split()[1:]]

    yield start
    for process in started:
        process.kill()
        process.communicate()


@pytest.mark.parametrize("text", ["pass", "hang"])
def test_no_worker_survives_a_parent_that_is_killed(script, text):
    process, pids = script(text)
    assert len(pids) == 2 and all(map(alive, pids))
    process.kill()
    assert until(lambda: not any(map(alive, pids)))


def test_no_worker_survives_a_parent_that_never_closes(script):
    process, pids = script("pass", stays=False)
    assert process.wait(10) == 0
    assert until(lambda: not any(map(alive, pids)))


@pytest.mark.parametrize("kind", KINDS)
def test_closing_twice_is_closing_once(stage, kind):
    opened = began(stage(kind))
    opened.close()
    opened.close()
    with pytest.raises(RuntimeError, match="closed"):
        opened.reset([0], [0])


@pytest.mark.parametrize("kind", ["threads", "processes"])
def test_closing_ends_what_hangs(stage, kind):
    opened = began(stage(kind, timeout_s=HANG_S if kind == "threads" else 60.0))
    pids = opened.pids if kind == "processes" else []
    pending = opened.step(range(SLOTS), ["hang", LOOK, LOOK, LOOK])
    time.sleep(0.1)
    opened.close()
    outcomes = pending.result()
    assert faults(outcomes) == ["error", "", "error", ""]
    assert "closed" in outcomes[0].message
    assert not any(map(alive, pids))


def test_what_an_engine_has_started_ends_with_its_worker(stage, tmp_path):
    opened = began(stage("processes", options=(("folder", str(tmp_path)),)))
    assert faults(play(opened, "child")) == [""]
    child = int((tmp_path / "child").read_text())
    assert alive(child)
    opened.close()
    assert until(lambda: not alive(child))


def test_a_missing_engine_is_said_as_it_is(stage, tmp_path):
    (tmp_path / "gone").touch()
    options = (("folder", str(tmp_path)),)
    with pytest.raises(ImportError, match=r"^pip install 'skillsd_jax\[unruly\]'$"):
        stage("processes", "unruly:Missing", options=options)
    with pytest.raises(ImportError, match="no_such_module"):
        stage("threads", "no_such_module:Class")


def test_an_engine_that_goes_missing_ends_the_run_with_its_cause(stage, tmp_path):
    opened = began(
        stage("processes", "unruly:Missing", options=(("folder", str(tmp_path)),))
    )
    (tmp_path / "gone").touch()
    kill(opened.pids[0])
    # A worker that is dying may still take the first call, whose episodes it loses.
    with pytest.raises(ImportError, match="pip install"):
        for _ in range(2):
            play(opened, LOOK, LOOK, LOOK, LOOK)
    assert faults(opened.step([1, 3], [LOOK, LOOK]).result()) == ["", ""]


def test_workers_that_cannot_be_started_are_given_up_with_the_cause(stage):
    with pytest.raises(RuntimeError, match=r"unruly:Stillborn.* 3 tries .*SIGKILL"):
        stage("processes", "unruly:Stillborn", worker_count=1)


def test_a_local_instance_plays_apart_from_the_workers(stage):
    for kind in KINDS:
        opened = began(stage(kind, "household"))
        opened.local.reset(7)
        (outcome,) = play(opened, LOOK)
        bare = Household()
        bare.reset(0)
        assert outcome.step == bare.step(LOOK)


def test_a_list_of_environments_is_a_stage_and_stays_its_owners():
    made = [Household(), Household()]
    with pool.stage_of(made) as opened:
        assert opened.count == 2
        assert opened.local is made[0]
        assert faults(opened.reset([1, 0], [4, 5]).result()) == ["", ""]
        assert [each.task().seed for each in made] == [5, 4]
    made[0].step(LOOK)


def test_wrong_slots_are_refused(stage):
    opened = stage("inline")
    for slots, seeds in (([0, 0], [1, 2]), ([0], [1, 2]), ([SLOTS], [0]), ([-1], [0])):
        with pytest.raises(ValueError, match="slots"):
            opened.reset(slots, seeds)


def test_a_maker_makes_the_configured_environment():
    setting = config.Environment(name="sokoban", require_think=True)
    setting.sokoban.max_steps = 7
    made = Maker.of(setting, "test")()
    assert made.max_steps == 7
    made.reset(0)
    assert made.task().split == "test"
    assert not made.step("<action>up</action>").valid
    with pytest.raises(ValueError, match=r"unknown environment 'chess'; known: house"):
        Maker("chess")()


@pytest.mark.skipif(
    importlib.util.find_spec("alfworld") is None, reason="needs the extra alfworld"
)
@pytest.mark.parametrize("kind", ["threads", "processes"])
def test_alfworld_plays_alike_in_threads_and_processes(stage, tmp_path, kind):
    """Its parsers and its library have state that all threads share."""
    from skillsd_jax.environments import alfworld_text

    options = (("cache", str(tmp_path)),)
    said = []
    for workers in (kind, "inline"):
        for parsed in ("_parsed", "_symbols", "_query"):
            getattr(alfworld_text, parsed).cache_clear()
        opened = stage(workers, "alfworld", 8, options, worker_count=4)
        outcomes = opened.reset(range(8), [0, 1] * 4).result()
        said.append(outcomes)
        for _ in range(4):
            texts = [f"<action>{o.step.admissible[0]}</action>" for o in outcomes]
            outcomes = opened.step(range(8), texts).result()
            said[-1] = said[-1] + outcomes
    assert said[0] == said[1]
    assert not any(faults(said[0]))
