"""Learning from recorded episodes: the warm start by behaviour cloning.

A from-scratch model must know, like a pretrained one, how to act and how to use a hint
it is shown. Half of the cloned rows therefore carry a skill in the prompt, written by
the template summariser from another episode of the same task.
"""

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import numpy as np
import optax

from skillsd_jax import config as settings
from skillsd_jax import episode, prompts, rollout, sharding
from skillsd_jax.environments import base, pool
from skillsd_jax.environments.stage import FAULTS
from skillsd_jax.models import qwen, scoring
from skillsd_jax.skills import summarizer
from skillsd_jax.skills.skill import Skill
from skillsd_jax.tokens import Row, TokenView, pack
from skillsd_jax.trajectory import Role, Segment, Trajectory

STEPS_PER_CALL = 25  # optimiser steps per call of the jitted loop


def play(
    environment: base.Environment,
    seed: int,
    rng: np.random.Generator,
    workflow: Sequence[str] = (),
    noise: float = 0.0,
) -> Trajectory:
    """One scripted episode; it has turns and no contexts.

    Raises:
      RuntimeError: the environment broke; a recording has no use for half an episode.
    """
    stage = pool.stage_of([environment])
    (outcome,) = stage.reset([0], [seed]).result()
    played = episode.begin(0, 0, seed, outcome, environment.max_steps)
    while not played.ending:
        reply = environment.demonstrate(rng, workflow, noise)
        (outcome,) = stage.step([0], [reply]).result()
        played.take(reply, outcome)
    if played.ending == "error":
        raise RuntimeError(f"task {seed} broke off: {played.step.feedback}")
    return played.finish()


def expert_skill(environment: base.Environment, seed: int) -> Skill:
    """The skill that one expert episode of the task summarises to."""
    environment.reset(seed)
    plan = environment.expert_workflow()
    won = play(environment, seed, np.random.default_rng(0), plan)
    return summarizer.summarize(won, 0, "expert")


class Expert:
    """Skills of expert's episodes of training tasks, made when they are asked for."""

    def __init__(self, config: settings.Environment):
        self._config = config
        self._environment: base.Environment | None = None
        self._made: dict[int, Skill | None] = {}

    def skill(self, seed: int) -> Skill | None:
        """None where the expert's episode breaks or fails."""
        if seed not in self._made:
            self._made[seed] = self._play(seed)
        return self._made[seed]

    def _play(self, seed: int) -> Skill | None:
        if self._environment is None:
            self._environment = rollout.environment(self._config, "train")
        try:
            skill = expert_skill(self._environment, seed)
        except FAULTS:
            return None
        return skill if skill.reward == 1 else None


def demonstrations(
    environment: base.Environment, config: settings.Imitate, seed: int
) -> Iterator[tuple[Trajectory, str, Trajectory]]:
    """Plain episodes, and skills with episodes that follow them.

    Args:
      environment: an instance of the training split.
      config: how many, of which tasks, how noisy.
      seed: of every choice.

    Yields:
      (plain episode, skill text, episode that follows the skill), one task each.
    """
    rng = np.random.default_rng([seed, 7])
    for index in range(config.episodes):
        task = index % config.tasks
        plain = play(environment, task, rng, noise=config.noise)
        environment.reset(task)
        misled = rng.random() < config.misled
        plan = () if misled else environment.expert_workflow()
        source = play(environment, task, rng, plan, config.noise)
        skill = summarizer.summarize(source, 0, "demonstration")
        workflow = skill.golden_workflow
        skilled = play(environment, task, rng, workflow, config.skilled_noise)
        yield plain, summarizer.render(skill), skilled


def texts(episodes: Sequence[tuple[Trajectory, str, Trajectory]]) -> list[str]:
    """Everything an episode shows or says: the corpus of the tokenizer."""
    corpus = []
    for plain, skill, skilled in episodes:
        corpus.append(skill)
        for trajectory in (plain, skilled):
            corpus.append(trajectory.task.instruction)
            for turn in trajectory.turns:
                corpus += [turn.observation, turn.reply, turn.feedback]
    return corpus


def cloned_rows(
    prompter: prompts.Prompter, trajectory: Trajectory, skill: str | None
) -> list[Row]:
    """Rows that score a recorded episode's replies, skill in the prompt or not."""
    rows, turn = [], 0
    for context in _contexts(prompter, trajectory, skill):
        replies = [segment for segment in context if segment.scored]
        row = Row(
            student=context,
            teacher=None,
            turns=range(turn, turn + len(replies)),
            labels=[prompter.labels(reply.tokens) for reply in replies],
            anchors=[0] * len(replies),
            returns=[0.0] * len(replies),
            reward=0.0,
            group=0,
            trajectory=0,
            success=trajectory.success,
        )
        rows.append(row)
        turn += len(replies)
    return rows


def recorded(prompter: prompts.Prompter, trajectory: Trajectory) -> Trajectory:
    """The same episode with the contexts a player under plain prompts would have seen.

    Nobody sampled its replies: their log-probs are 0.
    """
    contexts = _contexts(prompter, trajectory, None)
    return dataclasses.replace(trajectory, contexts=tuple(map(tuple, contexts)))


def _contexts(
    prompter: prompts.Prompter, trajectory: Trajectory, skill: str | None
) -> list[list[Segment]]:
    contexts: list[list[Segment]] = []
    whole = prompter.config.context == "whole"
    for index, turn in enumerate(trajectory.turns):
        step = base.TimeStep(turn.observation, admissible=turn.admissible)
        reply = _spoken(prompter.encoder, turn.reply)
        if whole and contexts:
            longer = [*contexts[-1], prompter.following(step), reply]
            if prompter.holds(longer):
                contexts[-1] = longer
                continue
        shown = () if whole else trajectory.turns[:index]
        segments, _ = prompter.opening(trajectory.task, step, shown, skill)
        contexts.append([*segments, reply])
    return contexts


def _spoken(encoder: prompts.Encoder, reply: str) -> Segment:
    ids = np.array([*encoder.encode(reply), encoder.stop_id], np.int32)
    return Segment(Role.AGENT, ids, np.zeros(len(ids), np.float32))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Recorded:
    """Packed rows of one kind, resident on the device."""

    view: TokenView
    mask: jax.Array


def record(rows: Sequence[Row], scored: int) -> Recorded:
    """Packs recorded rows to the length of the longest."""
    length = max(sum(len(s.tokens) for s in row.student) for row in rows)
    batch = pack(rows, len(rows), length, length, scored)
    return jax.device_put(Recorded(batch.student, batch.mask))


def clone(
    model: qwen.ModelConfig,
    params: Any,
    data: Sequence[Recorded],
    config: settings.Imitate,
    key: jax.Array,
) -> Iterator[tuple[int, Any, float]]:
    """Behaviour cloning: AdamW with a cosine schedule on the replies' cross-entropy.

    Args:
      model: shape of the network.
      params: where it starts.
      data: one entry per kind of row; every step takes `config.rows` of each.
      config: steps, rows, learning rate.
      key: of the rows drawn.

    Yields:
      (steps done, weights, mean loss of the last steps in nats per token).
    """
    rule = optax.chain(
        optax.clip_by_global_norm(1.0),
        optax.adamw(optax.cosine_decay_schedule(config.learning_rate, config.steps)),
    )

    def loss(params, parts):
        total = count = 0.0
        for part in parts:
            scores = scoring.score(model, params, part.view, 1.0, part.mask)
            total += -scores.logprob.sum()
            count += part.mask.sum()
        return total / count

    @jax.jit
    def several(params, moments, data, keys):
        def step(carry, key):
            params, moments = carry
            parts = []
            for part, k in zip(data, jax.random.split(key, len(data))):
                index = jax.random.randint(k, (config.rows,), 0, part.mask.shape[0])
                parts.append(jax.tree.map(lambda x, at=index: x[at], part))
            value, gradient = jax.value_and_grad(loss)(params, parts)
            change, moments = rule.update(gradient, moments, params)
            return (optax.apply_updates(params, change), moments), value

        (params, moments), losses = jax.lax.scan(step, (params, moments), keys)
        return *sharding.laid((params, moments)), losses.mean()

    moments, data = sharding.made(rule.init, params), tuple(data)
    for done in range(0, config.steps, STEPS_PER_CALL):
        count = min(STEPS_PER_CALL, config.steps - done)
        keys = jax.random.split(jax.random.fold_in(key, done), count)
        params, moments, value = several(params, moments, data, keys)
        yield done + count, params, float(value)
