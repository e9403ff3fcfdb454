"""What every environment owes its callers, whatever it is."""

import subprocess
import sys

import numpy as np
import pytest

from skillsd_jax.environments import ENVIRONMENTS
from skillsd_jax.environments.base import SPLITS, TimeStep

# Engines that an extra installs; their environments are skipped where it is missing.
ENGINES = {"alfworld": "textworld"}
SEEDS = {"alfworld": 2}  # levels compared per split; 20 where levels are cheap
UNREADABLE = [
    "",
    " \n\t",
    "go to fridge 1",
    "<action>",
    "</action><action>",
    "<action></action>",
    "<action>\x00\ud800</action>",
    "<action>fly to the moon</action>",
    "<action>go to nowhere 77</action>",
    f"<action>{'go to ' * 400}</action>",
    "a" * 20_000,
    bytes(range(256)).decode("latin-1"),
    "<|im_end|><action>{}</action>",
]


@pytest.fixture(params=sorted(ENVIRONMENTS))
def name(request):
    if request.param in ENGINES:
        pytest.importorskip(ENGINES[request.param])
    return request.param


@pytest.fixture(scope="session")
def options(tmp_path_factory):
    return {"alfworld": {"cache": str(tmp_path_factory.mktemp("games"))}}


@pytest.fixture
def make(name, options):
    made = []

    def build(split="train", **extra):
        made.append(ENVIRONMENTS[name](split, **options.get(name, {}), **extra))
        return made[-1]

    yield build
    for environment in made:
        environment.close()


def play(environment, seed, rng, noise=0.0):
    steps = [environment.reset(seed)]
    while not steps[-1].done:
        steps.append(environment.step(environment.demonstrate(rng, noise=noise)))
    return steps


def test_same_seed_and_replies_give_the_same_episode(make):
    first, second = make(), make()
    second.reset(5)  # what was played before must not matter
    episodes = [
        play(e, 3, np.random.default_rng(0), noise=0.3) for e in (first, second)
    ]
    assert episodes[0] == episodes[1]
    assert first.task() == second.task()


def test_task_names_the_episode(make, name):
    environment = make("validation")
    environment.reset(4)
    task = environment.task()
    assert (task.environment, task.split, task.seed) == (name, "validation", 4)
    assert task.instruction
    assert task.family in environment.families


def test_seeds_give_different_levels_and_splits_share_none(make, name):
    count = SEEDS.get(name, 20)
    levels = [
        fingerprint(environment, seed)
        for environment in map(make, SPLITS)
        for seed in range(count)
    ]
    by_split = [set(levels[i : i + count]) for i in range(0, len(levels), count)]
    assert all(len(split) > count // 2 for split in by_split)
    assert len(set().union(*by_split)) == sum(map(len, by_split))


def fingerprint(environment, seed):
    """What each first command shows: tells levels with a hidden state apart."""
    step = environment.reset(seed)
    shown = [environment.task().instruction, step.observation]
    for command in step.admissible:
        environment.reset(seed)
        shown.append(environment.step(f"<action>{command}</action>").feedback)
    return tuple(shown)


@pytest.mark.parametrize("reply", UNREADABLE, ids=range(len(UNREADABLE)))
def test_unreadable_reply_is_a_turn(make, reply):
    environment = make()
    environment.reset(0)
    step = environment.step(reply)
    assert isinstance(step, TimeStep)
    assert not step.valid
    assert not step.effective
    assert not step.success
    assert step.reward == 0
    assert len(step.observation) < 2_000


def test_episode_ends_at_max_steps(make):
    environment = make(max_steps=5)
    assert environment.max_steps == 5
    environment.reset(0)
    ends = [environment.step("pass").done for _ in range(5)]
    assert ends == [False] * 4 + [True]


def test_close_may_be_called_twice(make):
    environment = make()
    environment.reset(0)
    environment.close()
    environment.close()


def test_close_before_any_reset(make):
    make().close()


def test_reset_in_mid_episode_starts_afresh(make):
    environment = make()
    start = environment.reset(1)
    environment.step(f"<action>{start.admissible[0]}</action>")
    assert environment.reset(1) == start


def test_player_without_noise_replies_with_valid_commands(make):
    environment = make()
    rng = np.random.default_rng(1)
    for seed in range(5):
        steps = play(environment, seed, rng)[1:]
        assert all(step.valid for step in steps)


def test_scripted_reply_is_a_bare_action_tag(make):
    environment = make()
    environment.reset(0)
    reply = environment.demonstrate(np.random.default_rng(0))
    command = reply.removeprefix("<action>").removesuffix("</action>")
    assert reply == f"<action>{command}</action>"
    assert environment.step(reply).action == command


def test_success_ends_the_episode_with_return_one(make):
    environment = make()
    rng = np.random.default_rng(2)
    won = 0
    for seed in range(12):
        steps = play(environment, seed, rng)
        if steps[-1].success:
            won += 1
            assert sum(step.reward for step in steps) == pytest.approx(1)
        assert not any(step.success for step in steps[:-1])
    assert won


def test_required_thought_marks_a_bare_action_invalid_but_plays_it(make):
    environment = make(require_think=True)
    plain = make()
    command = environment.reset(0).admissible[0]
    plain.reset(0)
    step = environment.step(f"<action>{command}</action>")
    expected = plain.step(f"<action>{command}</action>")
    assert not step.valid
    assert expected.valid
    assert step.observation == expected.observation
    environment.reset(0)
    thought = environment.step(f"<think>so</think><action>{command}</action>")
    assert thought.valid


def test_unknown_split_is_refused(make):
    with pytest.raises(ValueError, match="split='tests' is unknown"):
        make("tests")


def test_unknown_option_is_refused(make):
    with pytest.raises(TypeError, match="no_such_option"):
        make(no_such_option=1)


def test_lexicon_holds_each_phrase_once(name, options):
    phrases = list(ENVIRONMENTS[name].lexicon(**options.get(name, {})))
    assert len(phrases) == len(set(phrases))
    assert all(phrases)
    assert {"<action>", "</action>"} <= set(phrases)


def test_environments_import_neither_jax_nor_an_engine():
    script = (
        "import sys, skillsd_jax.environments as e\n"
        "[e.ENVIRONMENTS[n]().reset(0) for n in ('household', 'sokoban')]\n"
        "found = {'jax', 'transformers', 'textworld', 'alfworld'} & set(sys.modules)\n"
        "assert not found, f'{found} imported'"
    )
    command = [sys.executable, "-c", script]
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
