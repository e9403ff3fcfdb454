import dataclasses
import json

import pytest

from skillsd_jax import config


def test_settings_survive_json():
    settings = config.to_dict(config.Config())
    assert json.loads(json.dumps(settings)) == settings


def test_settings_come_back_from_what_a_run_wrote():
    changed = config.Config(seed=3)
    changed.model.lora_targets, changed.environment.alfworld.max_steps = "query", 7
    assert config.from_dict(json.loads(json.dumps(config.to_dict(changed)))) == changed
    assert config.from_dict({"model": {"width": 8}}).model.width == 8
    with pytest.raises(
        ValueError, match=r"unknown setting model\.wide; known: .*width"
    ):
        config.from_dict({"model": {"wide": 8}})


def test_every_setting_has_a_type_the_command_line_can_read():
    def leaves(section):
        for field in dataclasses.fields(section):
            value = getattr(section, field.name)
            if dataclasses.is_dataclass(value):
                yield from leaves(value)
            else:
                yield field.type, value

    for wanted, value in leaves(config.Config()):
        assert wanted in (int, float, str, bool)
        assert type(value) is wanted


def test_two_configs_share_no_section():
    a, b = config.Config(), config.Config()
    a.objective.name = "grpo"
    assert b.objective.name != "grpo"


def test_difference_names_settings_as_the_command_line_does():
    other = config.Config(seed=1)
    other.environment.sokoban.boxes = 2
    old, new = config.to_dict(config.Config()), config.to_dict(other)
    assert config.difference(old, new) == {
        "seed": (0, 1),
        "environment.sokoban.boxes": (1, 2),
    }
    assert config.difference(old, old) == {}
    assert config.difference({}, {"a": {"b": 1}}) == {"a.b": (None, 1)}
