"""Every setting: type, unit and default, in one place.

A file in configs/ returns a `Config` that differs from these defaults only where it
says why. Command line: `--config.SECTION.KEY=VALUE`. An empty string means "not set".
"""

import dataclasses
from collections.abc import Iterator, Mapping
from dataclasses import field


@dataclasses.dataclass
class Household:
    """Options of the miniature household (constructor arguments of the class)."""

    max_steps: int = 9  # turns per episode


@dataclasses.dataclass
class Sokoban:
    """Options of Sokoban."""

    size: int = 6  # squares per side, walls included
    boxes: int = 1
    max_steps: int = 15  # turns per episode
    min_pushes: int = 1  # difficulty filter: pushes of a shortest plan
    min_moves: int = 4  # difficulty filter: moves of a shortest plan


@dataclasses.dataclass
class Alfworld:
    """Options of ALFWorld."""

    max_steps: int = 15  # turns per episode
    rooms: str = "kitchen"  # kitchen, all
    families: str = "pick,clean,heat,cool"  # comma-separated, or 'all' (six)
    max_receptacles: int = 20  # generated rooms lose cabinets over it; 0: no limit
    view: str = "notes"  # 'notes' (compact memory of what was read) or 'native'
    cache: str = ""  # folder for generated games; "": the user's cache folder
    games: str = ""  # folder with json_2.1.1/; "": $ALFWORLD_DATA, else generated


@dataclasses.dataclass
class Environment:
    name: str = "household"  # household, sokoban, alfworld
    train_tasks: int = 128  # RL draws its tasks from that many
    require_think: bool = False  # a reply without <think>…</think> is invalid
    workers: str = "inline"  # what steps them: inline, threads, processes
    worker_count: int = 2  # threads or processes
    timeout_s: float = 60.0  # of one reset or step; inline has no limit
    max_observation: int = 20_000  # characters of one text that is kept
    household: Household = field(default_factory=Household)
    sokoban: Sokoban = field(default_factory=Sokoban)
    alfworld: Alfworld = field(default_factory=Alfworld)


@dataclasses.dataclass
class Model:
    """Qwen3-shaped decoder; a Hugging Face folder in `path` overrides the shape."""

    path: str = ""  # Hugging Face folder; "": the embedded model, from scratch
    shape: str = ""  # from scratch in a published shape, e.g. qwen3-0.6b; "": as below
    required: bool = False  # published presets: refuse to start without `path`
    width: int = 64
    layers: int = 2
    heads: int = 4
    kv_heads: int = 4
    head_size: int = 16
    hidden: int = 256  # of the gated MLP
    rope_theta: float = 10_000.0
    tie_embeddings: bool = True
    dtype: str = "float32"  # of the matmuls; masters and reductions are float32
    attention: str = (
        "plain"  # of whole sequences: plain, xla, cudnn (GPU), splash (TPU)
    )
    remat: str = "dots"  # kept of a layer for its gradient: dots, nothing, everything
    lora_rank: int = 0  # of the adapters that are trained instead; 0: all weights are
    lora_alpha: float = 16.0  # an adapter's update is scaled by alpha / rank
    lora_targets: str = "attention|mlp"  # regex over attention/query, …, mlp/down


@dataclasses.dataclass
class Mesh:
    """How many devices share the work; nothing but rounding depends on it."""

    data: int = 1  # parts of the rows; 0: all devices that fsdp × tp leaves
    fsdp: int = 1  # parts of the rows and of the weights
    tp: int = 1  # parts of the heads and hidden units
    sampler: str = (
        "replicated"  # weights that play: whole on every fsdp part, or 'same'
    )


@dataclasses.dataclass
class Prompt:
    """How the model is shown an episode. Lengths in tokens."""

    context: str = "windowed"  # 'windowed' (a prompt per turn) or 'whole' (history)
    history: int = 0  # earlier turns shown by a windowed prompt
    system: str = ""  # system message; "": the chat template's own, if it has one
    style: str = "plain"  # 'plain' (instruction, observation) or 'agent' (told how)
    admissible: bool = False  # list the admissible commands
    stop_tokens: str = ""  # comma-separated control tokens that end a reply as well
    stop_texts: str = ""  # comma-separated; a reply ends where it says one of them
    thinking: bool = True  # False: replies begin with an empty thought, as Qwen3's do
    max_prompt_length: int = 48  # student's context without the last reply
    max_response_length: int = 8  # one reply, stop token included
    max_skill_length: int = 28  # extra room of the teacher's view
    skill_turn: str = "task"  # turn that a skill stands in: task, system
    max_length: int = 512  # whole history: the window of all turns together


@dataclasses.dataclass
class Rollout:
    prompts: int = 16  # tasks per iteration
    group_size: int = 8  # episodes per task
    temperature: float = 1.0
    rows: int = 128  # episodes played at once
    cohorts: int = 1  # parts of the rows: one's environments step while another speaks
    reuse_prefix: bool = False  # windowed: keep on the device what two turns share
    hinted_groups: int = 0  # of an iteration, played and learned with a skill in view
    draws: int = 1  # > 1: draw again up to so often for groups of equal rewards
    old_logprobs: str = "sampled"  # or 'recomputed' by the scorer before the update
    correction_cap: float = 0.0  # of the weights π_scorer / π_sampler; 0: off


@dataclasses.dataclass
class Objective:
    name: str = "skill_sd"  # 'help' lists them
    sdl_lambda: float = 0.1  # λ of skill_sd and grpo_opsd
    sdar_coef: float = 0.1  # λ of sdar
    estimator: str = ""  # of opsd, grpo_opsd, opd; "": the method's own
    topk: int = 100  # words that topk_tail keeps apart
    topk_kind: str = "jsd"  # forward_kl, reverse_kl, jsd
    topk_select: str = "teacher"  # whose likeliest words: teacher, student
    jsd_alpha: float = 0.5  # α of full_jsd
    gate_beta: float = 5.0  # β of the gate
    gate: str = "gap"  # gap, entropy, soft_or
    gate_entropy: str = "nats"  # or 'normalised': divided by log V
    per_skilled_token: bool = False  # divide distillation by skilled tokens alone
    rlsd_mix: float = 0.5  # l of rlsd
    rlsd_clip: float = 0.2  # ε of rlsd
    discount: float = 0.95  # γ of gigpo's step returns
    step_weight: float = 1.0  # w of gigpo's step advantage
    turn_mix: float = 0.5  # λ of grsd and agent_opsd
    turn_clip: float = 0.2  # bound of their multipliers
    belief_discount: float = 1.0  # γ of agent_opsd; its paper is said to have 0.95
    gap_weight: float = 0.001  # w of opid
    window_every: int = 5  # iterations per turn that tcod's window grows
    reason_weight: float = 1.0  # of reasoning tokens in every term
    action_weight: float = 1.0  # of action tokens in every term
    distill_reason_weight: float = 1.0  # the same in the distillation alone
    distill_action_weight: float = 1.0
    schedules: str = ""  # NAME=constant|linear|cosine|growing|plateau:ITERATIONS,…
    plateau_tolerance: float = 0.01  # relative decrease of the gap that still counts
    ratio: str = "token"  # or 'sequence', GSPO
    clip_low: float = 0.2
    clip_high: float = 0.2
    dual_clip: float = 3.0  # 0: off
    kl_coefficient: float = 0.0  # to the reference (initial) policy
    kl_kind: str = "k3_clamped"
    entropy_coefficient: float = 0.0  # bonus; the released scripts keep 0.001
    loss_agg_mode: str = "token-mean"
    normalize_std: bool = True  # divide advantages by the group's deviation
    statistics: str = "trajectory"  # or 'row', as the released code
    invalid_action_penalty: float = 0.0  # per invalid turn
    max_log_ratio: float = 10.0  # overflow guards of the released port
    max_gap: float = 20.0


@dataclasses.dataclass
class Teacher:
    kind: str = ""  # live, periodic, ema, frozen, external; "": the method's, or frozen
    every: int = 10  # iterations between copies of a periodic teacher
    rate: float = 0.05  # share of the student an ema teacher takes in per iteration
    path: str = ""  # external: Hugging Face folder; "": a warm start of another seed


@dataclasses.dataclass
class Author:
    """The policy as the writer of skills."""

    max_request_length: int = 512  # tokens; of a longer request the middle is left out
    max_answer_length: int = 96  # tokens
    rows: int = 16  # answers written at once
    temperature: float = 0.4  # 0: greedy


@dataclasses.dataclass
class Endpoint:
    """A server with the chat interface of OpenAI as the writer of skills.

    Failures are not reproduced: what goes on or replays has an answer that came later.
    """

    url: str = ""  # e.g. http://localhost:8000/v1
    model: str = ""  # as the server calls it
    temperature: float = 0.7
    max_tokens: int = 512  # of an answer; asks for a third as many words at most
    key_variable: str = "OPENAI_API_KEY"  # environment variable with the key
    timeout_s: float = 60.0  # of one attempt
    retries: int = 3
    concurrency: int = 8  # requests at a time
    lag: int = 1  # iterations from an episode to when its skill enters the bank
    late: str = "wait"  # for what is not there by then, or 'drop'
    record: str = ""  # file of requests and answers; what it answers is not asked again
    replay: str = ""  # file to answer from, without a server


@dataclasses.dataclass
class Skills:
    maker: str = "template"  # template, policy, endpoint
    comparative: bool = False  # one skill from a group's successes and failures
    # Endpoint: a skill enters when it is there; not reproducible. Of more requests than
    # 4 × concurrency or two iterations' worth that wait the oldest are dropped as late.
    asynchronous: bool = False
    retrieval: str = "ucb"  # a mixture: [shelf:]rule+…, see skills/retrieval.py
    exploration: float = 1.0  # c of UCB; 0.3 earns more over 500 shows of 20 skills
    embedding: str = "hashed"  # of retrieval; or sentence-transformers:MODEL
    per_group: int = 2  # best episodes of a group that are summarised
    capacity: int = 8  # skills per task
    family_capacity: int = 64  # skills per family that are of no task
    global_capacity: int = 64  # skills that are of no family
    similarity: float = 1.0  # trigram overlap that merges skills; 1: equal texts alone
    library: str = ""  # comma-separated files or folders of skills to begin with
    allow_own: bool = False  # a row may be shown the skill of its own episode
    author: Author = field(default_factory=Author)
    endpoint: Endpoint = field(default_factory=Endpoint)


@dataclasses.dataclass
class Optimizer:
    name: str = "adamw"  # adamw, lion, muon
    moments: str = "float32"  # of the first moments: float32, bfloat16
    learning_rate: float = 5e-4
    schedule: str = "cosine"  # to 0 at the end of the run, or constant
    beta1: float = 0.9  # of adamw and lion; muon's matrices have 0.95 of their own
    beta2: float = 0.999  # likewise; lion's authors use 0.99
    weight_decay: float = 0.01
    grad_clip: float = 1.0  # global norm
    minibatches: int = 4  # updates per iteration
    minibatch_rows: int = 0  # rows per update instead; 0: use `minibatches`
    micro_rows: int = 32  # rows scored at once
    micro_tokens: int = (
        0  # tokens scored at once, padding and both views; 0: micro_rows
    )
    length_buckets: int = 1  # lengths that rows are padded to; 1: the longest alone


@dataclasses.dataclass
class Imitate:
    """Warm start by behaviour cloning; off with a pretrained model."""

    steps: int = 600
    rows: int = 64  # plain rows a step, and as many skilled ones
    learning_rate: float = 2e-3
    episodes: int = 4000  # demonstrations
    tasks: int = 4000  # training tasks they are drawn from
    noise: float = 0.1  # chance of a random command in a demonstration
    skilled_noise: float = 0.1  # the same in the skilled ones
    misled: float = 0.25  # share of skills summarised from an episode without a hint


@dataclasses.dataclass
class Evaluate:
    every: int = 10  # iterations; 0: only before and after
    tasks: int = 256  # test panel
    samples: int = 1  # episodes per task at `temperature`
    temperature: float = 0.4
    top_k: int = 0  # only so many of the likeliest words are drawn; 0: all
    top_p: float = 1.0  # only the likeliest words that together reach it; 1: all
    greedy: bool = True  # also T = 0, before and after
    teacher_tasks: int = 128  # panel of the teacher
    teacher_every: int = 0  # iterations; 0: only before and after
    split: str = "test"  # panel of before and after; 'validation' to choose settings


@dataclasses.dataclass
class Config:
    seed: int = 0
    iterations: int = 40
    checkpoint_every: int = 5  # iterations
    keep_checkpoints: int = 2  # the newest
    keep_best: int = 0  # besides, by success in the evaluation of their iteration
    sample_trajectories: int = 4  # written to trajectories/ per iteration
    cache: str = ""  # warm starts and tokenizers; "": the user's cache folder
    writers: str = ""  # comma-separated extra sinks: tensorboard, wandb
    environment: Environment = field(default_factory=Environment)
    model: Model = field(default_factory=Model)
    mesh: Mesh = field(default_factory=Mesh)
    prompt: Prompt = field(default_factory=Prompt)
    rollout: Rollout = field(default_factory=Rollout)
    objective: Objective = field(default_factory=Objective)
    teacher: Teacher = field(default_factory=Teacher)
    skills: Skills = field(default_factory=Skills)
    optimizer: Optimizer = field(default_factory=Optimizer)
    imitate: Imitate = field(default_factory=Imitate)
    evaluate: Evaluate = field(default_factory=Evaluate)


def to_dict(config: Config) -> dict:
    """The settings as nested dicts of plain values, as config.json holds them."""
    return dataclasses.asdict(config)


def from_dict(values: Mapping) -> Config:
    """The settings that `to_dict` wrote; one that is not there keeps its default.

    Raises:
      ValueError: there is a setting we do not know.
    """
    return _filled(Config(), values, "")


def _filled(section, values: Mapping, prefix: str):
    known = [field.name for field in dataclasses.fields(section)]
    for name, value in values.items():
        if name not in known:
            raise ValueError(f"unknown setting {prefix}{name}; known: {known}")
        old = getattr(section, name)
        nested = dataclasses.is_dataclass(old)
        new = _filled(old, value, f"{prefix}{name}.") if nested else value
        setattr(section, name, new)
    return section


def flatten(values: Mapping, prefix: str = "") -> Iterator[tuple[str, object]]:
    """The settings of `to_dict` one by one, named as on the command line."""
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from flatten(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value


def difference(a: Mapping, b: Mapping) -> dict[str, tuple]:
    """The settings that differ: name → (in `a`, in `b`); one that is absent is None."""
    old, new = dict(flatten(a)), dict(flatten(b))
    return {
        name: (old.get(name), new.get(name))
        for name in dict.fromkeys([*old, *new])
        if old.get(name) != new.get(name)
    }
