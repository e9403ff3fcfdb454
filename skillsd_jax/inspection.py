"""Both views of an episode, side by side: what the teacher reads, what is scored."""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from skillsd_jax import agent, checkpoint, experience, imitate, prompts, rollout, tokens
from skillsd_jax import config as settings
from skillsd_jax.models import qwen, scoring
from skillsd_jax.skills import bank as skill_bank
from skillsd_jax.skills.skill import Skill
from skillsd_jax.trajectory import Role, Segment, Trajectory

Skills = Sequence[Skill]


@dataclasses.dataclass(frozen=True)
class Student:
    """Who plays: static settings, weights, and the bank of its run."""

    player: rollout.Player
    params: qwen.Params
    bank: skill_bank.Bank
    iteration: int


@dataclasses.dataclass(frozen=True)
class Inspected:
    """An episode in both views.

    Args:
      trajectory: as it was played, under plain prompts.
      skills: what the teacher is shown.
      rows: one per context; `teacher` is None where nothing is shown.
      student, teacher: log-probs [rows R] of the scored tokens, nats, by the student's
        weights in either view; 0 beyond the row's tokens.
      cut: pieces of history that made room in the teacher's view.
      encoder: ids to text.
    """

    trajectory: Trajectory
    skills: Skills
    rows: Sequence[tokens.Row]
    student: np.ndarray
    teacher: np.ndarray
    cut: int
    encoder: prompts.Encoder


def restore(
    config: settings.Config,
    workdir: Path,
    step: int | None,
    say: Callable[[str], None],
) -> Student:
    """The student of a run after `step` iterations, the last saved if None.

    Raises:
      ValueError: there is no such checkpoint, or its parts are not there any more.
    """
    done, trained, host = checkpoint.read(workdir / "checkpoints", "params", step, say)
    words, model, params = agent.finished(config, trained, host["origin"], say)
    player = rollout.Player(model, words, config.prompt, rows=1)
    params = jax.tree.map(jax.numpy.asarray, params)
    return Student(player, params, skill_bank.Bank.from_state(host["bank"]), done)


def inspect(student: Student, config: settings.Config, seed: int) -> Inspected:
    """Plays one training task and shows the teacher a skill of the bank.

    Where the bank has none for it, the skill of an expert's episode of the task.

    Args:
      student: who plays.
      config: of its run.
      seed: index of the training task.
    """
    player = student.player
    key = jax.random.fold_in(jax.random.key(config.seed), student.iteration)
    with rollout.open_stage(config.environment, "train", 1) as stage:
        temperature = config.rollout.temperature
        episodes = rollout.collect(
            player, student.params, stage, [seed], key, temperature
        )
        turns = stage.max_steps
    played = experience.Experience(episodes, [0], student.iteration)
    expert = imitate.Expert(config.environment)
    rng = np.random.default_rng([config.seed, student.iteration])
    sources = experience.Sources(student.bank, config.skills, rng, expert.skill)
    skills = experience.SHOWN["skill"](played, sources)
    if not skills[0]:
        skills = experience.experts(played, sources)
    views = experience.views(played, skills, player.prompter, config.objective)
    scores = _scores(student, views.rows, player.scored(turns), temperature)
    return Inspected(
        episodes[0], views.shown[0], views.rows, *scores, views.cut, player.encoder
    )


def _scores(student: Student, rows, scored: int, temperature: float) -> tuple[Any, Any]:
    player = student.player
    sizes = player.length, player.skilled_length
    batch = tokens.pack(rows, max(1, len(rows)), *sizes, scored)
    score = jax.jit(functools.partial(scoring.score, player.model))
    found = [
        score(student.params, view, temperature, batch.mask).logprob
        for view in (batch.student, batch.teacher)
    ]
    return tuple(map(np.asarray, found))


def render(seen: Inspected) -> RenderableType:
    """The episode for a terminal; scored tokens stand in ⟦ ⟧, each by itself."""
    episode = seen.trajectory
    task = episode.task
    head = [
        f"task {task.key}, {task.family}: {task.instruction}",
        (
            f"{len(episode.turns)} turns, {episode.ending}; skills shown: "
            f"{len(seen.skills)}, pieces of history cut for them: {seen.cut}"
        ),
    ]
    parts: list[RenderableType] = [Text(_printable(line)) for line in head]
    for number, row in enumerate(seen.rows):
        parts += [_views(seen, number, row), _figures(seen, number, row)]
    return Group(*parts)


def _views(seen: Inspected, number: int, row: tokens.Row) -> Table:
    table = Table(
        title=f"context {number}: turns {', '.join(map(str, row.turns))}",
        show_lines=False,
        expand=True,
    )
    for name in ("student", "teacher"):
        table.add_column("by", no_wrap=True)
        table.add_column(name, ratio=1, overflow="fold")
    pairs = _aligned(row.student, row.teacher or ())
    for left, right in pairs:
        table.add_row(*_cells(left, seen.encoder), *_cells(right, seen.encoder))
    return table


def _aligned(student: Sequence[Segment], teacher: Sequence[Segment]):
    """Pairs of segments, None where a view lacks it: cut history is at the beginning."""
    pairs, left, right = [], list(student), list(teacher)
    while left or right:
        if left and right and left[-1].role == right[-1].role:
            pairs.append((left.pop(), right.pop()))
        elif right and (not left or right[-1].role == Role.SKILL):
            pairs.append((None, right.pop()))
        else:
            pairs.append((left.pop(), None))
    return pairs[::-1]


def _cells(segment: Segment | None, encoder: prompts.Encoder) -> tuple[Text, Text]:
    if segment is None:
        return Text(""), Text("")
    name = segment.role.name.lower()
    ids = [int(id) for id in segment.tokens]
    if not segment.scored:
        return Text(name), Text(_printable(encoder.decode(ids)))
    said = Text()
    for id in ids:
        said.append(f"⟦{_printable(encoder.decode([id]))}⟧", style="reverse")
    return Text(name), said


def _figures(seen: Inspected, number: int, row: tokens.Row) -> Table:
    """What either view makes of each scored token."""
    table = Table("turn", "token", "student", "teacher", "gap", box=None)
    replies = [segment for segment in row.student if segment.scored]
    place = 0
    for turn, reply in zip(row.turns, replies):
        for id in reply.tokens:
            student = float(seen.student[number, place])
            teacher = float(seen.teacher[number, place])
            figures = [f"{student:.3f}"]
            shown = row.teacher is not None
            figures += (
                [f"{teacher:.3f}", f"{teacher - student:+.3f}"] if shown else ["–", "–"]
            )
            word = Text(repr(_printable(seen.encoder.decode([int(id)]))))
            table.add_row(str(turn), word, *figures)
            place += 1
    return table


def _printable(text: str) -> str:
    """The text without what could steer a terminal."""
    return "".join(
        c if c.isprintable() or c == "\n" else "\N{REPLACEMENT CHARACTER}" for c in text
    )
