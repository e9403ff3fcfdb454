"""The two panels of a run: the student's, and the teacher's own."""

import collections
import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from skillsd_jax import config as settings
from skillsd_jax import evaluate, imitate, rollout
from skillsd_jax.environments.stage import Stage
from skillsd_jax.skills import summarizer
from skillsd_jax.trajectory import Task

Hint = Callable[[Task], str | None]


class Panels:
    """Held-out tasks, disjoint from training and from each other.

    Args:
      config: the run's settings.
      player: who plays.
      keys: sampling key by purpose.
    """

    def __init__(
        self,
        config: settings.Config,
        player: rollout.Player,
        keys: Callable[[str], jax.Array],
    ):
        setting = config.evaluate
        self.setting, self.keys = setting, keys
        self.player = dataclasses.replace(
            player, top_k=setting.top_k, top_p=setting.top_p
        )
        self._open = functools.partial(
            rollout.open_stage, config.environment, count=player.rows
        )
        self._teacher = rollout.environment(config.environment, "teacher")
        self.taught = evaluate.make_panel(
            self._teacher, "teacher", setting.teacher_tasks
        )
        self._stage = self._open(setting.split)
        self.test = evaluate.make_panel(self._stage.local, setting.split, setting.tasks)
        self._faults = collections.Counter()  # of stages that are closed

    def close(self) -> None:
        """Ends the workers that play the panels."""
        self._stage.close()
        self._teacher.close()

    def faults(self) -> dict[str, int]:
        """What went wrong in all that was played; see Stage.counts."""
        counts = collections.Counter(self._stage.counts())
        counts.update(self._faults)
        return dict(counts)

    def describe(self) -> str:
        return (
            f"panels: {self.test.size} tasks {self.test.hash}, teacher "
            f"{self.taught.size} tasks {self.taught.hash}"
        )

    def student(
        self, params: Any, greedy: bool = False, hint: Hint | None = None
    ) -> evaluate.Result:
        """The student on the test panel, without skills unless `hint` gives them."""
        setting = self.setting
        return evaluate.evaluate(
            self.player,
            params,
            self._stage,
            self.test,
            self.keys("evaluate"),
            0.0 if greedy else setting.temperature,
            1 if greedy else setting.samples,
            hint,
        )

    def during(self, done: int, student: Any, teacher: Any) -> dict[str, Any]:
        """What is to be played after `done` iterations, as metrics.jsonl has it.

        Args:
          done: iterations.
          student, teacher: weights.
        """
        setting, found = self.setting, {}
        if setting.every and done % setting.every == 0:
            found["evaluation"] = dataclasses.asdict(self.student(student))
        if setting.teacher_every and done % setting.teacher_every == 0:
            found["teacher"] = self.teacher(student, teacher, "")
        return found

    def standing(
        self, params: Any, when: str, hint: Hint | None = None
    ) -> dict[str, dict[str, Any]]:
        """Sampled and, where asked for, greedy results, and those with skills.

        Args:
          params: weights of the student.
          when: 'before' or 'after', in the names of summary.json.
          hint: skills of the student.
        """
        results = {"": self.student(params)}
        if self.setting.greedy:
            results["_greedy"] = self.student(params, greedy=True)
        if hint is not None:
            results["_with_skills"] = self.student(params, hint=hint)
        return {when + name: dataclasses.asdict(r) for name, r in results.items()}

    def teacher(
        self, student: Any, teacher: Any, when: str
    ) -> dict[str, dict[str, float]]:
        """The student without a skill and the teacher with one, on the teacher's panel.

        Each task's skill is written from one expert episode of it, or from the
        student's own single episode, shown once and discarded.

        Args:
          student, teacher: weights.
          when: 'before' or 'after', in the names of summary.json; '': as metrics.
        """
        expert = {
            seed: summarizer.render(imitate.expert_skill(self._teacher, seed))
            for seed in range(self.taught.size)
        }
        with self._open("teacher") as stage:
            plain, taught, own = self._taught(student, teacher, stage, expert)
            self._faults.update(stage.counts())
        if not when:
            return {"student": plain, "expert_skill": taught, "own_skill": own}
        suffix = "" if when == "before" else f"_{when}"
        return {
            f"student_on_teacher_panel{suffix}": plain,
            f"teacher_{when}": taught,
            f"teacher_{when}_own_skills": own,
        }

    def _taught(
        self, student: Any, teacher: Any, stage: Stage, expert: dict[int, str]
    ) -> tuple[dict[str, float], ...]:
        plain, episodes = self._play(student, stage, None)
        own = {
            t.task.seed: summarizer.render(summarizer.summarize(t, 0, "own"))
            for t in episodes
            if t.turns
        }
        taught, _ = self._play(teacher, stage, lambda task: expert[task.seed])
        self_taught, _ = self._play(teacher, stage, lambda task: own.get(task.seed))
        return plain.record(), taught.record(), self_taught.record()

    def _play(self, params: Any, stage: Stage, hint: Hint | None):
        episodes = rollout.collect(
            self.player,
            params,
            stage,
            np.arange(self.taught.size),
            self.keys("teacher"),
            self.setting.temperature,
            hint,
        )
        return evaluate.tally(episodes), episodes
