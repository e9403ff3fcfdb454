"""The import rules of docs/architecture.md, read from the code."""

import ast
import os
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "skillsd_jax"

# From the entry down. A module imports only from lower lines; names on one line do not
# import each other; a folder may import itself.
LINES = (
    ("main", "export", "inspect"),
    ("inspection", "train"),
    ("preflight", "savepoint"),
    ("agent", "panels", "practice", "summaries"),
    ("author", "evaluate", "experience", "imitate", "report"),
    ("rollout", "learner", "checkpoint", "metrics", "timing", "preemption"),
    (
        "episode",
        "guard",
        "keys",
        "optimizers",
        "packing",
        "showing",
        "slots",
        "teachers",
    ),
    ("sampler", "losses", "skills", "environments"),
    ("prompts",),
    ("models",),
    ("presets", "runfolder"),
    ("cluster", "manifest", "sharding", "tokens"),
    ("validation",),
    ("trajectory", "config", "artifacts"),
)
ENTRY_POINTS = LINES[0]
WITHOUT_JAX = (
    "environments",
    "skills",
    "episode",
    "showing",
    "prompts",
    "presets",
    "manifest",
    "runfolder",
    "validation",
    "trajectory",
    "config",
    "artifacts",
    "models.tokenizer",
    "models.template",
    "models.spelling",
    "main",
)
FILE_WRITERS = {
    "artifacts",
    "checkpoint",
    "metrics",
    "report",
    "skills.bank",
    "skills.recording",
    "models.huggingface",
    "models.tensor_files",
    "models.tokenizer",  # its save is given a path by artifacts.cached
    "agent",  # likewise: the warm start
}
OPTIONAL = {"alfworld", "textworld", "fast_downward", "wandb", "tensorboardX"}
OPTIONAL |= {"sentence_transformers"}
STANDARD = set(sys.stdlib_module_names)


@cache
def modules() -> dict[str, Path]:
    """Dotted name below the package → file."""
    found = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(PACKAGE).with_suffix("").parts
        name = ".".join(part for part in parts if part != "__init__")
        if name:
            found[name] = path
    return found


@cache
def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), str(path))


def imported(nodes) -> set[str]:
    """Dotted names that import statements among the nodes may load."""
    names = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"relative import in line {node.lineno}"
            # `from a import b`: b may be a module or a name in a.
            names.add(node.module)
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


@cache
def imports_of(name: str) -> set[str]:
    """Our own modules that a module imports, anywhere in it."""
    ours = modules()
    found = imported(ast.walk(tree(ours[name])))
    return {
        full.removeprefix("skillsd_jax.")
        for full in found
        if full.removeprefix("skillsd_jax.") in ours and full != name
    }


def reached(name: str) -> set[str]:
    """Our own modules that importing a module may load, itself included."""
    seen, todo = set(), [name]
    while todo:
        current = todo.pop()
        if current not in seen:
            seen.add(current)
            todo += imports_of(current)
    return seen


def line_of(name: str) -> int:
    top = name.split(".")[0]
    for number, line in enumerate(LINES):
        if top in line:
            return number
    raise AssertionError(f"give {top} a line in LINES and in docs/architecture.md")


@pytest.mark.parametrize("name", modules())
def test_imports_run_downward(name):
    line_of(name)
    for other in imports_of(name):
        inside = other.split(".")[0] == name.split(".")[0]
        assert inside or line_of(other) > line_of(name), f"{name} imports {other}"


@pytest.mark.parametrize("name", [n for n in modules() if n.startswith("losses")])
def test_losses_take_arrays_only(name):
    allowed = STANDARD | {"jax", "jaxtyping", "chex", "skillsd_jax"}
    found = imported(ast.walk(tree(modules()[name])))
    assert {full.split(".")[0] for full in found} <= allowed
    ours = {other for other in imports_of(name) if not other.startswith("losses")}
    sees_config = name.startswith("losses.objective")
    assert ours <= ({"config"} if sees_config else set())


def needs_engine(name: str, seen: frozenset[str] = frozenset()) -> bool:
    """Whether importing a module imports an optional package."""
    body = tree(modules()[name]).body
    found = imported(body)
    if OPTIONAL & {full.split(".")[0] for full in found}:
        return True
    ours = {full.removeprefix("skillsd_jax.") for full in found} & modules().keys()
    return any(needs_engine(o, seen | {name}) for o in ours - seen - {name})


def test_what_environment_workers_import_loads_no_jax_and_no_engine(tmp_path):
    """One process for all of them; it must also leave no file and print nothing."""
    names = [
        name
        for name in modules()
        if any(name == top or name.startswith(f"{top}.") for top in WITHOUT_JAX)
        and not needs_engine(name)
    ]
    code = (
        "import importlib, sys\n"
        f"for engine in {sorted(OPTIONAL)}: sys.modules[engine] = None\n"
        f"for name in {names}:\n"
        "    importlib.import_module('skillsd_jax.' + name)\n"
        "    heavy = {'jax', 'flax', 'transformers'} & set(sys.modules)\n"
        "    assert not heavy, (name, heavy)\n"
    )
    environment = {
        key: value for key, value in os.environ.items() if not key.startswith("XDG")
    }
    environment |= {"HOME": str(tmp_path), "PYTHONPATH": str(ROOT)}
    environment |= {"PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run(
        [sys.executable, "-c", code],
        check=False,
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env=environment,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == ""
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", modules())
def test_only_the_files_behind_an_environment_need_its_engine(name):
    """They are imported by its __init__; the package and the class never need it."""
    if needs_engine(name):
        assert name.startswith("environments.") and "_" in name


def test_rollout_and_learner_do_not_know_each_other():
    ours = modules()
    for name, other in (("rollout", "learner"), ("learner", "rollout")):
        if name in ours:
            assert other not in reached(name)


@pytest.mark.parametrize("name", modules())
def test_flags_are_read_in_entry_points_only(name):
    found = imported(ast.walk(tree(modules()[name])))
    flags = {"absl.flags", "absl.app", "ml_collections.config_flags"} & found
    assert not flags or name in ENTRY_POINTS


def writes(node: ast.AST) -> bool:
    """Whether a call opens a file for writing or hands data to one."""
    if not isinstance(node, ast.Call):
        return False
    called = node.func
    if isinstance(called, ast.Attribute):
        return called.attr in {"write_text", "write_bytes", "savez", "save_file"}
    if isinstance(called, ast.Name) and called.id == "open":
        modes = [*node.args[1:2], *(k.value for k in node.keywords if k.arg == "mode")]
        return any(set("wax+") & set(ast.literal_eval(mode)) for mode in modes)
    return False


@pytest.mark.parametrize("name", modules())
def test_files_are_written_in_known_places(name):
    """Elsewhere only at a path that artifacts gives."""
    if any(writes(node) for node in ast.walk(tree(modules()[name]))):
        assert name in FILE_WRITERS or "artifacts" in imports_of(name)


@pytest.mark.parametrize("name", modules())
def test_nnx_stops_at_the_jit_boundary(name):
    """nnx.jit and nnx.Optimizer cost many times the host time of plain jax.jit."""
    used = {
        node.attr
        for node in ast.walk(tree(modules()[name]))
        if isinstance(node, ast.Attribute)
        and isinstance(node.value, ast.Name)
        and node.value.id == "nnx"
    }
    assert not used & {"jit", "Optimizer", "grad", "value_and_grad"}


@pytest.mark.parametrize("name", modules())
def test_modules_and_functions_are_short(name):
    path = modules()[name]
    assert len(path.read_text(encoding="utf-8").splitlines()) <= 400
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.FunctionDef):
            docstring = (ast.get_docstring(node) or "").count("\n") + 1
            length = node.end_lineno - node.lineno + 1 - docstring
            assert length <= 45, f"{node.name} has {length} lines"
