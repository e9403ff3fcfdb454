"""From trajectories to rows: skills come from siblings, faults are left out."""

import dataclasses
import pathlib

import numpy as np
import pytest

from skillsd_jax import config as settings
from skillsd_jax import experience, showing
from skillsd_jax.prompts import Prompter
from skillsd_jax.skills import bank as skill_bank
from skillsd_jax.skills import summarizer
from skillsd_jax.trajectory import Task, Trajectory, Turn

REFERENCE = pathlib.Path(__file__).parent / "reference"


class Words:
    """One id per word; enough of a tokenizer for prompting."""

    stop_id = 1
    default_system = ""
    no_thought = "<think>\n\n</think>\n\n"

    def __init__(self):
        self.ids = {}

    def encode(self, text):
        return [self.ids.setdefault(word, len(self.ids) + 10) for word in text.split()]

    def decode(self, ids):
        words = {value: word for word, value in self.ids.items()}
        return " ".join(words.get(int(i), "") for i in ids)

    def open_turn(self, role):
        return [2]

    def close_turn(self):
        return [1]


@pytest.fixture
def prompter():
    return Prompter(Words(), settings.Prompt(max_skill_length=64))


def episode(prompter, seed, actions, success, ending="", valid=True):
    task = Task("household", seed, "train", "pick", "put some apple in shelf 1")
    turns, contexts = [], []
    for action in actions:
        turn = Turn("at: middle", action, action, valid, True, 0.0, "")
        segments, _ = prompter.opening(task, _Step(turn.observation), ())
        ids = [*prompter.encoder.encode(action), 1]
        contexts.append((*segments, prompter.reply(ids, [-0.5] * len(ids))))
        turns.append(turn)
    turns[-1] = dataclasses.replace(turns[-1], reward=float(success))
    return Trajectory(
        task=task,
        turns=tuple(turns),
        contexts=tuple(contexts),
        reward=float(success),
        success=success,
        ending=ending or ("success" if success else "limit"),
    )


@dataclasses.dataclass(frozen=True)
class _Step:
    observation: str
    admissible: tuple = ()


SOLVED = (
    "go to fridge 1",
    "take apple 1 from fridge 1",
    "go to shelf 1",
    "move apple 1 to shelf 1",
)


@pytest.fixture
def played(prompter):
    return experience.Experience(
        trajectories=[
            episode(prompter, 3, SOLVED, True),
            episode(prompter, 3, ("go to shelf 1", *SOLVED), True),
            episode(prompter, 3, ("go to shelf 1",), False),
            episode(prompter, 4, ("go to fridge 1",), False, "error"),
        ],
        groups=[0, 0, 0, 1],
        iteration=5,
    )


def summarized(played, bank, config=None):
    found = experience.groups(played, bank, config or settings.Skills())
    return [summarizer.compare(group, played.iteration) for group in found]


def shown(played, **options):
    config = settings.Skills(**options)
    bank = skill_bank.Bank(config.capacity)
    bank.absorb(summarized(played, bank, config))
    return bank, experience.SHOWN["skill"](played, sources(bank, config))


def sources(bank=None, config=None, expert=None):
    return experience.Sources(
        bank=bank or skill_bank.Bank(4),
        config=config or settings.Skills(),
        rng=np.random.default_rng(0),
        expert=expert,
    )


def test_a_sibling_is_a_solved_episode_of_the_group_and_not_the_row_itself(played):
    found = experience.siblings(played, sources())
    assert [skill.source for (skill,) in found[:2]] == ["5/1", "5/0"]
    assert found[2][0].source in ("5/0", "5/1")
    assert found[3] == ()  # nobody solved its task


def test_an_expert_shows_the_same_skill_to_a_whole_group(played):
    asked = experience.experts(played, sources(expert=lambda seed: f"skill {seed}"))
    assert asked == [("skill 3",)] * 3 + [()]


def test_another_model_reads_the_plain_view(played, prompter):
    made = experience.views(
        played,
        experience.nothing(played, sources()),
        prompter,
        settings.Objective(),
        teacher_reads="plain",
    )
    assert made.rows and all(row.teacher == row.student for row in made.rows)


def test_an_episode_played_with_a_skill_is_learned_without_it(played, prompter):
    text = "go to fridge 1"
    hinted = [
        prompter.skilled(context, text)[0]
        for context in played.trajectories[0].contexts
    ]
    first = dataclasses.replace(played.trajectories[0], contexts=tuple(hinted))
    both = experience.Experience([first, played.trajectories[2]], [0, 1], 0)
    made = experience.views(
        both, [(), ()], prompter, settings.Objective(), teacher_reads="played"
    )
    rescued = [row for row in made.rows if row.trajectory == 0]
    assert [row.teacher for row in rescued] == hinted
    for row, plain in zip(rescued, played.trajectories[0].contexts):
        assert [s.role for s in row.student] == [s.role for s in plain]
    assert all(row.teacher is None for row in made.rows if row.trajectory == 1)


def test_returns_are_discounted_sums_of_what_is_still_to_come():
    assert experience.discounted([0.0, 1.0, 2.0], 0.5) == [1.0, 2.0, 2.0]
    assert experience.discounted([], 0.5) == []


def test_an_expert_is_not_asked_about_an_episode_that_broke(played):
    def expert(seed):
        assert seed == 3
        return "skill"

    assert experience.experts(played, sources(expert=expert))[3] == ()


def test_a_task_has_one_hint_for_its_whole_group(played, prompter):
    bank = skill_bank.Bank(4)
    bank.absorb(summarized(played, bank))
    retrieval = settings.Skills(retrieval="random")
    hints = showing.Hints(bank, retrieval, [0], prompter)
    task, other = played.trajectories[0].task, played.trajectories[3].task
    said = {hints.text(task) for _ in range(9)}
    assert len(said) == 1 and said != {None}
    other = dataclasses.replace(other, family="unheard of")
    assert hints.text(other) is None and hints.given[other.key] == showing.Hint((), 0)


def test_what_a_task_is_shown_does_not_depend_on_who_asks_first(played, prompter):
    bank = skill_bank.Bank(4)
    bank.absorb(summarized(played, bank))
    tasks = [t.task for t in played.trajectories[:1]] + [
        dataclasses.replace(played.trajectories[0].task, seed=seed)
        for seed in range(100, 130)
    ]
    shown = []
    for order in (tasks, tasks[::-1]):
        config = settings.Skills(retrieval="random")
        hints = showing.Hints(bank, config, [7], prompter)
        shown.append({task.key: hints.text(task) for task in order})
    assert shown[0] == shown[1] and len(set(shown[0].values())) > 1


def test_a_hint_that_does_not_fit_is_not_shown(played):
    bank = skill_bank.Bank(4)
    bank.absorb(summarized(played, bank))
    tight = Prompter(Words(), settings.Prompt(max_skill_length=3))
    hints = showing.Hints(bank, settings.Skills(), [0], tight)
    task = played.trajectories[0].task
    assert hints.text(task) is None
    assert hints.given[task.key] == showing.Hint((), 1)


def test_the_best_episodes_of_a_group_are_summarised(played):
    made = summarized(played, skill_bank.Bank(4), settings.Skills(per_group=3))
    assert [skill.source for skill in made] == ["5/0", "5/1"]
    assert made[0].golden_workflow == SOLVED


def test_no_row_is_shown_the_skill_of_its_own_episode(played):
    _, skills = shown(played)
    sources = [skill.source for (skill,) in skills[:3]]
    assert sources[:2] == ["5/1", "5/0"] and sources[2] in ("5/0", "5/1")


def test_every_row_of_a_skilled_episode_carries_the_skill_whole(played, prompter):
    _, skills = shown(played)
    views = experience.views(played, skills, prompter, settings.Objective())
    assert len(views.rows) == 4 + 5 + 1
    assert all(row.teacher is not None for row in views.rows)
    for row in views.rows:
        extra = sum(len(s.tokens) for s in row.teacher)
        assert extra > sum(len(s.tokens) for s in row.student)


def test_an_episode_that_broke_leaves_no_row_and_is_counted(played, prompter):
    _, skills = shown(played)
    views = experience.views(played, skills, prompter, settings.Objective())
    assert {row.trajectory for row in views.rows} == {0, 1, 2}
    figures = experience.figures(played.trajectories)
    assert figures["endings"] == {"error": 1, "limit": 1, "success": 2}
    assert figures["success"] == pytest.approx(2 / 3)


def test_a_skill_too_long_to_show_whole_is_dropped_and_counted(played):
    narrow = Prompter(Words(), settings.Prompt(max_skill_length=2))
    _, skills = shown(played)
    views = experience.views(played, skills, narrow, settings.Objective())
    assert views.dropped == len(views.rows) == 4 + 5 + 1
    assert all(row.teacher is None for row in views.rows)
    assert views.shown[:3] == [()] * 3


def test_dropped_counts_the_rows_of_a_teacher_that_was_shown_fewer(played):
    """Of two skills the first fits: rows of that episode count, of others none."""
    _, skills = shown(played)
    (one,), (other,) = skills[:2]
    size = Prompter(Words(), settings.Prompt()).size(summarizer.render(one))
    narrow = Prompter(Words(), settings.Prompt(max_skill_length=size))
    chosen = [(one, other), (one,), (), (one,)]
    views = experience.views(played, chosen, narrow, settings.Objective())
    assert views.shown[:3] == [(one,), (one,), ()]
    assert views.dropped == 4
    assert [row.teacher is not None for row in views.rows] == [True] * 9 + [False]


def test_rows_whose_player_saw_fewer_skills_than_were_found_are_counted(played):
    skill = shown(played)[1][0][0]
    nothing, fewer = showing.Hint((), 0), showing.Hint((skill,), 2)
    for hints, dropped, missing in (
        ([showing.Hint()] * 4, 0, 0),
        ([showing.Hint((skill,), 1)] * 4, 0, 0),
        ([nothing, fewer, showing.Hint((), 1), nothing], 5 + 1, 4),
        ([fewer] * 4, 4 + 5 + 1, 0),  # the fourth broke and left no row
    ):
        counts = {"hints_dropped": dropped, "hints_missing": missing}
        assert experience.unseen(played, hints) == counts


def test_invalid_turns_cost_the_penalty_each(prompter):
    bad = episode(prompter, 3, ("dance", "sing"), False, valid=False)
    played = experience.Experience([bad], [0], 0)
    objective = settings.Objective(invalid_action_penalty=0.1)
    views = experience.views(played, [()], prompter, objective)
    assert [row.reward for row in views.rows] == pytest.approx([-0.2, -0.2])


def test_with_row_statistics_a_row_pays_for_its_own_turns(prompter):
    bad = episode(prompter, 3, ("dance", "sing"), False, valid=False)
    turns = (bad.turns[0], dataclasses.replace(bad.turns[1], valid=True))
    played = experience.Experience([dataclasses.replace(bad, turns=turns)], [0], 0)
    objective = settings.Objective(invalid_action_penalty=0.1, statistics="row")
    views = experience.views(played, [()], prompter, objective)
    assert [row.reward for row in views.rows] == pytest.approx([-0.1, 0.0])


def test_turns_count_on_over_windowed_rows(played, prompter):
    views = experience.views(played, [()] * 4, prompter, settings.Objective())
    first = [list(row.turns) for row in views.rows if row.trajectory == 0]
    assert first == [[0], [1], [2], [3]]


def test_the_penalty_of_a_row_agrees_with_the_released_code(prompter):
    with np.load(REFERENCE / "invalid_penalty.npz") as file:
        data = dict(file)
    before = data["scores_before"].sum(-1)
    trajectories = [
        dataclasses.replace(
            episode(prompter, seed, ("look",), False, valid=bool(valid)),
            reward=float(reward),
        )
        for seed, (reward, valid) in enumerate(zip(before, data["is_action_valid"]))
    ]
    penalised = experience.views(
        experience.Experience(trajectories, [0] * 4, 0),
        [()] * 4,
        prompter,
        settings.Objective(
            statistics="row", invalid_action_penalty=float(data["coef"])
        ),
    )
    after = [row.reward for row in penalised.rows]
    np.testing.assert_allclose(after, data["scores_after"].sum(-1), rtol=1e-6)


def test_every_skill_shown_earns_its_episodes_reward_but_for_faults(played):
    bank, _ = shown(played)
    held = bank.for_task(played.trajectories[0].task.key)
    pairs = [(episode, held) for episode in played.trajectories]
    earned = experience.rewards(pairs)
    assert earned == [(skill.id, r) for r in (1.0, 1.0, 0.0) for skill in held]
