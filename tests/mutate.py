"""Breaks losses/ in every small way and asks the tests whether they notice.

  python tests/mutate.py                      every function of losses/
  python tests/mutate.py gates credit         some modules

A mutant is one file with one change: a sign flipped, + and − or two arguments swapped,
a stop_gradient, a mask or a `where` dropped, a constant changed, a comparison turned.
It is killed when the tests of losses/ fail; the unchanged file must pass them first.
Those that live and are listed in EQUIVALENT are shown there to compute the same; any
other survivor is a hole in the tests and makes this fail.
"""

import argparse
import ast
import copy
import os
import queue
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent import futures
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
LOSSES = Path("skillsd_jax/losses")

# (module, what the change is) → why it computes the same.
EQUIVALENT: dict[tuple[str, str], str] = {}
UNCHANGED = "unchanged"

SWAPS = {ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Div, ast.Div: ast.Mult}
TURNS = {
    ast.Lt: ast.GtE,
    ast.GtE: ast.Lt,
    ast.Gt: ast.LtE,
    ast.LtE: ast.Gt,
    ast.Eq: ast.NotEq,
    ast.NotEq: ast.Eq,
}
MASKS = {"mask", "weight", "once", "own", "real", "present", "seen"}


def mutants(source: str) -> Iterator[tuple[str, str]]:
    """(description, changed source) for every place that can be changed."""
    tree = ast.parse(source)
    places = [node for node in ast.walk(tree) if hasattr(node, "lineno")]
    skipped = _uninteresting(tree)
    for index, node in enumerate(places):
        if id(node) in skipped:
            continue
        for kind, change in _changes(node):
            fresh = copy.deepcopy(tree)
            target = [n for n in ast.walk(fresh) if hasattr(n, "lineno")][index]
            changed = _Replace(target, change(target)).visit(fresh)
            text = ast.unparse(ast.fix_missing_locations(changed))
            line = source.splitlines()[node.lineno - 1].strip()
            yield f"{node.lineno}: {kind} at {node.col_offset}: {line}", text


def _uninteresting(tree: ast.Module) -> set[int]:
    """Docstrings, annotations, defaults of dataclass fields, messages of errors."""
    skipped: set[int] = set()
    for node in ast.walk(tree):
        roots = []
        if isinstance(node, ast.Raise | ast.Import | ast.ImportFrom):
            roots = [node]
        if isinstance(node, ast.AnnAssign):
            roots = [node.annotation]
        if isinstance(node, ast.FunctionDef):
            named = [*node.args.args, *node.args.kwonlyargs]
            roots = [a.annotation for a in named if a.annotation] + [node.returns]
            roots += node.decorator_list
        if isinstance(node, ast.ClassDef):
            roots = node.decorator_list
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            roots = [node]
        for root in filter(None, roots):
            skipped |= {id(child) for child in ast.walk(root)}
    return skipped


def _changes(node: ast.AST):
    """(kind, function from the node to what takes its place)."""
    if isinstance(node, ast.BinOp) and type(node.op) in SWAPS:
        swapped = SWAPS[type(node.op)]
        yield "operator", lambda n: ast.BinOp(n.left, swapped(), n.right)
        for side in ("left", "right"):
            other = getattr(node, side)
            if isinstance(other, ast.Name | ast.Attribute) and _name(other) in MASKS:
                rest = "right" if side == "left" else "left"
                yield "mask dropped", lambda n, rest=rest: getattr(n, rest)
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
        yield "sign", lambda n: n.operand
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Invert):
        yield "inverted", lambda n: n.operand
    if isinstance(node, ast.Compare) and type(node.ops[0]) in TURNS:
        turned = TURNS[type(node.ops[0])]
        yield "comparison", lambda n: ast.Compare(n.left, [turned()], n.comparators)
    if isinstance(node, ast.Constant) and type(node.value) in (int, float):
        yield "constant", lambda n: ast.Constant(n.value + 1)
    if isinstance(node, ast.Call):
        name = _name(node.func)
        if name == "stop_gradient":
            yield "stop_gradient dropped", lambda n: n.args[0]
        if name == "where" and len(node.args) == 3:
            yield "where dropped", lambda n: n.args[1]
        if name in ("minimum", "maximum"):
            yield "bound dropped", lambda n: n.args[0]
        if len(node.args) == 2 and name not in ("minimum", "maximum", "getattr"):
            yield "arguments swapped", lambda n: _call(n, n.args[::-1])
        if len(node.args) >= 3 and name != "where":
            swapped_first = lambda n: _call(n, [n.args[1], n.args[0], *n.args[2:]])
            yield "arguments swapped", swapped_first


def _call(node: ast.Call, arguments: list[ast.expr]) -> ast.Call:
    return ast.Call(node.func, arguments, node.keywords)


def _name(node: ast.AST) -> str:
    return getattr(node, "attr", None) or getattr(node, "id", "")


class _Replace(ast.NodeTransformer):
    def __init__(self, target: ast.AST, replacement: ast.AST):
        self.target, self.replacement = target, replacement

    def visit(self, node: ast.AST):
        if node is self.target:
            return ast.copy_location(self.replacement, node)
        return super().visit(node)


def survives(module: Path, text: str, folder: Path) -> bool:
    """Whether every test of losses/ passes with this text in place of the module."""
    path = folder / module
    original = path.read_text()
    path.write_text(text)
    own = f"tests/losses/{module.stem}_test.py"
    if not (folder / own).exists():
        own = "tests/losses/objective_test.py"
    try:
        return _passes([own], folder) and _passes(
            ["tests/losses", f"--ignore={own}"], folder
        )
    finally:
        path.write_text(original)


def _passes(tests: list[str], folder: Path) -> bool:
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "JAX_COMPILATION_CACHE_DIR": str(folder.parent / "compiled"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
        "XLA_FLAGS": "--xla_backend_optimization_level=0",
        "PYTHONDONTWRITEBYTECODE": "1",
        "PYTHONPATH": str(folder),
    }
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider"]
    try:
        done = subprocess.run(
            [*command, "-m", "not slow", *tests],
            cwd=folder,
            env=environment,
            capture_output=True,
            timeout=900,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return False
    return done.returncode == 0


def verdicts(files: list[Path], scratch: Path, jobs: int) -> Iterator[tuple]:
    """(file, description, whether it lives) of every mutant, `jobs` at a time."""
    folders: queue.SimpleQueue[Path] = queue.SimpleQueue()
    for job in range(jobs):
        folder = scratch / f"copy{job}"
        folder.mkdir()
        for part in ("skillsd_jax", "tests", "pyproject.toml"):
            source = ROOT / part
            copying = shutil.copytree if source.is_dir() else shutil.copy
            copying(source, folder / part)
        folders.put(folder)

    def judge(task: tuple[Path, str, str]) -> tuple[Path, str, bool]:
        file, what, text = task
        folder = folders.get()
        try:
            return file, what, survives(file, text, folder)
        finally:
            folders.put(folder)

    tasks = []
    for file in files:
        source = (ROOT / file).read_text()
        tasks.append((file, UNCHANGED, ast.unparse(ast.parse(source))))
        tasks += [(file, what, text) for what, text in mutants(source)]
    with futures.ThreadPoolExecutor(jobs) as pool:
        yield from pool.map(judge, tasks)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("modules", nargs="*", help="stems of files; default: all")
    parser.add_argument("--list", action="store_true", help="count, run nothing")
    parser.add_argument("--jobs", type=int, default=2, help="mutants tested at once")
    arguments = parser.parse_args()
    files = [
        f.relative_to(ROOT)
        for f in sorted((ROOT / LOSSES).rglob("*.py"))
        if f.name != "__init__.py"
        and (not arguments.modules or f.stem in arguments.modules)
    ]
    if arguments.list:
        for file in files:
            for what, _ in mutants((ROOT / file).read_text()):
                print(f"{file.relative_to(LOSSES)}:{what}")
        return
    counts = {"killed": 0, "equivalent": 0, "alive": 0}
    with tempfile.TemporaryDirectory() as scratch:
        for file, what, lives in verdicts(files, Path(scratch), arguments.jobs):
            module = str(file.relative_to(LOSSES))
            if what == UNCHANGED:
                if not lives:
                    sys.exit(f"the tests fail on {file} as it is")
            elif not lives:
                counts["killed"] += 1
            elif (module, what.split(": ", 1)[1]) in EQUIVALENT:
                counts["equivalent"] += 1
            else:
                counts["alive"] += 1
                print("alive", f"{module}:{what}", flush=True)
    print(counts)
    sys.exit(bool(counts["alive"]))


if __name__ == "__main__":
    main()
