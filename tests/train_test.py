"""A whole run at toy size: it leaves what it promises, repeats, resumes, refuses."""

import io
import json
import os
import signal
from pathlib import Path

import jax
import numpy as np
import pytest
from rich.console import Console

from skillsd_jax import (
    checkpoint,
    inspection,
    learner,
    manifest,
    metrics,
    packing,
    practice,
    runfolder,
    train,
    validation,
)
from skillsd_jax import config as settings
from skillsd_jax.environments.stage import Stage
from skillsd_jax.losses.objective import OBJECTIVES
from skillsd_jax.models import huggingface, qwen, tokenizer


def toy(tmp: Path, **objective) -> settings.Config:
    """Seconds, not minutes: nothing here learns anything."""
    config = settings.Config(iterations=4, checkpoint_every=2, cache=str(tmp / "cache"))
    config.environment.train_tasks = 6
    config.model.width, config.model.layers, config.model.hidden = 16, 1, 32
    config.model.heads = config.model.kv_heads = 2
    config.model.head_size = 8
    config.rollout.prompts, config.rollout.group_size = 2, 2
    config.rollout.rows = 4
    config.optimizer.minibatches, config.optimizer.micro_rows = 2, 8
    config.imitate.steps, config.imitate.rows = 5, 4
    config.imitate.episodes = config.imitate.tasks = 30
    config.evaluate.tasks = config.evaluate.teacher_tasks = 4
    config.evaluate.every = 2
    for name, value in objective.items():
        setattr(config.objective, name, value)
    return config


def figures(workdir: Path) -> list[dict]:
    rows = metrics.read(workdir / "metrics.jsonl")
    timing = ("seconds", "compilations")
    return [{k: v for k, v in row.items() if k not in timing} for row in rows]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    tmp = tmp_path_factory.mktemp("run")
    summary = train.run(toy(tmp), str(tmp / "work"))
    return tmp, summary


def test_a_run_leaves_what_it_promises(finished):
    tmp, summary = finished
    work = tmp / "work"
    for name in ("config.json", "metrics.jsonl", "summary.json", "skills.jsonl"):
        assert (work / name).is_file(), name
    assert any((work / "checkpoints").iterdir())
    assert len(list((work / "trajectories").glob("*.jsonl"))) == 4
    assert json.loads((work / "summary.json").read_text())["seed"] == 0
    for key in ("before", "after", "before_greedy", "after_greedy"):
        assert {"success", "low", "high", "n"} <= summary[key].keys()
    for key in ("teacher_before", "student_on_teacher_panel", "teacher_after"):
        assert summary[key].keys() == {"success", "low", "high", "n"}
    assert summary["data"] == "generated"
    assert summary["panel"]["size"] == 4 and len(summary["panel"]["hash"]) == 16


def test_every_iteration_has_every_figure(finished):
    rows = metrics.read(finished[0] / "work" / "metrics.jsonl")
    assert [row["iteration"] for row in rows] == [0, 1, 2, 3]
    wanted = {
        *("success", "return", "steps", "invalid_rate", "tokens", "environment_steps"),
        *("loss", "loss_policy", "loss_distillation", "gap", "gap_rms", "ratio"),
        *("clip_fraction", "entropy", "grad_norm", "seconds", "skills", "endings"),
    }
    for row in rows:
        assert wanted <= row.keys()
        assert {"held", "used", "cut", "dropped"} <= row["skills"].keys()
        assert {"asked", "made", "failed", "age", "uses"} <= row["skills"].keys()
        assert {"gap_action", "gap_turn_1", "gap_turn_3_4"} <= row.keys()
        assert {"rollout", "skills", "update"} <= row["seconds"].keys()
        assert 0 < row["padding"] < 1
    assert "evaluation" in rows[1]


def test_every_row_is_skilled_when_groups_have_siblings(finished):
    rows = metrics.read(finished[0] / "work" / "metrics.jsonl")
    assert all(row["skills"]["used"] >= 0.8 for row in rows[1:])


def test_nothing_compiles_after_the_second_iteration(finished):
    rows = metrics.read(finished[0] / "work" / "metrics.jsonl")
    assert rows[0]["compilations"] > 0
    assert [row["compilations"] for row in rows[2:]] == [0, 0]


def test_two_runs_with_one_seed_give_identical_metrics(finished):
    tmp, summary = finished
    again = train.run(toy(tmp), str(tmp / "again"))
    assert figures(tmp / "again") == figures(tmp / "work")
    assert again["after"] == summary["after"]


def test_both_views_of_an_episode_stand_side_by_side(finished):
    work = finished[0] / "work"
    config = runfolder.read_config(work)
    student = inspection.restore(config, work, None, lambda line: None)
    assert student.iteration == 4
    seen = inspection.inspect(student, config, seed=0)
    scored = 0
    for row, student_says in zip(seen.rows, seen.student):
        (reply,) = [segment for segment in row.student if segment.scored]
        found = student_says[: len(reply.tokens)]
        np.testing.assert_allclose(found, reply.logprobs, atol=1e-4)
        scored += len(reply.tokens)
    console = Console(file=io.StringIO(), width=200)
    console.print(inspection.render(seen))
    text = console.file.getvalue()
    assert text.count("⟦") == text.count("⟧") == 2 * scored  # in either view
    assert text.count("golden_workflow") == len(seen.rows)  # in the teacher's alone
    assert not set(text) & set("\x1b\x00")


def test_an_interrupted_run_goes_on_from_its_checkpoint(finished, monkeypatch):
    tmp, summary = finished
    whole = train.Run.iterate

    def broken(self, iteration):
        if iteration == 3:
            raise KeyboardInterrupt
        return whole(self, iteration)

    monkeypatch.setattr(train.Run, "iterate", broken)
    with pytest.raises(KeyboardInterrupt):
        train.run(toy(tmp), str(tmp / "resumed"))
    monkeypatch.setattr(train.Run, "iterate", whole)
    resumed = train.run(toy(tmp), str(tmp / "resumed"))
    assert figures(tmp / "resumed") == figures(tmp / "work")
    assert resumed["after"] == summary["after"]
    skills = [(tmp / name / "skills.jsonl").read_text() for name in ("work", "resumed")]
    assert skills[0] == skills[1]


def test_updates_that_are_not_finite_end_the_run_and_leave_the_batch(
    finished, monkeypatch
):
    """Counted over an interruption: two before it, the third after."""
    tmp, work = finished[0], finished[0] / "not-finite"
    means = learner.means
    monkeypatch.setattr(
        learner, "means", lambda sums: means(sums) | {"skipped_updates": 1.0}
    )
    whole = train.Run.iterate

    def broken(self, iteration):
        if iteration == 2:
            raise KeyboardInterrupt
        return whole(self, iteration)

    with monkeypatch.context() as patch:
        patch.setattr(train.Run, "iterate", broken)
        with pytest.raises(KeyboardInterrupt):
            train.run(toy(tmp), str(work))
    with pytest.raises(validation.Stopped, match="in iterations 1 to 3"):
        train.run(toy(tmp), str(work))
    with np.load(work / "not-finite-000002.npz") as saved:
        assert {"mask", "old", "student.tokens", "teacher.scored"} <= set(saved)
    assert len(metrics.read(work / "metrics.jsonl")) == 2


def test_a_full_disk_stops_the_run_and_the_same_command_goes_on(finished, monkeypatch):
    tmp, work = finished[0], finished[0] / "full"
    write = manifest.write

    def full(folder, about):
        if folder.name == ".part-4":
            raise OSError(28, "No space left on device")
        write(folder, about)

    with monkeypatch.context() as patch:
        patch.setattr(manifest, "write", full)
        with pytest.raises(validation.Stopped, match="free.*no space left; 2 is still"):
            train.run(toy(tmp), str(work))
    train.run(toy(tmp), str(work))
    assert figures(work) == figures(tmp / "work")


def test_rows_in_buckets_learn_the_same_and_keep_their_lengths_when_resumed(
    finished, monkeypatch
):
    tmp, _ = finished
    config = toy(tmp)
    config.optimizer.length_buckets, config.optimizer.micro_tokens = 4, 700
    train.run(config, str(tmp / "buckets"))
    rows, plain = figures(tmp / "buckets"), figures(tmp / "work")
    for key in ("loss", "loss_policy", "loss_distillation", "grad_norm"):
        assert rows[0][key] == pytest.approx(plain[0][key], abs=1e-5, rel=1e-4)
    told = metrics.read(tmp / "buckets" / "metrics.jsonl")
    assert [row["compilations"] for row in told[2:]] == [0, 0]
    whole = train.Run.iterate

    def broken(self, iteration):
        if iteration == 3:
            raise KeyboardInterrupt
        return whole(self, iteration)

    monkeypatch.setattr(train.Run, "iterate", broken)
    with pytest.raises(KeyboardInterrupt):
        train.run(config, str(tmp / "buckets_resumed"))
    monkeypatch.setattr(train.Run, "iterate", whole)
    monkeypatch.setattr(packing, "fitted", None)  # what was saved is enough
    train.run(config, str(tmp / "buckets_resumed"))
    assert figures(tmp / "buckets_resumed") == rows


def adapted(tmp: Path) -> settings.Config:
    config = toy(tmp)
    config.model.lora_rank, config.optimizer.name = 2, "muon"
    return config


def test_adapters_train_on_the_same_warm_start_and_are_saved_alone(finished):
    tmp, summary = finished
    work = tmp / "adapters"
    trained = train.run(adapted(tmp), str(work))
    assert trained["before"] == summary["before"]
    assert len(list((tmp / "cache" / "warm_starts").iterdir())) == 1
    _, saved, _ = checkpoint.read(work / "checkpoints", "params")
    paths = jax.tree_util.tree_leaves_with_path(saved)
    assert {path[-1].key for path, _ in paths} == {"lora_down", "lora_up"}
    assert all(np.abs(leaf).max() > 0 for _, leaf in paths)
    assert checkpoint.read(work / "checkpoints", "frozen")[1] is None
    rows = metrics.read(work / "metrics.jsonl")
    assert [row["compilations"] for row in rows[2:]] == [0, 0]


def test_an_adapter_run_resumes_exactly_and_on_its_own_base_alone(
    finished, monkeypatch
):
    tmp, _ = finished
    whole, work = train.Run.iterate, tmp / "adapters-resumed"
    train.run(adapted(tmp), str(tmp / "adapters-whole"))

    def broken(self, iteration):
        if iteration == 3:
            raise KeyboardInterrupt
        return whole(self, iteration)

    monkeypatch.setattr(train.Run, "iterate", broken)
    with pytest.raises(KeyboardInterrupt):
        train.run(adapted(tmp), str(work))
    monkeypatch.setattr(train.Run, "iterate", whole)
    with monkeypatch.context() as patch:
        patch.setattr(train.agent, "fingerprint", lambda params: "another")
        with pytest.raises(validation.Refused, match="trained with another base"):
            train.run(adapted(tmp), str(work))
    train.run(adapted(tmp), str(work))
    assert figures(work) == figures(tmp / "adapters-whole")


@pytest.mark.parametrize(
    "section, values, fault",
    [
        ("model", {"lora_rank": 2, "lora_targets": "q_proj"}, "matches none of"),
        ("model", {"lora_targets": "mlp"}, "not used without adapters"),
        ("model", {"shape": "qwen3-0.6b", "width": 32}, "decides on model.width"),
        ("teacher", {"path": "somewhere"}, "is not used: the teacher .* is frozen"),
        ("model", {"lora_rank": 2, "lora_targets": "("}, "is no regular expression"),
        ("model", {"attention": "cudnn"}, "wants a GPU and model.dtype=bfloat16"),
        ("model", {"attention": "flash"}, "unknown model.attention='flash'; known"),
        ("optimizer", {"name": "sgd"}, "unknown optimizer.name='sgd'; known: adamw"),
    ],
)
def test_a_model_that_cannot_be_trained_so_is_refused(tmp_path, section, values, fault):
    config = toy(tmp_path)
    for name, value in values.items():
        setattr(getattr(config, section), name, value)
    with pytest.raises(validation.Refused, match=fault):
        train.run(config, str(tmp_path / "work"))
    assert not (tmp_path / "work").exists()


def test_the_warm_start_is_the_same_for_every_objective(finished):
    tmp, summary = finished
    other = train.run(toy(tmp, name="grpo"), str(tmp / "grpo"))
    assert other["before"] == summary["before"]
    assert other["panel"] == summary["panel"]
    assert len(list((tmp / "cache" / "warm_starts").iterdir())) == 1
    assert "gap" not in figures(tmp / "grpo")[0]


def test_a_workdir_of_another_config_is_refused_with_the_difference(finished):
    tmp, _ = finished
    with pytest.raises(validation.Refused, match=r"objective.sdl_lambda: 0.1 there"):
        train.run(toy(tmp, sdl_lambda=0.5), str(tmp / "work"))


@pytest.mark.parametrize(
    "section,key", [("environment", "name"), ("objective", "name"), ("model", "shape")]
)
def test_an_unknown_name_is_refused_with_the_known_ones(tmp_path, section, key):
    config = toy(tmp_path)
    setattr(getattr(config, section), key, "nonsense")
    with pytest.raises(
        validation.Refused,
        match="(?s)nonsense.*(known|one of).*(household|grpo|qwen3-8b)",
    ):
        train.run(config, str(tmp_path / "work"))
    assert not (tmp_path / "work").exists()


def test_tasks_are_drawn_in_epochs_without_state():
    first = [t for i in range(4) for t in practice.drawn_tasks(0, i, 2, 8)]
    assert sorted(first) == list(range(8))
    second = [t for i in range(4, 8) for t in practice.drawn_tasks(0, i, 2, 8)]
    assert sorted(second) == list(range(8)) and first != second
    assert practice.drawn_tasks(1, 0, 8, 8) != practice.drawn_tasks(0, 0, 8, 8)


def test_a_worker_that_is_killed_costs_its_own_episodes_and_training_goes_on(
    tmp_path, monkeypatch
):
    """Whole histories in two cohorts, environments in two worker processes, old
    log-probs by the scorer, panels drawn from the likeliest five words."""
    config = toy(tmp_path)
    config.rollout.old_logprobs, config.rollout.correction_cap = "recomputed", 2.0
    config.evaluate.top_k = 5
    config.environment.workers = "processes"
    config.prompt.context, config.prompt.max_length = "whole", 400
    config.rollout.cohorts = 2
    whole, step = train.Run.iterate, Stage.step

    def killing(self, iteration):
        def once(stage, slots, texts):
            if stage is self.stage and len(killed) == 0 and iteration == 2:
                killed.append(stage.pids[0])
                os.kill(killed[0], signal.SIGKILL)
            return step(stage, slots, texts)

        monkeypatch.setattr(Stage, "step", once)
        return whole(self, iteration)

    killed = []
    monkeypatch.setattr(train.Run, "iterate", killing)
    summary = train.run(config, str(tmp_path / "work"))
    rows = metrics.read(tmp_path / "work" / "metrics.jsonl")
    assert len(rows) == 4 and killed and "after" in summary
    assert [row["faults"]["restarts"] for row in rows] == [0, 0, 1, 0]
    # Two of the four places were that worker's.
    lost = [row["endings"].get("error", 0) for row in rows]
    assert lost[:2] == [0, 0] and 1 <= lost[2] <= 2 and lost[3] == 0
    assert rows[2]["faults"]["errors"] == lost[2]
    assert [row["compilations"] for row in rows[1:]] == [0, 0, 0]
    for row in rows:
        assert row["old_difference_max"] < 1e-4 and row["old_difference_share"] == 0
        assert row["correction_mean"] == pytest.approx(1, abs=1e-4)
    assert summary["faults"]["restarts"] == 1


def test_whole_history_runs_and_scores_what_was_sampled(tmp_path):
    config = toy(tmp_path)
    config.iterations = 1
    config.prompt.context, config.prompt.max_length = "whole", 512
    summary = train.run(config, str(tmp_path / "work"))
    (row,) = metrics.read(tmp_path / "work" / "metrics.jsonl")
    assert row["rows"] == 4 and np.isfinite(row["loss"])
    # The weights have not moved when the first minibatch is scored.
    assert row["ratio"] == pytest.approx(1.0, abs=0.05)
    assert summary["after"]["n"] == 4


@pytest.mark.parametrize("name, cap", [("opsd", 2.0), ("sad", 0.0)])
def test_old_log_probs_that_have_no_use_are_refused(tmp_path, name, cap):
    config = toy(tmp_path, name=name)
    config.rollout.old_logprobs, config.rollout.correction_cap = "recomputed", cap
    message = f"{name} does not take rollout.(correction_cap: it has|old_logprobs=re)"
    with pytest.raises(validation.Refused, match=message):
        train.run(config, str(tmp_path / "work"))
    assert not (tmp_path / "work").exists()


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"schedules": "sdl_lambda=linear"}, "wants a number of iterations"),
        ({"schedules": "lambda=linear:3"}, "no coefficient 'lambda'; choose action_"),
        ({"name": "opd", "estimator": "k9"}, "estimator='k9' is unknown; choose k1"),
    ],
)
def test_a_method_that_cannot_work_is_refused(tmp_path, changes, message):
    with pytest.raises(validation.Refused, match=message):
        train.run(toy(tmp_path, **changes), str(tmp_path / "work"))
    assert not (tmp_path / "work").exists()


def test_skill_grpo_is_measured_with_and_without_skills(finished):
    tmp, _ = finished
    summary = train.run(toy(tmp, name="skill_grpo"), str(tmp / "skill_grpo"))
    assert {"after", "after_with_skills"} <= summary.keys()
    rows = metrics.read(tmp / "skill_grpo" / "metrics.jsonl")
    assert rows[0]["skills"]["used"] == 0  # the bank starts empty
    assert rows[-1]["skills"]["used"] > 0
    assert [row["compilations"] for row in rows[2:]] == [0, 0]
    assert rows[-1]["ratio"] == pytest.approx(1.0, abs=0.1)


def test_prompting_with_skills_leaves_the_weights_alone_and_measures_both(finished):
    tmp, _ = finished
    config = toy(tmp, name="skill_prompt")
    config.iterations = 2
    summary = train.run(config, str(tmp / "prompted"))
    assert summary["after"] == summary["before"]
    assert {"before_with_skills", "after_with_skills"} <= summary.keys()
    rows = metrics.read(tmp / "prompted" / "metrics.jsonl")
    assert "loss" not in rows[0] and rows[1]["skills"]["used"] > 0


def test_some_groups_may_play_and_learn_with_a_skill(finished):
    tmp, _ = finished
    config = toy(tmp)
    config.rollout.hinted_groups = 1
    train.run(config, str(tmp / "hinted"))
    rows = metrics.read(tmp / "hinted" / "metrics.jsonl")
    assert [row["compilations"] for row in rows[2:]] == [0, 0]
    assert rows[0]["skills"]["hints_missing"] > 0  # the bank starts empty
    assert all(row["skills"]["hints_dropped"] == 0 for row in rows)
    hinted = [row for row in rows if "success_hinted" in row]
    assert hinted and all(0 < row["skills"]["used"] < 1 for row in hinted)


def test_an_external_teacher_is_a_warm_start_of_another_seed_and_named(finished):
    tmp, _ = finished
    summary = train.run(toy(tmp, name="opd"), str(tmp / "opd"))
    assert summary["teacher"]["kind"] == "external"
    assert summary["teacher"]["warm start of seed"] == 1
    rows = metrics.read(tmp / "opd" / "metrics.jsonl")
    assert all(row["skills"]["used"] == 1 for row in rows)  # every row is taught
    assert abs(rows[0]["gap"]) > 1e-4


def test_an_external_teacher_of_real_weights_needs_a_folder(tmp_path, monkeypatch):
    config = toy(tmp_path, name="opd")
    (tmp_path / "config.json").write_text("{}")
    config.model.path = str(tmp_path)
    with pytest.raises(validation.Refused, match="--config.teacher.path=FOLDER"):
        train.run(config, str(tmp_path / "work"))


def test_a_folder_without_a_chat_template_is_refused_before_anything_starts(tmp_path):
    config = toy(tmp_path)
    shape = qwen.ModelConfig(19, 8, 1, 2, 1, 4, 8)
    huggingface.save(tmp_path, shape, qwen.init(shape, jax.random.key(0)))
    tokenizer.train(["some text"], []).save(tmp_path)
    said = tmp_path / "tokenizer_config.json"
    said.write_text("{}")
    config.model.path = str(tmp_path)
    with pytest.raises(validation.Refused, match="has no chat template"):
        train.run(config, str(tmp_path / "work"))
    assert not (tmp_path / "work").exists()


@pytest.mark.parametrize("folder", [False, True])
def test_a_library_that_could_never_be_shown_is_refused(finished, tmp_path, folder):
    """With a tokenizer at hand before anything starts, else before any iteration."""
    config = toy(finished[0])
    (tmp_path / "long.md").write_text("## Look\n" + "everywhere, twice " * 40)
    config.skills.library = str(tmp_path / "long.md")
    if folder:
        words = tokenizer.train(["some text"], [])
        shape = qwen.ModelConfig(words.vocab_size, 8, 1, 2, 1, 4, 8)
        huggingface.save(tmp_path, shape, qwen.init(shape, jax.random.key(0)))
        words.save(tmp_path)
        config.model = settings.Model(path=str(tmp_path))
    message = "none of the 1 skills of .*; the shortest needs [0-9]+, all of them fit"
    with pytest.raises(validation.Refused, match=message):
        train.run(config, str(tmp_path / "work"))
    assert (tmp_path / "work").exists() != folder
    assert not (tmp_path / "work" / "config.json").exists()


def test_sad_learns_from_the_expert(finished):
    tmp, _ = finished
    train.run(toy(tmp, name="sad"), str(tmp / "sad"))
    rows = metrics.read(tmp / "sad" / "metrics.jsonl")
    # The toy's own agent solves nothing; the expert runs out of turns now and then.
    assert np.mean([row["success"] for row in rows]) > 0.5
    assert rows[0]["loss_distillation"] > 0 and "ratio" not in rows[0]


@pytest.mark.slow
@pytest.mark.parametrize("name", OBJECTIVES)
def test_every_method_runs(finished, name):
    tmp, _ = finished
    train.run(toy(tmp, name=name), str(tmp / f"all-{name}"))
    rows = metrics.read(tmp / f"all-{name}" / "metrics.jsonl")
    assert len(rows) == 4
    if OBJECTIVES[name].terms:
        assert all(np.isfinite(row["loss"]) for row in rows)
    assert [row["compilations"] for row in rows[2:]] == [0, 0]
