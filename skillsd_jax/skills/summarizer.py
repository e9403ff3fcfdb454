"""Skills from finished episodes, by template: no model writes them.

The three fields are few tokens in a fixed order, in the words that observations and
commands use, so that a very small network can look an answer up in one hop.
"""

import dataclasses
import re
from collections.abc import Callable, Sequence
from typing import NamedTuple

from skillsd_jax.skills.skill import Skill, skill_id
from skillsd_jax.trajectory import Trajectory, Turn

# Places named in mistake_analysis: every one costs the prompt two tokens.
MISTAKES = 2
# Commands that act on an object; looking around is never a needed step.
PUTTING = ("move", "put")
CARRYING = ("take", *PUTTING)
STATES = {"heat": "hot", "cool": "cold", "clean": "clean"}
HANDLING = (*CARRYING, *STATES, "use", "slice")


def summarize(trajectory: Trajectory, born: int, source: str) -> Skill:
    """The skill of one episode, solved or not.

    Args:
      trajectory: a finished episode of at least one turn.
      born: iteration.
      source: id of the episode.
    """
    task = trajectory.task
    workflow = WORKFLOWS.get(task.environment, _effective)(trajectory)
    outcome = "solved" if trajectory.success else "failed"
    success = f"{outcome} in {len(trajectory.turns)} steps"
    mistake = _mistake(trajectory, workflow)
    return Skill(
        id=skill_id(task.key, success, mistake, workflow),
        success_analysis=success,
        mistake_analysis=mistake,
        golden_workflow=workflow,
        task=task.key,
        family=task.family,
        source=source,
        born=born,
        reward=unit_reward(trajectory),
    )


@dataclasses.dataclass(frozen=True)
class Group:
    """Episodes of one task that one skill is to be written from.

    Args:
      trajectories: one, or several to compare.
      sources: their ids.
      policy: iterations that whoever played them had learned from.
    """

    trajectories: Sequence[Trajectory]
    sources: Sequence[str]
    policy: int = 0

    def __post_init__(self):
        tasks = {trajectory.task.key for trajectory in self.trajectories}
        if len(tasks) != 1 or len(self.sources) != len(self.trajectories):
            raise ValueError(
                f"{len(self.trajectories)} episodes of {len(tasks)} tasks with "
                f"{len(self.sources)} sources; give episodes of one task, a source each"
            )


def compare(group: Group, born: int) -> Skill:
    """The skill of the first episode; its mistakes are those of the first that failed.

    Args:
      group: best episode first.
      born: iteration in which the skill enters the bank.
    """
    best = group.trajectories[0]
    skill = summarize(best, born, "+".join(group.sources))
    failed = [t for t in group.trajectories[1:] if not t.success]
    mistake = skill.mistake_analysis
    if failed:
        mistake = _mistake(failed[0], skill.golden_workflow)
    return dataclasses.replace(
        skill,
        id=skill_id(skill.task, skill.success_analysis, mistake, skill.golden_workflow),
        mistake_analysis=mistake,
        policy=group.policy,
    )


def unit_reward(trajectory: Trajectory) -> float:
    """Reward in [0, 1] on one scale for all environments: 1 if solved."""
    if trajectory.success:
        return 1.0
    return min(max(float(trajectory.reward), 0.0), 1.0)


def select(trajectories: Sequence[Trajectory], per_group: int) -> list[int]:
    """Which episodes of a group are worth a skill, best first.

    Success comes first, then fewer turns, then reward, then the order given. An
    episode whose environment broke is no evidence and is left out.

    Returns:
      At most `per_group` indices.
    """
    sound = [
        i
        for i, trajectory in enumerate(trajectories)
        if trajectory.turns and trajectory.ending not in ("error", "timeout")
    ]

    def rank(i: int):
        trajectory = trajectories[i]
        return not trajectory.success, len(trajectory.turns), -trajectory.reward

    return sorted(sound, key=rank)[:per_group]


def render(*skills: Skill) -> str:
    """The text that a prompt shows."""
    return "\n".join(map(_block, skills))


def _block(skill: Skill) -> str:
    return (
        f"<skill>\nsuccess_analysis: {skill.success_analysis}"
        f"\nmistake_analysis: {skill.mistake_analysis}"
        f"\ngolden_workflow: {'; '.join(skill.golden_workflow) or 'none'}"
        "\n</skill>"
    )


def lexicon() -> list[str]:
    """Phrases of the template that the embedded tokenizer keeps whole.

    Fields begin with a space, as the environments' phrases do, and a separator takes
    the verb after it along: a whole errand is about 25 tokens.
    """
    verbs = ("go to", "open", *HANDLING)
    return [
        "<skill>\nsuccess_analysis: solved in",
        "<skill>\nsuccess_analysis: failed in",
        " steps",
        " steps\nmistake_analysis: none",
        " steps\nmistake_analysis: wasted",
        "\ngolden_workflow:",
        "\ngolden_workflow: go to",
        "\ngolden_workflow: none",
        "\n</skill>\n",
        *(f"; {verb}" for verb in verbs),
        *(";", ",", " from", " to", " with"),
        *(" up", " down", " left", " right"),
        *(f" {count}" for count in range(1, 16)),
    ]


class _Command(NamedTuple):
    verb: str
    thing: str
    place: str  # after from, to, with, in or on; "" if none


def _read(action: str) -> _Command:
    """Splits 'move apple 1 to shelf 2' into its parts."""
    if action.startswith("go to "):
        return _Command("go to", "", action.removeprefix("go to "))
    verb, _, rest = action.partition(" ")
    parts = re.split(r" (?:from|to|with|in/on|in|on) ", rest, maxsplit=1)
    return _Command(verb, parts[0], parts[1] if len(parts) > 1 else "")


def _errand(trajectory: Trajectory) -> tuple[str, ...]:
    """Fetching and carrying: what was done to the task's objects, and where.

    Keeps what worked and serves the instruction, the `go to` before it, and the `open`
    without which it would fail. A detour that put an object down and picked it up
    again is left out. Of a failed episode this still tells where the object was, if
    it was taken.
    """
    done = [turn for turn in trajectory.turns if turn.effective]
    commands = [_read(turn.action) for turn in done]
    instruction = trajectory.task.instruction.lower()
    needed: list[int] = []
    for i, command in enumerate(commands):
        if not _serves(command, instruction):
            continue
        carried = [
            j
            for j in needed
            if commands[j].thing == command.thing and commands[j].verb in CARRYING
        ]
        if command.verb == "take" and carried:
            if commands[carried[-1]].verb != "take":
                needed.remove(carried[-1])
        else:
            needed.append(i)
    return _steps(done, commands, needed)


def _serves(command: _Command, instruction: str) -> bool:
    """Whether the instruction speaks of the object, of its new place or state."""
    verb = command.verb
    if verb not in HANDLING or not _named(command.thing, instruction):
        return False
    if verb in PUTTING:
        return _named(command.place, instruction)
    return verb not in STATES or any(
        _named(w, instruction) for w in (verb, STATES[verb])
    )


def _steps(
    done: Sequence[Turn], commands: Sequence[_Command], needed: Sequence[int]
) -> tuple[str, ...]:
    """The needed commands with the `go to` and `open` that each one requires."""
    steps: list[str] = []
    here = ""
    for i in needed:
        gone = [c.place for c in commands[:i] if c.verb == "go to"]
        if gone and gone[-1] != here:
            here = gone[-1]
            steps.append(f"go to {here}")
        opening = f"open {commands[i].place}"
        opened = opening in (turn.action for turn in done[:i])
        if opened and commands[i].verb in CARRYING and opening not in steps:
            steps.append(opening)
        steps.append(done[i].action)
    return tuple(steps)


def _named(thing: str, instruction: str) -> bool:
    """Whether an instruction, if there is one, speaks of 'apple', given 'apple 1'."""
    kind = re.escape(re.sub(r" \d+$", "", thing))
    return not instruction or bool(re.search(rf"\b{kind}s?\b", instruction))


def _keyed_moves(trajectory: Trajectory) -> tuple[str, ...]:
    """Sokoban: one entry per state, such as 'r2c3 r3c3 down', loops removed.

    Keyed by the squares that the observation names, player first, since a small
    network can look a state up but cannot count steps. A failed episode is kept up to
    the last move that earned a reward.
    """
    turns = list(trajectory.turns)
    if not trajectory.success:
        while turns and turns[-1].reward <= 0:
            turns.pop()
    path: list[tuple[str, str]] = []
    for turn in turns:
        if not turn.effective:
            continue
        state = _squares(turn.observation)
        seen = [known for known, _ in path]
        if state and state in seen:
            del path[seen.index(state) :]
        path.append((state, turn.action))
    return tuple(f"{state} {action}".strip() for state, action in path)


def _squares(observation: str) -> str:
    """'r2c3 r3c3' of '… player r2c3 box r3c3 target r4c4'."""
    _, _, named = observation.rpartition("player ")
    return " ".join(re.findall(r"r\d+c\d+", named.partition("target")[0]))


def _effective(trajectory: Trajectory) -> tuple[str, ...]:
    return tuple(turn.action for turn in trajectory.turns if turn.effective)


WORKFLOWS: dict[str, Callable[[Trajectory], tuple[str, ...]]] = {
    "household": _errand,
    "alfworld": _errand,
    "sokoban": _keyed_moves,
}


def _mistake(trajectory: Trajectory, workflow: Sequence[str]) -> str:
    """The places that were visited for nothing, else how many steps were wasted."""
    visits = [
        turn.action.removeprefix("go to ")
        for turn in trajectory.turns
        if turn.effective
        and turn.action.startswith("go to ")
        and turn.action not in workflow
    ]
    places = list(dict.fromkeys(visits))[:MISTAKES]
    wasted = len(trajectory.turns) - len(workflow)
    if places:
        return "wasted " + ", ".join(places)
    return f"wasted {wasted} steps" if wasted > 0 else "none"
