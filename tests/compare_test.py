"""The table of benchmarks/compare.py, of runs that differ in what `--by` names."""

import json
import runpy
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parent.parent / "benchmarks" / "compare.py"


@pytest.fixture
def compare(tmp_path, monkeypatch):
    """Runs the script on two runs of sdar, one shown skills by ucb and one none."""
    folders = []
    for rule, success in (("ucb", 0.5), ("none", 0.25)):
        summary = {
            "config": {"objective": {"name": "sdar"}, "skills": {"retrieval": rule}},
            "seed": 0 if rule == "ucb" else 1,
            "panel": {"hash": "x"},
            "before": {"success": 0.1},
            "after": {"success": success},
            "environment_steps": 1000,
        }
        folder = tmp_path / rule
        folder.mkdir()
        (folder / "summary.json").write_text(json.dumps(summary))
        folders.append(str(folder))

    def run(*flags):
        monkeypatch.setattr(sys, "argv", ["compare.py", *folders, *flags])
        runpy.run_path(str(SCRIPT), run_name="__main__")

    return run


def test_a_baseline_that_no_run_is_of_is_refused_where_labels_are_chosen(compare):
    with pytest.raises(SystemExit, match="no run is 'grpo'; set .* of: none, ucb"):
        compare("--by=skills.retrieval")


@pytest.mark.parametrize("name", ["skills.rule", "skills.retrieval.rule", "", "skill"])
def test_an_unknown_setting_is_named(compare, name):
    with pytest.raises(SystemExit, match=f"no setting {name!r}"):
        compare(f"--by=objective.name,{name}")


def test_a_table_has_a_row_per_label(compare, capsys):
    compare("--by=skills.retrieval", "--baseline=none")
    rows = capsys.readouterr().out.splitlines()
    assert rows[0].startswith("| skills.retrieval |") and "minus none" in rows[0]
    assert [row.split(" | ")[0] for row in rows[2:]] == ["| none", "| ucb"]


def test_without_grpo_the_table_has_no_difference(compare, capsys):
    compare()
    rows = capsys.readouterr().out.splitlines()
    assert rows[0].startswith("| objective.name |") and len(rows) == 3
    assert rows[2].startswith("| sdar | 2 |") and rows[2].endswith("| – |")
