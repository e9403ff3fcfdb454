"""How long retrieval and the bank take with many skills.

  python benchmarks/skills.py
  python benchmarks/skills.py --skills=10000 --calls=50

Two banks of as many skills: all on the global shelf, and eight for each task of one
family. Each rule is asked on the shelf that holds all of them, after the first question,
which reads every text once; it is timed of its own. Between questions a skill is absorbed
and one is credited, outside the clock, as in a run. The baseline is the same choice by a
loop over Python objects, in the same process, call by call in turn. Its keyword and
embedding have the words and vectors of every skill ready, and none has to be kept up.
JSON lines {"benchmark", "case", "metric", "ours", "baseline", "baseline_name",
"ratio"}; medians in milliseconds, ratio = baseline / ours. On a machine that others use
as well take --clock=cpu, which leaves out the disk too. Memory of texts and vectors is
not measured.
"""

import argparse
import json
import math
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from skillsd_jax import config as settings
from skillsd_jax.skills import embedding, retrieval
from skillsd_jax.skills.bank import Bank
from skillsd_jax.skills.skill import Skill, skill_id
from skillsd_jax.trajectory import Task

FAMILY = "fetch"
PER_TASK = 8
CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}
THINGS = ("apple", "mug", "book", "plate", "egg", "pan", "knife", "towel")
PLACES = ("fridge", "sink", "drawer", "shelf", "microwave", "cabinet", "desk")


def skills(count: int, scope: str, tasks: int) -> list[Skill]:
    """Skills of about forty words, all different."""
    made = []
    for i in range(count):
        thing, place = THINGS[i % len(THINGS)], PLACES[i % len(PLACES)]
        steps = tuple(
            f"{verb} {thing} {i % 13} at {place} {step}"
            for step, verb in enumerate(("go to", "take", "open", "move", "close"))
        )
        task = f"fake/train/{i % tasks}" if scope == "tasks" else ""
        family = FAMILY if task else ""
        success = f"solved in {i} steps"
        id = skill_id(task, success, "none", steps, family)
        reward = (i * 37 % 101) / 101
        made.append(Skill(id, success, "none", steps, task, family, f"e{i}", i, reward))
    return made


class Loop:
    """The rules over a list of objects."""

    def __init__(self, bank: Bank, question: str):
        self.bank = bank
        self.entries = [
            {
                "skill": skill,
                "uses": bank.stats(skill.id).uses,
                "mean": bank.stats(skill.id).mean_reward,
                "sources": bank.sources(skill.id),
                "words": set(embedding.words(skill.text)),
            }
            for skill in bank.skills(bank.all_rows())
        ]
        texts = [entry["skill"].text for entry in self.entries]
        for entry, vector in zip(self.entries, embedding.hashed(texts)):
            entry["vector"] = vector.tolist()
        self.words = set(embedding.words(question))
        self.question = embedding.hashed([question])[0].tolist()

    def ask(self, rule: str, source: str, rng: np.random.Generator):
        allowed = [e for e in self.entries if any(s != source for s in e["sources"])]
        return getattr(self, rule)(allowed, rng)

    def none(self, allowed, rng):
        return None

    def random(self, allowed, rng):
        return allowed[int(rng.integers(len(allowed)))]

    def full(self, allowed, rng):
        return sorted(allowed, key=self.value, reverse=True)

    def ucb(self, allowed, rng):
        shows = sum(entry["uses"] for entry in self.entries)
        untried = [entry for entry in allowed if not entry["uses"]]
        if untried:
            return max(untried, key=lambda e: (e["skill"].reward, e["skill"].born))
        return max(
            allowed,
            key=lambda e: e["mean"] + math.sqrt(math.log(shows) / e["uses"]),
        )

    def keyword(self, allowed, rng):
        count = dict.fromkeys(self.words, 0)
        for entry in allowed:
            for word in self.words & entry["words"]:
                count[word] += 1

        def score(entry):
            shared = self.words & entry["words"]
            return sum(math.log1p(len(allowed) / count[word]) for word in shared)

        return max(allowed, key=lambda e: (score(e), self.value(e)))

    def embedding(self, allowed, rng):
        def score(entry):
            return sum(a * b for a, b in zip(entry["vector"], self.question))

        return max(allowed, key=score)

    @staticmethod
    def value(entry):
        total = entry["skill"].reward + entry["mean"] * entry["uses"]
        return total / (1 + entry["uses"])


def seconds(call: Callable[[], object], clock: str) -> float:
    start = CLOCKS[clock]()
    call()
    return CLOCKS[clock]() - start


def say(case: str, metric: str, ours: list[float], baseline: list[float], of: str):
    a, b = (1e3 * statistics.median(times) for times in (ours, baseline))
    line = {
        "benchmark": "skills",
        "case": case,
        "metric": metric,
        "ours": round(a, 4),
        "baseline": round(b, 4),
        "baseline_name": of,
        "ratio": round(b / a, 2),
    }
    print(json.dumps(line), flush=True)


def retrieved(scope: str, shelf: str, arguments: argparse.Namespace) -> Bank:
    """Times every rule; returns the bank."""
    count, clock = arguments.skills, arguments.clock
    extra = len(retrieval.RETRIEVAL) * arguments.calls
    made = skills(count + extra, scope, count // PER_TASK)
    bank = Bank(PER_TASK, global_capacity=count)
    first, more = made[:count], iter(made[count:])
    bank.absorb(first)
    bank.credit([(skill.id, skill.reward) for skill in first])
    question = "put a clean egg 3 into the microwave"
    task, loop = Task("fake", 0, "train", FAMILY, question), Loop(bank, question)
    rng = np.random.default_rng(0)
    case = f"{count} skills, {scope}"
    for rule in retrieval.RETRIEVAL:
        setting = settings.Skills(retrieval=f"{shelf}:{rule}")

        def ask(setting=setting):
            return retrieval.retrieve(bank, task, "e7", rng, setting)

        began, ours, baseline = seconds(ask, clock), [], []
        for _ in range(arguments.calls):
            new = next(more)
            bank.absorb([new])
            bank.credit([(new.id, 0.5)], 1)
            ours.append(seconds(ask, clock))
            if len(baseline) < arguments.loops:
                baseline.append(
                    seconds(lambda rule=rule: loop.ask(rule, "e7", rng), clock)
                )
        say(case, f"{rule} ms", ours, baseline, "Python loop")
        if rule in ("keyword", "embedding"):
            say(case, f"{rule} ms", ours, [began], "the first question")
    return bank


def saved(bank: Bank, scope: str, arguments: argparse.Namespace) -> None:
    case, clock = f"{len(bank)} skills, {scope}", arguments.clock
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "skills.jsonl"

        def plain():
            state = bank.state()["entries"]
            text = "".join(json.dumps(e, ensure_ascii=False) + "\n" for e in state)
            path.write_text(text)

        ours, baseline = [], []
        for _ in range(arguments.loops):
            ours.append(seconds(lambda: bank.save(path), clock))
            baseline.append(seconds(plain, clock))
    say(case, "save ms", ours, baseline, "asdict, json.dumps, no fsync")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--skills", type=int, default=10_000)
    parser.add_argument("--calls", type=int, default=50, help="timed, of each rule")
    parser.add_argument("--clock", default="wall", choices=CLOCKS)
    parser.add_argument("--loops", type=int, default=5, help="of the baseline")
    arguments = parser.parse_args()
    for scope, shelf in (("one shelf", "global"), ("tasks", "bank")):
        bank = retrieved(scope, shelf, arguments)
        saved(bank, scope, arguments)


if __name__ == "__main__":
    main()
