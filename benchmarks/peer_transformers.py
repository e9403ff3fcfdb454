"""Hugging Face transformers as a contender of benchmarks/rollout.py."""

import os
from collections.abc import Sequence

import numpy as np
import torch
import transformers
from script import CHECKED_ROWS, CHECKED_TURNS, Script, spoken


class Transformers:
    """`generate` over a batch padded on the left, with sdpa attention in float32.

    Args:
      folder: of Hugging Face.
      keep: past_key_values are kept between turns. The cache then has a column for
        every token that any row was given; in rows that were given none there, or that
        had reached their limit, the attention mask hides it. False: every turn reads
        the whole history anew.
    """

    def __init__(self, folder: str, keep: bool):
        torch.set_num_threads(len(os.sched_getaffinity(0)))
        torch.manual_seed(0)
        self.model = transformers.Qwen3ForCausalLM.from_pretrained(
            folder, dtype=torch.float32, attn_implementation="sdpa"
        ).eval()
        self.keep, self.watched, self.logits = keep, False, ()

    def ready(self, script: Script) -> None:
        """Nothing is compiled."""
        self.forget()

    def forget(self) -> None:
        self.cache, self.known = None, None

    @torch.inference_mode()
    def say(
        self, contexts: Sequence[np.ndarray], limits: np.ndarray, turn: int
    ) -> list[np.ndarray]:
        if self.known is None or not self.keep:
            rows = len(contexts)
            self.known = [0] * rows
            self.ids = torch.zeros((rows, 0), dtype=torch.long)
            self.mask = torch.zeros((rows, 0), dtype=torch.long)
            self.cache = transformers.DynamicCache(config=self.model.config)
        new, mask = _padded([c[at:] for c, at in zip(contexts, self.known)])
        ids, mask = torch.cat([self.ids, new], 1), torch.cat([self.mask, mask], 1)
        limit = torch.from_numpy(limits)
        out = self.model.generate(
            input_ids=ids,
            attention_mask=mask,
            past_key_values=self.cache,
            generation_config=self._generation(int(limits.max())),
            stopping_criteria=[_Limit(ids.shape[1], limit)],
        )
        self.logits = out.logits
        drawn = out.sequences[:, ids.shape[1] :]
        within = torch.arange(drawn.shape[1]) < limit[:, None]
        # What rows went on to draw past their limits stays in the cache, unseen. The
        # positions of all that follows are counted along the mask.
        self.ids, self.mask = out.sequences, torch.cat([mask, within.long()], 1)
        self.known = [len(c) + int(n) for c, n in zip(contexts, limits)]
        return [row[:n].numpy().astype(np.int32) for row, n in zip(drawn, limits)]

    def _generation(self, max_new: int) -> transformers.GenerationConfig:
        return transformers.GenerationConfig(
            do_sample=True,
            temperature=1.0,
            top_k=0,
            top_p=1.0,
            max_new_tokens=max_new,
            pad_token_id=0,
            return_dict_in_generate=True,
            output_logits=self.watched,
        )

    @torch.inference_mode()
    def difference(self, script: Script) -> float:
        """Of logits, to a forward pass over each row's own tokens alone."""
        self.forget()
        self.watched, worst = True, 0.0
        for contexts, replies in spoken(script.cut(CHECKED_TURNS), self):
            logits = torch.stack(self.logits, 1)
            for b, (context, reply) in enumerate(zip(contexts, replies)):
                if b < CHECKED_ROWS:
                    expected = self._alone(np.append(context, reply))
                    apart = expected[len(context) - 1 : -1] - logits[b, : len(reply)]
                    worst = max(worst, apart.abs().max().item())
        return worst

    def _alone(self, ids: np.ndarray) -> torch.Tensor:
        ids = torch.from_numpy(ids.astype(np.int64))[None]
        return self.model(input_ids=ids, use_cache=False).logits[0]

    @torch.inference_mode()
    def forward(self, tokens: np.ndarray) -> np.ndarray:
        """Logits [B L V] of whole sequences [B L]."""
        return self.model(input_ids=torch.from_numpy(tokens).long()).logits.numpy()


class _Limit(transformers.StoppingCriteria):
    """Ends each row at a length of its own."""

    def __init__(self, prompt: int, limit: torch.Tensor):
        self.prompt, self.limit = prompt, limit

    def __call__(self, input_ids, scores, **_):
        return input_ids.shape[1] - self.prompt >= self.limit


def _padded(rows: Sequence[np.ndarray]) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids and mask, both [rows, longest], the padding on the left."""
    longest = max(map(len, rows))
    ids, mask = np.zeros((2, len(rows), longest), np.int64)
    for b, row in enumerate(rows):
        ids[b, longest - len(row) :], mask[b, longest - len(row) :] = row, 1
    return torch.from_numpy(ids), torch.from_numpy(mask)
