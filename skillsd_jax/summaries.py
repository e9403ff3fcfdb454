"""Finished episodes become skills: by whom, and in which iteration they enter the bank.

template   rules, in the iteration of the episode
policy     the student writes, in the iteration of the episode
endpoint   a server writes; a skill enters `endpoint.lag` iterations later, or with
           skills.asynchronous as soon as it is there
"""

import contextlib
import dataclasses
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Any

import jax

from skillsd_jax import author, experience, rollout
from skillsd_jax import config as settings
from skillsd_jax.skills import asking, endpoint, stock, summarizer, written
from skillsd_jax.skills import bank as skill_bank
from skillsd_jax.skills.skill import Skill
from skillsd_jax.validation import Refused

# A writer is asked for half a word per token of a skill, and for this many at least.
WORDS = 20
# What becomes of what is asked; figures of every iteration.
FIGURES = ("asked", *written.OUTCOMES, "late", "waiting")
LOCAL = "http://localhost"  # in the place of no url


@dataclasses.dataclass(frozen=True)
class Made:
    """Skills that enter the bank now, and counts by name of FIGURES."""

    skills: list[Skill]
    counts: dict[str, int]


@dataclasses.dataclass(frozen=True)
class _Pending:
    """A request under way, and the iteration in which its skill is to enter."""

    request: written.Request
    due: int
    handle: endpoint.Handle


class Summaries:
    """Writes the skills of a run.

    Args:
      config: the run's settings.
      player: whose network, tokenizer and prompting.
      keys: sampling key of an iteration.

    Raises:
      ValueError: the endpoint cannot be used.
    """

    def __init__(
        self,
        config: settings.Config,
        player: rollout.Player,
        keys: Callable[[int], jax.Array],
    ):
        self.config, self.keys = config.skills, keys
        self.writer: endpoint.Writer | None = None
        if self.config.maker == "endpoint":
            self.writer = endpoint.Writer(asked_of(self.config.endpoint, config.seed))
        room = written.Room(config.prompt.max_skill_length, player.prompter.size)
        self.writing = written.Writing(
            self.config.maker,
            room,
            written.Limits(words=max(WORDS, room.tokens // 2)),
            self.writer.endpoint.scrub if self.writer else str,
        )
        self.make = {
            "template": self._template,
            "policy": self._policy,
            "endpoint": self._endpoint,
        }[self.config.maker]
        self.author = author.Author.of(player, self.config.author)
        self._pending: list[_Pending] = []

    def open_bank(
        self, families: Collection[str], say: Callable[[str], None]
    ) -> skill_bank.Bank:
        """The bank to begin with, see stock.open_bank.

        Raises:
          Refused: a library cannot be used.
        """
        try:
            return stock.open_bank(self.config, self.writing.room, families, say)
        except ValueError as fault:
            raise Refused(str(fault)) from fault

    def take(
        self,
        played: experience.Experience,
        bank: skill_bank.Bank,
        params: Any,
    ) -> Made:
        """The skills that enter the bank in the iteration of `played`.

        Args:
          played: the iteration's episodes.
          bank: decides, by what it has, which of them are worth a skill.
          params: of the student, who may be the writer.
        """
        groups = experience.groups(played, bank, self.config)
        made, counts = self.make(groups, played.iteration, params)
        known = dict.fromkeys(FIGURES, 0) | {"asked": len(groups)}
        return Made(made, known | counts | {"waiting": len(self._pending)})

    def warm_up(self, params: Any) -> None:
        """Compiles what writing needs."""
        if self.config.maker == "policy":
            self.author.warm_up(params)

    def close(self) -> None:
        """Ends what is under way."""
        if self.writer is not None:
            self.writer.close()

    def state(self) -> list[dict]:
        """What is under way, as plain values that survive JSON."""
        return [
            {"due": each.due, "request": dataclasses.asdict(each.request)}
            for each in self._pending
        ]

    def restore(self, state: Sequence[dict]) -> None:
        """Asks again for what was under way; what a recording answers is not sent."""
        for each in state:
            self._ask(written.Request(**each["request"]), each["due"])

    def _template(self, groups: Sequence[summarizer.Group], iteration: int, params):
        made = [summarizer.compare(group, iteration) for group in groups]
        room = self.writing.room
        fits = [s for s in made if room.measure(summarizer.render(s)) <= room.tokens]
        return fits, {"made": len(fits), "too_long": len(made) - len(fits)}

    def _policy(self, groups: Sequence[summarizer.Group], iteration: int, params):
        requests = self._requests(groups)
        texts = [request.text for request in requests]
        answers = self.author.write(params, self.keys(iteration), texts)
        return written.read(requests, answers, self.writing, iteration)

    def _endpoint(self, groups: Sequence[summarizer.Group], iteration: int, params):
        for request in self._requests(groups):
            self._ask(request, iteration + self.config.endpoint.lag)
        come, waiting, late = [], [], 0
        for each in self._pending:
            due = each.due <= iteration
            patient = self.config.endpoint.late == "wait" or each.handle.ready()
            if self.config.asynchronous:
                (come if each.handle.ready() else waiting).append(each)
            elif not due:
                waiting.append(each)
            elif patient:
                come.append(each)
            else:
                late += 1
        self._pending = waiting
        answers = [each.handle.result()[0] for each in come]
        requests = [each.request for each in come]
        made, counts = written.read(requests, answers, self.writing, iteration)
        return made, {**counts, "late": late}

    def _requests(self, groups: Sequence[summarizer.Group]) -> list[written.Request]:
        return [written.Request.of(group, self.writing.limits) for group in groups]

    def _ask(self, request: written.Request, due: int) -> None:
        if self.writer is None:
            raise ValueError("only an endpoint can be asked ahead of time")
        handle = self.writer.submit([request.text])
        self._pending.append(_Pending(request, due, handle))


def check(config: settings.Config) -> None:
    """Whether the writer of skills could work; starts and leaves nothing.

    Raises:
      ValueError: with the setting that is wrong. Repeats no secret.
    """
    chosen, maker = config.skills.endpoint, config.skills.maker
    with _named():
        # Whoever writes: config.json has all settings.
        asking.check_public(chosen.url or LOCAL, chosen.key_variable)
    if maker == "endpoint":
        asked = asked_of(chosen, config.seed)
        with _named():
            endpoint.check(asked)
    elif config.skills.asynchronous:
        raise ValueError(
            f"skills.asynchronous is of skills.maker=endpoint alone; {maker} writes "
            "while the loop waits"
        )


def asked_of(config: settings.Endpoint, seed: int) -> asking.Endpoint:
    """The endpoint that is set; a replay needs no url.

    Raises:
      ValueError: it cannot be used; with the setting that is wrong.
    """
    if not (config.url or config.replay) or not config.model:
        raise ValueError(
            "skills.maker=endpoint needs a server; set skills.endpoint.url, such as "
            "http://localhost:8000/v1, and skills.endpoint.model as it calls it"
        )
    with _named():
        return asking.Endpoint(
            url=config.url or LOCAL,
            model=config.model,
            temperature=config.temperature,
            max_tokens=config.max_tokens,
            seed=seed,
            key_variable=config.key_variable,
            timeout_s=config.timeout_s,
            retries=config.retries,
            concurrency=config.concurrency,
            record=config.record,
            replay=config.replay,
        )


@contextlib.contextmanager
def _named() -> Iterator[None]:
    """Gives the settings that an endpoint's faults begin with their whole names."""
    try:
        yield
    except ValueError as fault:
        raise ValueError(f"skills.endpoint.{fault}") from None
