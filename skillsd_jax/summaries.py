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

from skillsd_jax import author, cluster, experience, rollout
from skillsd_jax import config as settings
from skillsd_jax.skills import asking, endpoint, stock, summarizer, written
from skillsd_jax.skills import bank as skill_bank
from skillsd_jax.skills.skill import Skill
from skillsd_jax.validation import Refused

# A writer is asked for half a word per token of a skill, a third per token of its
# answer, which holds JSON as well, and for this many at least.
WORDS = 20
# What becomes of what is asked; figures of every iteration.
FIGURES = ("asked", *written.OUTCOMES, "late", "waiting")
LOCAL = "http://localhost"  # in the place of no url


@dataclasses.dataclass(frozen=True)
class Made:
    """Skills that enter the bank now, and counts by name of FIGURES.

    An endpoint's have 'server' as well: further attempts, and requests that failed
    since the last iteration by why, see endpoint.Writer.counts.
    """

    skills: list[Skill]
    counts: dict[str, Any]


@dataclasses.dataclass(frozen=True)
class _Pending:
    """A request under way, and the iteration in which its skill is to enter."""

    request: written.Request
    due: int
    handle: endpoint.Handle


class Summaries:
    """Writes the skills of a run; in a job, the first process asks an endpoint.

    Args:
      config: the run's settings.
      player: whose network, tokenizer and prompting.
      keys: sampling key of an iteration.
      say: tells the user.

    Raises:
      ValueError: the endpoint cannot be used.
    """

    def __init__(
        self,
        config: settings.Config,
        player: rollout.Player,
        keys: Callable[[int], jax.Array],
        say: Callable[[str], None],
    ):
        self.config, self.keys, self.say = config.skills, keys, say
        self.iterations, self.backlog = config.iterations, backlog(config)
        self.writer: endpoint.Writer | None = None
        if self.config.maker == "endpoint" and cluster.first():
            self.writer = endpoint.Writer(asked_of(self.config.endpoint, config.seed))
        room = written.Room(config.prompt.max_skill_length, player.prompter.size)
        self.writing = written.Writing(
            self.config.maker,
            room,
            written.Limits(words=words(self.config, room.tokens)),
            self.writer.endpoint.scrub if self.writer else str,
        )
        self.make = {
            "template": self._template,
            "policy": self._policy,
            "endpoint": self._endpoint,
        }[self.config.maker]
        self.author = author.Author.of(player, self.config.author)
        self._pending: list[_Pending] = []
        self._counted: dict[str, int] = {}  # by the writer, up to the last iteration
        self._mute = False  # all that was due in the last iteration failed

    def open_bank(self, families: Collection[str]) -> skill_bank.Bank:
        """The bank to begin with, see stock.open_bank.

        Raises:
          Refused: a library cannot be used.
        """
        try:
            return stock.open_bank(self.config, self.writing.room, families, self.say)
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
        due = iteration + delay(self.config)
        # What could enter after the last iteration alone is not paid for.
        requests = self._requests(groups) if due < self.iterations else []
        for request in requests:
            self._ask(request, due)
        come, waiting, late = self._sorted(iteration)
        self._pending = waiting
        for each in late:
            each.handle.cancel()
        answers = [each.handle.result()[0] for each in come]
        texts = [each.request for each in come]
        made, counts = written.read(texts, answers, self.writing, iteration)
        known = {"asked": len(requests), **counts, "late": len(late)}
        if come or late:
            self._tell(known["late"] + counts.get("failed", 0), len(come) + len(late))
        return made, known | {"server": self._news()}

    def _sorted(
        self, iteration: int
    ) -> tuple[list[_Pending], list[_Pending], list[_Pending]]:
        """Of what is under way what is taken now, waited for, and dropped as late."""
        come, waiting, late = [], [], []
        for each in self._pending:
            if self.config.asynchronous:
                (come if each.handle.ready() else waiting).append(each)
            elif each.due > iteration:
                waiting.append(each)
            elif self.config.endpoint.late == "wait" or each.handle.ready():
                come.append(each)
            else:
                late.append(each)
        if self.config.asynchronous:
            over = max(0, len(waiting) - self.backlog)
            waiting, late = waiting[over:], waiting[:over]
        return come, waiting, late

    def _news(self) -> dict[str, int]:
        """What the writer has counted since the last call, if it went wrong."""
        before, self._counted = self._counted, self._failures()
        since = {n: count - before.get(n, 0) for n, count in self._counted.items()}
        return {name: count for name, count in since.items() if count}

    def _failures(self) -> dict[str, int]:
        """Further attempts so far, and requests that failed by why."""
        counts = self.writer.counts if self.writer else {}
        return {n: c for n, c in counts.items() if n not in ("asked", "answered")}

    def _tell(self, failed: int, due: int) -> None:
        """Says that a server gives nothing, when that begins."""
        mute, self._mute = self._mute, failed == due
        if self._mute and not mute:
            why = ", ".join(f"{n} {c}" for n, c in self._failures().items())
            self.say(
                f"no skills: of all {due} that were due none came from the endpoint "
                f"(so far: {why or 'no failures, it is slow'}); the run goes on without "
                "new ones; see skills.server in metrics.jsonl"
            )

    def _requests(self, groups: Sequence[summarizer.Group]) -> list[written.Request]:
        return [written.Request.of(group, self.writing.limits) for group in groups]

    def _ask(self, request: written.Request, due: int) -> None:
        if self.writer is None:
            raise ValueError("only an endpoint can be asked ahead of time")
        handle = self.writer.submit([request.text])
        self._pending.append(_Pending(request, due, handle))


def words(config: settings.Skills, tokens: int) -> int:
    """How many a writer is asked for.

    Args:
      config: who writes, and how long an answer may be.
      tokens: of a skill, at most.
    """
    answers = {
        "policy": config.author.max_answer_length,
        "endpoint": config.endpoint.max_tokens,
    }
    return max(WORDS, min(tokens // 2, answers.get(config.maker, 3 * tokens) // 3))


def delay(config: settings.Skills) -> int:
    """Iterations until an endpoint's skill enters; asynchronous: at the soonest."""
    return 1 if config.asynchronous else config.endpoint.lag


def backlog(config: settings.Config) -> int:
    """Requests that wait at most in asynchronous mode: always two iterations' worth."""
    iteration = config.rollout.prompts * config.skills.per_group
    return max(4 * config.skills.endpoint.concurrency, 2 * iteration)


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
        late = delay(config.skills)
        if 0 < config.iterations <= late:
            raise ValueError(
                f"iterations={config.iterations} are over before a skill of "
                f"skills.maker=endpoint enters; set --config.iterations={late + 1} or "
                "more, or --config.skills.endpoint.lag below it"
            )
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
