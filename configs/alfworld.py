"""ALFWorld on the real TextWorld engine, after SDAR (arXiv 2605.15155) and Skill-SD.

Command: python -m skillsd_jax.main --config=configs/alfworld.py
Hardware: a laptop's CPU; 10 minutes on one core, caches empty. Success on unseen
kitchens at T = 0.4, seeds 0, 1, 2: 37 → 71, 21 → 64, 30 → 66 %.

The embedded default restricts the world so that it fits minutes: kitchens, the four
families pick, clean, heat and cool, at most 20 receptacles, 15 turns. Everything:
--config.environment.alfworld.rooms=all --config.environment.alfworld.families=all
--config.environment.alfworld.max_receptacles=0. Games are generated from what the
alfworld package ships unless ALFWORLD_DATA holds the original ones.

The other presets carry the settings of the SDAR authors' ALFWorld scripts, which also
ran Skill-SD, and take --config.model.path=FOLDER. Success they report (single runs):

               GRPO   Skill-SD   SDAR
  qwen2.5-3b   75.0       73.4   84.4
  qwen2.5-7b   81.2       85.1   85.9
  qwen3-1.7b   46.1       52.3   53.9

The other sizes are the same setting, without a published figure. None of them is run
here yet. SDAR itself: --config.objective.name=sdar.
"""

from skillsd_jax import presets
from skillsd_jax.config import Config

PRESETS = {
    "": "small model from scratch, real engine, kitchens, four families, 15 turns",
    "smoke": "the same, cut to about a minute: shows that it runs",
    "qwen2.5-0.5b": "the same setting, no published figure; needs --config.model.path",
    "qwen2.5-1.5b": "the same setting, no published figure; needs --config.model.path",
    "qwen2.5-3b": "published setting, all rooms, 50 turns; needs --config.model.path",
    "qwen2.5-7b": "published setting, all rooms, 50 turns; needs --config.model.path",
    "qwen3-0.6b": "the same setting, no published figure; needs --config.model.path",
    "qwen3-1.7b": "published setting, all rooms, 50 turns; needs --config.model.path",
    "qwen3-4b": "the same setting, no published figure; needs --config.model.path",
    "qwen3-8b": "the same setting, no published figure; needs --config.model.path",
}


def get_config(preset: str = "") -> Config:
    presets.known(preset, PRESETS)
    if preset.startswith("qwen"):
        config = _published()
        config.prompt.thinking = not preset.startswith("qwen3")  # published: off
        return config
    config = _embedded()
    return presets.smoke(config) if preset == "smoke" else config


def _embedded() -> Config:
    config = Config()
    config.environment.name = "alfworld"
    config.environment.train_tasks = 600  # generated games; loading one takes a while
    config.prompt.max_prompt_length = 56  # twenty receptacles by name: up to 50
    config.prompt.max_skill_length = 32  # two places, a tool and their doors: up to 30
    config.iterations = 50  # held-out success still rises at 40
    config.objective.sdl_lambda = 0.03  # on the validation panel, seeds 1 and 2
    config.imitate.steps = 1800  # plain success appears after 800
    config.imitate.episodes = 3000  # five of each game
    config.imitate.tasks = 600  # the same games
    config.evaluate.tasks = 128  # games in unseen kitchens
    config.evaluate.samples = 2  # halves the sampling noise of a game
    return config


def _published() -> Config:
    config = Config()
    config.iterations = 150  # published
    config.checkpoint_every = 10  # ours: a checkpoint is large

    environment = config.environment
    environment.name = "alfworld"
    environment.train_tasks = 3553  # the original training games
    environment.require_think = True  # published: a reply without a thought is invalid
    environment.workers = "processes"  # ours: one that hangs can be killed
    environment.alfworld.max_steps = 50  # published
    environment.alfworld.rooms = "all"  # published
    environment.alfworld.families = "all"  # published
    environment.alfworld.max_receptacles = 0  # published: every room
    environment.alfworld.view = "native"  # published: the engine's own words

    config.model.required = True  # never from scratch under a published name
    config.model.dtype = "bfloat16"  # ours: matmuls only, masters stay float32

    prompt = config.prompt
    prompt.context = "windowed"  # published: a prompt per turn
    prompt.history = 2  # published
    prompt.style = "agent"  # a pretrained model must be told how to answer
    prompt.admissible = True  # published: the prompt lists the commands
    prompt.max_prompt_length = 2048  # published
    prompt.max_response_length = 512  # published
    prompt.max_skill_length = 1024  # ours: the skill never shortens the history
    prompt.stop_tokens = "<|endoftext|>"  # as Qwen's generation_config.json has it

    config.rollout.prompts = 16  # published
    config.rollout.group_size = 8  # published
    config.rollout.rows = 128  # ours: the whole batch at once
    config.rollout.cohorts = 2  # ours: environments step while the device decodes
    config.rollout.reuse_prefix = True  # ours: instructions are read once

    objective = config.objective
    objective.name = "skill_sd"  # sdar is one override away
    objective.sdl_lambda = 1e-3  # Skill-SD paper
    objective.sdar_coef = 0.01  # published
    objective.gate, objective.gate_beta = "gap", 5.0  # published
    objective.clip_low = objective.clip_high = 0.2  # published
    objective.kl_coefficient = 0.01  # published
    objective.kl_kind = "k3_clamped"  # published, as low_var_kl
    objective.entropy_coefficient = 0.001  # the released scripts keep it silently
    objective.statistics = "row"  # published: advantages over step rows
    objective.invalid_action_penalty = 0.01  # published 0.1 of a reward of 10; ours 1

    config.teacher.kind = "live"  # published

    skills = config.skills
    skills.similarity = 0.8  # ours: retold in almost the same words is one skill
    skills.author.max_request_length = 4096  # ours: an episode, its turns shortened
    skills.author.max_answer_length = 1024  # ours: a skill and the JSON around it
    skills.endpoint.max_tokens = 2048  # ours: the same, and a thought before it

    optimizer = config.optimizer
    optimizer.learning_rate = 1e-6  # published
    optimizer.schedule = "constant"  # published
    optimizer.beta1, optimizer.beta2 = 0.9, 0.999  # published
    optimizer.weight_decay = 0.01  # published
    optimizer.grad_clip = 1.0  # published
    optimizer.minibatch_rows = 256  # published
    optimizer.length_buckets = 8  # ours: see benchmarks/packing.py
    optimizer.micro_tokens = 12_288  # ours: memory; both views of two longest rows

    config.imitate.steps = 0  # the model is pretrained

    config.evaluate.tasks = 128  # published
    config.evaluate.temperature = 0.4  # published
    config.evaluate.teacher_tasks = 128  # ours: as large as the test panel
    return config
