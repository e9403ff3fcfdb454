"""The agent a run starts from: a Hugging Face folder, or the embedded warm start."""

import dataclasses
import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import flax.traverse_util
import jax
import numpy as np

import skillsd_jax
from skillsd_jax import artifacts, cluster, imitate, rollout, sharding
from skillsd_jax import config as settings
from skillsd_jax.environments import ENVIRONMENTS
from skillsd_jax.models import huggingface, lora, qwen, shapes, tokenizer
from skillsd_jax.models.fingerprint import fingerprint
from skillsd_jax.prompts import Prompter
from skillsd_jax.skills import summarizer
from skillsd_jax.validation import Refused

# Sources that decide what a warm start is; a change in one of them makes a new one.
SOURCES = (
    "environments",
    "models",
    "skills",
    "imitate.py",
    "prompts.py",
    "tokens.py",
    "agent.py",
)
ADAPTERS = 1 << 20  # folded into the run's key; its other uses fold in small numbers
CORPUS_EPISODES = 500  # demonstrations the embedded tokenizer is trained on


@dataclasses.dataclass(frozen=True)
class Agent:
    """Who plays and learns.

    Args:
      player: tokenizer, shape and prompting.
      params: float32 weights.
      record: how the weights came about, plain values.
    """

    player: rollout.Player
    params: Any
    record: dict[str, Any]


def make_agent(config: settings.Config, say: Callable[[str], None]) -> Agent:
    """Loads the pretrained model, or makes the warm start or takes it from the cache.

    Args:
      config: the run's settings.
      say: told what is going on, a line at a time.
    """
    if config.model.path:
        words = tokenizer.load(config.model.path)
        model, params = _pretrained(config.model.path, config.model)
        record = {"path": config.model.path}
    else:
        words, model, params, record = _embedded(config, say)
    if config.model.lora_rank:
        model = adapted(config.model, model)
        key = jax.random.fold_in(jax.random.key(config.seed), ADAPTERS)
        params = lora.attach(model.lora, params, key)
    player = rollout.Player(
        model,
        words,
        config.prompt,
        -(-config.rollout.rows // cluster.count()),
        config.rollout.cohorts,
        config.rollout.reuse_prefix,
        gathered=config.mesh.sampler == "replicated",
    )
    return Agent(player, params, record)


def shape(config: settings.Model) -> qwen.ModelConfig:
    """The network without adapters; from scratch, with a vocabulary of one word.

    Raises:
      FileNotFoundError, ValueError: its folder holds no model that can run.
    """
    if config.path:
        return _computed(huggingface.check(config.path), config)
    return _shape(config, 1)


def adapted(config: settings.Model, model: qwen.ModelConfig) -> qwen.ModelConfig:
    """`model` with the adapters that are set.

    Raises:
      ValueError: they match none of its linear maps.
    """
    if not config.lora_rank:
        return model
    chosen = lora.Lora(config.lora_rank, config.lora_alpha, config.lora_targets)

    def attached(key):
        return lora.attach(chosen, qwen.init(model, key), key)

    jax.eval_shape(attached, jax.random.key(0))
    return dataclasses.replace(model, lora=chosen)


def finished(
    config: settings.Config,
    trained: Any,
    origin: dict[str, Any],
    say: Callable[[str], None],
) -> tuple[tokenizer.Tokenizer, qwen.ModelConfig, Any]:
    """Tokenizer, shape and whole weights of a student, adapters merged.

    Args:
      config: of its run.
      trained: what the run's checkpoint holds: its weights, or its adapters.
      origin: what they were trained with, as `origin_of` says it.
      say: told what is going on, a line at a time.

    Raises:
      ValueError: the tokenizer or the base is not the one of the run any more.
    """
    if config.model.path and not config.model.lora_rank:
        words, model, base = (
            tokenizer.load(config.model.path),
            shape(config.model),
            None,
        )
    else:
        made = make_agent(config, say)
        words, model, base = made.player.encoder, made.player.model, None
        if model.lora is not None:
            _, base = lora.split(made.params)
    check_origin(origin, origin_of(words, model, base))
    if model.lora is not None:
        trained = lora.merge(model.lora, lora.join(trained, base))
        model = dataclasses.replace(model, lora=None)
    return words, model, trained


def origin_of(
    words: tokenizer.Tokenizer,
    model: qwen.ModelConfig,
    base: Any = None,
    teacher: Any = None,
) -> dict[str, Any]:
    """What a checkpoint counts on and does not hold, as values that survive JSON.

    Args:
      words: the student's tokenizer.
      model: its network.
      base: weights beside adapters.
      teacher: weights of an external teacher.
    """
    parts = {"base": base, "teacher": teacher}
    held = {name: part and fingerprint(part) for name, part in parts.items()}
    network = json.loads(json.dumps(dataclasses.asdict(model)))
    return {"tokenizer": words.fingerprint, "network": network, **held}


def check_origin(before: dict[str, Any], now: dict[str, Any]) -> None:
    """Raises ValueError where a part is not what the checkpoint was trained with."""
    changed = [name for name in now if now[name] and now[name] != before.get(name)]
    if not changed:
        return
    sizes = settings.difference(*(each.get("network", {}) for each in (before, now)))
    rows = [f"\n  {name}: {a} there, {b} now" for name, (a, b) in sizes.items()]
    raise ValueError(
        f"the checkpoint was trained with another {' and '.join(changed)}; give the same "
        "files in model.path and teacher.path and the same version of this program, or "
        "start anew" + "".join(rows)
    )


def make_teacher(
    config: settings.Config, student: Agent, say: Callable[[str], None]
) -> tuple[qwen.ModelConfig, Any, dict[str, Any]]:
    """The external teacher: shape, weights, and how they came about.

    A Hugging Face folder in teacher.path; without one, beside an embedded student, a
    warm start of another seed in the student's vocabulary.

    Raises:
      Refused: the two do not share a vocabulary.
    """
    if not config.teacher.path:
        other = dataclasses.replace(config, seed=config.seed + 1)
        say(f"teacher: a warm start of seed {other.seed}, frozen")
        words = student.player.encoder
        _, model, params, record = _embedded(other, say, words, config.seed)
        return model, params, record | {"warm start of seed": other.seed}
    check_words(config, student.player.encoder)
    model, params = _pretrained(config.teacher.path, config.model)
    return model, params, {"path": config.teacher.path}


def check_words(
    config: settings.Config, words: tokenizer.Tokenizer | None = None
) -> None:
    """Raises Refused unless the teacher's folder reads ids as the student does.

    Args:
      config: with a teacher.path.
      words: the student's; None: of its folder, and nothing is checked without one.
    """
    if words is None and config.model.path:
        words = tokenizer.load(config.model.path)
    if words and not tokenizer.load(config.teacher.path).means(words):
        raise Refused(
            f"teacher.path={config.teacher.path!r} has another tokenizer than the "
            "student; token ids must mean the same: take a teacher of its family"
        )


def _pretrained(folder: str, config: settings.Model):
    """Shape and float32 masters of a Hugging Face folder."""
    model, params = huggingface.load(
        folder, dtype="float32", sharding=sharding.shardings
    )
    return _computed(model, config), params


def _computed(model: qwen.ModelConfig, config: settings.Model) -> qwen.ModelConfig:
    """The shape with what the settings say of how it is computed."""
    return dataclasses.replace(
        model, dtype=config.dtype, attention=config.attention, remat=config.remat
    )


def _embedded(
    config: settings.Config,
    say: Callable[[str], None],
    words: tokenizer.Tokenizer | None = None,
    words_of: int | None = None,
):
    """A warm start, in its own vocabulary or in that of the seed `words_of`."""
    chosen = getattr(config.environment, config.environment.name)
    environment = rollout.environment(config.environment, "train")
    environment.close()
    key = artifacts.content_hash(
        config.environment.name,
        config.environment.require_think,
        chosen,
        # Adapters come on top of a warm start; what is kept of a layer changes nothing.
        dataclasses.replace(
            config.model, lora_rank=0, lora_alpha=0, lora_targets="", remat=""
        ),
        config.prompt,
        config.imitate,
        config.seed,
        environment.data,
        [file.read_bytes() for file in _sources(Path(skillsd_jax.__file__).parent)],
        *([] if words_of is None else [words_of]),
    )
    folder = artifacts.cache_folder(config.cache) / "warm_starts"

    def found():
        make = functools.partial(_make, config, say, words)
        with sharding.own():
            return artifacts.cached(folder, f"warm-{key}", make, _load, _save)

    made, model, params, record = cluster.in_turn(found)
    cluster.check_same({"the warm start": artifacts.content_hash(record)})
    params = jax.tree.map(jax.numpy.asarray, sharding.put(params))
    return made, _computed(model, config.model), params, record


def _sources(package: Path) -> list[Path]:
    """The Python files of SOURCES, without the bytecode that lies beside them."""
    return [
        file
        for source in SOURCES
        for file in sorted((package / source).rglob("*.py")) or [package / source]
    ]


@dataclasses.dataclass(frozen=True)
class Recording:
    """What a warm start is cloned from.

    Args:
      words: tokenizer trained on the episodes' text.
      model: shape of the network, with that vocabulary.
      data: plain rows and skilled rows, packed.
      record: counts and the demonstrator's own success.
    """

    words: tokenizer.Tokenizer
    model: qwen.ModelConfig
    data: list[imitate.Recorded]
    record: dict[str, Any]


def record(
    config: settings.Config,
    say: Callable[[str], None],
    words: tokenizer.Tokenizer | None = None,
) -> Recording:
    """Plays the demonstrations and packs them, in a vocabulary of their own if `words`
    is None."""
    environment = rollout.environment(config.environment, "train")
    say(f"warm start: playing {config.imitate.episodes} demonstrations")
    made = imitate.demonstrations(environment, config.imitate, config.seed)
    episodes = list(made)
    environment.close()
    if words is None:
        corpus = imitate.texts(episodes[:CORPUS_EPISODES])
        words = tokenizer.train(corpus, _lexicon(config.environment))
    model = _shape(config.model, words.vocab_size)
    plain, skilled = _rows(Prompter(words, config.prompt), episodes)
    player = rollout.Player(model, words, config.prompt, config.rollout.rows)
    scored = player.scored(environment.max_steps)
    won = [np.mean([episode[i].success for episode in episodes]) for i in (0, 2)]
    return Recording(
        words=words,
        model=model,
        data=[imitate.record(rows, scored) for rows in (plain, skilled)],
        record={
            "demonstrator": {"plain": float(won[0]), "skilled": float(won[1])},
            "rows": {"plain": len(plain), "skilled": len(skilled)},
        },
    )


def _make(config: settings.Config, say: Callable[[str], None], words):
    made = record(config, say, words)
    rows = made.record["rows"]
    say(f"warm start: cloning {rows['plain']} plain and {rows['skilled']} skilled rows")
    params, curve = _clone(config, made.model, made.data, say)
    return made.words, made.model, params, made.record | {"loss": curve}


def _rows(prompter: Prompter, episodes):
    """Plain rows and skilled rows; a skill too long to be shown whole is left out."""
    plain, skilled = [], []
    for episode, skill, followed in episodes:
        plain += imitate.cloned_rows(prompter, episode, None)
        if prompter.fits(skill):
            skilled += imitate.cloned_rows(prompter, followed, skill)
    if not skilled:
        longest = prompter.config.max_skill_length
        raise Refused(f"no skill fits prompt.max_skill_length={longest}; raise it")
    return plain, skilled


def _clone(config: settings.Config, model: qwen.ModelConfig, data, say):
    key, setting, curve = jax.random.key(config.seed), config.imitate, []
    params = qwen.init(model, key)
    for step, cloned, loss in imitate.clone(model, params, data, setting, key):
        params = cloned
        curve.append((step, round(loss, 4)))
        if step % 100 == 0 or step == setting.steps:
            say(f"warm start: step {step} of {setting.steps}, loss {loss:.3f}")
    return params, curve


def _lexicon(config: settings.Environment) -> list[str]:
    options = dataclasses.asdict(getattr(config, config.name))
    words = [*ENVIRONMENTS[config.name].lexicon(**options), *summarizer.lexicon()]
    return list(dict.fromkeys(words))


def _shape(config: settings.Model, vocab: int) -> qwen.ModelConfig:
    if config.shape:
        shape = dataclasses.replace(shapes.SHAPES[config.shape], vocab=vocab)
        return _computed(shape, config)
    shape = qwen.ModelConfig(
        vocab=vocab,
        width=config.width,
        layers=config.layers,
        heads=config.heads,
        kv_heads=config.kv_heads,
        head_size=config.head_size,
        hidden=config.hidden,
        rope_theta=config.rope_theta,
        tie_embeddings=config.tie_embeddings,
    )
    return _computed(shape, config)


def _save(folder: Path, made) -> None:
    words, model, params, record = made
    folder.mkdir(parents=True)
    words.save(folder / "tokenizer")
    flat = flax.traverse_util.flatten_dict(params, sep="/")
    np.savez(folder / "params.npz", **{k: np.asarray(v) for k, v in flat.items()})
    text = {"model": dataclasses.asdict(model), "record": record}
    (folder / "agent.json").write_text(json.dumps(text))


def _load(folder: Path):
    text = json.loads((folder / "agent.json").read_text())
    with np.load(folder / "params.npz") as flat:
        params = flax.traverse_util.unflatten_dict(dict(flat), sep="/")
    model = qwen.ModelConfig(**text["model"])
    return tokenizer.load(folder / "tokenizer"), model, params, text["record"]
