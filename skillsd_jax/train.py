"""The iteration loop: wires the parts and owns every side effect.

tasks → practice (rollout.collect) → summarize → bank.absorb → retrieve → prompts, tokens.pack
      → learner.update → bank.credit → metrics, checkpoint
"""

import collections
import contextlib
import dataclasses
import functools
import platform
from pathlib import Path
from typing import Any

import jax
import numpy as np

from skillsd_jax import (
    agent,
    artifacts,
    checkpoint,
    experience,
    imitate,
    learner,
    metrics,
    panels,
    practice,
    preflight,
    rollout,
    summaries,
    timing,
    tokens,
    validation,
)
from skillsd_jax import config as settings
from skillsd_jax.losses.objective import recipe
from skillsd_jax.skills import bank as skill_bank
from skillsd_jax.skills import summarizer

PURPOSES = ("rollout", "evaluate", "teacher", "summary")


def run(config: settings.Config, workdir: str) -> dict[str, Any]:
    """Trains one agent from start, or from the last checkpoint, to finish.

    Args:
      config: every setting.
      workdir: folder the run leaves its files in; the same config on it resumes.

    Returns:
      What summary.json holds.

    Raises:
      validation.Refused: the run cannot work; nothing has been changed.
    """
    preflight.check(config)
    validation.claim_workdir(workdir, config)
    compiled = artifacts.cache_folder(config.cache) / "compiled" / _machine()
    jax.config.update("jax_compilation_cache_dir", str(compiled))
    with contextlib.ExitStack() as stack:
        progress = stack.enter_context(metrics.Progress(config.iterations))
        return Run(config, Path(workdir), progress, stack).finish()


def _machine() -> str:
    """Names what compiled programs depend on: jaxlib and the processor's features."""
    described = Path("/proc/cpuinfo")
    features = described.read_text() if described.exists() else platform.processor()
    flags = {line for line in features.split("\n") if line.startswith("flags")}
    return artifacts.content_hash(jax.lib.__version__, platform.machine(), flags)


def key_for(seed: int, purpose: str, index: int = 0) -> jax.Array:
    """A key that depends on (seed, purpose, index) alone: resuming needs no state."""
    key = jax.random.fold_in(jax.random.key(seed), PURPOSES.index(purpose))
    return jax.random.fold_in(key, index)


class Run:
    """The parts of one run.

    Args:
      config: every setting.
      workdir: exists and belongs to this run.
      progress: what the user sees meanwhile.
      stack: ends the workers that hold environments.
    """

    def __init__(
        self,
        config: settings.Config,
        workdir: Path,
        progress: metrics.Progress,
        stack: contextlib.ExitStack,
    ):
        self.config, self.workdir, self.progress = config, workdir, progress
        self.commit = metrics.commit()  # of the code that runs, not of a later edit
        self.clock = timing.Clock()
        self.compilations = timing.Compilations()
        with self.clock("warm_start"):
            self.agent = agent.make_agent(config, progress.say)
        self.player = self.agent.player
        stage = rollout.open_stage(config.environment, "train", config.rollout.rows)
        self.stage = stack.enter_context(stage)
        turns = self.stage.max_steps
        episodes = config.rollout.prompts * config.rollout.group_size
        # The most rows an iteration can leave, plus one that is always padding.
        self.batch_rows = episodes * turns + 1
        self.scored = self.player.scored(turns)
        self.recipe = recipe(config.objective.name)
        self.host: dict[str, Any] = {}
        self._make_learner()
        self.expert = imitate.Expert(config.environment)
        self.practice = practice.Practice(
            config,
            self.recipe,
            self.player,
            self.stage,
            functools.partial(key_for, config.seed, "rollout"),
            self.expert,
        )
        self._make_skills(stack)
        self.environment_steps = 0
        with self.clock("panels"):
            self.panels = panels.Panels(
                config, self.player, functools.partial(key_for, config.seed)
            )
            stack.callback(self.panels.close)
            self.progress.say(self.panels.describe())
        self.checkpoints = checkpoint.Checkpointer(
            workdir / "checkpoints", config.keep_checkpoints
        )

    def _make_learner(self) -> None:
        model, weights, record = None, None, {}
        kind = learner.teacher_kind(self.recipe, self.config.teacher)
        if kind == "external":
            with self.clock("warm_start"):
                model, weights, record = agent.make_teacher(
                    self.config, self.agent, self.progress.say
                )
        self.teacher_record = {"kind": kind, **record}
        updates = self.config.iterations * self._updates()
        self.learner = learner.Learner(self.player.model, self.config, updates, model)
        self.state = self.learner.init(self.agent.params, weights)
        self.origin = agent.origin_of(
            self.player.encoder, self.state.frozen, self._fixed().get("teacher")
        )

    def _make_skills(self, stack: contextlib.ExitStack) -> None:
        keys = functools.partial(key_for, self.config.seed, "summary")
        self.bank = summaries.open_bank(self.config.skills)
        self.summaries = summaries.Summaries(self.config, self.player, keys)
        stack.callback(self.summaries.close)

    def _updates(self) -> int:
        """Optimiser steps per iteration, at most."""
        setting = self.config.optimizer
        if setting.minibatch_rows:
            return -(-self.batch_rows // setting.minibatch_rows)
        return setting.minibatches

    def finish(self) -> dict[str, Any]:
        """Goes from where the run stands to its summary."""
        start = self._restore()
        with self.clock("compile"):
            for player in (self.player, self.panels.player):
                hinted = self.recipe.hinted or self.practice.hinted
                rollout.warm_up(player, self.state.weights, hinted)
            self.summaries.warm_up(self.state.weights)
        if not self.host:
            self.progress.say("before: student on the test panel, teacher on its own")
            with self.clock("evaluate"):
                self.host |= self._standing("before")
            with self.clock("teacher"):
                self.host |= self._teacher("before")
            self.clock.lap()
        self.writer = metrics.open_writer(self.config.writers, self.workdir, start)
        for iteration in range(start, self.config.iterations):
            record = self.iterate(iteration)
            self.writer.write(iteration, record)
            self.progress.iteration(iteration, record)
            done = iteration + 1
            if (
                done % self.config.checkpoint_every == 0
                or done == self.config.iterations
            ):
                self._save(done)
        self.writer.close()
        self.checkpoints.close()
        self.compilations.close()
        return self._after()

    def _faults(self) -> collections.Counter[str]:
        """What went wrong with environments so far."""
        counts = collections.Counter(self.stage.counts())
        counts.update(self.panels.faults())
        return counts

    def iterate(self, iteration: int) -> dict[str, Any]:
        """One iteration; returns its line of metrics.jsonl."""
        clock = self.clock
        before, faults = self.compilations.count, self._faults()
        with clock("rollout"):
            practiced = self.practice.episodes(self.state.weights, iteration, self.bank)
            played = practiced.kept
        with clock("skills"):
            made = self.summaries.take(played, self.bank, self.state.weights)
            self.bank.absorb(made.skills)
            views = self._views(played, iteration)
        figures = self._learn(views.rows, iteration)
        shown = [hint or seen for hint, seen in zip(practiced.hints, views.shown)]
        with clock("skills"):
            reuse = experience.reuse(shown, self.bank, iteration)
            self._credit(played, shown)
        taught = [row.teacher is not None for row in views.rows]
        hinted = [len(skills) > 0 for skills in practiced.hints]
        record = {
            **experience.figures(practiced.played),
            **figures,
            "rows": len(views.rows),
            "groups_dropped": practiced.dropped,
            "skills": {
                **self.bank.counts,
                **made.counts,
                "used": _mean(hinted if self.recipe.student_skill else taught),
                "cut": views.cut,
                "dropped": views.dropped,
                **reuse,
            },
        }
        self.environment_steps += sum(len(t.turns) for t in practiced.played)
        with clock("evaluate"):
            record |= self._during(iteration)
        self._keep_sample(iteration, played, shown)
        record["faults"] = {n: c - faults[n] for n, c in self._faults().items()}
        record["environment_steps"] = self.environment_steps
        record["compilations"] = self.compilations.count - before
        record["seconds"] = clock.lap()
        return record

    def _views(self, played, iteration: int) -> experience.Views:
        """Both views of the episodes' contexts, as the method says."""
        rng = np.random.default_rng([self.config.seed, iteration, 1])
        sources = experience.Sources(
            self.bank, self.config.skills, rng, self.expert.skill
        )
        return experience.views(
            played,
            experience.SHOWN[self.recipe.shown](played, sources),
            self.player.prompter,
            self.config.objective,
            {"plain": "plain", "rescued": "played"}.get(self.recipe.shown, "skill"),
        )

    def _learn(self, rows: list[tokens.Row], iteration: int) -> dict[str, float]:
        """Updates the student, where the method does."""
        if not self.recipe.terms:
            return {}
        with self.clock("pack"):
            batch = self._batch(rows, iteration)
        with self.clock("update"):
            self.state, sums = self.learner.update(self.state, batch)
            return learner.means(sums)

    def _batch(self, rows: list[tokens.Row], iteration: int) -> tokens.TokenBatch:
        batch = tokens.pack(
            rows,
            self.batch_rows,
            self.player.skilled_length if self.practice.hinted else self.player.length,
            self.player.skilled_length,
            self.scored,
        )
        order = np.random.default_rng([self.config.seed, iteration, 2]).permutation(
            len(rows)
        )
        return tokens.arrange(batch, order, self.config.optimizer)

    def _credit(self, played: experience.Experience, shown) -> None:
        """Books each episode's reward to the skill of the bank that was shown."""
        if self.recipe.shown != "skill" and not self.practice.hinted:
            return
        rewards = (
            (skill.id, summarizer.unit_reward(played.trajectories[i]))
            for i in played.usable
            for skill in shown[i]
        )
        self.bank.credit(rewards, played.iteration)

    def _standing(self, when: str) -> dict[str, Any]:
        """Figures of the present student, named for summary.json."""
        seed = [self.config.seed, 0, 5]
        hints = experience.Hints(
            self.bank, self.config.skills, seed, self.player.prompter
        )
        hint = hints.text if self.recipe.student_skill else None
        results = self.panels.standing(self.state.weights, hint)
        return {when + name: dataclasses.asdict(r) for name, r in results.items()}

    def _during(self, iteration: int) -> dict[str, Any]:
        setting, done, found = self.config.evaluate, iteration + 1, {}
        if done == self.config.iterations:
            return found
        if setting.every and done % setting.every == 0:
            result = self.panels.student(self.state.weights)
            found["evaluation"] = dataclasses.asdict(result)
        if setting.teacher_every and done % setting.teacher_every == 0:
            found["teacher"] = self._teacher("")
        return found

    def _teacher(self, when: str) -> dict[str, Any]:
        """Figures of the teacher's panel; another model's weights are not played with."""
        student, teacher = self.state.weights, self.state.teacher
        external = self.teacher_record["kind"] == "external"
        shared = teacher is None or external
        weights = student if shared else self.state.whole(teacher)
        return self.panels.teacher(student, weights, when)

    def _keep_sample(self, iteration: int, played, shown) -> None:
        """Writes some episodes as text, one JSON object a line."""
        chosen = list(zip(played.trajectories, shown))
        chosen = chosen[: self.config.sample_trajectories]
        lines = [experience.line(episode, skills) for episode, skills in chosen]
        path = self.workdir / "trajectories" / f"{iteration:06d}.jsonl"
        artifacts.write_atomic(path, "".join(lines))

    def _save(self, done: int) -> None:
        with self.clock("checkpoint"):
            host = {
                "figures": self.host,
                "bank": self.bank.state(),
                "summaries": self.summaries.state(),
                "environment_steps": self.environment_steps,
                "seconds": dict(self.clock.total),
                "origin": self.origin,
            }
            self.checkpoints.save(done, self._moving(), host)
            self.bank.save(self.workdir / "skills.jsonl")

    def _restore(self) -> int:
        """Takes up the last checkpoint; returns the iteration to go on with."""
        found = self.checkpoints.restore(self._moving())
        if found is None:
            return 0
        done, moving, host = found
        try:
            agent.check_origin(host["origin"], self.origin)
        except ValueError as fault:
            raise validation.Refused(f"{self.workdir}: {fault}") from fault
        self.state = dataclasses.replace(moving, **self._fixed())
        self.host = host["figures"]
        self.bank = skill_bank.Bank.from_state(host["bank"])
        self.summaries.restore(host.get("summaries", ()))
        self.environment_steps = host["environment_steps"]
        self.clock = timing.Clock(host["seconds"])
        self.progress.say(f"resumed after iteration {done}")
        return done

    def _fixed(self) -> dict[str, Any]:
        """What never changes: the base beside adapters, an external teacher."""
        fixed = {"frozen": self.state.frozen}
        if self.teacher_record["kind"] == "external":
            fixed["teacher"] = self.state.teacher
        return fixed

    def _moving(self) -> learner.LearnerState:
        """What a checkpoint holds."""
        return dataclasses.replace(self.state, **dict.fromkeys(self._fixed()))

    def _after(self) -> dict[str, Any]:
        """Final figures, summary.json and the table."""
        with self.clock("evaluate"):
            after = self._standing("after")
        with self.clock("teacher"):
            after |= self._teacher("after")
        self.bank.save(self.workdir / "skills.jsonl")
        summary = {
            "config": settings.to_dict(self.config),
            "seed": self.config.seed,
            "data": self.stage.data,
            "panel": self.panels.test.record(),
            "teacher_panel": self.panels.taught.record(),
            **self.host,
            **after,
            "warm_start": self.agent.record,
            "teacher": self.teacher_record,
            "environment_steps": self.environment_steps,
            "faults": dict(self._faults()),
            "seconds": {k: round(v, 1) for k, v in self.clock.total.items()},
            "versions": metrics.versions(),
            "commit": self.commit,
        }
        metrics.write_summary(self.workdir / "summary.json", summary)
        self.progress.say(metrics.table(summary))
        self.progress.say(f"everything lies in {self.workdir}")
        return summary


def _mean(values) -> float:
    return float(np.mean(values)) if len(values) else 0.0
