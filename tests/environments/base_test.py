import json
from pathlib import Path

import pytest

from skillsd_jax.environments.base import SPLITS, in_split, parse_action, split_index

REFERENCE = Path(__file__).parents[1] / "reference" / "projection.json"
CASES = json.loads(REFERENCE.read_text())["alfworld"]


@pytest.mark.parametrize("i", range(len(CASES["inputs"])))
def test_required_thought_reproduces_the_released_projection(i):
    action, valid = parse_action(CASES["inputs"][i], require_think=True)
    assert action == CASES["actions"][i]
    assert valid is bool(CASES["valids"][i])


@pytest.mark.parametrize(
    ("reply", "action"),
    [
        ("<action>Go To Shelf 1</action>", "go to shelf 1"),
        ("<think>你好</think><ACTION> look\n</ACTION>", "look"),
        ("so </action> then <action>look</action>", "look"),
        ("<action>one</action><action>two</action>", "one"),
    ],
)
def test_a_readable_tag_is_enough_without_required_thought(reply, action):
    assert parse_action(reply) == (action, True)


@pytest.mark.parametrize(
    "reply",
    ["", "look", "<action>look", "look</action>", "<action> </action>", "\ud800"],
)
def test_a_reply_without_a_readable_tag_is_invalid_and_empty(reply):
    assert parse_action(reply) == ("", False)


def test_every_level_belongs_to_exactly_one_split():
    for i in range(200):
        assert sum(in_split(split, f"level {i}") for split in SPLITS) == 1


def test_unknown_split_is_refused_with_the_known_names():
    with pytest.raises(ValueError, match="'tests' is unknown; use one of train"):
        split_index("tests")
