from pathlib import Path

import pytest

from skillsd_jax import config, presets, validation
from skillsd_jax.models import shapes

FILES = sorted(presets.FOLDER.glob("*.py"))
ALL = [
    (path.stem, preset) for path in FILES for preset in presets.load(str(path)).PRESETS
]


def build(name: str, preset: str) -> config.Config:
    return presets.load(str(presets.FOLDER / f"{name}.py")).get_config(preset)


def test_the_promised_presets_are_there():
    assert {
        ("household", ""),
        ("sokoban", ""),
        ("alfworld", ""),
        *((name, size) for name in ("sokoban", "alfworld") for size in shapes.SHAPES),
        *((path.stem, "smoke") for path in FILES),
    } <= set(ALL)


@pytest.mark.parametrize("name, preset", ALL)
def test_every_preset_is_valid_but_for_missing_weights(name, preset):
    settings = build(name, preset)
    published = preset.startswith("qwen")
    assert settings.model.required is published
    if published:
        with pytest.raises(validation.Refused, match="published weights"):
            validation.validate(settings)
        settings.model.required = False
    validation.validate(settings)


@pytest.mark.parametrize("name, preset", ALL)
def test_a_config_plays_the_environment_of_its_name(name, preset):
    assert build(name, preset).environment.name == name


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_an_unknown_preset_is_refused_with_the_known_ones(path):
    with pytest.raises(validation.Refused, match="unknown preset 'x'; known: .*smoke"):
        presets.load(str(path)).get_config("x")


@pytest.mark.parametrize(
    "name, published",
    [
        ("alfworld", {"qwen2.5-3b", "qwen2.5-7b", "qwen3-1.7b"}),
        ("sokoban", {"qwen3-4b"}),
    ],
)
def test_sizes_differ_in_the_thought_alone_and_say_what_is_published(name, published):
    texts = presets.load(str(presets.FOLDER / f"{name}.py")).PRESETS
    for size in shapes.SHAPES:
        settings = build(name, size)
        assert settings.prompt.thinking is size.startswith("qwen2.5")
        settings.prompt.thinking = build(name, "qwen3-4b").prompt.thinking
        assert settings == build(name, "qwen3-4b")
        assert texts[size].startswith("published") is (size in published)


def test_published_settings_are_the_published_ones():
    """Figures of the SDAR authors' ALFWorld scripts and of the Skill-SD paper."""
    for name in ("qwen2.5-3b", "qwen2.5-7b", "qwen3-1.7b"):
        alfworld = build("alfworld", name)
        assert alfworld.environment.alfworld.max_steps == 50
        assert alfworld.objective.sdar_coef == 0.01
        assert alfworld.evaluate.tasks == 128
    sokoban = build("sokoban", "qwen3-4b")
    assert sokoban.environment.train_tasks == 96
    assert sokoban.evaluate.tasks == 64
    assert sokoban.environment.sokoban.boxes == 2
    assert sokoban.environment.sokoban.max_steps == 40
    assert not build("alfworld", "qwen3-1.7b").prompt.thinking
    assert not sokoban.prompt.thinking
    assert build("alfworld", "qwen2.5-3b").prompt.thinking
    for settings in (alfworld, sokoban):
        assert settings.optimizer.learning_rate == 1e-6
        assert settings.objective.sdl_lambda == 1e-3
        assert settings.objective.kl_coefficient == 0.01
        assert (settings.rollout.prompts, settings.rollout.group_size) == (16, 8)
        assert settings.optimizer.minibatch_rows == 256
        assert settings.iterations == 150


def test_the_listing_has_one_line_for_every_preset(monkeypatch):
    monkeypatch.chdir(presets.FOLDER.parent)
    lines = presets.listing().splitlines()
    assert len(lines) == len(ALL)
    for name, preset in ALL:
        spec = f"--config=configs/{name}.py" + f":{preset}" * bool(preset)
        assert any(line.split()[0] == spec for line in lines)


def test_the_listing_can_be_pasted_from_any_folder(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    for line in presets.listing().splitlines():
        spec = line.split()[0].removeprefix("--config=")
        assert Path(spec.partition(":")[0]).is_file()


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--config=no.py"], r"no config file 'no.py'; known: .*household.py"),
        (["--config", "no.py"], "no config file 'no.py'"),
        (["--config"], "no config file ''"),
        (["FILE", "--config.sed=1"], "unknown setting --config.sed; known .* seed,"),
        (["FILE", "--config.objective.x=1"], "known in config.objective: name, sdl"),
        (["FILE", "--noconfig.model.x"], "known in config.model: path, shape"),
        (["FILE", "--config.objective=1"], "is a section; set one of: name"),
        (["FILE", "--config.seed.x=1"], "config.seed is a value, not a section"),
        (["FILE", "--config.seed=1.5"], "wants int, not '1.5'"),
        (["FILE", "--config.optimizer.grad_clip=x"], "wants float, not 'x'"),
        (["--config.seed=1", "FILE"], "must come after --config=FILE"),
    ],
)
def test_a_wrong_argument_is_refused_with_the_known_names(arguments, message):
    file = f"--config={presets.FOLDER / 'household.py'}"
    arguments = [file if argument == "FILE" else argument for argument in arguments]
    with pytest.raises(validation.Refused, match=message):
        presets.check(arguments)


def test_right_arguments_pass():
    file = str(presets.FOLDER / "household.py")
    presets.check(["--workdir", "a=b", f"--config={file}:smoke", "--config.seed=3"])
    presets.check(["--config", file, "--noconfig.model.required", "--config.seed", "3"])
    presets.check([])


def test_a_default_workdir_names_config_preset_objective_and_seed():
    settings = config.Config(seed=3)
    settings.objective.name = "sdar"
    name = presets.default_workdir
    assert name("configs/sokoban.py", settings) == "runs/sokoban-sdar-seed3"
    assert name("a/x.py:qwen3-4b", settings) == "runs/x-qwen3-4b-sdar-seed3"
