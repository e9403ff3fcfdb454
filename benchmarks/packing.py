"""What share of the tokens of an update is padding, on real episodes; nothing learns.

  python benchmarks/packing.py
  python benchmarks/packing.py --environment=household --episodes=100

Scripted experts with some noise play a few episodes of each of many tasks. Their
contexts in both views, the teacher's with a skill of an expert's episode, are packed,
dealt to minibatches and cut into micro-batches as in a run; a token counts where a
micro-batch has room for it. Buckets are fitted to the first half of the episodes, and
the other half is counted, of other tasks. Baselines pad rows to the longest allowed,
and to the longest of the batch, eight at a time; ours takes as many tokens at a time as two
of the longest rows have, of whole histories one. Rows that are padding, at the end of a
minibatch, count everywhere.

Cases: the embedded prompts, the published ones, and the latter as whole histories. The
tokenizer is trained on these very episodes, as the embedded one; Qwen's makes more
tokens of a word. The scripted replies hold a command and no thought: those of a
pretrained model are longer, and of more different lengths. JSON lines {"benchmark",
"case", "metric", "ours", "baseline", "baseline_name", "ratio"}; ratio = baseline / ours.
"""

import argparse
import dataclasses
import json
from collections.abc import Iterator

import numpy as np

from skillsd_jax import (
    config,
    experience,
    imitate,
    packing,
    presets,
    prompts,
    rollout,
    tokens,
)
from skillsd_jax.environments import ENVIRONMENTS
from skillsd_jax.models import tokenizer
from skillsd_jax.skills import summarizer
from skillsd_jax.trajectory import Trajectory

GROUP = 4  # episodes of a task
WINDOW = 16_384  # tokens of a whole history under the published prompts
BUCKETS, WHOLE_BUCKETS = 8, 12  # histories have many lengths, and are few


@dataclasses.dataclass(frozen=True)
class Played:
    """Args:
    episodes: GROUP of each task.
    skills: of an expert's episode, by task.
    words: tokenizer of what they say.
    turns: of an episode, at most.
    """

    episodes: list[Trajectory]
    skills: list
    words: tokenizer.Tokenizer
    turns: int


def play(setting: config.Environment, episodes: int, noise: float) -> Played:
    environment = rollout.environment(setting, "train")
    rng, tasks = np.random.default_rng(0), -(-episodes // GROUP)
    played = [
        imitate.play(environment, i // GROUP, rng, noise=noise) for i in range(episodes)
    ]
    skills = [imitate.expert_skill(environment, task) for task in range(tasks)]
    corpus = imitate.texts([(episode, "", episode) for episode in played])
    corpus += [summarizer.render(skill) for skill in skills]
    options = dataclasses.asdict(getattr(setting, setting.name))
    phrases = ENVIRONMENTS[setting.name].lexicon(**options) + summarizer.lexicon()
    words = tokenizer.train(corpus, list(dict.fromkeys(phrases)))
    environment.close()
    return Played(played, skills, words, environment.max_steps)


def halves(played: Played, settings: config.Config) -> Iterator[list[tokens.Row]]:
    """Rows of the first tasks and of the others."""
    prompter = prompts.Prompter(played.words, settings.prompt)
    groups = [i // GROUP for i in range(len(played.episodes))]
    middle = len(played.skills) // 2 * GROUP
    for part in (slice(None, middle), slice(middle, None)):
        seen = [imitate.recorded(prompter, e) for e in played.episodes[part]]
        episodes = experience.Experience(seen, groups[part], 0)
        shown = [(played.skills[group],) for group in groups[part]]
        found = experience.views(episodes, shown, prompter, settings.objective)
        yield found.rows


def measure(case: str, played: Played, settings: config.Config) -> None:
    player = rollout.Player(None, played.words, settings.prompt, rows=1)
    longest = player.length, player.skilled_length
    scored = player.scored(played.turns)
    first, rows = halves(played, settings)
    size = max(len(first), len(rows)) + 1
    order = np.random.default_rng(1).permutation(len(rows))
    rng, optimizer = np.random.default_rng(0), settings.optimizer
    whole = settings.prompt.context == "whole"
    buckets = WHOLE_BUCKETS if whole else BUCKETS
    micro_tokens = sum(longest) if whole else 2 * sum(longest)

    def share(longest, **changes) -> float:
        chosen = dataclasses.replace(optimizer, **changes)
        packer = packing.Packer(chosen, size, longest, scored)
        packer.arranged(first, rng.permutation(len(first)))
        return packing.padding(packer.arranged(rows, order))

    def most(views) -> int:
        both = [*views(first), *views(rows)]
        return max(sum(len(segment.tokens) for segment in view) for view in both)

    plain = most(lambda rows: [row.student for row in rows])
    skilled = most(lambda rows: [row.teacher or row.student for row in rows])
    ours = share(longest, length_buckets=buckets, micro_tokens=micro_tokens)
    naive = {"length_buckets": 1, "micro_tokens": 0, "micro_rows": 8}
    for name, baseline in (
        ("the longest allowed", share(longest, **naive)),
        ("the longest of the batch", share((plain, skilled), **naive)),
    ):
        line = {
            "benchmark": "packing",
            "case": f"{case}: {len(rows)} rows up to {longest[0]} + {longest[1]}",
            "metric": f"padding share, {buckets} buckets of {micro_tokens} tokens",
            "ours": round(ours, 4),
            "baseline": round(baseline, 4),
            "baseline_name": f"padded to {name}",
            "ratio": round(baseline / ours, 2),
        }
        print(json.dumps(line), flush=True)


def cases(name: str) -> Iterator[tuple[str, config.Config]]:
    """The embedded setting and the published one of its environment."""
    if name == "household":
        yield "embedded", config.Config()
        return
    for case, preset in (("embedded", ""), ("published", "qwen3-1.7b")):
        settings = presets.load(f"configs/{name}.py").get_config(preset)
        settings.prompt.stop_tokens = ""  # the tokenizer here has none of those
        yield case, settings


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--environment", default="alfworld")
    parser.add_argument("--episodes", type=int, default=200)
    parser.add_argument("--noise", type=float, default=0.2)
    arguments = parser.parse_args()
    for case, settings in cases(arguments.environment):
        try:
            played = play(settings.environment, arguments.episodes, arguments.noise)
        except ImportError as fault:
            raise SystemExit(f"{fault}; or take --environment=household") from fault
        measure(f"{arguments.environment} {case}", played, settings)
        settings.prompt.context = "whole"
        if case == "published":
            settings.prompt.max_length = WINDOW
        measure(f"{arguments.environment} {case}, whole", played, settings)


if __name__ == "__main__":
    main()
