import json
import os
import re

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


def test_a_workdir_is_claimed_once_and_taken_up_again(tmp_path):
    folder = str(tmp_path / "a" / "run")
    assert validation.claim_workdir(folder, config.Config()) is False
    assert validation.claim_workdir(folder, config.Config()) is True


@pytest.mark.parametrize("fault", [validation.Refused, KeyboardInterrupt])
def test_a_new_workdir_is_given_back_by_a_refusal_alone(fault, tmp_path):
    for folder, known in ((tmp_path / "new", False), (tmp_path / "old", True)):
        if known:
            validation.claim_workdir(str(folder), config.Config())
        with pytest.raises(fault), validation.claimed(str(folder), config.Config()):
            assert (folder / "config.json").exists()
            raise fault("no")
        given_back = fault is validation.Refused and not known
        assert (folder / "config.json").exists() != given_back


def test_a_workdir_of_other_settings_is_refused_with_the_difference(tmp_path):
    validation.claim_workdir(str(tmp_path), config.Config())
    before = (tmp_path / "config.json").read_text()
    other = changed("objective.sdl_lambda", 0.5)
    held = config.Objective().sdl_lambda
    message = re.escape(f"objective.sdl_lambda: {held} there, 0.5 now")
    with pytest.raises(validation.Refused, match=message):
        validation.claim_workdir(str(tmp_path), other)
    assert (tmp_path / "config.json").read_text() == before


def test_a_workdir_of_an_earlier_version_has_its_new_settings_at_their_defaults(
    tmp_path,
):
    validation.claim_workdir(str(tmp_path), config.Config())
    path = tmp_path / "config.json"
    earlier = json.loads(path.read_text())
    del earlier["skills"]["maker"], earlier["rollout"]["hinted_groups"]
    path.write_text(json.dumps(earlier))
    assert validation.claim_workdir(str(tmp_path), config.Config())
    with pytest.raises(validation.Refused, match="skills.maker: 'template' there"):
        validation.claim_workdir(str(tmp_path), changed("skills.maker", "policy"))


def test_hinted_groups_do_not_go_with_several_draws():
    config = changed("rollout.hinted_groups", 2)
    config.rollout.draws = 2
    with pytest.raises(validation.Refused, match="rollout.draws=2 keeps some"):
        validation.validate(config)


def test_a_workdir_that_cannot_be_written_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(validation.Refused, match="cannot be used: Not a directory"):
        validation.claim_workdir(str(tmp_path / "file" / "run"), config.Config())


def test_a_workdir_without_permission_is_refused(tmp_path, monkeypatch):
    # The file mode does not bind a superuser, so the system's answer is played.
    def denied(*_, **__):
        raise PermissionError(13, os.strerror(13))

    monkeypatch.setattr(validation, "write_atomic", denied)
    with pytest.raises(validation.Refused, match="Permission denied; pass --workdir"):
        validation.claim_workdir(str(tmp_path), config.Config())


def test_a_run_whose_folder_became_read_only_is_refused(tmp_path, monkeypatch):
    validation.claim_workdir(str(tmp_path), config.Config())

    def denied(*_, **__):
        raise OSError(30, os.strerror(30))

    monkeypatch.setattr(validation, "write_atomic", denied)
    with pytest.raises(validation.Refused, match="Read-only file system; pass"):
        validation.claim_workdir(str(tmp_path), config.Config())


@pytest.mark.parametrize("every, kept", [(10, 1), (0, 1), (7, 2), (20, 1)])
def test_the_best_of_what_is_never_evaluated_is_refused(every, kept):
    """With every=10, only the last iteration would have both: it is not evaluated."""
    settings = changed("evaluate.every", every)
    settings.iterations, settings.checkpoint_every, settings.keep_best = 20, 4, kept
    with pytest.raises(validation.Refused, match=f"keep_best={kept}.*to 4, or"):
        validation.validate(settings)
    settings.evaluate.every = 4
    validation.validate(settings)


def test_a_damaged_config_file_is_refused(tmp_path):
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(validation.Refused, match="damaged"):
        validation.claim_workdir(str(tmp_path), config.Config())
