"""benchmarks/compare.py: what counts as a regression, and which baseline a result belongs to."""
from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))
from common import Figure, report  # noqa: E402
from compare import baseline_path, compare  # noqa: E402


def result(**figures: Figure) -> dict:
    return {"bench": "b", "short": True, "environment": {"cuda": None},
            "figures": {name: vars(figure) for name, figure in figures.items()}}


@pytest.mark.parametrize(("old", "new", "regressed"), [
    (Figure(1.0, "x", "lower"), Figure(1.19, "x", "lower"), False),
    (Figure(1.0, "x", "lower"), Figure(1.21, "x", "lower"), True),
    (Figure(10.0, "x", "higher"), Figure(7.9, "x", "higher"), True),
    (Figure(10.0, "x", "higher"), Figure(99.0, "x", "higher"), False),
    (Figure(1.0, "x", "lower", goal=1.1), Figure(1.15, "x", "lower", goal=1.1), True),    # within tolerance, but a goal is lost
    (Figure(0.0, "", "lower", goal=0.0), Figure(1e-9, "", "lower", goal=0.0), True),
    (Figure(1.0, "x", "lower"), Figure(float("nan"), "x", "lower"), True),
])
def test_a_regression_is_worse_than_the_tolerance_or_a_lost_goal(old: Figure, new: Figure, regressed: bool) -> None:
    assert bool(compare(result(a=old), result(a=new))) is regressed


def test_a_figure_that_is_missing_is_a_regression_and_a_new_one_is_not() -> None:
    one, two = Figure(1.0, "x", "lower"), Figure(2.0, "x", "lower")
    assert compare(result(a=one, b=two), result(a=one)) == ["b: missing"]
    assert compare(result(a=one), result(a=one, b=two)) == []


def test_every_baseline_lies_where_a_result_of_its_kind_looks_for_it_and_equals_itself() -> None:
    for path in sorted((BENCHMARKS / "baselines").glob("*.json")):
        held = json.loads(path.read_text())
        assert baseline_path(held) == path and compare(held, held) == []


def test_parts_measured_apart_end_up_in_one_file_and_a_result_without_a_baseline_is_said(tmp_path: Path) -> None:
    path = tmp_path / "b.json"
    report("nameless", {"a": Figure(1.0, "x", "lower")}, {"one": 1}, path, True)
    report("nameless", {"b": Figure(2.0, "x", "lower")}, {"two": 2}, path, True, keep=True)
    held = json.loads(path.read_text())
    assert set(held["figures"]) == {"a", "b"} and held["details"] == {"one": 1, "two": 2}
    done = subprocess.run([sys.executable, BENCHMARKS / "compare.py", path], capture_output=True, text=True)
    assert done.returncode == 0 and "no baseline nameless_c" in done.stdout
