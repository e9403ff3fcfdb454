"""Claims about what an episode is summarised to."""

import random
import re

import pytest

from skillsd_jax.skills import summarizer
from skillsd_jax.trajectory import Task, Trajectory, Turn

HEAT = "heat the apple 1 and move it to the shelf 1"


def episode(
    actions,
    environment="household",
    instruction=HEAT,
    success=True,
    observations=None,
    rewards=None,
    ending="",
):
    """Actions in order; a leading '!' marks one that did nothing."""
    turns = tuple(
        Turn(
            observation=observations[i] if observations else "",
            reply="",
            action=action.removeprefix("!"),
            valid=True,
            effective=not action.startswith("!"),
            reward=rewards[i] if rewards else 0.0,
        )
        for i, action in enumerate(actions)
    )
    task = Task(environment, 5, "train", "heat", instruction)
    reward = float(sum(rewards) if rewards else success)
    ending = ending or ("success" if success else "limit")
    return Trajectory(task, turns, (), reward, success, ending)


def workflow(actions, **options):
    return list(
        summarizer.summarize(episode(actions, **options), 0, "").golden_workflow
    )


SOLVED = [
    "go to fridge 1",
    "go to drawer 1",
    "!take apple 1 from fridge 1",
    "go to cabinet 1",
    "examine apple 1",
    "take apple 1 from cabinet 1",
    "go to microwave 1",
    "heat apple 1 with microwave 1",
    "go to shelf 1",
    "move apple 1 to shelf 1",
]


@pytest.mark.parametrize("environment", ["household", "alfworld"])
def test_an_errand_is_summarised_to_the_steps_it_needed(environment):
    skill = summarizer.summarize(episode(SOLVED, environment), 7, "it 7 row 3")
    assert skill.golden_workflow == (
        "go to cabinet 1",
        "take apple 1 from cabinet 1",
        "go to microwave 1",
        "heat apple 1 with microwave 1",
        "go to shelf 1",
        "move apple 1 to shelf 1",
    )
    assert skill.success_analysis == "solved in 10 steps"
    assert skill.mistake_analysis == "wasted fridge 1, drawer 1"
    assert (skill.task, skill.family) == (f"{environment}/train/5", "heat")
    assert (skill.born, skill.source, skill.reward) == (7, "it 7 row 3", 1.0)


def test_a_skill_is_rendered_in_a_fixed_order():
    skill = summarizer.summarize(episode(SOLVED), 0, "")
    assert summarizer.render(skill) == (
        "<skill>\n"
        "success_analysis: solved in 10 steps\n"
        "mistake_analysis: wasted fridge 1, drawer 1\n"
        "golden_workflow: go to cabinet 1; take apple 1 from cabinet 1; go to "
        "microwave 1; heat apple 1 with microwave 1; go to shelf 1; move apple 1 to "
        "shelf 1\n"
        "</skill>"
    )
    nothing = summarizer.summarize(episode(["!look"], success=False), 0, "")
    assert "\nmistake_analysis: wasted 1 steps\n" in summarizer.render(nothing)
    assert "\ngolden_workflow: none\n</skill>" in summarizer.render(nothing)


def test_an_episode_without_detours_has_no_mistakes():
    needed = [SOLVED[i] for i in (3, 5, 6, 7, 8, 9)]
    skill = summarizer.summarize(episode(needed), 0, "")
    assert skill.mistake_analysis == "none"
    assert list(skill.golden_workflow) == needed


def test_places_named_as_wasted_are_few_and_different():
    visits = [f"go to drawer {n}" for n in (3, 3, 1, 2)]
    skill = summarizer.summarize(episode(visits + SOLVED[3:]), 0, "")
    assert skill.mistake_analysis == "wasted drawer 3, drawer 1"


def test_a_failed_episode_tells_where_the_object_was():
    skill = summarizer.summarize(episode(SOLVED[:6], success=False), 0, "")
    assert skill.golden_workflow == ("go to cabinet 1", "take apple 1 from cabinet 1")
    assert skill.success_analysis == "failed in 6 steps"
    assert skill.reward == 0.0


def test_other_objects_and_states_are_no_steps():
    actions = [
        "go to fridge 1",
        "take potato 1 from fridge 1",
        "move potato 1 to fridge 1",
        *SOLVED[3:6],
        "go to sinkbasin 1",
        "clean apple 1 with sinkbasin 1",
        *SOLVED[6:],
    ]
    needed = [SOLVED[i] for i in (3, 5, 6, 7, 8, 9)]
    assert workflow(actions) == needed
    # The instruction names whole words: neither 'pot' in 'potato' nor 'knife'.
    knife = ["go to shelf 1", "take knife 1 from shelf 1"]
    assert workflow(knife, instruction="put a butterknife in shelf") == []
    pot = ["go to shelf 1", "take pot 1 from shelf 1"]
    assert workflow(pot, instruction="put a hot potato in shelf") == []
    assert workflow(pot, instruction="put two pots in shelf") == pot


@pytest.mark.parametrize(
    ("state", "verb"), [("hot", "heat"), ("cold", "cool"), ("cool", "cool")]
)
def test_the_state_may_be_named_by_its_result(state, verb):
    step = f"{verb} apple 1 with tool 1"
    assert workflow([step], instruction=f"put a {state} apple in shelf") == [step]
    assert workflow([step], instruction="put an apple in shelf") == []


def test_a_detour_in_hand_is_left_out():
    there = ["go to shelf 1", "move apple 1 to shelf 1", "take apple 1 from shelf 1"]
    elsewhere = ["go to bed 1", "move apple 1 to bed 1", "take apple 1 from bed 1"]
    needed = [SOLVED[i] for i in (3, 5, 6, 7, 8, 9)]
    assert workflow([*SOLVED[3:6], *there, *SOLVED[6:]]) == needed
    assert workflow([*SOLVED[3:6], *elsewhere, *SOLVED[6:]]) == needed
    # Put down in a wrong place at the end: where it was found still counts.
    assert workflow([*SOLVED[3:6], *elsewhere[:2]], success=False) == needed[:2]


def test_steps_in_one_place_share_the_walk():
    instruction = "heat the apple 1 and move it to the microwave 1"
    arrive, heat = SOLVED[6:8]
    last = "move apple 1 to microwave 1"
    actions = [*SOLVED[3:8], last]
    expected = [SOLVED[3], SOLVED[5], arrive, heat, last]
    assert workflow(actions, instruction=instruction) == expected


def test_two_objects_are_both_fetched():
    instruction = "put two soapbar in drawer"
    actions = []
    for n in (1, 2):
        actions += [f"go to bed {n}", f"take soapbar {n} from bed {n}"]
        actions += ["go to drawer 1", f"move soapbar {n} to drawer 1"]
    assert workflow(actions, instruction=instruction) == actions


def test_a_door_is_opened_in_the_workflow_if_it_had_to_be():
    actions = [
        "go to drawer 1",
        "open drawer 1",
        "close drawer 1",
        "go to cabinet 1",
        "open cabinet 1",
        "go to drawer 1",
        "go to cabinet 1",
        "take apple 1 from cabinet 1",
        "go to microwave 1",
        "open microwave 1",
        "heat apple 1 with microwave 1",
        "go to shelf 1",
        "put apple 1 in/on shelf 1",
    ]
    assert workflow(actions) == [
        "go to cabinet 1",
        "open cabinet 1",
        "take apple 1 from cabinet 1",
        "go to microwave 1",
        "heat apple 1 with microwave 1",
        "go to shelf 1",
        "put apple 1 in/on shelf 1",
    ]


def test_a_lamp_is_used_in_the_workflow():
    actions = [
        "go to bed 1",
        "take book 1 from bed 1",
        "go to desk 2",
        "use desklamp 1",
    ]
    assert workflow(actions, instruction="look at book under the desklamp") == actions


def test_without_an_instruction_every_object_counts():
    actions = ["go to bed 1", "take pen 1 from bed 1"]
    assert workflow(actions, instruction="") == actions


def squares(player, box, target="r4c4"):
    return f"####\nplayer {player} box {box} target {target}"


def test_sokoban_steps_are_keyed_by_their_state():
    seen = [squares("r1c1", "r2c2"), squares("r1c2", "r2c2"), squares("r2c2", "r3c2")]
    moves = ["right", "down", "!left"]
    options = {"environment": "sokoban", "observations": seen}
    assert workflow(moves, **options) == ["r1c1 r2c2 right", "r1c2 r2c2 down"]
    two = [
        "player r1c1 box r2c2 r3c3 target r4c4 r4c1",
        "player r1c1 box r2c2 box r3c3",
    ]
    for observation in two:
        options["observations"] = [observation]
        assert workflow(["up"], **options) == ["r1c1 r2c2 r3c3 up"]


def test_sokoban_loops_are_removed():
    path = ["r1c1", "r1c2", "r1c3", "r1c2", "r1c1", "r2c1"]
    moves = ["right", "right", "left", "left", "down", "down"]
    seen = [squares(player, "r2c2") for player in path]
    got = workflow(moves, environment="sokoban", observations=seen)
    assert got == ["r1c1 r2c2 down", "r2c1 r2c2 down"]


def test_a_failed_sokoban_episode_is_kept_up_to_its_last_reward():
    seen = [squares(f"r1c{n}", "r2c2") for n in range(1, 5)]
    options = {"environment": "sokoban", "observations": seen, "success": False}
    moves = ["right", "right", "right", "right"]
    earned = workflow(moves, **options, rewards=[0, 0.5, 0, -0.5])
    assert earned == ["r1c1 r2c2 right", "r1c2 r2c2 right"]
    assert workflow(moves, **options, rewards=[0, 0, 0, 0]) == []


def test_any_other_environment_keeps_what_worked():
    actions = ["search[a]", "!click[b]", "buy"]
    assert workflow(actions, environment="shop") == ["search[a]", "buy"]


def test_equal_stories_of_a_task_have_equal_ids():
    one = summarizer.summarize(episode(SOLVED), 1, "a")
    two = summarizer.summarize(episode(SOLVED), 2, "b")
    assert one.id == two.id
    assert one.id != summarizer.summarize(episode(SOLVED[1:]), 1, "a").id


def test_any_actions_at_all_make_a_skill():
    rng = random.Random(3)
    words = [
        "take",
        "move",
        "go to",
        "open",
        "",
        "from",
        "to",
        "fridge 1",
        "apple 1",
        "☃",
    ]
    for _ in range(500):
        actions = [
            rng.choice(["", "!"]) + " ".join(rng.choices(words, k=rng.randrange(5)))
            for _ in range(rng.randrange(1, 10))
        ]
        for environment in ("household", "sokoban", "shop"):
            made = episode(actions, environment, success=rng.random() < 0.5)
            shown = summarizer.render(summarizer.summarize(made, 0, ""))
            assert shown.startswith("<skill>\n") and shown.endswith("\n</skill>")


@pytest.mark.parametrize(
    ("reward", "success", "expected"),
    [(10.0, True, 1.0), (0.0, True, 1.0), (0.5, False, 0.5), (-1.0, False, 0.0)],
)
def test_reward_is_put_on_one_scale(reward, success, expected):
    made = episode(["look"], success=success, rewards=[reward])
    assert summarizer.unit_reward(made) == expected
    assert summarizer.summarize(made, 0, "").reward == expected


def test_select_takes_success_then_few_turns_then_reward():
    group = [
        episode(SOLVED[:9], success=False, rewards=[0.0] * 9),
        episode(SOLVED),
        episode(SOLVED[:4], success=False, rewards=[0, 0, 0, 0.1]),
        episode(SOLVED[2:]),
        episode(SOLVED[:4], success=False, rewards=[0, 0, 0, 0.5]),
        episode(SOLVED[2:]),
    ]
    assert summarizer.select(group, 9) == [3, 5, 1, 4, 2, 0]
    assert summarizer.select(group, 2) == [3, 5]


@pytest.mark.parametrize("ending", ["error", "timeout"])
def test_select_leaves_out_what_broke(ending):
    group = [
        episode(SOLVED[:1], success=False, ending=ending),
        episode([], success=False),
        episode(SOLVED, success=False),
    ]
    assert summarizer.select(group, 3) == [2]


def test_the_lexicon_holds_an_errand_to_25_tokens():
    """Longest phrase first, from the left, as the embedded tokenizer cuts text."""
    names = {f" {name}" for name in re.findall(r"[a-z]+ 1", "; ".join(SOLVED))}
    phrases = sorted({*summarizer.lexicon(), *names}, key=len, reverse=True)
    cut = re.compile("|".join(map(re.escape, phrases)))
    skill = summarizer.render(summarizer.summarize(episode(SOLVED), 0, ""))
    tokens = cut.findall(skill + "\n")
    assert "".join(tokens) == skill + "\n"  # nothing lies outside the lexicon
    assert len(tokens) == 25
    assert len(set(summarizer.lexicon())) == len(summarizer.lexicon())
