"""From trajectories to learning rows: skills are made, chosen and shown to a teacher."""

import collections
import dataclasses
import json
import zlib
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np

from skillsd_jax import config as settings
from skillsd_jax import prompts, showing
from skillsd_jax.skills import bank as skill_bank
from skillsd_jax.skills import retrieval, summarizer
from skillsd_jax.skills.skill import Skill
from skillsd_jax.tokens import Row
from skillsd_jax.trajectory import Role, Segment, Trajectory

FAULTS = ("error", "timeout")  # endings that say nothing about the agent


@dataclasses.dataclass(frozen=True)
class Experience:
    """The episodes of one iteration.

    Args:
      trajectories: in order.
      groups: index of each episode's task within the iteration.
      iteration: when they were played.
    """

    trajectories: Sequence[Trajectory]
    groups: Sequence[int]
    iteration: int

    def source(self, index: int) -> str:
        """Names an episode for the provenance of its skills."""
        return f"{self.iteration}/{index}"

    @property
    def usable(self) -> list[int]:
        """Episodes that did not end in a fault of the environment."""
        return [i for i, t in enumerate(self.trajectories) if t.ending not in FAULTS]


def groups(
    experience: Experience, bank: skill_bank.Bank, config: settings.Skills
) -> list[summarizer.Group]:
    """The episodes that skills are to be written from, one skill each.

    The best of each task's episodes. A failed one is summarised only while its task has
    no solved one: a recipe that did not work is shown to a teacher for want of a better
    one. With `config.comparative` a task's solved and failed episodes go together where
    it has both.
    """
    members = collections.defaultdict(list)
    for index in experience.usable:
        members[experience.groups[index]].append(index)
    found = []
    for indices in members.values():
        episodes = [experience.trajectories[i] for i in indices]
        ranked = [indices[j] for j in summarizer.select(episodes, len(indices))]
        solved = [i for i in ranked if experience.trajectories[i].success]
        failed = [i for i in ranked if not experience.trajectories[i].success]
        if config.comparative and solved and failed:
            some = config.per_group
            found.append([*solved[:some], *failed[:some]])
            continue
        task = experience.trajectories[indices[0]].task
        known = any(skill.reward == 1 for skill in bank.for_task(task.key))
        best = ranked[: config.per_group]
        found += [[i] for i in best if i in solved or not (solved or known)]
    return [
        summarizer.Group(
            [experience.trajectories[i] for i in indices],
            [experience.source(i) for i in indices],
            experience.iteration,
        )
        for indices in found
    ]


@dataclasses.dataclass(frozen=True)
class Sources:
    """Where the teacher's skills may come from.

    Args:
      bank: skills of finished episodes.
      config: how they are retrieved.
      rng: of every random choice.
      expert: training task → skill of an expert's episode, None if it has none.
    """

    bank: skill_bank.Bank
    config: settings.Skills
    rng: np.random.Generator
    expert: Callable[[int], Skill | None]


# What each episode's teacher is to be shown, first things first; () is nothing.
Shown = list[tuple[Skill, ...]]


def retrieve(
    experience: Experience,
    bank: skill_bank.Bank,
    config: settings.Skills,
    rng: np.random.Generator,
) -> Shown:
    """Skills of the bank for each episode's teacher."""
    return [
        retrieval.retrieve(bank, t.task, experience.source(i), rng, config)
        for i, t in enumerate(experience.trajectories)
    ]


def siblings(experience: Experience, sources: Sources) -> Shown:
    """The skill of a solved episode of the same group, never of the row's own."""
    solved = collections.defaultdict(list)
    for i in experience.usable:
        if experience.trajectories[i].success:
            solved[experience.groups[i]].append(i)
    shown: Shown = []
    for i, group in enumerate(experience.groups):
        others = [j for j in solved[group] if j != i]
        if not others:
            shown.append(())
            continue
        chosen = others[int(sources.rng.integers(len(others)))]
        sibling = experience.trajectories[chosen]
        name = experience.source(chosen)
        shown.append((summarizer.summarize(sibling, experience.iteration, name),))
    return shown


def experts(experience: Experience, sources: Sources) -> Shown:
    """The skill of an expert's episode of the task, for ever the same."""
    shown: Shown = [()] * len(experience.trajectories)
    for i in experience.usable:
        skill = sources.expert(experience.trajectories[i].task.seed)
        shown[i] = () if skill is None else (skill,)
    return shown


def nothing(experience: Experience, sources: Sources) -> Shown:
    """No skill."""
    return [()] * len(experience.trajectories)


# What `Recipe.shown` names.
SHOWN = {
    "skill": lambda played, s: retrieve(played, s.bank, s.config, s.rng),
    "sibling": siblings,
    "expert": experts,
    "rescued": nothing,
    "plain": nothing,
    "": nothing,
}


def unseen(played: Experience, hints: Sequence[showing.Hint]) -> dict[str, int]:
    """Rows whose player was to see skills: shown fewer than were found; none found."""
    rows = [(len(played.trajectories[i].contexts), hints[i]) for i in played.usable]
    fewer = [n for n, hint in rows if hint.found and len(hint.skills) < hint.found]
    return {
        "hints_dropped": sum(fewer),
        "hints_missing": sum(n for n, hint in rows if hint.found == 0),
    }


@dataclasses.dataclass(frozen=True)
class Views:
    """Rows of an iteration and what it took to show the skills.

    Args:
      rows: one per context.
      shown: the skills each episode's teacher really saw.
      cut: history entries cut from teacher views.
      dropped: rows whose teacher was shown fewer skills than were chosen for it, for
        want of room.
    """

    rows: list[Row]
    shown: Shown
    cut: int
    dropped: int


def views(
    experience: Experience,
    skills: Sequence[Sequence[Skill]],
    prompter: prompts.Prompter,
    objective: settings.Objective,
    teacher_reads: str = "skill",
) -> Views:
    """One row per context, with the skilled view where a skill is shown.

    Args:
      experience: the episodes.
      skills: what to show for each episode, as much of it as there is room for. One
        that was played with a skill has no other view.
      prompter: writes the skill into the task turn.
      objective: invalid_action_penalty is taken from the reward per invalid turn: of
        the episode, or with statistics='row' of the row itself, as released.
      teacher_reads: 'skill': the context with the skill given. 'plain': the
        student's own view, it is another model. 'played': the context as it was
        played, where that has a skill; the student's view is then without.
    """
    rows, shown, cut, dropped = [], [()] * len(skills), 0, 0
    fitting = showing.Fitting(prompter)
    for index in experience.usable:
        contexts = experience.trajectories[index].contexts
        skilled: Sequence[Sequence[Segment] | None] = [None] * len(contexts)
        if teacher_reads == "plain":
            skilled = contexts
        if teacher_reads == "played":
            bare = [_without_skill(context) for context in contexts]
            pairs = zip(contexts, bare)
            skilled = [full if len(full) > len(b) else None for full, b in pairs]
            contexts = bare
        found = () if hinted(experience.trajectories[index]) else skills[index]
        whole = fitting(found)
        if (text := showing.text_of(whole)) is not None:
            made = [prompter.skilled(context, text) for context in contexts]
            if all(made):
                shown[index], skilled = whole, [view for view, _ in made]
                cut += sum(cuts for _, cuts in made)
        dropped += len(contexts) * (len(shown[index]) < len(found))
        both = list(zip(contexts, skilled))
        rows += _rows(experience, index, both, prompter, objective)
    return Views(rows, shown, cut, dropped)


def hinted(trajectory: Trajectory) -> bool:
    """Whether it was played with a skill in the prompt."""
    return any(s.role == Role.SKILL for c in trajectory.contexts for s in c)


def _without_skill(context: Sequence[Segment]) -> Sequence[Segment]:
    return [segment for segment in context if segment.role != Role.SKILL]


def _rows(
    experience: Experience,
    index: int,
    both: Sequence[tuple[Sequence[Segment], Sequence[Segment] | None]],
    prompter: prompts.Prompter,
    objective: settings.Objective,
) -> list[Row]:
    trajectory = experience.trajectories[index]
    invalid = np.array([not turn.valid for turn in trajectory.turns])
    by_row = objective.statistics == "row"
    anchors = [zlib.crc32(t.observation.encode()) >> 1 for t in trajectory.turns]
    rewards = [turn.reward for turn in trajectory.turns]
    returns = discounted(rewards, objective.discount)
    rows, turn = [], 0
    for context, view in both:
        replies = [segment for segment in context if segment.scored]
        turns = range(turn, turn + len(replies))
        turn += len(replies)
        wrong = invalid[turns.start : turns.stop] if by_row else invalid
        row = Row(
            student=context,
            teacher=view,
            turns=turns,
            labels=[prompter.labels(reply.tokens) for reply in replies],
            anchors=[anchors[t] for t in turns],
            returns=[returns[t] for t in turns],
            reward=trajectory.reward
            - objective.invalid_action_penalty * float(wrong.sum()),
            group=experience.groups[index],
            trajectory=index,
            success=trajectory.success,
        )
        rows.append(row)
    return rows


def discounted(rewards: Sequence[float], discount: float) -> list[float]:
    """G_t = r_t + γ G_{t+1}: the return from each turn on."""
    returns, ahead = [], 0.0
    for reward in reversed(rewards):
        ahead = reward + discount * ahead
        returns.append(ahead)
    return returns[::-1]


def figures(trajectories: Sequence[Trajectory]) -> dict[str, Any]:
    """What an iteration's episodes came to, as plain numbers.

    Episodes that ended in a fault are counted under `endings` and nowhere else. Where
    only some were played with a skill in the prompt, `success` is that of the others.
    """
    usable = [t for t in trajectories if t.ending not in FAULTS]
    turns = [turn for t in usable for turn in t.turns]
    plain = [t.success for t in usable if not hinted(t)]
    helped = [t.success for t in usable if hinted(t)]
    endings = collections.Counter(t.ending for t in trajectories)
    return {
        "success": mean(plain or helped),
        **({"success_hinted": mean(helped)} if plain and helped else {}),
        "return": mean([t.reward for t in usable]),
        "steps": mean([len(t.turns) for t in usable]),
        "invalid_rate": mean([not turn.valid for turn in turns]),
        "endings": dict(sorted(endings.items())),
        "tokens": sum(_scored(t) for t in trajectories),
        "prompts_cut": sum(t.cut for t in trajectories),
        "replies_cut": mean([not turn.stopped for turn in turns]),
    }


def rewards(
    shown: Iterable[tuple[Trajectory, Sequence[Skill]]],
) -> list[tuple[str, float]]:
    """(skill id, reward of its episode in [0, 1]) of each that was shown."""
    return [
        (skill.id, summarizer.unit_reward(episode))
        for episode, skills in shown
        if episode.ending not in FAULTS
        for skill in skills
    ]


def reuse(shown: Shown, bank: skill_bank.Bank, iteration: int) -> dict[str, float]:
    """Of the skills shown: iterations since they entered the bank, earlier shows.

    Ask before this iteration's are credited. Skills that no bank holds are left out.
    """
    held = [skill for skills in shown for skill in skills if skill.id in bank]
    return {
        "age": mean([iteration - skill.born for skill in held]),
        "uses": mean([bank.stats(skill.id).uses for skill in held]),
    }


def _scored(trajectory: Trajectory) -> int:
    segments = [segment for context in trajectory.contexts for segment in context]
    return sum(len(segment.tokens) for segment in segments if segment.scored)


def mean(values: Sequence[float]) -> float:
    """0 where there is nothing."""
    return float(np.mean(values)) if len(values) else 0.0


def line(trajectory: Trajectory, skills: Sequence[Skill]) -> str:
    """An episode as one line of JSON: what was seen, said and done."""
    record = {
        "task": dataclasses.asdict(trajectory.task),
        "success": trajectory.success,
        "reward": trajectory.reward,
        "ending": trajectory.ending,
        "skill": showing.text_of(skills),
        "turns": [dataclasses.asdict(turn) for turn in trajectory.turns],
    }
    return json.dumps(record, ensure_ascii=False) + "\n"
