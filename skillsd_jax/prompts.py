"""Chat rendering: an episode as the model is shown it, cut to length.

Text becomes tokens only through an `Encoder`, whose `encode` never yields a control
token: what an environment, a player or a skill says cannot open or close a turn.
"""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Protocol

import numpy as np
from jaxtyping import Int8

from skillsd_jax import config as settings
from skillsd_jax.trajectory import Role, Segment, Task, Turn

CONTEXTS = ("windowed", "whole")
SKILL_TURNS = ("task", "system")


class Encoder(Protocol):
    """What prompting needs of a tokenizer."""

    @property
    def stop_id(self) -> int:
        """The control token that ends a turn."""
        ...

    @property
    def default_system(self) -> str:
        """What a prompt says as system when prompt.system is not set; "": nothing."""
        ...

    @property
    def no_thought(self) -> str:
        """What comes before a reply where prompt.thinking is off; "": nothing."""
        ...

    def encode(self, text: str) -> Sequence[int]:
        """Ids of a text, whatever it says; never a control token."""
        ...

    def decode(self, ids: Sequence[int]) -> str: ...

    def open_turn(self, role: str) -> Sequence[int]:
        """Control tokens that open a turn of 'system', 'user' or 'assistant'."""
        ...

    def close_turn(self) -> Sequence[int]:
        """The stop token and a newline."""
        ...

    def control_id(self, token: str) -> int:
        """The id of a control token; ValueError if there is none of that name."""
        ...

    def pieces(self, count: int) -> Sequence[bytes]:
        """What each of the ids 0 … count − 1 adds to the text."""
        ...


class Observed(Protocol):
    """What a prompt shows of an environment's time step."""

    @property
    def observation(self) -> str: ...

    @property
    def admissible(self) -> Sequence[str]: ...


@dataclasses.dataclass(frozen=True)
class Style:
    """Wording of a prompt; each field is a `str.format` template."""

    task: str  # instruction
    entry: str  # observation, action: an earlier turn in a windowed prompt
    now: str  # observation
    admissible: str  # commands


STYLES = {
    "plain": Style(
        task="{instruction}\n",
        entry="{observation}\n{action}\n",
        now="{observation}",
        admissible="\ncommands: {commands}",
    ),
    "agent": Style(
        task=(
            "Your task: {instruction}\n"
            "Every turn, first reason about what to do next between <think> and "
            "</think>, then give exactly one command between <action> and </action>.\n"
        ),
        entry="Earlier you saw: {observation}\nYour command was: {action}\n",
        now="You now see: {observation}",
        admissible="\nCommands that would work now: {commands}",
    ),
}


class NoRoom(ValueError):
    """An instruction that leaves no room for an observation."""


class Prompter:
    """Turns an episode into segments and a plain context into the skilled one."""

    def __init__(self, encoder: Encoder, config: settings.Prompt):
        """Args:
          encoder: text to ids and back.
          config: wording, and lengths in tokens.

        Raises:
          ValueError: an unknown style, context or skill_turn.
        """
        _check_choice("style", config.style, STYLES)
        _check_choice("context", config.context, CONTEXTS)
        _check_choice("skill_turn", config.skill_turn, SKILL_TURNS)
        self.encoder = encoder
        self.config = config
        self.style = STYLES[config.style]
        # One text is measured and shown in context after context.
        self._shown = functools.lru_cache(1)(self._framed)

    def opening(
        self,
        task: Task,
        step: Observed,
        history: Sequence[Turn] = (),
        skill_text: str | None = None,
    ) -> tuple[tuple[Segment, ...], int]:
        """The prompt of one turn, or the first prompt of a whole history.

        Earlier turns are cut oldest first until the plain prompt fits
        `max_prompt_length`, then the observation from its front. The instruction is
        never cut. A skill comes on top and cuts nothing: the result equals `skilled`
        of the plain opening.

        Args:
          task: gives the instruction.
          step: what the agent reads now.
          history: all earlier turns; the last `config.history` are shown.
          skill_text: shown to the player itself; see `fits`.

        Returns:
          The segments up to the point where the reply begins, and how many pieces
          (earlier turns, the observation) were cut.

        Raises:
          NoRoom: the instruction leaves no room.
          ValueError: the skill does not fit.
        """
        plain, cut = self._plain(task, step, history)
        if skill_text is None:
            return plain, cut
        if not self.fits(skill_text):
            raise ValueError(
                f"a skill does not fit prompt.max_skill_length="
                f"{self.config.max_skill_length}; ask `fits` first, or raise it"
            )
        return self._with_skill(plain, skill_text), cut

    def following(self, step: Observed, stopped: bool = True) -> Segment:
        """What a whole history appends after a reply, up to where the next begins.

        Args:
          step: what the agent reads next.
          stopped: the reply ended with the stop token; if it ran out of room instead,
            its turn is closed here.
        """
        body = self._encode(self._observation(step))
        return self._between(body, stopped)

    def reply(
        self, tokens: Sequence[int] | np.ndarray, logprobs: Sequence[float] | np.ndarray
    ) -> Segment:
        """The sampled ids as they are, stop token included."""
        return Segment(
            Role.AGENT, np.array(tokens, np.int32), np.array(logprobs, np.float32)
        )

    def fits(self, skill_text: str) -> bool:
        """Whether the skill, whole, takes at most `max_skill_length` tokens."""
        return self.size(skill_text) <= self.config.max_skill_length

    def size(self, skill_text: str) -> int:
        """Tokens that a skill adds to a prompt."""
        return len(self._shown(skill_text))

    def skilled(
        self, context: Sequence[Segment], skill_text: str
    ) -> tuple[tuple[Segment, ...], int] | None:
        """The teacher's view: the same segments and a SKILL segment.

        That stands after the task, in its turn, or with prompt.skill_turn='system' at the
        end of the system turn, which is opened for it where there is none. The view may
        be longer than the plain view by `max_skill_length`. Over that, the environment's
        words are cut oldest first, never the agent's tokens, the task, the skill or the
        last observation.

        Args:
          context: a plain context, as the model saw it, replies included.
          skill_text: untrusted text.

        Returns:
          The segments and how many observations were cut. None where the skill is too
          long or does not fit even so: the caller counts the row as unskilled.
        """
        if not self.fits(skill_text):
            return None
        view = list(self._with_skill(context, skill_text))
        over = self._excess(view)
        cut = 0
        words = [i for i, s in enumerate(view) if s.role == Role.ENVIRONMENT]
        for i in words[:-1]:
            if over <= 0:
                break
            bare = self._without_words(view, i)
            saved = len(view[i].tokens) - len(bare.tokens)
            view[i] = bare
            over -= saved
            cut += saved > 0
        if over > 0:
            return None
        return tuple(segment for segment in view if len(segment.tokens)), cut

    def holds(self, context: Sequence[Segment]) -> bool:
        """Whether a whole history, replies included, is within its window."""
        hinted = any(segment.role == Role.SKILL for segment in context)
        room = self.config.max_length + hinted * self.config.max_skill_length
        return sum(len(segment.tokens) for segment in context) <= room

    def labels(self, tokens: Sequence[int] | np.ndarray) -> Int8[np.ndarray, " n"]:
        """Labels a reply's tokens: 1 from <think> to </think>, tags included, else 2.

        A token that holds part of a tag belongs to the tag. An unclosed <think> runs
        to the end.
        """
        ids = [int(token) for token in tokens]
        labels = np.full(len(ids), 2, np.int8)
        after = 0
        while "<think>" in self.encoder.decode(ids[after:]):
            start, opened = self._find(ids, "<think>", after)
            rest = self.encoder.decode(ids[opened:])
            after = len(ids)
            if "</think>" in rest:
                _, after = self._find(ids, "</think>", opened)
            labels[start:after] = 1
        return labels

    def _find(self, ids: list[int], tag: str, first: int) -> tuple[int, int]:
        """The range of tokens that spell the tag's first occurrence from `first` on.

        Bisection on decoded text: positions in text and tokens do not line up where a
        token holds part of a character.
        """
        low, high = first, len(ids)
        while low < high:
            middle = (low + high) // 2
            if tag in self.encoder.decode(ids[first:middle]):
                high = middle
            else:
                low = middle + 1
        end, low, high = high, first, high - 1
        while low < high:
            middle = (low + high + 1) // 2
            if tag in self.encoder.decode(ids[middle:end]):
                low = middle
            else:
                high = middle - 1
        return low, end

    def _plain(
        self, task: Task, step: Observed, history: Sequence[Turn]
    ) -> tuple[tuple[Segment, ...], int]:
        """The opening without a skill."""
        head = [*self._system(), self._task(task)]
        ending = self._ask()
        fixed = sum(len(segment.tokens) for segment in head) + len(ending)
        room = self.config.max_prompt_length - fixed
        if room < 1:
            raise NoRoom(
                f"the instruction of {task.key} and its frame take {fixed} tokens and "
                f"leave no room for an observation; raise prompt.max_prompt_length="
                f"{self.config.max_prompt_length}"
            )
        shown = history[max(0, len(history) - self.config.history) :]
        entries = [self._entry(turn) for turn in shown]
        body = self._encode(self._observation(step))
        kept, body, cut = _fit(entries, body, room)
        last = _segment(Role.ENVIRONMENT, [*body, *ending])
        return (*head, *kept, last), cut

    def _encode(self, text: str) -> Sequence[int]:
        return self.encoder.encode(text) if text else ()

    def _observation(self, step: Observed) -> str:
        text = self.style.now.format(observation=step.observation)
        if self.config.admissible and step.admissible:
            commands = "; ".join(step.admissible)
            text += self.style.admissible.format(commands=commands)
        return text

    def _system(self) -> list[Segment]:
        encoder = self.encoder
        text = self.config.system or encoder.default_system
        if not text:
            return []
        ids = [*encoder.open_turn("system"), *encoder.encode(text)]
        return [_segment(Role.SYSTEM, [*ids, *encoder.close_turn()])]

    def _task(self, task: Task) -> Segment:
        text = self.style.task.format(instruction=task.instruction)
        ids = [*self.encoder.open_turn("user"), *self.encoder.encode(text)]
        return _segment(Role.TASK, ids)

    def _entry(self, turn: Turn) -> Segment:
        text = self.style.entry.format(
            observation=turn.observation, action=turn.action or "(unreadable)"
        )
        return _segment(Role.ENVIRONMENT, self.encoder.encode(text))

    def _framed(self, skill_text: str) -> Sequence[int]:
        """What a skill adds to a prompt, the frame of a turn of its own included."""
        encoder = self.encoder
        if self.config.skill_turn == "task":
            return encoder.encode(skill_text + "\n")
        if self._system():
            return encoder.encode("\n" + skill_text)
        ids = self._encode(skill_text)
        return [*encoder.open_turn("system"), *ids, *encoder.close_turn()]

    def _with_skill(
        self, context: Sequence[Segment], skill_text: str
    ) -> tuple[Segment, ...]:
        skill = _segment(Role.SKILL, self._shown(skill_text))
        roles = [segment.role for segment in context]
        if self.config.skill_turn == "task":
            after = 1 + roles.index(Role.TASK)
            return (*context[:after], skill, *context[after:])
        if Role.SYSTEM not in roles:
            return (skill, *context)
        system, *rest = context
        end = len(system.tokens) - len(self.encoder.close_turn())
        said, closing = system.tokens[:end], system.tokens[end:]
        return (Segment(Role.SYSTEM, said), skill, Segment(Role.SYSTEM, closing), *rest)

    def _excess(self, view: Sequence[Segment]) -> int:
        """Tokens over the limit; a windowed limit does not count the reply."""
        whole = self.config.context == "whole"
        plain = self.config.max_length if whole else self.config.max_prompt_length
        taken = sum(len(s.tokens) for s in view if whole or s.role != Role.AGENT)
        return taken - plain - self.config.max_skill_length

    def _without_words(self, view: Sequence[Segment], i: int) -> Segment:
        """An ENVIRONMENT segment with only the tokens that open and close turns."""
        if view[i + 1].role != Role.AGENT:
            return _segment(Role.ENVIRONMENT, ())
        if view[i - 1].role != Role.AGENT:
            return _segment(Role.ENVIRONMENT, self._ask())
        return self._between((), view[i - 1].tokens[-1] == self.encoder.stop_id)

    def _ask(self) -> list[int]:
        """Ends the user's turn and begins the reply."""
        begun = [*self.encoder.close_turn(), *self.encoder.open_turn("assistant")]
        if self.config.thinking:
            return begun
        return [*begun, *self._encode(self.encoder.no_thought)]

    def _between(self, body: Sequence[int], stopped: bool) -> Segment:
        encoder = self.encoder
        ended = encoder.encode("\n") if stopped else encoder.close_turn()
        ids = [*ended, *encoder.open_turn("user"), *body, *self._ask()]
        return _segment(Role.ENVIRONMENT, ids)


def _segment(role: Role, ids: Sequence[int]) -> Segment:
    return Segment(role, np.array(ids, np.int32))


def _fit(
    entries: Sequence[Segment], body: Sequence[int], room: int
) -> tuple[Sequence[Segment], Sequence[int], int]:
    """Cuts entries oldest first, then the body's front; returns how many pieces."""
    first, taken = 0, len(body) + sum(len(entry.tokens) for entry in entries)
    while first < len(entries) and taken > room:
        taken -= len(entries[first].tokens)
        first += 1
    if len(body) > room:
        return entries[first:], body[len(body) - room :], first + 1
    return entries[first:], body, first


def _check_choice(name: str, value: str, known) -> None:
    if value not in known:
        raise ValueError(f"prompt.{name}={value!r}; set one of {', '.join(known)}")
