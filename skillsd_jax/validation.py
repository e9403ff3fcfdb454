"""Refusing what cannot work before anything starts."""

import math
import re
from collections.abc import Collection, Mapping
from pathlib import Path

from skillsd_jax.config import (
    Config,
    Model,
    Optimizer,
    Rollout,
    Skills,
    flatten,
    to_dict,
)


class Refused(ValueError):
    """What the user asked for cannot be done; the message says what to do instead.

    Entry points print it without a traceback.
    """


class Stopped(SystemExit):
    """Ends the program midway, without a traceback; the same command goes on.

    Its argument is the message, or the exit status where all was said.
    """


# Settings that name one of a fixed list. Names that live in a dict further up
# (objectives, environments) are given to `validate` by its caller.
CHOICES: dict[str, Collection[str]] = {
    "environment.workers": ("inline", "threads", "processes"),
    "environment.alfworld.rooms": ("kitchen", "all"),
    "environment.alfworld.view": ("notes", "native"),
    "model.dtype": ("float32", "bfloat16"),
    "mesh.sampler": ("replicated", "same"),
    "prompt.context": ("windowed", "whole"),
    "prompt.style": ("plain", "agent"),
    "prompt.skill_turn": ("task", "system"),
    "rollout.old_logprobs": ("sampled", "recomputed"),
    "objective.gate": ("gap", "entropy", "soft_or"),
    "objective.gate_entropy": ("nats", "normalised"),
    "objective.topk_kind": ("forward_kl", "reverse_kl", "jsd"),
    "objective.topk_select": ("teacher", "student"),
    "objective.ratio": ("token", "sequence"),
    "objective.kl_kind": ("k1", "k2", "k3", "k3_clamped", "abs"),
    "objective.loss_agg_mode": (
        "token-mean",
        "seq-mean-token-sum",
        "seq-mean-token-mean",
        "seq-mean-token-sum-norm",
    ),
    "objective.statistics": ("trajectory", "row"),
    "teacher.kind": ("", "live", "periodic", "ema", "frozen", "external"),
    "skills.maker": ("template", "policy", "endpoint"),
    "skills.endpoint.late": ("wait", "drop"),
    "optimizer.moments": ("float32", "bfloat16"),
    "optimizer.schedule": ("constant", "cosine"),
    "evaluate.split": ("validation", "test"),
}
# A number must be > 0 unless it is listed here (≥ 0) or a share (0 to 1).
MAY_BE_ZERO = (
    "seed",
    "iterations",
    "keep_best",
    "environment.sokoban.min_pushes",
    "environment.sokoban.min_moves",
    "environment.alfworld.max_receptacles",
    "model.lora_rank",
    "mesh.data",
    "prompt.history",
    "prompt.max_skill_length",
    "rollout.correction_cap",
    "rollout.hinted_groups",
    "objective.sdl_lambda",
    "objective.sdar_coef",
    "objective.gate_beta",
    "objective.dual_clip",
    "objective.kl_coefficient",
    "objective.entropy_coefficient",
    "objective.step_weight",
    "objective.gap_weight",
    "objective.reason_weight",
    "objective.action_weight",
    "objective.distill_reason_weight",
    "objective.distill_action_weight",
    "objective.plateau_tolerance",
    "objective.invalid_action_penalty",
    "skills.exploration",
    "skills.author.temperature",
    "skills.endpoint.temperature",
    "skills.endpoint.retries",
    "skills.endpoint.lag",
    "optimizer.weight_decay",
    "optimizer.minibatch_rows",
    "optimizer.micro_tokens",
    "imitate.steps",
    "evaluate.every",
    "evaluate.teacher_every",
    "evaluate.top_k",
    "evaluate.temperature",
)
SHARES = (
    "objective.jsd_alpha",
    "objective.rlsd_mix",
    "objective.turn_mix",
    "objective.turn_clip",
    "objective.discount",
    "objective.belief_discount",
    "objective.rlsd_clip",
    "teacher.rate",
    "skills.similarity",
    "optimizer.beta1",
    "optimizer.beta2",
    "imitate.noise",
    "imitate.skilled_noise",
    "imitate.misled",
)
# What a published shape decides on.
SIZES = (
    "width",
    "layers",
    "heads",
    "kv_heads",
    "head_size",
    "hidden",
    "rope_theta",
    "tie_embeddings",
)
WRITERS = ("tensorboard", "wandb")
REQUEST = 256  # tokens of the shortest request for a skill that says what is wanted


def validate(config: Config, choices: Mapping[str, Collection[str]] = {}) -> None:
    """Checks what can be checked before anything starts.

    Args:
      config: the settings of a run.
      choices: known names of further settings, such as
        {'objective.name': OBJECTIVES}: their homes lie above this module.

    Raises:
      Refused: with the setting, what was wanted and what came.
    """
    settings = dict(flatten(to_dict(config)))
    for name, known in {**CHOICES, **choices}.items():
        if settings[name] not in known:
            raise Refused(
                f"unknown {name}={settings[name]!r}; known: "
                + ", ".join(choice or "''" for choice in known)
            )
    for name, value in settings.items():
        if isinstance(value, int | float) and not isinstance(value, bool):
            _check_number(name, value)
    for name in filter(None, config.writers.split(",")):
        if name not in WRITERS:
            raise Refused(f"unknown writer {name!r}; known: {', '.join(WRITERS)}")
    _check_model(config.model)
    _check_moments(config.optimizer)
    _check_lengths(config)
    if config.evaluate.top_p > 1:
        raise Refused(f"evaluate.top_p={config.evaluate.top_p} must be at most 1")
    _check_correction(config.rollout)
    _check_lag(config.skills)
    _check_best(config)


def _check_number(name: str, value: float) -> None:
    if name in SHARES:
        right, wanted = 0 <= value <= 1, "between 0 and 1"
    elif name in MAY_BE_ZERO:
        right, wanted = 0 <= value < math.inf, "≥ 0"
    else:
        right, wanted = 0 < value < math.inf, "> 0"
    if not right:
        raise Refused(f"{name}={value} must be {wanted}")


def _check_model(model: Model) -> None:
    if model.required and not model.path:
        raise Refused(
            "this preset trains published weights and none were given; pass "
            "--config.model.path=FOLDER, a Hugging Face folder with config.json and "
            "*.safetensors, or leave the preset out for the embedded model"
        )
    if model.path and not (Path(model.path) / "config.json").is_file():
        raise Refused(
            f"model.path={model.path!r} is no Hugging Face folder: no config.json in it"
        )
    _check_shape(model)
    _check_adapters(model)


def _check_shape(model: Model) -> None:
    """A folder or a published shape decides on the sizes, or they fit together."""
    if model.path and model.shape:
        raise Refused(
            f"model.shape={model.shape!r} is not used: the folder in model.path has a "
            "shape of its own; leave one out"
        )
    changed = [name for name in SIZES if getattr(model, name) != getattr(Model(), name)]
    if model.shape and changed:
        raise Refused(
            f"model.shape={model.shape!r} decides on model.{changed[0]}; leave one out"
        )
    if model.path or model.shape:
        return
    if model.heads % model.kv_heads:
        raise Refused(
            f"model.kv_heads={model.kv_heads} must divide model.heads={model.heads}"
        )
    if model.head_size % 2:
        raise Refused(f"model.head_size={model.head_size} must be even for RoPE")


def _check_adapters(model: Model) -> None:
    default = Model()
    chosen = (model.lora_alpha, model.lora_targets)
    if not model.lora_rank and chosen != (default.lora_alpha, default.lora_targets):
        raise Refused(
            "model.lora_alpha and model.lora_targets are not used without adapters; set "
            "model.lora_rank > 0"
        )
    if not model.lora_targets:
        raise Refused("model.lora_targets is empty; name linear maps, e.g. 'attention'")
    try:
        re.compile(model.lora_targets)
    except re.error as fault:
        raise Refused(
            f"model.lora_targets={model.lora_targets!r} is no regular expression: {fault}"
        ) from fault


def _check_moments(optimizer: Optimizer) -> None:
    """A mean that moves by less than 2^-8 of itself stands still in bfloat16."""
    name = "beta2" if optimizer.name == "lion" else "beta1"
    beta = getattr(optimizer, name)
    if optimizer.moments == "bfloat16" and 1 - beta < 2**-8:
        raise Refused(
            f"optimizer.moments=bfloat16 is too coarse for optimizer.{name}={beta} of "
            f"{optimizer.name}: the mean would stand still; set {name} to 0.99 or less, "
            "or moments to float32"
        )


def _check_correction(rollout: Rollout) -> None:
    if rollout.correction_cap and rollout.old_logprobs != "recomputed":
        raise Refused(
            f"rollout.correction_cap={rollout.correction_cap} weighs the scorer's "
            f"log-probs against the sampler's, and rollout.old_logprobs="
            f"{rollout.old_logprobs} has the sampler's alone; set "
            "--config.rollout.old_logprobs=recomputed, or the cap to 0"
        )


def _check_lag(skills: Skills) -> None:
    if skills.endpoint.late == "drop" and not (
        skills.endpoint.lag or skills.asynchronous
    ):
        raise Refused(
            "skills.endpoint.late=drop with skills.endpoint.lag=0 would drop every "
            "skill: none is there as soon as it is asked for; set "
            "--config.skills.endpoint.lag=1 or more, or late=wait"
        )


def _check_best(config: Config) -> None:
    """The best are told by evaluations, and the last iteration has none of its own."""
    meet = math.lcm(config.checkpoint_every, config.evaluate.every)
    rare = config.checkpoint_every >= config.iterations
    mend = (
        "both to less than iterations"
        if rare
        else (f"evaluate.every to {config.checkpoint_every}")
    )
    if config.keep_best and not 0 < meet < config.iterations:
        raise Refused(
            f"keep_best={config.keep_best} keeps checkpoints of iterations that were "
            f"evaluated, and with checkpoint_every={config.checkpoint_every}, "
            f"evaluate.every={config.evaluate.every} and iterations="
            f"{config.iterations} there are none; set {mend}, or keep_best to 0"
        )


def _check_lengths(config: Config) -> None:
    rollout, prompt = config.rollout, config.prompt
    if rollout.rows % rollout.cohorts:
        raise Refused(
            f"rollout.cohorts={rollout.cohorts} must divide rollout.rows={rollout.rows}"
        )
    if rollout.rows % rollout.group_size:
        fits = [n for n in range(1, rollout.rows + 1) if rollout.rows % n == 0]
        below = [n for n in fits if n < rollout.group_size][-1:]
        above = [n for n in fits if n > rollout.group_size][:1]
        raise Refused(
            f"rollout.group_size={rollout.group_size} must divide "
            f"rollout.rows={rollout.rows}; set group_size to "
            + " or ".join(map(str, below + above))
        )
    if rollout.hinted_groups and rollout.draws > 1:
        raise Refused(
            f"rollout.hinted_groups={rollout.hinted_groups} are of each draw, and "
            f"rollout.draws={rollout.draws} keeps some groups of several; set one back"
        )
    if rollout.hinted_groups > rollout.prompts:
        raise Refused(
            f"rollout.hinted_groups={rollout.hinted_groups} are more groups than an "
            f"iteration has: rollout.prompts={rollout.prompts}"
        )
    asked = config.skills.author.max_request_length
    if asked < REQUEST:
        raise Refused(
            f"skills.author.max_request_length={asked} must be at least {REQUEST}: the "
            "order to answer alone is about as long"
        )
    window = prompt.max_prompt_length + prompt.max_response_length
    if prompt.context == "whole" and prompt.max_length < window:
        raise Refused(
            f"prompt.max_length={prompt.max_length} must hold a first prompt and one "
            f"reply: at least max_prompt_length + max_response_length = {window}"
        )
    size, boxes = config.environment.sokoban.size, config.environment.sokoban.boxes
    if size < 4 or boxes > (size - 2) ** 2 // 3:
        raise Refused(
            f"environment.sokoban.size={size} has no room for {boxes} boxes and the "
            f"player; make it larger"
        )
