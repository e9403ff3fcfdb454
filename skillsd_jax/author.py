"""The student as a writer: requests in, answers out, in batches on the device."""

import dataclasses
from collections.abc import Sequence

import jax
import numpy as np

from skillsd_jax import config as settings
from skillsd_jax import prompts, rollout, sharding, slots
from skillsd_jax.models import qwen
from skillsd_jax.sampler import Decoding


@dataclasses.dataclass(frozen=True)
class Author:
    """Writes what it is asked for under a prompt of its own.

    Args:
      player: whose network and tokenizer.
      length: tokens of a request with its frame; what is longer loses its middle.
      limit: tokens of an answer, stop token included.
      rows: answers written at once.
      temperature: 0 is greedy.
    """

    player: rollout.Player
    length: int
    limit: int
    rows: int
    temperature: float

    @classmethod
    def of(cls, player: rollout.Player, config: settings.Author) -> "Author":
        return cls(
            player,
            config.max_request_length,
            config.max_answer_length,
            config.rows,
            config.temperature,
        )

    def write(
        self, params: qwen.Params, key: jax.Array, requests: Sequence[str]
    ) -> list[str]:
        """One answer per request, in order.

        The answer to a request depends on (key, its index) alone, up to rounding.

        Args:
          params: weights that write.
          key: of all sampling.
          requests: untrusted text.
        """
        voice = self._voice(self.player.apart(params), key)
        answers: list[str] = []
        for first in range(0, len(requests), self.rows):
            part = requests[first : first + self.rows]
            asks = [
                slots.Ask(i, self.prompt(text), first + i, 0, self.limit)
                for i, text in enumerate(part)
            ]
            heard = voice.ask(asks).result()
            answers += [self._text(ids) for ids, _ in heard]
        return answers

    def prompt(self, request: str) -> np.ndarray:
        """Ids [n] of a request as the user's turn, up to where the answer begins."""
        encoder = self.player.encoder
        opened = encoder.open_turn("user")
        closed = [*encoder.close_turn(), *encoder.open_turn("assistant")]
        if not self.player.prompt.thinking and encoder.no_thought:
            closed += encoder.encode(encoder.no_thought)
        room = self.length - len(opened) - len(closed)
        return np.array([*opened, *_shortened(encoder, request, room), *closed])

    def warm_up(self, params: qwen.Params) -> None:
        """Compiles every shape that `write` may use."""
        self._voice(self.player.apart(params), jax.random.key(0)).warm_up()

    def _voice(self, params: qwen.Params, key: jax.Array) -> slots.Fresh:
        how = Decoding(max_new=self.limit, stop_ids=self.player.stop_ids)
        speaker = slots.Voice(self.player.model, params, how, key, self.temperature)
        ways = sharding.ways()
        return slots.Fresh(speaker, [-(-self.rows // ways) * ways], self.length)

    def _text(self, ids: np.ndarray) -> str:
        spoken = ids[~np.isin(ids, self.player.stop_ids)]
        return self.player.encoder.decode(spoken.tolist())


def _shortened(encoder: prompts.Encoder, text: str, room: int) -> list[int]:
    """Ids of a text, without its middle where there are more than `room`.

    What is asked stands at a request's beginning and its end.
    """
    ids = list(encoder.encode(text))
    if len(ids) <= room:
        return ids
    head = room // 2
    return [*ids[:head], *ids[len(ids) - (room - head) :]]
