import numpy as np
import pytest

from skillsd_jax.environments import chores, household
from skillsd_jax.environments.household import (
    FAMILIES,
    OBJECTS,
    PLACES,
    Household,
    draw_level,
    prior,
)


def find(family, environment):
    """Resets to the first level of a family; its level."""
    for seed in range(100):
        level = draw_level("train", seed)
        # Nothing in the tools' places but what the test brings there.
        tools = {PLACES.index(f"{kind} 1") for kind in chores.TOOLS.values()}
        if FAMILIES[level.family] == family and not tools & {
            level.places[0],
            level.destination,
        }:
            environment.reset(seed)
            return level
    raise AssertionError(f"no {family} level among the first 100")


def workflow(level):
    """The shortest plan, as a skill would tell it."""
    thing = OBJECTS[level.objects[0]]
    place, destination = PLACES[level.places[0]], PLACES[level.destination]
    verb = FAMILIES[level.family]
    steps = [f"go to {place}", f"take {thing} from {place}"]
    if verb in chores.TOOLS:
        tool = f"{chores.TOOLS[verb]} 1"
        steps += [f"go to {tool}", f"{verb} {thing} with {tool}"]
    return [*steps, f"go to {destination}", f"move {thing} to {destination}"]


def win_rate(plan, noise, episodes, seed=0):
    environment, rng = Household(), np.random.default_rng(seed)
    won = 0
    for index in range(episodes):
        step = environment.reset(index)
        advice = plan(draw_level("train", index))
        while not step.done:
            step = environment.step(environment.demonstrate(rng, advice, noise))
        won += step.success
    return won / episodes


def act(environment, commands):
    return [environment.step(f"<action>{command}</action>") for command in commands]


@pytest.mark.parametrize("family", FAMILIES)
def test_shortest_plan_wins_only_with_its_last_command(family):
    environment = Household()
    level = find(family, environment)
    steps = act(environment, workflow(level))
    assert [step.success for step in steps] == [False] * (len(steps) - 1) + [True]
    assert [step.reward for step in steps] == [0.0] * (len(steps) - 1) + [1.0]
    assert all(step.valid and step.effective for step in steps)
    assert environment.task().family == family


@pytest.mark.parametrize("family", ["heat", "cool", "clean"])
def test_delivery_without_the_wanted_state_does_not_count(family):
    environment = Household()
    plan = workflow(find(family, environment))
    steps = act(environment, plan[:2] + plan[4:])
    assert steps[-1].effective
    assert not steps[-1].done


@pytest.mark.parametrize("family", ["heat", "cool", "clean"])
def test_only_the_right_tool_works(family):
    environment = Household()
    level = find(family, environment)
    thing = OBJECTS[level.objects[0]]
    act(environment, workflow(level)[:2])
    for kind in set(chores.TOOLS.values()) - {chores.TOOLS[family]}:
        last = act(environment, [f"go to {kind} 1", f"{family} {thing} with {kind} 1"])[
            -1
        ]
        assert last.valid
        assert not last.effective
        assert last.feedback == "Nothing happens."


def test_cooling_undoes_heating():
    environment = Household()
    plan = workflow(find("heat", environment))
    thing = plan[1].split(" from ")[0].removeprefix("take ")
    cooling = ["go to fridge 1", f"cool {thing} with fridge 1"]
    steps = act(environment, [*plan[:4], *cooling, *plan[4:]])
    assert not steps[-1].success


def test_sentences_are_the_engines():
    environment = Household()
    level = find("heat", environment)
    thing, place = OBJECTS[level.objects[0]], PLACES[level.places[0]]
    steps = act(environment, [*workflow(level), "inventory"][:4])
    assert steps[0].feedback.startswith(
        f"You arrive at {place}. On the {place}, you see a"
    )
    assert steps[1].feedback == f"You pick up the {thing} from the {place}."
    assert steps[3].feedback == f"You heat the {thing} using the microwave 1."
    assert act(environment, ["inventory"])[0].feedback.startswith("You are carrying: a")


def test_enumeration_is_the_engines():
    assert household._listed(["mug 1", "egg 1"]) == "a mug 1, and an egg 1"
    assert household._listed([]) == "nothing"


def test_admissible_are_the_commands_that_work():
    names = [*PLACES, *OBJECTS]
    every = [f"go to {place}" for place in PLACES]
    every += [f"take {a} from {b}" for a in names for b in names]
    every += [f"move {a} to {b}" for a in OBJECTS for b in PLACES]
    every += [
        f"{v} {a} with {b}" for v in chores.TOOLS for a in OBJECTS for b in PLACES
    ]
    environment = Household()
    plan = workflow(find("heat", environment))
    seed = environment.task().seed
    for played in range(5):
        admissible = set(replay(environment, seed, plan[:played]).admissible)
        works = {
            command
            for command in every
            if replay(environment, seed, [*plan[:played], command]).effective
        }
        again = {plan[3]} if played == 4 else set()  # heated already: changes nothing
        assert works == admissible - {"look", "inventory"} - again


def replay(environment, seed, history):
    step = environment.reset(seed)
    for command in history:
        step = environment.step(f"<action>{command}</action>")
    return step


def test_step_after_the_end_is_refused():
    environment = Household()
    environment.reset(0)
    for _ in range(environment.max_steps):
        environment.step("")
    with pytest.raises(RuntimeError, match="call reset"):
        environment.step("")


@pytest.mark.parametrize("split", ["train", "test"])
def test_placement_follows_the_prior_in_every_split(split):
    # 3,000 levels hold 12,000 placements. Destinations do not depend on the prior, so
    # each is at its object's first place with 0.70 (deviation 0.0042), at its second
    # with 0.15 (0.0033). The bounds are 5 deviations: a false alarm is below 1e-5,
    # and the seeds are fixed.
    levels = [draw_level(split, seed) for seed in range(3000)]
    chances = [
        prior()[thing, place]
        for level in levels
        for thing, place in zip(level.objects, level.places, strict=True)
    ]
    assert np.mean(np.isclose(chances, household.HOME)) == pytest.approx(
        0.70, abs=0.021
    )
    assert np.mean(np.isclose(chances, household.SECOND)) == pytest.approx(
        0.15, abs=0.017
    )


def test_prior_sums_to_one_with_two_usual_places():
    np.testing.assert_allclose(prior().sum(1), 1)
    assert (np.sort(prior(), 1)[:, -2:] == [household.SECOND, household.HOME]).all()


def test_families_and_destinations_are_spread_evenly():
    # Multinomial counts over 4,000 levels: family 1000 ± 27, destination 400 ± 19;
    # the bounds are above 5 deviations.
    levels = [draw_level("train", seed) for seed in range(4000)]
    assert max(abs(np.bincount([x.family for x in levels]) - 1000)) < 150
    assert max(abs(np.bincount([x.destination for x in levels]) - 400)) < 110


def test_wanted_object_never_starts_at_its_destination():
    for seed in range(500):
        level = draw_level("train", seed)
        assert level.places[0] != level.destination
        assert len(set(level.objects)) == household.PRESENT


def test_honest_player_wins_a_quarter_to_two_fifths():
    assert 0.25 < win_rate(lambda level: (), noise=0.1, episodes=600) < 0.40


def test_right_workflow_wins_nearly_always():
    assert win_rate(workflow, noise=0.0, episodes=200) == 1
    assert win_rate(workflow, noise=0.1, episodes=400) > 0.95


def test_knowing_the_prior_is_worth_learning():
    def usual_places(level):
        thing = level.objects[0]
        plan = workflow(level)[2:]
        order = np.argsort(-prior()[thing])[:2]
        return [f"take {OBJECTS[thing]} from {PLACES[p]}" for p in order] + plan

    assert win_rate(usual_places, noise=0.0, episodes=400) > 0.8


def test_tool_knowledge_is_drawn_once_an_episode():
    environment, rng = Household(), np.random.default_rng(0)
    drawn = []
    for seed in range(300):
        environment.reset(seed)
        environment.demonstrate(rng)
        drawn.append(environment._knows_tools)
        environment.step("")
        environment.demonstrate(rng)
        assert environment._knows_tools is drawn[-1]
    # 150 ± 8.7 of 300; the bounds are 5 deviations.
    assert 106 < sum(drawn) < 194


def test_observation_is_made_of_few_lexicon_phrases():
    phrases = sorted(Household.lexicon(), key=len, reverse=True)
    environment, rng = Household(), np.random.default_rng(0)
    for seed in range(30):
        step = environment.reset(seed)
        assert len(split(environment.task().instruction, phrases)) == 5
        while not step.done:
            assert len(split(step.observation, phrases)) <= 30
            reply = environment.demonstrate(rng, noise=0.2)
            assert len(split(reply, phrases)) <= 6
            step = environment.step(reply)


def split(text, phrases):
    found = []
    while text:
        phrase = next((p for p in phrases if text.startswith(p)), None)
        assert phrase, f"no phrase at the start of {text[:40]!r}"
        found.append(phrase)
        text = text[len(phrase) :]
    return found
