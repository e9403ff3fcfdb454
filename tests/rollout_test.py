"""Episodes played together: what was sampled is what is scored, whoever shares the batch.

The network is random, so its replies are garbage; the environment is the household, cut
short at a turn that the episode's seed tells, so that batches shrink row by row.
"""

import dataclasses
import json
import time
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from skillsd_jax import config as settings
from skillsd_jax import experience, imitate, rollout, timing, tokens
from skillsd_jax.environments import household, pool, stage
from skillsd_jax.models import qwen, scoring, tokenizer
from skillsd_jax.skills import summarizer
from skillsd_jax.trajectory import Role

# seed % 8 → (turns, ending)
PLAN = (
    *((9, "limit"), (1, "error"), (2, "success"), (3, "failure")),
    *((4, "error"), (5, "success"), (6, "failure"), (7, "success")),
)
SEEDS = (13, 0, 6, 1, 7, 2, 11, 4)
TEMPERATURE = 0.7
KEY = 11

score = jax.jit(scoring.score, static_argnums=0)
apply = jax.jit(qwen.apply, static_argnums=0)


class Staged:
    """The household until an episode's time is up; then it ends as planned."""

    data = "generated"

    def __init__(self):
        self.household = household.Household()
        self.max_steps = self.household.max_steps

    def reset(self, seed):
        self.left, self.ending = PLAN[seed % len(PLAN)]
        return self.household.reset(seed)

    def task(self):
        return self.household.task()

    def step(self, text):
        self.left -= 1
        if not self.left and self.ending == "error":
            raise RuntimeError("the engine died")
        step = self.household.step(text)
        if self.left:
            return step
        won = self.ending == "success"
        return dataclasses.replace(step, done=True, success=won, reward=float(won))


@pytest.fixture(scope="module")
def encoder():
    demonstrations = imitate.demonstrations(
        household.Household(), settings.Imitate(episodes=10), 0
    )
    lexicon = [*household.Household.lexicon(), *summarizer.lexicon()]
    return tokenizer.train(imitate.texts(list(demonstrations)), lexicon)


@pytest.fixture(scope="module")
def model(encoder):
    return qwen.ModelConfig(
        vocab=encoder.vocab_size,
        width=16,
        layers=1,
        heads=2,
        kv_heads=1,
        head_size=8,
        hidden=32,
    )


@pytest.fixture(scope="module")
def params(model, encoder):
    """Random weights that end some replies at once and let others run out of room."""
    params = qwen.init(model, jax.random.key(0))
    embed = params["embed"].at[encoder.stop_id].multiply(3.5)
    return {**params, "embed": embed}


KINDS = {
    "windowed": ("windowed", {}),
    "windowed, kept, in cohorts": ("windowed", {"reuse": True, "cohorts": 2}),
    "whole": ("whole", {}),
    "whole, in cohorts": ("whole", {"cohorts": 2}),
}


@pytest.fixture(scope="module", params=KINDS)
def player(request, model, encoder):
    context, how = KINDS[request.param]
    prompt = settings.Prompt(context=context, max_skill_length=112, max_length=256)
    return rollout.Player(model, encoder, prompt, rows=4, **how)


def play(player, params, seeds=SEEDS, key=KEY, temperature=TEMPERATURE, hint=None):
    environments = [Staged() for _ in range(player.rows)]
    return rollout.collect(
        player,
        params,
        environments,
        seeds,
        jax.random.key(key),
        temperature,
        hint,
    )


@pytest.fixture(scope="module")
def played(player, params):
    """Two batches of unequal episodes, and what they compiled after the warm-up."""
    jax.random.key(KEY)
    rollout.warm_up(player, params)
    compilations = timing.Compilations()
    trajectories = play(player, params)
    compilations.close()
    return SimpleNamespace(trajectories=trajectories, compiled=compilations.count)


def replies(trajectories):
    """Sampled ids, by episode."""
    return [
        [s.tokens.tolist() for context in t.contexts for s in context if s.scored]
        for t in trajectories
    ]


def packed(player, trajectories):
    rows = [
        tokens.Row(
            student=context,
            teacher=None,
            turns=range(sum(s.scored for s in context)),
            labels=[np.full(len(s.tokens), 2) for s in context if s.scored],
            anchors=[0] * sum(s.scored for s in context),
            returns=[0] * sum(s.scored for s in context),
            reward=0.0,
            group=0,
            trajectory=0,
            success=False,
        )
        for trajectory in trajectories
        for context in trajectory.contexts
    ]
    # One shape for every test: the most contexts that eight episodes leave.
    length = player.skilled_length
    return tokens.pack(rows, 8 * 9, length, length, player.scored(9))


def assert_scored_alike(player, params, trajectories, temperature):
    batch = packed(player, trajectories)
    view = jax.tree.map(jnp.asarray, batch.student)
    scores = score(player.model, params, view, np.float32(temperature), batch.mask)
    np.testing.assert_allclose(batch.old, scores.logprob, atol=1e-4)
    sampled = sum(len(ids) for episode in replies(trajectories) for ids in episode)
    assert batch.mask.sum() == sampled > 0


def test_the_scorer_gives_what_was_sampled_the_same_log_probs(player, params, played):
    trajectories = played.trajectories
    lengths = {len(ids) for episode in replies(trajectories) for ids in episode}
    assert min(lengths) < 8 == max(lengths)
    assert_scored_alike(player, params, trajectories, TEMPERATURE)


def test_warm_up_leaves_nothing_to_compile(played):
    assert played.compiled == 0


def test_trajectories_come_in_the_order_of_the_seeds(played):
    assert tuple(t.task.seed for t in played.trajectories) == SEEDS


def test_every_ending_is_named(played):
    ended = [(len(t.turns), t.ending) for t in played.trajectories]
    assert ended == [PLAN[seed % len(PLAN)] for seed in SEEDS]
    for t in played.trajectories:
        assert t.success == (t.ending == "success") == t.reward


def test_an_environment_that_raises_ends_its_own_episode_only(played):
    broken = [t for t in played.trajectories if t.ending == "error"]
    assert len(broken) == 2
    for trajectory in broken:
        assert "the engine died" in trajectory.turns[-1].feedback
        assert not trajectory.success and trajectory.reward == 0
    # One breaks in the very first turn; the longest episode still runs its course.
    assert max(len(t.turns) for t in played.trajectories) == 9


def test_a_reply_of_any_bytes_is_a_turn(played):
    turns = [turn for t in played.trajectories for turn in t.turns]
    assert any("\ufffd" in turn.reply for turn in turns)
    read = [turn for turn in turns if "the engine died" not in turn.feedback]
    assert len(read) == len(turns) - 2
    assert not any(turn.valid for turn in read)


def test_turns_and_scored_segments_match_one_to_one(player, played):
    for trajectory, sampled in zip(played.trajectories, replies(played.trajectories)):
        texts = [player.encoder.decode(ids) for ids in sampled]
        assert texts == [turn.reply for turn in trajectory.turns]


def test_a_reply_does_not_depend_on_who_shares_the_batch(player, params, played):
    alone = play(player, params, SEEDS[:3])
    assert replies(alone) == replies(played.trajectories[:3])
    others = play(player, params, [*SEEDS[:3], 16, 24, 32])
    assert replies(others[:3]) == replies(alone)


def test_more_episodes_than_rows_are_played_in_turn(player, params, played):
    halved = dataclasses.replace(player, rows=2)
    assert replies(play(halved, params)) == replies(played.trajectories)


def test_the_key_decides_what_is_said(player, params, played):
    said = replies(played.trajectories)
    assert replies(play(player, params)) == said
    other = replies(play(player, params, key=KEY + 1))
    assert all(a != b for a, b in zip(said, other))


def test_episodes_of_one_task_say_different_things(player, params):
    said = replies(play(player, params, [5, 5, 5, 5]))
    assert len({str(episode) for episode in said}) == 4


def test_temperature_0_takes_the_most_probable_token(player, params):
    greedy = play(player, params, SEEDS[:3], temperature=0.0)
    again = play(player, params, SEEDS[:3], key=KEY + 1, temperature=0.0)
    assert replies(again) == replies(greedy)
    assert_scored_alike(player, params, greedy, 1.0)
    batch = packed(player, greedy)
    logits = np.asarray(apply(player.model, params, batch.student.tokens))
    for b, r in np.argwhere(batch.mask):
        t = batch.student.scored[b, r]
        before = logits[b, t - 1]
        assert before[batch.student.tokens[b, t]] == pytest.approx(
            before.max(), abs=1e-5
        )


def test_a_context_shows_what_was_observed_and_fits_the_window(player, played):
    for trajectory in played.trajectories:
        turns = iter(trajectory.turns)
        for context in trajectory.contexts:
            assert sum(len(s.tokens) for s in context) <= player.length
            assert [s.role for s in context[:2]] == [Role.TASK, Role.ENVIRONMENT]
            for words, reply in zip(context[1::2], context[2::2], strict=True):
                assert words.role == Role.ENVIRONMENT and reply.role == Role.AGENT
                shown = player.encoder.decode(words.tokens)
                assert next(turns).observation in shown
        assert next(turns, None) is None


def test_a_whole_history_opens_a_new_context_where_it_would_outgrow_the_window(
    player, played
):
    if player.prompt.context == "windowed":
        for t in played.trajectories:
            assert t.cut == 0 and len(t.contexts) == len(t.turns)
        return
    cuts = {len(t.turns): t.cut for t in played.trajectories}
    assert cuts[2] == cuts[3] == 0 and cuts[9] > 0
    for trajectory in played.trajectories:
        assert len(trajectory.contexts) == 1 + trajectory.cut
        for context, after in zip(trajectory.contexts, trajectory.contexts[1:]):
            taken = sum(len(s.tokens) for s in context)
            turn = len(after[1].tokens) + player.prompt.max_response_length
            # Closed no earlier than it must be; the frame of a turn is a few tokens.
            assert taken + turn + 4 > player.length


def test_a_hint_is_shown_whole_or_not_at_all(player, params):
    hints = {0: "\ngolden_workflow: go to fridge 1", 8: "go to " * 200, 16: None}
    trajectories = play(player, params, [0, 8, 16], hint=lambda task: hints[task.seed])
    shown, *others = trajectories
    wanted = player.encoder.encode(hints[0] + "\n")
    for context in shown.contexts:
        assert [s.role for s in context[:2]] == [Role.TASK, Role.SKILL]
        assert context[1].tokens.tolist() == wanted
    for other in others:
        roles = {s.role for context in other.contexts for s in context}
        assert Role.SKILL not in roles and Role.AGENT in roles
    assert_scored_alike(player, params, trajectories, TEMPERATURE)


def test_no_prompt_carries_a_skill_unless_it_is_asked_for(played):
    for trajectory in played.trajectories:
        roles = {s.role for context in trajectory.contexts for s in context}
        assert Role.SKILL not in roles


class Broken(Staged):
    """Breaks as an engine may: at reset, or with an error of any kind."""

    def reset(self, seed):
        if seed == 1:
            raise AssertionError("the engine is dead")
        return super().reset(seed)

    def step(self, text):
        raise AttributeError("the engine lost its state")


def test_an_environment_that_breaks_at_reset_ends_its_own_episode_only(player, params):
    made = [Broken(), Staged(), Broken()]
    key = jax.random.key(KEY)
    played = rollout.collect(player, params, made, [1, 0, 0], key, TEMPERATURE)
    assert [t.ending == "error" for t in played] == [True, False, True]
    assert played[0].turns == () and played[0].task.seed == 1
    assert [turn.valid for turn in played[2].turns] == [False]


def test_too_few_environments_are_refused(player, params):
    with pytest.raises(ValueError, match="1 environments for 2 episodes"):
        key = jax.random.key(KEY)
        rollout.collect(player, params, [Staged()], [0, 1], key, TEMPERATURE)


@pytest.mark.parametrize("cohorts", [1, 2])
@pytest.mark.parametrize("workers", ["threads", "processes"])
def test_what_is_played_does_not_depend_on_who_steps_the_environments(
    player, params, workers, cohorts
):
    player = dataclasses.replace(player, cohorts=cohorts)
    setting = settings.Environment(workers=workers)
    maker, key = stage.Maker.of(setting, "train"), jax.random.key(KEY)
    environments = [household.Household() for _ in range(player.rows)]
    expected = rollout.collect(player, params, environments, SEEDS, key, TEMPERATURE)
    with pool.open_stage(maker, player.rows, setting) as places:
        played = rollout.collect(player, params, places, SEEDS, key, TEMPERATURE)
    assert replies(played) == replies(expected)
    assert [t.turns for t in played] == [t.turns for t in expected]


def test_an_episode_can_be_written_as_a_line_that_says_which_replies_were_cut(
    player, played
):
    stop, most = player.encoder.stop_id, player.prompt.max_response_length
    for trajectory, said in zip(played.trajectories, replies(played.trajectories)):
        turns = json.loads(experience.line(trajectory, None))["turns"]
        cut = [len(ids) == most and ids[-1] != stop for ids in said]
        assert [not turn["stopped"] for turn in turns] == cut
    figures = experience.figures(played.trajectories)
    assert 0 < figures["replies_cut"] < 1


def test_a_reply_ends_at_a_stop_text(player, params):
    free = play(player, params, SEEDS[:3])
    letters = [turn.reply for t in free for turn in t.turns]
    often = max(
        "abcdefghijklmnopqrstuvwxyz", key=lambda x: sum(x in r for r in letters)
    )
    prompt = dataclasses.replace(player.prompt, stop_texts=f"never,{often}")
    player = dataclasses.replace(player, prompt=prompt)
    stopped = play(player, params, SEEDS[:3])
    said = [turn for t in stopped for turn in t.turns]
    assert any(often in turn.reply for turn in said)
    ids = [ids for episode in replies(stopped) for ids in episode]
    for turn, tokens_ in zip(said, ids):
        # nothing comes after the token that completes the text
        assert often not in player.encoder.decode(tokens_[:-1])
        full = len(tokens_) == player.prompt.max_response_length
        assert turn.stopped or full
    assert_scored_alike(player, params, stopped, TEMPERATURE)


def test_a_world_that_hangs_ends_its_own_episodes_as_timeouts(player, params):
    setting = settings.Environment(workers="threads", worker_count=4, timeout_s=0.5)
    maker = stage.Maker(f"{__name__}:Hanging", "train")
    key = jax.random.key(KEY)
    with pool.open_stage(maker, player.rows, setting) as places:
        played = rollout.collect(player, params, places, SEEDS, key, TEMPERATURE)
        counts = places.counts()
    late = [t.ending == "timeout" for t in played]
    assert late == [seed % 8 == 3 for seed in SEEDS] and any(late)
    assert counts["timeouts"] == sum(late)


class Hanging(household.Household):
    """Takes for ever in some episodes."""

    def reset(self, seed):
        self.hangs = seed % 8 == 3
        return super().reset(seed)

    def step(self, text):
        if self.hangs:
            time.sleep(2)
        return super().step(text)


class Endless(household.Household):
    """Forgets to end, or asks for more than a prompt can hold."""

    def task(self):
        task = super().task()
        if self.seed % 2:
            return dataclasses.replace(task, instruction="go on " * 500)
        return task

    def reset(self, seed):
        self.seed = seed
        return super().reset(seed)

    def step(self, text):
        return dataclasses.replace(super().step("look"), done=False)


def test_worlds_that_know_no_bounds_end_their_own_episodes_alone(player, params):
    made = [Endless() for _ in range(player.rows)]
    key = jax.random.key(KEY)
    played = rollout.collect(player, params, made, range(6), key, TEMPERATURE)
    assert [t.ending for t in played] == ["limit", "error"] * 3
    assert [len(t.turns) for t in played] == [made[0].max_steps, 0] * 3


def test_any_number_of_episodes_is_played_whatever_the_cohorts(player, params):
    wide = dataclasses.replace(player, rows=3, cohorts=3)
    assert play(wide, params, []) == []
    expected = replies(play(player, params, SEEDS[:5]))
    for count in (1, 2, 5):
        assert replies(play(wide, params, SEEDS[:count])) == expected[:count]
