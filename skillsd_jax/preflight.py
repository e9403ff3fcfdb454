"""What a run needs is there, and fits together, before anything starts."""

import contextlib
from collections.abc import Sequence

import jax

from skillsd_jax import (
    agent,
    cluster,
    learner,
    optimizers,
    rollout,
    sharding,
    summaries,
    tokens,
)
from skillsd_jax import config as settings
from skillsd_jax.environments import ENVIRONMENTS
from skillsd_jax.losses.objective import recipe
from skillsd_jax.losses.objective.terms import policy
from skillsd_jax.models import attention, huggingface, qwen, shapes, tokenizer
from skillsd_jax.skills import retrieval, stock, written
from skillsd_jax.validation import Refused, validate

# What a writer of skills costs; a template costs nothing.
COSTS = {"endpoint": "pays a server", "policy": "takes the time of every iteration"}


def check(config: settings.Config) -> None:
    """Values, method, skills, weights, environment, libraries, devices, in this order.

    Raises:
      Refused: the run cannot work; nothing has been changed.
    """
    validate(
        config,
        {
            "environment.name": ENVIRONMENTS,
            "model.shape": ("", *shapes.SHAPES),
            "model.attention": attention.ATTENTION,
            "model.remat": qwen.REMAT,
            "optimizer.name": optimizers.OPTIMIZERS,
        },
    )
    _check_method(config)
    _check_skills(config)
    _check_micro_tokens(config)
    _check_mesh(config, _probe(config))


def _check_method(config: settings.Config) -> None:
    """The method exists, nothing set is ignored, and its teacher can be had."""
    try:
        method = recipe(config.objective.name)
        method.scheduled(config.objective)
        method.required(config.objective)
    except ValueError as fault:
        raise Refused(str(fault)) from fault
    wrong = method.ignored(config.objective)
    if method.teacher and config.teacher.kind not in ("", method.teacher):
        wrong = f"teacher.kind={config.teacher.kind!r}: its is {method.teacher}"
    if config.rollout.draws > 1 and not method.rewarded:
        wrong = "rollout.draws: equal rewards are no reason to drop a group"
    if config.rollout.correction_cap and policy not in method.terms:
        wrong = "rollout.correction_cap: it has no policy gradient to correct"
    if config.rollout.old_logprobs == "recomputed" and method.data != "rollouts":
        wrong = "rollout.old_logprobs=recomputed: nobody sampled its episodes"
    if config.rollout.hinted_groups and (method.hinted or method.data != "rollouts"):
        wrong = "rollout.hinted_groups: it says itself who plays with a skill"
    if wrong:
        name = config.objective.name
        raise Refused(f"objective.name={name} does not take {wrong}")
    kind = learner.teacher_kind(method, config.teacher)
    external = kind == "external"
    if config.teacher.path and not external:
        raise Refused(
            f"teacher.path={config.teacher.path!r} is not used: the teacher of "
            f"objective.name={config.objective.name} is {kind}; set "
            "--config.teacher.kind=external or leave the path out"
        )
    if kind == "ema" and config.model.lora_rank:
        raise Refused(
            "teacher.kind=ema does not go with adapters: the product of averaged factors "
            "is no average of their products; take periodic"
        )
    if external and config.model.path and not config.teacher.path:
        raise Refused(
            f"objective.name={config.objective.name} with an external teacher needs "
            "its weights; pass --config.teacher.path=FOLDER, a Hugging Face folder of "
            "the student's vocabulary"
        )


def _check_skills(config: settings.Config) -> None:
    """Rules are known; whoever is to write can be asked, for skills that are shown."""
    skills, method = config.skills, recipe(config.objective.name)
    try:
        retrieval.check(skills.retrieval, skills.embedding)
        if cluster.first():  # who alone asks
            summaries.check(config)
    except ValueError as fault:
        raise Refused(str(fault)) from fault
    hinted = method.student_skill or config.rollout.hinted_groups
    reads = hinted or method.shown == "skill"
    wrong = ""
    if not reads:
        wrong = f"objective.name={config.objective.name} reads none of the bank"
    elif not retrieval.shows(skills.retrieval):
        wrong = f"skills.retrieval={skills.retrieval} shows none"
    if skills.maker in COSTS and wrong:
        raise Refused(
            f"skills.maker={skills.maker} {COSTS[skills.maker]} for skills that nobody "
            f"is shown: {wrong}; leave skills.maker=template, or show them"
        )


def _check_micro_tokens(config: settings.Config) -> None:
    """Rows of the longest kind, one for each part of a mesh, are scored at once."""
    if not config.optimizer.micro_tokens:
        return
    prompt, student = config.prompt, recipe(config.objective.name).student_skill
    plain = prompt.max_prompt_length + prompt.max_response_length
    if prompt.context == "whole":
        plain = prompt.max_length
    skilled = plain + prompt.max_skill_length
    hinted = student or config.rollout.hinted_groups > 0
    try:
        mesh = sharding.make(config.mesh)
        ways = 1 if mesh is None else mesh.shape["data"] * mesh.shape["fsdp"]
        lengths = [(skilled if hinted else plain, skilled)]
        tokens.buckets(lengths, 1, config.optimizer, ways)
    except ValueError as fault:
        raise Refused(str(fault)) from fault


def _probe(config: settings.Config) -> list[qwen.ModelConfig]:
    """Looks at the weights, starts an episode, reads the libraries for its families:
    what is missing ends the run now.

    Returns:
      The student's shape and that of a folder's external teacher.
    """
    try:
        networks = [agent.adapted(config.model, agent.shape(config.model))]
        if config.teacher.path:
            networks.append(huggingface.check(config.teacher.path))
            agent.check_words(config)
        room = None
        if config.model.path:
            words = tokenizer.load(config.model.path)
            # Reads what ends a reply: a name the tokenizer has not is refused here.
            player = rollout.Player(networks[0], words, config.prompt, rows=1)
            _ = player.stop_ids, player.guide
            room = written.Room(config.prompt.max_skill_length, player.prompter.size)
        environment = rollout.environment(config.environment, "train")
        with contextlib.closing(environment):
            environment.reset(0)
            stock.open_bank(config.skills, room, environment.families)
    except (ImportError, ValueError, OSError) as fault:
        raise Refused(str(fault)) from fault
    kind, dtype = config.model.attention, config.model.dtype
    for network in networks:
        size, backend = network.head_size, jax.default_backend()
        fault = attention.refuse(kind, size, dtype, backend)
        if fault:
            raise Refused(fault)
    return networks


def _check_mesh(config: settings.Config, networks: Sequence[qwen.ModelConfig]) -> None:
    """The devices are there, and rows, heads and weights can be divided among them."""
    try:
        mesh = sharding.make(config.mesh)
        if mesh is None:
            return
        for network in networks:
            shapes = jax.eval_shape(lambda n=network: qwen.init(n, jax.random.key(0)))
            sharding.check(shapes, mesh.shape)
    except ValueError as fault:
        raise Refused(str(fault)) from fault
    ways, rollouts = mesh.shape["data"] * mesh.shape["fsdp"], config.rollout
    # micro_tokens leaves it to tokens.buckets how many rows that is.
    micro = ways if config.optimizer.micro_tokens else config.optimizer.micro_rows
    for name, rows, unit in (
        ("optimizer.micro_rows", micro, ways),
        ("rollout.rows", rollouts.rows, ways * rollouts.cohorts),
    ):
        if rows % unit:
            by = " × rollout.cohorts" * (unit > ways)
            near = " or ".join(
                str(n * unit) for n in (rows // unit, -(-rows // unit)) if n
            )
            raise Refused(
                f"mesh.data × mesh.fsdp{by} = {unit} must divide {name}={rows}; set "
                f"{name.split('.')[1]} to {near}"
            )
    for network in networks:
        if network.heads % mesh.shape["tp"]:
            raise Refused(
                f"mesh.tp={mesh.shape['tp']} must divide the {network.heads} attention "
                "heads; set it to 1, 2 or another divisor"
            )
