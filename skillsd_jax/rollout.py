"""Plays many episodes at once: environments on the host, the sampler on the device."""

import collections
import dataclasses
import functools
import time
from collections.abc import Callable, Iterator, Sequence

import jax
import numpy as np

from skillsd_jax import config as settings
from skillsd_jax import prompts, sharding, slots
from skillsd_jax.environments import base, pool
from skillsd_jax.environments.stage import Maker, Pending, Stage
from skillsd_jax.episode import Episode, begin
from skillsd_jax.models import automaton, qwen
from skillsd_jax.sampler import Decoding
from skillsd_jax.trajectory import Segment, Task, Trajectory

Hint = Callable[[Task], str | None]
Waits = slots.Heard | Pending

GLANCE_S = 2e-4  # between looks at what several cohorts wait for


@dataclasses.dataclass(frozen=True)
class Player:
    """How the model plays: static settings of every rollout.

    Args:
      model: shape of the network.
      encoder: text to ids and back.
      prompt: how an episode is shown; lengths are the shapes that get compiled.
      rows: episodes on the device at once; smaller batches use rows/2, rows/4, …
      cohorts: parts of the rows that take turns: while one is on the device, the
        environments of the others step.
      reuse: windowed prompts too keep what two turns share on the device.
      top_k, top_p: see sampler.Decoding; 0 and 1: every word may be drawn.
      gathered: on a mesh, weights that play are whole on every part of 'fsdp'.
    """

    model: qwen.ModelConfig
    encoder: prompts.Encoder
    prompt: settings.Prompt
    rows: int
    cohorts: int = 1
    reuse: bool = False
    top_k: int = 0
    top_p: float = 1.0
    gathered: bool = False

    @property
    def prompter(self) -> prompts.Prompter:
        return prompts.Prompter(self.encoder, self.prompt)

    @property
    def length(self) -> int:
        """Tokens of the longest context a plain view may have."""
        prompt = self.prompt
        if prompt.context == "whole":
            return prompt.max_length
        return prompt.max_prompt_length + prompt.max_response_length

    @property
    def skilled_length(self) -> int:
        """The same for the teacher's view, which has room for a skill."""
        return self.length + self.prompt.max_skill_length

    def scored(self, turns: int) -> int:
        """Scored tokens of a row, at most, in episodes of up to `turns` turns."""
        whole = self.prompt.context == "whole"
        return self.prompt.max_response_length * (turns if whole else 1)

    @property
    def cohort_rows(self) -> int:
        return -(-self.rows // self.cohorts)

    @property
    def keeps(self) -> bool:
        """Whether rows keep what they have read between turns."""
        return self.prompt.context == "whole" or self.reuse

    @property
    def stop_ids(self) -> tuple[int, ...]:
        """The token that ends a turn, and those of `prompt.stop_tokens`.

        Raises:
          ValueError: the tokenizer has no such token.
        """
        names = filter(None, self.prompt.stop_tokens.split(","))
        return (self.encoder.stop_id, *map(self.encoder.control_id, names))

    @property
    def stop_texts(self) -> tuple[str, ...]:
        return tuple(filter(None, self.prompt.stop_texts.split(",")))

    @property
    def guide(self) -> automaton.Automaton | None:
        """Ends a reply where it says one of `prompt.stop_texts`."""
        texts = self.stop_texts
        return _stopping(self.encoder, self.model.vocab, texts) if texts else None

    def apart(self, params: qwen.Params) -> qwen.Params:
        """The weights as this player reads them."""
        return apart(self.model, params, self.gathered)

    def voice(
        self, params: qwen.Params, key: jax.Array, temperature: float, hinted: bool
    ) -> slots.Slots | slots.Fresh:
        """What answers a cohort's turns."""
        ways = sharding.ways()
        room = slots.Room(
            self.cohort_rows,
            self.skilled_length,
            fine=jax.default_backend() == "cpu",
            still=ways > 1,
        )
        how = Decoding(
            max_new=self.prompt.max_response_length,
            stop_ids=self.stop_ids,
            top_k=self.top_k,
            top_p=self.top_p,
            shrink=room.shrink if self.keeps else (),
        )
        speaker = slots.Voice(self.model, params, how, key, temperature, self.guide)
        if self.keeps:
            return slots.Slots(speaker, room)
        parts = (self.cohort_rows // n // ways * ways for n in (1, 2, 4, 8))
        rows = sorted({max(ways, part) for part in parts})
        length = self.prompt.max_prompt_length + hinted * self.prompt.max_skill_length
        return slots.Fresh(speaker, rows, length)


@functools.lru_cache(maxsize=4)
def _stopping(encoder, vocab: int, texts: tuple[str, ...]) -> automaton.Automaton:
    return jax.device_put(automaton.stopping(encoder.pieces(vocab), texts))


def environment(config: settings.Environment, split: str) -> base.Environment:
    """One instance of the configured environment, in this process.

    Raises:
      ImportError: its engine is missing; names the pip extra.
    """
    return Maker.of(config, split)()


def open_stage(config: settings.Environment, split: str, count: int) -> Stage:
    """Places for `count` episodes of it at once, in workers if the config says so.

    Raises:
      ImportError: its engine is missing; names the pip extra.
    """
    return pool.open_stage(Maker.of(config, split), count, config)


def collect(
    player: Player,
    params: qwen.Params,
    places: Stage | Sequence[base.Environment],
    seeds: Sequence[int],
    key: jax.Array,
    temperature: float,
    hint: Hint | None = None,
) -> list[Trajectory]:
    """Plays one episode per seed and returns the trajectories in that order.

    A finished episode's place goes to the next seed of its cohort. What is played, and
    in which place, does not depend on how long anything takes.

    Args:
      player: static settings.
      params: weights of the acting policy.
      places: a stage with a place for each episode at once, or a list of environments
        in this process.
      seeds: indices into the environments' split; a group repeats its seed.
      key: source of all sampling. The random numbers of a reply depend on (key,
        episode, turn) alone, not on which other episodes share the batch.
      temperature: 0 is greedy.
      hint: skill text shown to the acting policy itself. None: plain prompts.
    """
    world = places if isinstance(places, Stage) else pool.stage_of(places)
    wanted = min(player.rows, len(seeds))
    if world.count < wanted:
        raise ValueError(
            f"{world.count} environments for {wanted} episodes at once; "
            f"make as many as player.rows={player.rows}"
        )
    params = player.apart(params)
    if hint is not None:
        hint = _that_fits(player, hint)
    waiting, finished = list(enumerate(map(int, seeds))), {}
    cohorts, parts = [], min(player.cohorts, wanted)
    for number in range(parts):
        owned = range(wanted)[_share(wanted, parts, number)]
        queue = waiting[_share(len(waiting), parts, number)]
        voice = player.voice(params, key, temperature, hint is not None)
        cohort = Cohort(player, voice, world, owned, queue, finished)
        cohorts.append(cohort.play(hint))
    _alternate(cohorts)
    return [finished[index] for index in range(len(seeds))]


def _share(count: int, parts: int, number: int) -> slice:
    """The part of `count` things that is as large as the others, or one smaller."""
    return slice(-(-count * number // parts), -(-count * (number + 1) // parts))


def _alternate(cohorts: Sequence[Iterator[Waits]]) -> None:
    """Goes on with a cohort as soon as what it waits for is there, until all end."""
    running = [(cohort, next(cohort, None)) for cohort in cohorts]
    while running := [pair for pair in running if pair[1] is not None]:
        ready = [i for i, (_, what) in enumerate(running) if what.ready()]
        if not ready and len(running) > 1:
            time.sleep(GLANCE_S)
            continue
        cohort, _ = running.pop(ready[0] if ready else 0)
        running.append((cohort, next(cohort, None)))


@functools.partial(jax.jit, static_argnums=(0, 2))
def apart(model: qwen.ModelConfig, params: qwen.Params, gathered: bool = False):
    """The weights as a decoder reads them; see Player.gathered."""
    params = qwen.unstack(model, params)
    return sharding.laid(params, whole="fsdp" if gathered else None)


def _that_fits(player: Player, hint: Hint) -> Hint:
    """The same hints, without those that cannot be shown whole."""

    def fitting(task: Task) -> str | None:
        text = hint(task)
        return text if text is not None and player.prompter.fits(text) else None

    return fitting


def warm_up(player: Player, params: qwen.Params, hinted: bool = False) -> None:
    """Compiles every shape that rollouts may use, so that none is met later.

    Args:
      player, params: who plays.
      hinted: prompts with a skill too.
    """
    params = player.apart(params)
    for shown in (False, True)[: 1 + (hinted and not player.keeps)]:
        player.voice(params, jax.random.key(0), 1.0, shown).warm_up()


class Cohort:
    """Episodes that take their turns together.

    Args:
      player: static settings.
      voice: speaks for them.
      stage: where their environments are.
      places: which of its places are theirs.
      queue: (episode, seed) of those that wait for a place.
      finished: gets what is over, by episode.
    """

    def __init__(
        self,
        player: Player,
        voice: slots.Slots | slots.Fresh,
        stage: Stage,
        places: Sequence[int],
        queue: Sequence[tuple[int, int]],
        finished: dict[int, Trajectory],
    ):
        self.player, self.voice, self.stage = player, voice, stage
        self.prompter, self.finished = player.prompter, finished
        self.queue, self.free = collections.deque(queue), list(places)
        self.first = min(places)
        self.live: dict[int, Episode] = {}

    def play(self, hint: Hint | None) -> Iterator[Waits]:
        """Plays until nothing waits; yields what the device or a world is at work on."""
        while self.live or self.queue:
            taken = self._free_places()
            if taken:
                places, _, seeds = zip(*taken)
                resetting = self.stage.reset(places, seeds)
                yield resetting
                for each, outcome in zip(taken, resetting.result()):
                    self._begin(*each, outcome, hint)
            asked = self._contexts()
            if not asked:
                continue
            heard = self.voice.ask([self._ask(*pair) for pair in asked])
            yield heard
            said = [
                self._record(*pair, *reply)
                for pair, reply in zip(asked, heard.result())
            ]
            live = [episode for episode, _ in asked]
            stepping = self.stage.step([e.slot for e in live], [t for t, _ in said])
            yield stepping
            for episode, (text, stopped), outcome in zip(live, said, stepping.result()):
                episode.take(text, outcome, stopped)
                self._over_if_ended(episode)

    def _free_places(self) -> list[tuple[int, int, int]]:
        """(place, episode, seed) of those whose turn it is to begin."""
        places = sorted(self.free)[: len(self.queue)]
        self.free = [place for place in self.free if place not in places]
        return [(place, *self.queue.popleft()) for place in places]

    def _begin(self, place: int, index: int, seed: int, outcome, hint) -> None:
        episode = begin(index, place, seed, outcome, self.stage.max_steps, hint)
        self.live[place] = episode
        self._over_if_ended(episode)

    def _over_if_ended(self, episode: Episode) -> None:
        if episode.ending:
            del self.live[episode.slot]
            self.free.append(episode.slot)
            self.finished[episode.index] = episode.finish()

    def _contexts(self) -> list[tuple[Episode, list[Segment]]]:
        """Who speaks next, and what each is to have read.

        An instruction that leaves no room is a fault of the environment.
        """
        asked = []
        for place in sorted(self.live):
            episode = self.live[place]
            try:
                asked.append((episode, self._context(episode)))
            except prompts.NoRoom as fault:
                episode.fail(str(fault))
                self._over_if_ended(episode)
        return asked

    def _context(self, episode: Episode) -> list[Segment]:
        if self.player.prompt.context == "whole" and episode.contexts:
            context = episode.contexts[-1]
            stopped = context[-1].tokens[-1] == self.player.encoder.stop_id
            segment = self.prompter.following(episode.step, stopped)
            total = len(_ids(context)) + len(segment.tokens)
            window = self.player.prompt.max_length
            if episode.hint is not None:
                window += self.player.prompt.max_skill_length
            if total + self.player.prompt.max_response_length <= window:
                return [*episode.contexts.pop(), segment]
            # A history that would outgrow the window is closed, a new one opened.
            episode.cut += 1
        history = () if self.player.prompt.context == "whole" else episode.turns
        segments, cut = self.prompter.opening(
            episode.task, episode.step, history, episode.hint
        )
        episode.cut += cut
        return list(segments)

    def _ask(self, episode: Episode, context: list[Segment]) -> slots.Ask:
        return slots.Ask(
            slot=episode.slot - self.first,
            context=_ids(context),
            episode=episode.index,
            turn=len(episode.turns),
            limit=self.player.prompt.max_response_length,
        )

    def _record(
        self, episode: Episode, context: list[Segment], ids, logprobs
    ) -> tuple[str, bool]:
        """Appends the reply to its context; returns it as text, and whether it ended."""
        player = self.player
        context.append(self.prompter.reply(ids, logprobs))
        episode.contexts.append(context)
        text = player.encoder.decode(ids[~np.isin(ids, player.stop_ids)].tolist())
        stopped = len(ids) < player.prompt.max_response_length
        stopped |= int(ids[-1]) in player.stop_ids
        return text, stopped or any(end in text for end in player.stop_texts)


def _ids(segments: Sequence[Segment]) -> np.ndarray:
    return np.concatenate([segment.tokens for segment in segments])
