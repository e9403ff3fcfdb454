import io
import json
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from skillsd_jax import metrics
from skillsd_jax.validation import Refused


def test_every_line_is_on_disk_at_once(tmp_path):
    writer = metrics.JsonLines(tmp_path / "m.jsonl")
    writer.write(0, {"success": np.float32(0.5), "n": np.int64(3), "s": {"a": 1}})
    assert metrics.read(tmp_path / "m.jsonl") == [
        {"iteration": 0, "success": 0.5, "n": 3, "s": {"a": 1}}
    ]
    writer.close()


def test_what_is_not_finite_becomes_null(tmp_path):
    writer = metrics.JsonLines(tmp_path / "m.jsonl")
    writer.write(
        0, {"a": float("nan"), "b": {"c": np.float32("inf")}, "d": [-math.inf]}
    )
    writer.close()
    found = json.loads((tmp_path / "m.jsonl").read_text(), parse_constant=pytest.fail)
    assert found == {"iteration": 0, "a": None, "b": {"c": None}, "d": [None]}


def test_a_resumed_run_rewrites_the_iterations_it_plays_again(tmp_path):
    path = tmp_path / "m.jsonl"
    first = metrics.JsonLines(path)
    for iteration in range(4):
        first.write(iteration, {"run": 1})
    first.close()
    with open(path, "a") as file:
        file.write('{"iteration": 4, "ru')  # the crash
    second = metrics.JsonLines(path, start=2)
    second.write(2, {"run": 2})
    second.close()
    rows = [(row["iteration"], row["run"]) for row in metrics.read(path)]
    assert rows == [(0, 1), (1, 1), (2, 2)]


def test_extra_sinks_get_the_same_figures(tmp_path):
    writer = metrics.open_writer("tensorboard", tmp_path, 0)
    writer.write(0, {"success": 0.5, "seconds": {"update": 2.0}, "note": "text"})
    writer.close()
    (events,) = (tmp_path / "tensorboard").iterdir()
    data = events.read_bytes()
    assert b"success" in data
    assert b"seconds/update" in data
    assert b"note" not in data
    assert len(metrics.read(tmp_path / "metrics.jsonl")) == 1


@pytest.mark.parametrize("extra", ["tensorboard", "wandb"])
def test_a_missing_sink_names_the_extra(extra, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorboardX", None)
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(Refused, match=rf"pip install 'skillsd_jax\[{extra}\]'"):
        metrics.open_writer(extra, tmp_path, 0)


def test_an_unknown_sink_is_refused(tmp_path):
    with pytest.raises(Refused, match="'clu'; known: tensorboard, wandb"):
        metrics.open_writer("clu", tmp_path, 0)


@pytest.mark.parametrize(
    "successes, n, low, high",
    [
        # Roots of (p − k/n)² = z² p (1 − p)/n, z = 1.96. For k = 0 they are 0 and
        # z²/(n + z²) = 3.8415/13.8415.
        (0, 10, 0.0, 0.27753),
        (10, 10, 1 - 0.27753, 1.0),
        # ½ ± z/2 · √(1/(n + z²)) = ½ ± 0.98 · √(1/13.8415).
        (5, 10, 0.5 - 0.26341, 0.5 + 0.26341),
        (0, 0, 0.0, 1.0),
    ],
)
def test_wilson_interval(successes, n, low, high):
    assert metrics.wilson(successes, n) == pytest.approx((low, high), abs=2e-5)


def test_wilson_covers_the_truth_as_often_as_it_says():
    """Exact coverage at n = 128, no sampling: between 93 and 97 % for middling p."""
    n = 128
    intervals = [metrics.wilson(k, n) for k in range(n + 1)]
    for p in (0.1, 0.3, 0.5, 0.9):
        coverage = sum(
            math.comb(n, k) * p**k * (1 - p) ** (n - k)
            for k, (low, high) in enumerate(intervals)
            if low <= p <= high
        )
        assert 0.93 < coverage < 0.97


def record(**more) -> dict:
    return {
        "success": 0.25,
        "gap": -0.1,
        "tokens": 600,
        "seconds": {"a": 1, "b": 2},
    } | (more)


def test_off_a_terminal_progress_is_plain_lines():
    stream, now = io.StringIO(), [0.0]
    with metrics.Progress(10, stream=stream, clock=lambda: now[0]) as progress:
        progress.say("before: 25 % [20, 30]")
        progress.iteration(4, record())
        now[0] = 20.0  # two iterations in 20 s; 3 of 10 are left: 30 s
        progress.iteration(6, record(gate=0.4, evaluation={"success": 0.5}))
    assert stream.getvalue() == (
        "before: 25 % [20, 30]\n"
        "iteration 5/10  success 25.0%  gap -0.100  gate –  tokens/s 200  left –\n"
        "iteration 7/10  success 25.0%  held-out 50.0%  gap -0.100  gate 0.40  "
        "tokens/s 200  left 0:30\n"
    )


def test_on_a_terminal_progress_is_one_live_display():
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    stream = Terminal()
    with metrics.Progress(10, stream=stream) as progress:
        progress.say("[bold] is text")
        progress.iteration(0, record())
    shown = stream.getvalue()
    assert "[bold] is text" in shown
    assert "iteration 1/10" in shown


def test_other_processes_show_nothing():
    stream = io.StringIO()
    with metrics.Progress(10, stream=stream, enabled=False) as progress:
        progress.say("text")
        progress.iteration(0, record())
    assert stream.getvalue() == ""


def panel(success: float, **more) -> dict:
    return {"success": success, "low": success - 0.05, "high": success + 0.05} | more


def test_the_table_goes_from_warm_start_to_trained():
    summary = {
        "config": {"evaluate": {"temperature": 0.4}},
        "before": panel(0.25, families={"heat": panel(0.2)}),
        "after": panel(0.75, families={"heat": panel(0.7)}),
        "teacher_before": panel(0.9),
        "panel": {"size": 256, "hash": "abc"},
        "data": "generated",
    }
    assert metrics.table(summary).splitlines() == [
        "                         warm start           trained              change",
        "T = 0.4                  25.0 % [20.0, 30.0]  75.0 % [70.0, 80.0]  +50.0 points",
        "  heat                   20.0 % [15.0, 25.0]  70.0 % [65.0, 75.0]",
        "teacher, expert's skill  90.0 % [85.0, 95.0]",
        "held-out panel: 256 tasks (generated), hash abc; [ ]: 95 % interval",
    ]


def test_the_summary_is_readable_json(tmp_path):
    metrics.write_summary(tmp_path / "s.json", {"a": np.float32("nan"), "b": "Δ"})
    assert json.loads((tmp_path / "s.json").read_text()) == {"a": None, "b": "Δ"}


def test_versions_name_what_a_result_depends_on():
    found = metrics.versions()
    assert {"python", "jax", "jaxlib", "flax", "optax", "numpy"} <= found.keys()


def test_the_commit_is_marked_when_files_differ(tmp_path, monkeypatch):
    def git(*arguments):
        identity = ("-c", "user.name=a", "-c", "user.email=a@b")
        subprocess.run(["git", *identity, *arguments], cwd=tmp_path, check=True)

    monkeypatch.setattr(metrics, "__file__", str(tmp_path / "metrics.py"))
    # No repository above a temporary folder may answer for it.
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(Path(tmp_path).parent))
    assert metrics.commit() is None
    (tmp_path / "metrics.py").write_text("1")
    git("init", "-q")
    git("add", ".")
    git("commit", "-q", "-m", "first")
    clean = metrics.commit()
    assert len(clean) == 40
    (tmp_path / "metrics.py").write_text("2")
    assert metrics.commit() == clean + "+"
