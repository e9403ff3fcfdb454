"""OBJECTIVES: the methods, each a few lines on the algebra."""

from skillsd_jax.losses.objective import advantage
from skillsd_jax.losses.objective.recipe import Recipe
from skillsd_jax.losses.objective.terms import (
    Distil,
    entropy_bonus,
    policy,
    reference_kl,
)
from skillsd_jax.losses.objective.weights import (
    on_segments,
    on_skilled,
    up_to_two,
)

GRPO = (policy, reference_kl, entropy_bonus)
RELEASED = "github.com/ZJU-REAL/SDAR at 8b85c23"

OBJECTIVES = {
    "grpo": Recipe(
        "reward only: clipped policy gradient within groups",
        source="arXiv 2402.03300",
        terms=GRPO,
    ),
    "skill_grpo": Recipe(
        "GRPO with a skill in the student's own prompt; no teacher",
        source="baseline of arXiv 2604.10674 and 2605.15155",
        terms=GRPO,
        student_skill=True,
    ),
    "skill_prompt": Recipe(
        "no training: the start plays with skills of its own episodes in the prompt",
        source="baseline of arXiv 2604.10674 and 2605.15155",
        terms=(),
        student_skill=True,
    ),
    "skill_sd": Recipe(
        "GRPO + λ ρ(e^−ℓ − 1 + ℓ): reverse KL to the skilled view",
        source="arXiv 2604.10674",
        terms=(*GRPO, Distil("iw_k3", "sdl_lambda")),
        shown="skill",
    ),
    "sdar": Recipe(
        "GRPO + λ g(Δ)·Δ: tokens the skilled view endorses, gated",
        source="arXiv 2605.15155",
        terms=(*GRPO, Distil("gated", "sdar_coef")),
        shown="skill",
    ),
    "opsd": Recipe(
        "reverse KL alone to the view with an expert's solution, frozen teacher",
        source="arXiv 2601.18734, with the estimator of arXiv 2604.10674",
        terms=(Distil("iw_k3", 1.0, open=True),),
        shown="expert",
        teacher="frozen",
    ),
    "grpo_opsd": Recipe(
        "GRPO + λ reverse KL to the view with an expert's solution, frozen teacher",
        source="arXiv 2601.18734, with the estimator of arXiv 2604.10674",
        terms=(*GRPO, Distil("iw_k3", "sdl_lambda", open=True)),
        shown="expert",
        teacher="frozen",
    ),
    "opsd_released": Recipe(
        "what the SDAR authors' scripts call OPSD: sdar without the policy gradient",
        source=RELEASED,
        terms=(reference_kl, entropy_bonus, Distil("gated", "sdar_coef")),
        shown="skill",
        settings={"gate": "gap", "gate_beta": 5.0},
    ),
    "grpo_opsd_released": Recipe(
        "what they call GRPO+OPSD: sdar at β = 0, no distillation in expectation",
        source=RELEASED,
        terms=(*GRPO, Distil("gated", "sdar_coef")),
        shown="skill",
        settings={"gate": "gap", "gate_beta": 0.0},
    ),
    "opd": Recipe(
        "on-policy distillation: Δ to another model as the only advantage",
        source="thinkingmachines.ai/blog/on-policy-distillation",
        terms=(Distil("k1_reward", 1.0, open=True),),
        shown="plain",
        teacher="external",
    ),
    "rlsd": Recipe(
        "GRPO with A·[(1−l) + l·clip(e^{sign(A)·Δ})]: the teacher weighs tokens",
        source="arXiv 2604.03128",
        terms=GRPO,
        credits=(advantage.evidence,),
        shown="skill",
        schedule="rlsd_mix=linear:100",
    ),
    "sdpo": Recipe(
        "JSD over the likeliest words to the view with a solved sibling, EMA teacher",
        source="arXiv 2601.20802; github.com/lasgroup/SDPO at 229d137",
        terms=(Distil("topk_tail", 1.0, weights=(on_skilled, up_to_two)),),
        shown="sibling",
        teacher="ema",
        settings={
            "per_skilled_token": True,
            "topk": 100,
            "topk_kind": "jsd",
            "topk_select": "student",
        },
    ),
    "hdpo": Recipe(
        "GRPO + λ JSD on tasks a group failed, played again with an expert's skill",
        source="arXiv 2603.23871, algorithm 1",
        terms=(*GRPO, Distil("full_jsd", "sdl_lambda")),
        shown="rescued",
        settings={"per_skilled_token": True, "jsd_alpha": 0.5},
    ),
    "tcod": Recipe(
        "Δ to another model as the advantage, on a window of turns that grows",
        source="arXiv 2604.24005, forward to backward",
        terms=(policy, reference_kl),
        credits=(advantage.early_gap,),
        baseline=advantage.without_rewards,
        shown="plain",
        teacher="external",
    ),
    "opid": Recipe(
        "GRPO with A + 0.001·Δ; skills of whole episodes, none of single steps",
        source="arXiv 2606.26790; github.com/jinyangwu/OPID at e5c0b0f",
        terms=GRPO,
        credits=(advantage.added_gap,),
        shown="skill",
        teacher="live",
    ),
    "grsd": Recipe(
        "GRPO with A weighed by each turn's mean gap; skills are not trained",
        source="arXiv 2607.28076; github.com/BinbZheng1/GRSD at 38f9787",
        terms=GRPO,
        credits=(advantage.surprise,),
        shown="skill",
        teacher="live",
    ),
    "agent_opsd": Recipe(
        "GRPO with A weighed by how each turn moves a belief in success",
        source="arXiv 2608.05987; github.com/zhangdw156/AgentOPSD at e0c0f09",
        terms=GRPO,
        credits=(advantage.belief,),
        shown="skill",
        teacher="live",
    ),
    "gigpo": Recipe(
        "GRPO + advantages among turns that answered the same screen",
        source="arXiv 2505.10978; github.com/langfengQ/DrMAS at 3b556f2",
        terms=GRPO,
        baseline=advantage.by_group_and_state,
    ),
    "sad": Recipe(
        "forward KL to another model on an expert's episodes, by segment",
        source="arXiv 2505.13820",
        terms=(Distil("full_forward_kl", 1.0, weights=(on_segments,)),),
        shown="plain",
        teacher="external",
        data="expert",
    ),
}


def listing() -> str:
    """The methods, one line each."""
    width = max(map(len, OBJECTIVES))
    return "\n".join(f"  {n:<{width}}  {r.summary}" for n, r in OBJECTIVES.items())


def recipe(name: str) -> Recipe:
    """The method of that name.

    Raises:
      ValueError: there is none; the message lists all, one line each.
    """
    if name not in OBJECTIVES:
        raise ValueError(
            f"objective.name={name!r} is unknown; choose one of\n{listing()}"
        )
    return OBJECTIVES[name]
