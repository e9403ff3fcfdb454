"""Breaks losses/ in every small way and asks the tests whether they notice.

  python tests/mutate.py                      every function of losses/
  python tests/mutate.py gates credit         some modules
  python tests/mutate.py --own gates          by the module's own tests: a quick look

A mutant is one file with one change: a sign flipped, + and − or two arguments swapped,
a stop_gradient, a mask or a `where` dropped, a constant changed, a comparison turned.
It is killed when the tests of losses/ fail; the unchanged code must pass them first.
Those listed in equivalent_mutants.txt compute the same, for the reason given there,
and are not tried; any survivor is a hole in the tests and makes this fail.
"""

import argparse
import ast
import compileall
import copy
import importlib
import multiprocessing
import os
import re
import resource
import shutil
import signal
import sys
import tempfile
import threading
from collections.abc import Iterator
from concurrent import futures
from pathlib import Path
from typing import NoReturn

import pytest

ROOT = Path(__file__).resolve().parent.parent
LOSSES = Path("skillsd_jax/losses")
EQUIVALENT = ROOT / "tests" / "equivalent_mutants.txt"

UNCHANGED = "unchanged"
KILLERS = 12  # tests that are tried before the others
SECONDS, BYTES = 900, 12 << 30  # a mutant that needs more is dead

SWAPS = {ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Div, ast.Div: ast.Mult}
TURNS = {
    ast.Lt: ast.GtE,
    ast.GtE: ast.Lt,
    ast.Gt: ast.LtE,
    ast.LtE: ast.Gt,
    ast.Eq: ast.NotEq,
    ast.NotEq: ast.Eq,
}
COMMUTE = {"minimum", "maximum", "clip", "logaddexp", "promote_types"}
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
        if len(node.args) == 2 and name not in COMMUTE:
            yield "arguments swapped", lambda n: _call(n, n.args[::-1])
        if len(node.args) >= 3 and name not in COMMUTE | {"where"}:
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


class Judge:
    """One worker's copy of the project, and which tests have killed there before.

    Tests run in forks of a process that holds the libraries but nothing of ours; those
    that killed a mutant of the same file come first, for they will kill the next.
    """

    def __init__(self, scratch: Path, own: bool):
        self.own = own
        self.folder = Path(tempfile.mkdtemp(dir=scratch))
        self.killers: dict[Path, list[str]] = {}
        for part in ("skillsd_jax", "tests", "pyproject.toml"):
            source = ROOT / part
            copying = shutil.copytree if source.is_dir() else shutil.copy
            copying(source, self.folder / part)
        compileall.compile_dir(self.folder, quiet=2)  # forks write no bytecode

    def survives(self, module: Path, text: str) -> bool:
        """Whether every test of losses/ passes with this text in place of the module."""
        path = self.folder / module
        original = path.read_text()
        path.write_text(text)
        known = self.killers.setdefault(module, [])
        own = f"tests/losses/{module.stem}_test.py"
        if not (self.folder / own).exists():
            own = "tests/losses/objective_test.py"
        rest = [] if self.own else ["tests/losses", f"--ignore={own}"]
        try:
            for tests in ([*known[:KILLERS]], [own], rest):
                killer = self._failing(tests) if tests else None
                if killer:
                    known[:] = [killer, *(test for test in known if test != killer)]
                if killer is not None:
                    return False
            return True
        finally:
            path.write_text(original)

    def _failing(self, tests: list[str]) -> str | None:
        """The first test that fails, '' if it has no name; None: all pass."""
        output = self.folder / "output"
        child = os.fork()
        if not child:
            self._run(tests, output)
        late = threading.Timer(SECONDS, os.kill, (child, signal.SIGKILL))
        late.start()
        _, status = os.waitpid(child, 0)
        late.cancel()
        if os.waitstatus_to_exitcode(status) == 0:
            return None
        named = re.search(r"^FAILED (.+?)(?: - .*)?$", output.read_text(), re.MULTILINE)
        return named[1] if named else ""

    def _run(self, tests: list[str], output: Path) -> NoReturn:
        stream = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(stream, 1)
        os.dup2(stream, 2)
        resource.setrlimit(resource.RLIMIT_AS, (BYTES, BYTES))
        os.chdir(self.folder)
        sys.path.insert(0, str(self.folder))
        sys.dont_write_bytecode = True
        quiet = ["-x", "-q", "-p", "no:cacheprovider", "-m", "not slow"]
        quiet += ["--assert=plain", "--tb=no"]
        os._exit(int(pytest.main([*quiet, *tests])))


_judge: Judge | None = None  # each worker's own


def _prepare(scratch: Path, own: bool) -> None:
    global _judge
    os.environ |= {
        "JAX_PLATFORMS": "cpu",
        "JAX_COMPILATION_CACHE_DIR": str(scratch / "compiled"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
        "XLA_FLAGS": "--xla_backend_optimization_level=0",
    }
    for library in ("jax", "chex", "flax.nnx", "hypothesis.strategies", "optax"):
        importlib.import_module(library)
    _judge = Judge(scratch, own)


def _lives(file: Path, text: str) -> bool:
    return _judge.survives(file, text)


def verdicts(
    tasks: list[tuple[Path, str, str]], jobs: int, own: bool
) -> Iterator[tuple[Path, str, bool]]:
    """(file, description, whether it lives) of every mutant, `jobs` at a time.

    Args:
      tasks: file, description and changed text of each.
      jobs: workers.
      own: whether only the tests of a module's own name judge it.
    """
    fork = multiprocessing.get_context("fork")
    with (
        tempfile.TemporaryDirectory() as scratch,
        futures.ProcessPoolExecutor(jobs, fork, _prepare, (Path(scratch), own)) as pool,
    ):
        pending = [pool.submit(_lives, file, text) for file, _, text in tasks]
        for (file, what, _), one in zip(tasks, pending):
            yield file, what, one.result()


def name(file: Path, what: str) -> str:
    """A mutant as equivalent_mutants.txt names it: its line may move."""
    return f"{file.relative_to(LOSSES)}: {what.split(': ', 1)[1]}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("modules", nargs="*", help="stems of files; default: all")
    parser.add_argument("--list", action="store_true", help="count, run nothing")
    parser.add_argument("--own", action="store_true", help="own tests only")
    parser.add_argument("--jobs", type=int, default=2, help="mutants tested at once")
    arguments = parser.parse_args()
    files = [
        f.relative_to(ROOT)
        for f in sorted((ROOT / LOSSES).rglob("*.py"))
        if f.name != "__init__.py"
        and (not arguments.modules or f.stem in arguments.modules)
    ]
    made = [
        (file, *mutant)
        for file in files
        for mutant in mutants((ROOT / file).read_text())
    ]
    if arguments.list:
        for file, what, _ in made:
            print(f"{file.relative_to(LOSSES)}:{what}")
        return
    same = set(EQUIVALENT.read_text().splitlines())
    tried = [
        (file, what, text) for file, what, text in made if name(file, what) not in same
    ]
    counts = {"killed": 0, "equivalent": len(made) - len(tried), "alive": 0}
    plain = (files[0], UNCHANGED, (ROOT / files[0]).read_text())
    for file, what, lives in verdicts([plain, *tried], arguments.jobs, arguments.own):
        if what == UNCHANGED:
            if not lives:
                sys.exit("the tests fail on losses/ as it is")
            continue
        counts["alive" if lives else "killed"] += 1
        if lives:
            print("alive", f"{file.relative_to(LOSSES)}:{what}", flush=True)
        if sum(counts.values()) % 25 == 0:
            print(counts, file, file=sys.stderr, flush=True)
    print(counts)
    sys.exit(bool(counts["alive"]))


if __name__ == "__main__":
    main()
