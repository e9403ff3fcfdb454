"""One whole update of the released actor, around our unreduced losses."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from skillsd_jax import config
from skillsd_jax.losses import masking, objective

NAMES = {"actor_grpo": "grpo", "actor_sdar": "sdar", "actor_skillsd": "skill_sd"}
RESPONSE = 5


def settings_of(name: str, cfg: dict) -> config.Objective:
    return config.Objective(
        name=name,
        clip_low=cfg["clip_ratio_low"],
        clip_high=cfg["clip_ratio_high"],
        dual_clip=cfg["clip_ratio_c"],
        kl_coefficient=cfg["kl_loss_coef"],
        kl_kind="k3_clamped",
        loss_agg_mode=cfg["loss_agg_mode"],
        sdl_lambda=cfg.get("sdl_loss_coef", 0.0),
        sdar_coef=cfg.get("sdar_loss_coef", 0.0),
        gate_beta=cfg.get("sdar_gate_beta", 0.0),
        max_log_ratio=10.0,
        max_gap=20.0,
    )


def score(weights, ids, mask):
    """Log-prob of each response token and entropy where it is read, nats."""
    here, context = weights
    seen = jnp.cumsum(mask[..., None] * context[ids], axis=1)
    logits = here[ids] + seen / jnp.maximum(1, jnp.cumsum(mask, axis=1))[..., None]
    log_p = jax.nn.log_softmax(logits[:, -RESPONSE - 1 : -1])
    entropy = -jnp.sum(jnp.exp(log_p) * log_p, axis=-1)
    return jnp.take_along_axis(log_p, ids[:, -RESPONSE:, None], -1)[..., 0], entropy


def loss(weights, batch, chosen, entropy_coefficient):
    student, entropy = score(weights, batch["input_ids"], batch["attention_mask"])
    signals = objective.Signals(
        student=student,
        old=batch["old_log_probs"],
        teacher=batch["teacher_log_probs"],
        reference=batch["ref_log_prob"],
        entropy=entropy,
        advantage=batch["grpo_advantages"],
        mask=batch["response_mask"],
    )
    terms = objective.recipe(chosen.name).loss(signals, chosen).terms
    terms |= {"entropy": -entropy_coefficient * entropy}
    reduced = {
        name: masking.aggregate(term, signals.mask, chosen.loss_agg_mode)
        for name, term in terms.items()
    }
    return sum(reduced.values()), reduced


BY_ROW = [
    "input_ids",
    "attention_mask",
    "response_mask",
    "old_log_probs",
    "teacher_log_probs",
    "ref_log_prob",
    "grpo_advantages",
]


def parts_of(batch: dict, size: int) -> list[dict]:
    starts = range(0, len(batch["input_ids"]), size)
    return [{n: batch[n][i : i + size] for n in BY_ROW} for i in starts]


@pytest.mark.parametrize("file", NAMES)
def test_a_whole_update_agrees_with_the_released_actor(file, released, close):
    batch, after = released("actor_batch"), released(file)
    cfg = json.loads(str(after["cfg_json"]))
    chosen = settings_of(NAMES[file], cfg)
    gradient = jax.jit(
        jax.grad(lambda w, b: loss(w, b, chosen, cfg["entropy_coeff"]), has_aux=True)
    )
    weights = batch["A0"], batch["C0"]
    policy_losses, norms = [], []
    for mini in parts_of(batch, cfg["ppo_mini_batch_size"]):
        # The released loop averages the means of micro-batches, whatever their sizes.
        micros = parts_of(mini, cfg["ppo_micro_batch_size_per_gpu"])
        each = [gradient(weights, micro) for micro in micros]
        mean = jax.tree.map(lambda *g: sum(g) / len(g), *[g for g, _ in each])
        norm = np.sqrt(sum(np.sum(g**2) for g in mean))
        scale = after["lr"] * min(1, cfg["grad_clip"] / (norm + 1e-6))
        weights = tuple(w - scale * g for w, g in zip(weights, mean))
        policy_losses += [reduced["policy"] for _, reduced in each]
        norms.append(norm)
    close(policy_losses, after["metric__actor__pg_loss"])
    close(norms, after["metric__actor__grad_norm"])
    close(weights[0], after["A_after"])
    close(weights[1], after["C_after"])


def test_the_toy_policy_scores_as_the_released_one(released, close):
    batch = released("actor_batch")
    weights = batch["A0"], batch["C0"]
    old, entropy = score(weights, batch["input_ids"], batch["attention_mask"])
    close(old, batch["old_log_probs"])
    close(entropy, batch["entropy"])
    teacher, _ = score(
        weights, batch["teacher_input_ids"], batch["teacher_attention_mask"]
    )
    close(teacher, batch["teacher_log_probs"])


def test_the_released_advantages_are_row_statistics(released, close):
    batch = released("actor_batch")
    ids = [np.unique(batch[n], return_inverse=True)[1] for n in ("uid", "traj_uid")]
    advantage = objective.group_advantage(
        batch["token_level_rewards"].sum(-1), *ids, config.Objective(statistics="row")
    )
    close(advantage[:, None] * batch["response_mask"], batch["grpo_advantages"])
