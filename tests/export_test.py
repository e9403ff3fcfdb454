"""A trained student becomes a folder that says what it says, and nothing is lost."""

import json
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from skillsd_jax import agent, checkpoint, export, presets, runfolder, train
from skillsd_jax import config as settings
from skillsd_jax.models import huggingface, lora, qwen, tokenizer
from skillsd_jax.validation import Refused

ROOT = Path(__file__).parent.parent
TOKENS = np.arange(24, dtype=np.int32).reshape(2, 12)


def toy(tmp: Path, rank: int) -> settings.Config:
    config = settings.Config(iterations=2, checkpoint_every=1, cache=str(tmp / "cache"))
    config.environment.train_tasks = 6
    config.model.width, config.model.layers, config.model.hidden = 16, 2, 32
    config.model.heads = config.model.kv_heads = 2
    config.model.head_size, config.model.lora_rank = 8, rank
    config.rollout.prompts, config.rollout.group_size = 2, 2
    config.rollout.rows = 4
    config.optimizer.minibatches, config.optimizer.micro_rows = 2, 8
    config.imitate.steps, config.imitate.rows = 5, 4
    config.imitate.episodes = config.imitate.tasks = 30
    config.evaluate.tasks = config.evaluate.teacher_tasks = 4
    return config


@pytest.fixture(scope="module", params=[0, 2], ids=["whole", "adapters"])
def run(request, tmp_path_factory):
    """The folder of a run, and the logits of its student."""
    tmp = tmp_path_factory.mktemp("run")
    config = toy(tmp, request.param)
    train.run(config, str(tmp / "work"))
    made = agent.make_agent(config, lambda line: None)
    _, trained, _ = checkpoint.read(tmp / "work" / "checkpoints", "params")
    if request.param:
        trained = lora.join(trained, lora.split(made.params)[1])
    return tmp / "work", np.asarray(qwen.apply(made.player.model, trained, TOKENS))


def test_the_folder_says_what_the_student_says(run, tmp_path):
    work, logits = run
    line = export.export(work, tmp_path / "out", None, "float32")
    assert line.startswith(f"iteration 2 of {work} lies in")
    huggingface.check(tmp_path / "out")
    config, params = huggingface.load(tmp_path / "out")
    np.testing.assert_allclose(qwen.apply(config, params, TOKENS), logits, atol=1e-4)
    text = json.loads((tmp_path / "out" / "config.json").read_text())
    words = tokenizer.load(tmp_path / "out")
    assert text["eos_token_id"] == words.stop_id
    assert text["pad_token_id"] == words.pad_id
    assert words.decode(words.encode("go to fridge 1")) == "go to fridge 1"


def test_transformers_says_the_same(run, tmp_path):
    torch = pytest.importorskip("torch")
    import transformers

    work, logits = run
    export.export(work, tmp_path / "out", None, "float32")
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    with torch.no_grad():
        found = model(torch.tensor(TOKENS, dtype=torch.long)).logits.numpy()
    np.testing.assert_allclose(found, logits, atol=1e-4)
    words = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    assert words.eos_token == "<|im_end|>" and words.chat_template


def test_an_earlier_step_and_half_precision_are_written(run, tmp_path):
    work, logits = run
    export.export(work, tmp_path / "out", 1, "bfloat16")
    config, params = huggingface.load(tmp_path / "out")
    assert {leaf.dtype.name for leaf in jax.tree.leaves(params)} == {"bfloat16"}
    found = np.asarray(qwen.apply(config, params, TOKENS))
    assert 1e-4 < np.abs(found - logits).max() < 1.0


def test_what_cannot_be_exported_is_refused_and_nothing_is_written(run, tmp_path):
    work, _ = run
    out = tmp_path / "out"
    with pytest.raises(Refused, match="nowhere is no run: no config.json"):
        export.export(tmp_path / "nowhere", out, None, "float32")
    with pytest.raises(Refused, match="no checkpoint of step 0 .*there: 1, 2"):
        export.export(work, out, 0, "float32")
    assert not out.exists()
    for text in ("{", '{"modle": 1}', "[]"):
        (tmp_path / "config.json").write_text(text)
        with pytest.raises(Refused, match="config.json is damaged or of another"):
            export.export(tmp_path, out, None, "float32")
    with pytest.raises(Refused, match="is not empty; name a new folder"):
        export.export(work, work, None, "float32")
    out.write_text("a file")
    with pytest.raises(Refused, match="cannot be written"):
        export.export(work, out, None, "float32")


def test_weights_of_another_origin_are_refused(run, tmp_path, monkeypatch):
    """A tokenizer or a base that is not the run's: nothing is written."""
    work, _ = run
    now = agent.origin_of

    def changed(*parts):
        return now(*parts) | {"tokenizer": "another"}

    monkeypatch.setattr(agent, "origin_of", changed)
    with pytest.raises(Refused, match="trained with another tokenizer"):
        export.export(work, tmp_path / "out", None, "float32")
    assert list(tmp_path.rglob("*.safetensors")) == []


def test_adapters_are_merged_into_their_own_base_alone(run, tmp_path, monkeypatch):
    """One weight of a warm start that is made again differs: refused. A whole student
    needs no base."""
    work, _ = run
    adapters = runfolder.read_config(work).model.lora_rank
    made = agent._embedded

    def other(*arguments):
        words, model, params, record = made(*arguments)
        params["norm"] = params["norm"].at[0].add(0.25)
        return words, model, params, record

    monkeypatch.setattr(agent, "_embedded", other)
    if adapters:
        with pytest.raises(Refused, match="trained with another base"):
            export.export(work, tmp_path / "out", None, "float32")
    else:
        export.export(work, tmp_path / "out", None, "float32")


def test_an_export_that_fails_leaves_nothing_and_takes_nothing(
    run, tmp_path, monkeypatch
):
    """No half-written folder, and what lies beside is not touched."""
    work, _ = run
    beside = tmp_path / "out.partial" / "notes.txt"
    beside.parent.mkdir()
    beside.write_text("kept")

    def full(words, folder):
        raise OSError("no space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(tokenizer.Tokenizer, "save", full)
        with pytest.raises(Refused, match="no space left"):
            export.export(work, tmp_path / "out", None, "float32")
    assert beside.read_text() == "kept"
    assert {path.name for path in tmp_path.iterdir()} == {"out", "out.partial"}
    assert not any((tmp_path / "out").iterdir())
    monkeypatch.chdir(tmp_path / "out")
    export.export(work, Path("."), None, "float32")
    huggingface.check(tmp_path / "out")
    assert {path.name for path in tmp_path.iterdir()} == {"out", "out.partial"}


def test_a_run_that_saved_nothing_is_refused(tmp_path):
    (tmp_path / "config.json").write_text(
        json.dumps(settings.to_dict(toy(tmp_path, 0)))
    )
    with pytest.raises(Refused, match="checkpoint"):
        export.export(tmp_path, tmp_path / "out", None, "float32")


@pytest.mark.slow
def test_a_folder_made_by_transformers_trains_and_comes_back(tmp_path):
    """config.model.path end to end: a smoke run from a tiny Qwen2, and its export."""
    torch = pytest.importorskip("torch")
    import transformers

    words = tokenizer.train(["go to fridge 1, take apple 1\n"] * 3, ["fridge 1"])
    words.save(tmp_path / "words")
    torch.manual_seed(0)
    shape = transformers.Qwen2Config(
        vocab_size=words.vocab_size + 5,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        rope_parameters={"rope_type": "default", "rope_theta": 5e4},
        max_position_embeddings=777,
        tie_word_embeddings=False,
    )
    folder = tmp_path / "folder"
    transformers.Qwen2ForCausalLM(shape).save_pretrained(folder)
    named = transformers.AutoTokenizer.from_pretrained(tmp_path / "words")
    named.save_pretrained(folder)
    config = presets.load(str(ROOT / "configs" / "household.py")).get_config("smoke")
    config.model.path = str(folder)
    config.prompt.max_prompt_length, config.prompt.max_response_length = 400, 4
    config.prompt.max_skill_length = 300
    summary = train.run(config, str(tmp_path / "work"))
    assert summary["warm_start"] == {"path": str(folder)}
    export.export(tmp_path / "work", tmp_path / "out", None, "float32")
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    _, trained, _ = checkpoint.read(tmp_path / "work" / "checkpoints", "params")
    read, start = huggingface.load(folder)
    with torch.no_grad():
        found = model(torch.tensor(TOKENS, dtype=torch.long)).logits.numpy()
    np.testing.assert_allclose(qwen.apply(read, trained, TOKENS), found, atol=1e-4)
    assert np.abs(trained["embed"] - start["embed"]).max() > 0
    assert model.config.max_position_embeddings == 777


@pytest.mark.slow
def test_the_command_says_what_is_wrong_in_one_line(tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "skillsd_jax.export", f"--workdir={tmp_path}"]
        + [f"--out={tmp_path / 'out'}"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1 and done.stdout == ""
    assert done.stderr == f"refused: {tmp_path} is no run: no config.json in it\n"
