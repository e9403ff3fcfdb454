"""The documents say what is so."""

import importlib
import re
from pathlib import Path

import numpy as np
import pytest

from skillsd_jax import config as settings
from skillsd_jax import presets
from skillsd_jax.losses import objective

ROOT = Path(__file__).parent.parent
HOMES = [
    ".".join(path.relative_to(ROOT).with_suffix("").parts)
    for path in (ROOT / "skillsd_jax").rglob("*.py")
]


def blocks(name: str) -> list[str]:
    """The Python blocks of a document."""
    text = (ROOT / "docs" / name).read_text(encoding="utf-8")
    return re.findall(r"```python\n(.*?)```", text, re.DOTALL)


@pytest.fixture
def signals():
    rng = np.random.default_rng(0)
    mask = np.array([[1, 1, 0], [1, 0, 0]], np.float32)
    values = {n: rng.uniform(-3, -0.1, (2, 3)) for n in ("student", "old", "teacher")}
    return objective.Signals(
        **values,
        advantage=np.ones((2, 3)),
        entropy=np.ones((2, 3)),
        mask=mask,
        skilled=np.array([1.0, 0.0]),
        group_success=np.array([0.0, 0.0]),
    )


@pytest.fixture
def written(tmp_path):
    """Loads a block as the file it stands for; its methods are gone afterwards."""
    known = set(objective.OBJECTIVES)

    def load(block):
        path = tmp_path / "written.py"
        path.write_text(block, encoding="utf-8")
        return presets.load(str(path))

    yield load
    for name in set(objective.OBJECTIVES) - known:
        del objective.OBJECTIVES[name]


def test_the_documented_method_works_and_has_fifteen_lines(written, signals):
    block, _ = blocks("your_method.md")
    lines = [line for line in block.splitlines() if line.strip()]
    assert len([line for line in lines if not line.startswith("from")]) <= 15
    config = written(block).get_config()
    recipe = objective.recipe(config.objective.name)
    assert recipe.required(config.objective) == {"entropy", "teacher"}
    terms = recipe.loss(signals, config.objective).terms
    gap = signals.teacher - signals.student
    wanted = 0.1 * gap**2 / 2 * signals.mask * signals.skilled[:, None]
    np.testing.assert_allclose(terms["distillation"], wanted, rtol=1e-5)


def test_the_documented_term_works(written, signals):
    _, block = blocks("your_method.md")
    hinge = written(block).hinge
    recipe = objective.Recipe("hinge", source="ours", terms=(hinge,), shown="skill")
    term = recipe.loss(signals, settings.Objective()).terms["hinge"]
    gap = signals.teacher - signals.student
    wanted = np.maximum(0, 0.5 - gap) * signals.mask * signals.skilled[:, None]
    np.testing.assert_allclose(term, wanted, rtol=1e-5, atol=1e-6)


def test_every_method_is_in_the_table_of_equations():
    text = (ROOT / "docs" / "equations.md").read_text(encoding="utf-8")
    for name in objective.OBJECTIVES:
        assert f"`{name}`" in text, name


def test_every_function_and_test_of_the_table_exists():
    text = (ROOT / "docs" / "equations.md").read_text(encoding="utf-8")
    tests = "".join(
        path.read_text(encoding="utf-8") for path in (ROOT / "tests").rglob("*.py")
    )
    named = re.findall(r"`(test_\w+)`", text)
    assert len(named) > 20
    for name in named:
        assert f"def {name}(" in tests, name
    for name, function in re.findall(r"`(\w+)\.(\w+)`", text):
        homes = [
            importlib.import_module(home) for home in HOMES if home.endswith(f".{name}")
        ]
        assert any(hasattr(home, function) for home in homes), (name, function)
