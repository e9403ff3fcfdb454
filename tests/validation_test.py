import pytest

from skillsd_jax import config, validation


def changed(name: str, value) -> config.Config:
    result = config.Config()
    *sections, last = name.split(".")
    holder = result
    for section in sections:
        holder = getattr(holder, section)
    assert hasattr(holder, last)
    setattr(holder, last, value)
    return result


def test_the_defaults_are_valid():
    validation.validate(config.Config())


def test_every_listed_name_is_a_setting():
    names = dict(config.flatten(config.to_dict(config.Config())))
    listed = {*validation.CHOICES, *validation.MAY_BE_ZERO, *validation.SHARES}
    assert listed <= names.keys()


@pytest.mark.parametrize(
    "name, value, message",
    [
        ("rollout.group_size", 5, r"5 must divide rollout.rows=128; .* to 4 or 8"),
        ("rollout.group_size", 256, r"must divide .* to 128"),
        ("rollout.group_size", 0, "must be > 0"),
        ("teacher.kind", "slow", "'slow'; known: '', live, periodic, ema, frozen"),
        ("prompt.context", "full", "known: windowed, whole"),
        ("rollout.old_logprobs", "exact", "'exact'; known: sampled, recomputed"),
        ("rollout.correction_cap", -1.0, "must be ≥ 0"),
        ("rollout.correction_cap", 2.0, "set --config.rollout.old_logprobs=recomputed"),
        ("objective.gate", "sigmoid", "known: gap, entropy, soft_or"),
        ("objective.loss_agg_mode", "mean", "known: token-mean, seq-mean-token-sum"),
        ("evaluate.split", "train", "known: validation, test"),
        ("evaluate.temperature", -0.1, "must be ≥ 0"),
        ("optimizer.learning_rate", float("nan"), "must be > 0"),
        ("optimizer.learning_rate", float("inf"), "must be > 0"),
        ("imitate.noise", 1.5, "between 0 and 1"),
        ("prompt.max_response_length", -1, "must be > 0"),
        ("seed", -1, "must be ≥ 0"),
        ("model.kv_heads", 3, "must divide model.heads=4"),
        ("model.head_size", 15, "even"),
        ("model.path", "nowhere", "no config.json"),
        ("model.required", True, r"--config.model.path=FOLDER"),
        ("writers", "tensorboard,clu", "'clu'; known: tensorboard, wandb"),
        ("environment.sokoban.boxes", 9, "no room for 9 boxes"),
        ("rollout.hinted_groups", 17, "17 are more groups .* rollout.prompts=16"),
        ("skills.author.max_request_length", 64, "64 must be at least 256"),
    ],
)
def test_a_wrong_value_is_refused_with_what_to_do(name, value, message):
    with pytest.raises(validation.Refused, match=message):
        validation.validate(changed(name, value))


@pytest.mark.parametrize(
    "name, beta, works",
    [
        ("lion", {}, False),  # β2 = 0.999
        ("lion", {"beta2": 0.99}, True),
        ("adamw", {}, True),  # its β2 is of the second moment, which stays float32
        ("adamw", {"beta1": 0.999}, False),
    ],
)
def test_a_mean_that_bfloat16_would_hold_still_is_refused(name, beta, works):
    result = config.Config()
    result.optimizer = config.Optimizer(name=name, moments="bfloat16", **beta)
    if works:
        return validation.validate(result)
    with pytest.raises(validation.Refused, match="is too coarse for optimizer.beta"):
        validation.validate(result)
    result.optimizer.moments = "float32"
    validation.validate(result)


def test_a_window_too_small_for_one_reply_is_refused():
    settings = changed("prompt.context", "whole")
    settings.prompt.max_length = 55  # 48 + 8 are wanted
    with pytest.raises(validation.Refused, match="= 56"):
        validation.validate(settings)
    settings.prompt.max_length = 108
    validation.validate(settings)


def test_a_cap_goes_with_recomputed_log_probs():
    settings = changed("rollout.correction_cap", 2.0)
    settings.rollout.old_logprobs = "recomputed"
    validation.validate(settings)


def test_names_from_above_are_checked_when_given():
    settings = changed("objective.name", "ppo")
    validation.validate(settings)
    with pytest.raises(validation.Refused, match=r"'ppo'; known: grpo, sdar"):
        validation.validate(settings, {"objective.name": {"grpo": 1, "sdar": 2}})


def test_a_published_preset_takes_a_hugging_face_folder(tmp_path):
    settings = changed("model.required", True)
    (tmp_path / "config.json").write_text("{}")
    settings.model.path = str(tmp_path)
    validation.validate(settings)


def test_hinted_groups_do_not_go_with_several_draws():
    config = changed("rollout.hinted_groups", 2)
    config.rollout.draws = 2
    with pytest.raises(validation.Refused, match="rollout.draws=2 keeps some"):
        validation.validate(config)


@pytest.mark.parametrize("every, kept", [(10, 1), (0, 1), (7, 2), (20, 1)])
def test_the_best_of_what_is_never_evaluated_is_refused(every, kept):
    """With every=10, only the last iteration would have both: it is not evaluated."""
    settings = changed("evaluate.every", every)
    settings.iterations, settings.checkpoint_every, settings.keep_best = 20, 4, kept
    with pytest.raises(validation.Refused, match=f"keep_best={kept}.*to 4, or"):
        validation.validate(settings)
    settings.evaluate.every = 4
    validation.validate(settings)
