"""tunix's sampler as a contender of benchmarks/rollout.py.

It runs in a virtual environment of its own, which needs nothing of this project:

  python -m venv tunix && tunix/bin/pip install google-tunix
"""

import json
from collections.abc import Sequence
from pathlib import Path

import jax.numpy as jnp
import numpy as np
from script import CHECKED_ROWS, CHECKED_TURNS, Script, spoken
from tunix.generate import sampler
from tunix.models.qwen3 import model, params

BUCKET = 64  # prompts are padded to multiples of it
NEVER = -1  # an id that is no token: its padding, and what would end a reply


class Tunix:
    """The whole history is read anew every turn: it takes prompts, not a cache.

    Rows have no limits of their own: all are drawn to the turn's longest, and cut here.
    """

    def __init__(self, folder: str, script: Script):
        fields = json.loads((Path(folder) / "config.json").read_text())
        config = model.ModelConfig(
            num_layers=fields["num_hidden_layers"],
            vocab_size=fields["vocab_size"],
            embed_dim=fields["hidden_size"],
            hidden_dim=fields["intermediate_size"],
            num_heads=fields["num_attention_heads"],
            head_dim=fields["head_dim"],
            num_kv_heads=fields["num_key_value_heads"],
            rope_theta=int(fields["rope_theta"]),
            norm_eps=fields["rms_norm_eps"],
            use_tied_embedding=True,
        )
        self.model = params.create_model_from_safe_tensors(
            folder, config, dtype=jnp.float32
        )
        size = _bucket(script.longest) + int(script.limits.max())
        cache = sampler.CacheConfig(
            cache_size=size,
            num_layers=config.num_layers,
            num_kv_heads=config.num_kv_heads,
            head_dim=config.head_dim,
        )
        self.sampler = sampler.Sampler(self.model, _Words(), cache)
        self.watched, self.logprobs = False, ()

    def ready(self, script: Script) -> None:
        """Plays it all: a turn's shapes are compiled as it is met."""
        for _ in spoken(script, self):
            pass

    def forget(self) -> None:
        """It keeps nothing."""

    def say(
        self, contexts: Sequence[np.ndarray], limits: np.ndarray, turn: int
    ) -> list[np.ndarray]:
        out = self.sampler(
            [" ".join(map(str, context)) for context in contexts],
            max_generation_steps=int(limits.max()),
            max_prompt_length=_bucket(max(map(len, contexts))),
            temperature=1.0,
            top_p=1.0,
            top_k=None,
            eos_tokens=[NEVER],
            seed=turn,
            return_logprobs=self.watched,
        )
        self.logprobs = out.logprobs
        return [
            np.asarray(ids[:n], np.int32) for ids, n in zip(out.tokens, limits.tolist())
        ]

    def difference(self, script: Script) -> float:
        """Of log-probs, to a forward pass over each row's own tokens alone."""
        self.watched, worst = True, 0.0
        for contexts, replies in spoken(script.cut(CHECKED_TURNS), self):
            for b in range(min(CHECKED_ROWS, len(contexts))):
                context, reply = contexts[b], replies[b]
                logits = self.forward(np.append(context, reply)[None])[0]
                logits = logits[len(context) - 1 : -1].astype(np.float64)
                total = np.log(np.exp(logits).sum(-1))
                expected = logits[np.arange(len(reply)), reply] - total
                apart = expected - np.asarray(self.logprobs[b])[: len(reply)]
                worst = max(worst, float(np.abs(apart).max()))
        return worst

    def forward(self, tokens: np.ndarray) -> np.ndarray:
        """Logits [B L V] of whole sequences [B L]."""
        rows, length = tokens.shape
        place = np.broadcast_to(np.arange(length), (rows, length))
        seen = np.broadcast_to(np.tri(length, dtype=bool), (rows, length, length))
        logits, _ = self.model(
            jnp.asarray(tokens), jnp.asarray(place), None, jnp.asarray(seen)
        )
        return np.asarray(logits)


class _Words:
    """A tokenizer of numbers between spaces: it only takes text."""

    def encode(self, text: str, **_) -> list[int]:
        return [int(word) for word in text.split()]

    def decode(self, ids: Sequence[int], **_) -> str:
        return ""

    def bos_id(self) -> int:
        return 0  # none is put in front

    def eos_id(self) -> int:
        return NEVER

    def pad_id(self) -> int:
        return NEVER


def _bucket(length: int) -> int:
    return -(-length // BUCKET) * BUCKET
