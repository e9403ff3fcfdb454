"""The iteration loop: wires the parts and owns every side effect.

tasks → rollout.collect → summarize → bank.absorb → retrieve → prompts, tokens.pack
      → learner.update → bank.credit → metrics, checkpoint
"""

import dataclasses
import platform
from pathlib import Path
from typing import Any

import jax
import numpy as np

from skillsd_jax import (
    agent,
    artifacts,
    checkpoint,
    evaluate,
    experience,
    imitate,
    learner,
    metrics,
    rollout,
    timing,
    tokens,
    validation,
)
from skillsd_jax import config as settings
from skillsd_jax.environments import ENVIRONMENTS
from skillsd_jax.losses.objective import OBJECTIVES
from skillsd_jax.models import huggingface
from skillsd_jax.skills import bank as skill_bank
from skillsd_jax.skills import retrieval, summarizer

PURPOSES = ("rollout", "evaluate", "teacher")


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
    validation.validate(
        config,
        {
            "environment.name": ENVIRONMENTS,
            "objective.name": OBJECTIVES,
            "skills.retrieval": retrieval.RETRIEVAL,
        },
    )
    _probe(config)
    validation.claim_workdir(workdir, config)
    compiled = artifacts.cache_folder(config.cache) / "compiled" / _machine()
    jax.config.update("jax_compilation_cache_dir", str(compiled))
    with metrics.Progress(config.iterations) as progress:
        return Run(config, Path(workdir), progress).finish()


def _probe(config: settings.Config) -> None:
    """Starts an episode and looks at the weights: what is missing ends the run now."""
    try:
        if config.model.path:
            huggingface.check(config.model.path)
        (environment,) = rollout.environments(config.environment, "train")
        environment.reset(0)
    except (ImportError, ValueError, OSError) as fault:
        raise validation.Refused(str(fault)) from fault
    environment.close()


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


def drawn_tasks(seed: int, iteration: int, count: int, tasks: int) -> list[int]:
    """Tasks of an iteration: epochs of a seeded permutation, without state."""
    drawn = []
    for cursor in range(iteration * count, (iteration + 1) * count):
        epoch, place = divmod(cursor, tasks)
        order = np.random.default_rng([seed, epoch]).permutation(tasks)
        drawn.append(int(order[place]))
    return drawn


class Run:
    """The parts of one run.

    Args:
      config: every setting.
      workdir: exists and belongs to this run.
      progress: what the user sees meanwhile.
    """

    def __init__(
        self, config: settings.Config, workdir: Path, progress: metrics.Progress
    ):
        self.config, self.workdir, self.progress = config, workdir, progress
        self.commit = metrics.commit()  # of the code that runs, not of a later edit
        self.clock = timing.Clock()
        self.compilations = timing.Compilations()
        with self.clock("warm_start"):
            self.agent = agent.make_agent(config, progress.say)
        self.player = self.agent.player
        self.train_environments = self._environments("train")
        turns = self.train_environments[0].max_steps
        episodes = config.rollout.prompts * config.rollout.group_size
        # The most rows an iteration can leave, plus one that is always padding.
        self.batch_rows = episodes * turns + 1
        self.scored = self.player.scored(turns)
        self.learner = learner.Learner(
            self.player.model, config, config.iterations * self._updates()
        )
        self.state = self.learner.init(self.agent.params)
        self.bank = skill_bank.Bank(config.skills.capacity)
        self.host: dict[str, Any] = {}
        self.environment_steps = 0
        with self.clock("panels"):
            self._make_panels()
        self.checkpoints = checkpoint.Checkpointer(
            workdir / "checkpoints", config.keep_checkpoints
        )

    def _updates(self) -> int:
        """Optimiser steps per iteration, at most."""
        setting = self.config.optimizer
        if setting.minibatch_rows:
            return -(-self.batch_rows // setting.minibatch_rows)
        return setting.minibatches

    def _environments(self, split: str):
        return rollout.environments(
            self.config.environment, split, self.config.rollout.rows
        )

    def _make_panels(self) -> None:
        setting = self.config.evaluate
        self.test_environments = self._environments(setting.split)
        self.teacher_environments = self._environments("teacher")
        self.progress.say("panels: reading the held-out tasks")
        self.panel = evaluate.make_panel(
            self.test_environments[0], setting.split, setting.tasks
        )
        self.teacher_panel = evaluate.make_panel(
            self.teacher_environments[0], "teacher", setting.teacher_tasks
        )
        self.progress.say(
            f"panels: {self.panel.size} tasks {self.panel.hash}, teacher "
            f"{self.teacher_panel.size} tasks {self.teacher_panel.hash}"
        )

    def finish(self) -> dict[str, Any]:
        """Goes from where the run stands to its summary."""
        start = self._restore()
        with self.clock("compile"):
            rollout.warm_up(self.player, self.state.params)
        if not self.host:
            self._before()
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

    def iterate(self, iteration: int) -> dict[str, Any]:
        """One iteration; returns its line of metrics.jsonl."""
        config, clock = self.config, self.clock
        before = self.compilations.count
        with clock("rollout"):
            played = self._play(iteration)
        with clock("skills"):
            made = experience.summarize(played, self.bank, config.skills.per_group)
            self.bank.absorb(made)
            rng = np.random.default_rng([config.seed, iteration, 1])
            found = experience.retrieve(played, self.bank, config.skills, rng)
            views = experience.views(
                played, found, self.player.prompter, config.objective
            )
        with clock("pack"):
            batch = self._batch(views.rows, iteration)
        with clock("update"):
            self.state, sums = self.learner.update(self.state, batch)
            figures = learner.means(sums)
        with clock("skills"):
            self._credit(played, views)
        record = {
            **experience.figures(played.trajectories),
            **figures,
            "rows": len(views.rows),
            "skills": {
                "held": len(self.bank),
                "made": len(made),
                "used": float(np.mean([row.teacher is not None for row in views.rows])),
                "cut": views.cut,
                "dropped": views.dropped,
            },
        }
        self.environment_steps += sum(len(t.turns) for t in played.trajectories)
        with clock("evaluate"):
            record |= self._during(iteration)
        self._keep_sample(iteration, played, views)
        record["environment_steps"] = self.environment_steps
        record["compilations"] = self.compilations.count - before
        record["seconds"] = clock.lap()
        return record

    def _play(self, iteration: int) -> experience.Experience:
        config = self.config
        drawn = drawn_tasks(
            config.seed,
            iteration,
            config.rollout.prompts,
            config.environment.train_tasks,
        )
        trajectories = rollout.collect(
            self.player,
            self.state.params,
            self.train_environments,
            np.repeat(drawn, config.rollout.group_size),
            key_for(config.seed, "rollout", iteration),
            config.rollout.temperature,
        )
        groups = np.repeat(np.arange(len(drawn)), config.rollout.group_size)
        return experience.Experience(trajectories, groups.tolist(), iteration)

    def _batch(self, rows: list[tokens.Row], iteration: int) -> tokens.TokenBatch:
        batch = tokens.pack(
            rows,
            self.batch_rows,
            self.player.length,
            self.player.skilled_length,
            self.scored,
        )
        order = np.random.default_rng([self.config.seed, iteration, 2]).permutation(
            len(rows)
        )
        return learner.arrange(batch, order, self.config.optimizer)

    def _credit(self, played: experience.Experience, views: experience.Views) -> None:
        """Books each episode's reward to the skill its teacher was shown."""
        shown = zip(views.shown, played.trajectories)
        self.bank.credit(
            (skill.id, summarizer.unit_reward(episode))
            for skill, episode in shown
            if skill is not None
        )

    def _evaluate(self, temperature: float, samples: int) -> evaluate.Result:
        """The student on the test panel, without skills."""
        return evaluate.evaluate(
            self.player,
            self.state.params,
            self.test_environments,
            self.panel,
            key_for(self.config.seed, "evaluate"),
            temperature,
            samples,
        )

    def _standing(self) -> dict[str, evaluate.Result]:
        """Sampled and, if asked for, greedy results of the present student."""
        setting = self.config.evaluate
        results = {"": self._evaluate(setting.temperature, setting.samples)}
        if setting.greedy:
            results["_greedy"] = self._evaluate(0.0, 1)
        return results

    def _during(self, iteration: int) -> dict[str, Any]:
        every, done = self.config.evaluate.every, iteration + 1
        if not every or done % every or done == self.config.iterations:
            return {}
        setting = self.config.evaluate
        result = self._evaluate(setting.temperature, setting.samples)
        return {"evaluation": dataclasses.asdict(result)}

    def _before(self) -> None:
        """Figures of the warm start, and of its teacher on the teacher's panel."""
        self.progress.say("before: student on the test panel, teacher on its own")
        with self.clock("evaluate"):
            for name, result in self._standing().items():
                self.host["before" + name] = dataclasses.asdict(result)
        with self.clock("teacher"):
            expert = {
                seed: imitate.expert_skill(self.teacher_environments[0], seed)
                for seed in range(self.teacher_panel.size)
            }
            plain, episodes = self._on_teacher_panel(None)
            own = {
                t.task.seed: summarizer.render(summarizer.summarize(t, 0, "own"))
                for t in episodes
                if t.turns
            }
            taught, _ = self._on_teacher_panel(lambda task: expert[task.seed])
            self_taught, _ = self._on_teacher_panel(lambda task: own.get(task.seed))
        self.host |= {
            "student_on_teacher_panel": plain.record(),
            "teacher_before": taught.record(),
            "teacher_before_own_skills": self_taught.record(),
        }
        self.clock.lap()

    def _on_teacher_panel(self, hint):
        seeds = np.arange(self.teacher_panel.size)
        episodes = rollout.collect(
            self.player,
            self.state.params,
            self.teacher_environments,
            seeds,
            key_for(self.config.seed, "teacher"),
            self.config.evaluate.temperature,
            hint,
        )
        return evaluate.tally(episodes), episodes

    def _keep_sample(self, iteration: int, played, views) -> None:
        """Writes some episodes as text, one JSON object a line."""
        chosen = list(zip(played.trajectories, views.shown))
        chosen = chosen[: self.config.sample_trajectories]
        lines = [experience.line(episode, skill) for episode, skill in chosen]
        path = self.workdir / "trajectories" / f"{iteration:06d}.jsonl"
        artifacts.write_atomic(path, "".join(lines))

    def _save(self, done: int) -> None:
        with self.clock("checkpoint"):
            host = {
                "figures": self.host,
                "bank": self.bank.state(),
                "environment_steps": self.environment_steps,
                "seconds": dict(self.clock.total),
            }
            self.checkpoints.save(done, self.state, host)
            self.bank.save(self.workdir / "skills.jsonl")

    def _restore(self) -> int:
        """Takes up the last checkpoint; returns the iteration to go on with."""
        found = self.checkpoints.restore(self.state)
        if found is None:
            return 0
        done, self.state, host = found
        self.host = host["figures"]
        self.bank = skill_bank.Bank.from_state(host["bank"])
        self.environment_steps = host["environment_steps"]
        self.clock = timing.Clock(host["seconds"])
        self.progress.say(f"resumed after iteration {done}")
        return done

    def _after(self) -> dict[str, Any]:
        """Final figures, summary.json and the table."""
        with self.clock("evaluate"):
            after = {
                "after" + name: dataclasses.asdict(result)
                for name, result in self._standing().items()
            }
        self.bank.save(self.workdir / "skills.jsonl")
        summary = {
            "config": settings.to_dict(self.config),
            "seed": self.config.seed,
            "data": self.train_environments[0].data,
            "panel": self.panel.record(),
            "teacher_panel": self.teacher_panel.record(),
            **self.host,
            **after,
            "warm_start": self.agent.record,
            "environment_steps": self.environment_steps,
            "seconds": {k: round(v, 1) for k, v in self.clock.total.items()},
            "versions": metrics.versions(),
            "commit": self.commit,
        }
        metrics.write_summary(self.workdir / "summary.json", summary)
        self.progress.say(metrics.table(summary))
        self.progress.say(f"everything lies in {self.workdir}")
        return summary
