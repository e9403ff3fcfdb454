"""The iteration loop: wires the parts and owns every side effect.

tasks → practice (rollout.collect) → summarize → bank.absorb → retrieve → prompts, packing
      → learner.update → bank.credit → metrics, checkpoint
"""

import collections
import contextlib
import functools
from pathlib import Path
from typing import Any

import numpy as np

from skillsd_jax import (
    agent,
    artifacts,
    cluster,
    experience,
    guard,
    imitate,
    learner,
    metrics,
    optimizers,
    packing,
    panels,
    practice,
    preemption,
    preflight,
    rollout,
    runfolder,
    savepoint,
    sharding,
    showing,
    summaries,
    timing,
    tokens,
)
from skillsd_jax import config as settings
from skillsd_jax.keys import key_for
from skillsd_jax.losses.objective import recipe


def run(config: settings.Config, workdir: str, job: str = "") -> dict[str, Any]:
    """Trains one agent from start, or from the last checkpoint, to finish.

    Args:
      config: every setting.
      workdir: folder the run leaves its files in; the same config on it resumes.
      job: which of many processes this is, see cluster.job; "": the only one.

    Returns:
      What summary.json holds.

    Raises:
      Refused: the run cannot work; nothing has been changed.
      Stopped: it ended midway; the same call goes on.
    """
    with contextlib.ExitStack() as stack:
        stack.enter_context(cluster.job(job))
        cluster.all_pass(lambda: preflight.check(config))
        timing.keep_compiled(artifacts.cache_folder(config.cache) / "compiled")
        _claim(stack, workdir, config)
        stack.enter_context(savepoint.ending(Path(workdir)))
        stack.enter_context(sharding.over(config.mesh))
        shown = metrics.Progress(config.iterations, enabled=cluster.first())
        progress = stack.enter_context(shown)
        return Run(config, Path(workdir), progress, stack).finish()


def _claim(stack: contextlib.ExitStack, workdir: str, config: settings.Config) -> None:
    """One process claims the folder; all of them go on, or none."""
    held = dict(settings.flatten(settings.to_dict(config)))
    cluster.check_same({"workdir": workdir, "commit": metrics.commit(), **held})

    cluster.told(lambda: stack.enter_context(runfolder.claimed(workdir, config)))


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
        player = self.player = self.agent.player
        stage = rollout.open_stage(config.environment, "train", player.rows)
        self.stage = stack.enter_context(stage)
        turns = self.stage.max_steps
        episodes = config.rollout.prompts * config.rollout.group_size
        # The most rows an iteration can leave, plus one that is always padding.
        self.batch_rows = episodes * turns + 1
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
        plain = player.skilled_length if self.practice.hinted else player.length
        shape = self.batch_rows, (plain, player.skilled_length), player.scored(turns)
        self.packer = packing.Packer(config.optimizer, *shape)
        self._make_skills(stack)
        with self.clock("panels"):
            self.panels = panels.Panels(
                config, self.player, functools.partial(key_for, config.seed)
            )
            stack.callback(self.panels.close)
            self.progress.say(self.panels.describe())
        self._make_savepoints(stack)

    def _make_learner(self) -> None:
        model, weights, record = None, None, {}
        kind = learner.teacher_kind(self.recipe, self.config.teacher)
        if kind == "external":
            with self.clock("warm_start"):
                model, weights, record = agent.make_teacher(
                    self.config, self.agent, self.progress.say
                )
        self.teacher_record = {"kind": kind, **record}
        self.external = kind == "external"
        steps = optimizers.per_iteration(self.config.optimizer, self.batch_rows)
        updates = self.config.iterations * steps
        self.learner = learner.Learner(self.player.model, self.config, updates, model)
        self.state = self.learner.init(self.agent.params, weights)

    def _make_skills(self, stack: contextlib.ExitStack) -> None:
        keys = functools.partial(key_for, self.config.seed, "summary")
        say = self.progress.say
        self.summaries = summaries.Summaries(self.config, self.player, keys, say)
        stack.callback(self.summaries.close)
        self.bank = self.summaries.open_bank(self.stage.local.families)

    def _make_savepoints(self, stack: contextlib.ExitStack) -> None:
        self.environment_steps = 0
        self.past_faults: dict[str, int] = {}  # of earlier parts of the run
        self.watch = guard.Watch(self.workdir)
        parts = self.config, self.player, self.state, self.external, self.progress.say
        opened = savepoint.Savepoints(self.workdir, *parts)
        self.savepoints = stack.enter_context(opened)

    def finish(self) -> dict[str, Any]:
        """Goes from where the run stands to its summary."""
        start = self._restore()
        self._warm_up(self._student())
        if not self.host:
            self.progress.say("before: student on the test panel, teacher on its own")
            with self.clock("evaluate"):
                self.host |= self._standing("before")
            with self.clock("teacher"):
                self.host |= self._teacher("before")
            self.clock.lap()
        writers = self.config.writers if cluster.first() else None
        writer = metrics.open_writer(writers, self.workdir, start)
        with contextlib.closing(writer) as self.writer, preemption.Notice() as notice:
            for iteration in range(start, self.config.iterations):
                self._go_on(iteration, notice)
            self.savepoints.wait()
            if any(cluster.gather(notice.given)):
                notice.stop(self.config.iterations, self.progress.say)
        self.compilations.close()
        return self._after()

    def _warm_up(self, weights: learner.Params) -> None:
        with self.clock("compile"), sharding.own():
            for player in (self.player, self.panels.player):
                hinted = self.recipe.hinted or self.practice.hinted
                rollout.warm_up(player, weights, hinted)
            self.summaries.warm_up(weights)

    def _go_on(self, iteration: int, notice: preemption.Notice) -> None:
        """An iteration, its line of metrics.jsonl and, where it is time, a savepoint."""
        record, done = self.iterate(iteration), iteration + 1
        self.writer.write(iteration, record)
        self.progress.iteration(iteration, record)
        self.savepoints.check()
        due = done % self.config.checkpoint_every == 0
        called = any(cluster.gather(notice.given))
        if due or done == self.config.iterations or called:
            self._save(done, record.get("evaluation", {}).get("success"))
        if called:
            self.savepoints.wait()
            notice.stop(done, self.progress.say)

    def _faults(self) -> collections.Counter[str]:
        """What went wrong with environments so far."""
        total = collections.Counter(self.past_faults)
        for counts in cluster.gather((self.stage.counts(), self.panels.faults())):
            for each in counts:
                total.update(each)
        return total

    def iterate(self, iteration: int) -> dict[str, Any]:
        """One iteration; returns its line of metrics.jsonl."""
        clock = self.clock
        before, faults = self.compilations.count, self._faults()
        weights = self._student()
        with clock("rollout"), sharding.own():
            practiced = self.practice.episodes(weights, iteration, self.bank)
            played = practiced.kept
        with clock("skills"):
            made = self._made(played, weights)
            del weights  # in a job a copy, which the update has no room for
            self.bank.absorb(made.skills)
            views = self._views(played, iteration)
        figures = self._learn(views.rows, iteration)
        shown = [h.skills or seen for h, seen in zip(practiced.hints, views.shown)]
        with clock("skills"):
            reuse = experience.reuse(shown, self.bank, iteration)
            self._credit(played, shown, practiced.unkept)
        taught = [row.teacher is not None for row in views.rows]
        hinted = [len(hint.skills) > 0 for hint in practiced.hints]
        record = {
            **experience.figures(practiced.played),
            **figures,
            "rows": len(views.rows),
            "groups_dropped": practiced.dropped,
            "skills": {
                **self.bank.counts,
                **made.counts,
                "used": experience.mean(
                    hinted if self.recipe.student_skill else taught
                ),
                "cut": views.cut,
                "dropped": views.dropped,
                **experience.unseen(played, practiced.hints),
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

    def _made(self, played, weights: learner.Params) -> summaries.Made:
        with sharding.own():
            take = self.summaries.take
            return cluster.told(lambda: take(played, self.bank, weights))

    def _views(self, played, iteration: int) -> experience.Views:
        """Both views of the episodes' contexts, as the method says."""
        rng = np.random.default_rng([self.config.seed, iteration, 1])
        skills = self.config.skills
        sources = experience.Sources(self.bank, skills, rng, self.expert.skill)
        chosen = experience.SHOWN[self.recipe.shown]
        return experience.views(
            played,
            cluster.told(lambda: chosen(played, sources)),
            self.player.prompter,
            self.config.objective,
            {"plain": "plain", "rescued": "played"}.get(self.recipe.shown, "skill"),
        )

    def _learn(self, rows: list[tokens.Row], iteration: int) -> dict[str, float]:
        """Updates the student, where the method does."""
        if not self.recipe.terms:
            return {}
        with self.clock("pack"):
            rng = np.random.default_rng([self.config.seed, iteration, 2])
            batch = self.packer.arranged(rows, rng.permutation(len(rows)))
        with self.clock("update"):
            self.state, sums = self.learner.update(self.state, batch)
            found = learner.means(sums)
        self.watch.see(iteration, found["skipped_updates"], batch.rows)
        return found | {"padding": packing.padding(batch)}

    def _credit(self, played: experience.Experience, shown, unkept) -> None:
        """Books each episode's reward to the skills of the bank that were shown."""
        if self.recipe.shown != "skill" and not self.practice.hinted:
            return
        pairs = [*zip(played.trajectories, shown)]
        pairs += [(episode, hint.skills) for episode, hint in unkept]
        self.bank.credit(experience.rewards(pairs), played.iteration)

    def _standing(self, when: str) -> dict[str, Any]:
        """Figures of the present student, named for summary.json."""
        seed, prompter = [self.config.seed, 0, 5], self.player.prompter
        hints = showing.Hints(self.bank, self.config.skills, seed, prompter)
        hint = hints.text if self.recipe.student_skill else None
        weights = self._student()
        with sharding.own():
            return self.panels.standing(weights, when, hint)

    def _during(self, iteration: int) -> dict[str, Any]:
        if iteration + 1 == self.config.iterations:
            return {}
        weights = self._weights()
        with sharding.own():
            return self.panels.during(iteration + 1, *weights)

    def _teacher(self, when: str) -> dict[str, Any]:
        weights = self._weights()
        with sharding.own():
            return self.panels.teacher(*weights, when)

    def _weights(self) -> tuple[learner.Params, learner.Params]:
        """Student's and teacher's where they play; another model's are not played with."""
        student, teacher = self.state.weights, self.state.teacher
        shared = teacher is None or self.external
        played = student if shared else self.state.whole(teacher)
        return sharding.mine((student, played))

    def _student(self) -> learner.Params:
        """Its weights where it plays: on this process's own devices."""
        return sharding.mine(self.state.weights)

    def _keep_sample(self, iteration: int, played, shown) -> None:
        """Writes some episodes as text, one JSON object a line."""
        if not cluster.first():
            return
        many = self.config.sample_trajectories
        lines = map(experience.line, played.trajectories[:many], shown)
        path = self.workdir / "trajectories" / f"{iteration:06d}.jsonl"
        artifacts.write_atomic(path, "".join(lines))

    def _save(self, done: int, score: float | None) -> None:
        with self.clock("checkpoint"):
            standing = savepoint.Standing(
                state=self.state,
                bank=self.bank,
                pending=self.summaries.state(),
                figures=self.host,
                environment_steps=self.environment_steps,
                seconds=dict(self.clock.total),
                faults=dict(self._faults()),
                skipped=self.watch.row,
                lengths=self.packer.lengths,
            )
            self.savepoints.save(done, standing, score)

    def _restore(self) -> int:
        """Takes up the last savepoint; returns the iteration to go on with."""
        found = self.savepoints.restore(self.state)
        if found is None:
            return 0
        done, standing = found
        self.state, self.bank = standing.state, standing.bank
        cluster.told(lambda: self.summaries.restore(standing.pending))
        self.host = standing.figures
        self.environment_steps = standing.environment_steps
        self.clock = timing.Clock(standing.seconds)
        self.past_faults = standing.faults
        self.watch = guard.Watch(self.workdir, standing.skipped)
        self.packer.lengths = standing.lengths
        return done

    def _after(self) -> dict[str, Any]:
        """Final figures, summary.json and the table."""
        with self.clock("evaluate"):
            after = self._standing("after")
        with self.clock("teacher"):
            after |= self._teacher("after")
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
        if cluster.first():
            self.bank.save(self.workdir / "skills.jsonl")
            metrics.write_summary(self.workdir / "summary.json", summary)
        self.progress.say(metrics.table(summary))
        self.progress.say(f"everything lies in {self.workdir}")
        return summary
