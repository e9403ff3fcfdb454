"""The documents say what is so."""

import re
from pathlib import Path

from skillsd_jax import presets
from skillsd_jax.losses import objective

ROOT = Path(__file__).parent.parent


def blocks(name: str) -> list[str]:
    """The Python blocks of a document."""
    text = (ROOT / "docs" / name).read_text(encoding="utf-8")
    return re.findall(r"```python\n(.*?)```", text, re.DOTALL)


def test_the_documented_method_works_and_has_fifteen_lines(tmp_path):
    config_file, _ = blocks("your_method.md")
    lines = [line for line in config_file.splitlines() if line.strip()]
    assert len([line for line in lines if not line.startswith("from")]) <= 15
    (tmp_path / "failed_k2.py").write_text(config_file, encoding="utf-8")
    known = set(objective.OBJECTIVES)
    try:
        module = presets.load(str(tmp_path / "failed_k2.py"))
        config = module.get_config()
        recipe = objective.recipe(config.objective.name)
        assert set(objective.OBJECTIVES) - known == {"failed_k2"}
        assert recipe.required(config.objective) == {"entropy", "teacher"}
    finally:
        for name in set(objective.OBJECTIVES) - known:
            del objective.OBJECTIVES[name]


def test_every_method_is_in_the_table_of_equations():
    text = (ROOT / "docs" / "equations.md").read_text(encoding="utf-8")
    for name in objective.OBJECTIVES:
        assert f"`{name}`" in text, name


def test_every_function_and_test_of_the_table_exists():
    text = (ROOT / "docs" / "equations.md").read_text(encoding="utf-8")
    code = "\n".join(
        path.read_text(encoding="utf-8")
        for folder in ("skillsd_jax", "tests")
        for path in (ROOT / folder).rglob("*.py")
    )
    named = re.findall(r"`(test_\w+)`", text)
    assert len(named) > 20
    for name in named:
        assert f"def {name}(" in code, name
    for module, function in re.findall(r"`(\w+)\.(\w+)`", text):
        assert re.search(
            rf"(def|class) {function}\b|^{function}\b", code, re.MULTILINE
        ), (
            module,
            function,
        )
