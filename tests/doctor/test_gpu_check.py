"""The GPU check runs whole on any machine, and a figure out of bounds, a step that fails or a process that dies is told."""
from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
import torch

from hdpo.doctor import gpu_check
from hdpo.doctor.doctor import main as doctor
from hdpo.doctor.gpu_check import Line, Lines, format_line, run_group


@pytest.mark.engine
@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="make gpu-check is the test on a device")
def test_the_check_runs_whole_on_a_cpu_and_writes_one_table_and_one_file(
        tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status = doctor(["--gpu", "--json", str(tmp_path / "check.json")])
    out = capsys.readouterr().out
    assert status == 0, out
    written = json.loads((tmp_path / "check.json").read_text())
    names = {line["name"] for line in written["lines"]}
    for part in ("fused loss", "attention of shared prompt", "parking, scratch", "gradient norm", "log-probs after sleep",
                 "weights that arrived changed", "greedy answers", "decode step"):
        assert any(name.startswith(part) for name in names), part
        assert part in out
    assert written["ok"] and written["machine"]["device"] == "CPU, toy sizes"
    assert all(line["ok"] for line in written["lines"]) and len(names) == len(written["lines"])


def test_a_line_out_of_its_bounds_or_without_a_figure_fails() -> None:
    assert Line("a", 1.0, "s", 1.0).ok and not Line("a", 1.01, "s", 1.0).ok and not Line("a", float("nan"), "s", 1.0).ok
    assert Line("a", 1.0, "x", 1.0, at_least=True).ok and not Line("a", 0.9, "x", 1.0, at_least=True).ok
    assert Line("a", 5.0).ok and Line("not here", None).ok and not Line("a", None, problem="died").ok
    assert "FAILED" in format_line(Line("a", 2.0, "s", 1.0)) and "FAILED: died" in format_line(Line("a", None, problem="died"))


def test_a_step_that_fails_is_a_line_and_the_next_goes_on() -> None:
    out = io.StringIO()
    lines = Lines(out)
    with lines.step("first"):
        raise RuntimeError("CUDA error:\n  an illegal memory access")
    lines.add("second", 1.0)
    told = [json.loads(text.removeprefix("LINE ")) for text in out.getvalue().splitlines()]
    assert told[0]["problem"] == "RuntimeError: CUDA error: an illegal memory access" and told[1]["name"] == "second"


def test_a_process_that_dies_keeps_its_lines_and_adds_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "dying_kernels.py").write_text(
        "import os, sys\nfrom hdpo.doctor.gpu_check import Lines\nLines().add('before', 1.0)\n"
        "print('device lost', file=sys.stderr, flush=True)\nos._exit(9)\n")
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}:{Path(gpu_check.__file__).parents[2]}")
    before, died = run_group("dying_kernels")
    assert before.name == "before" and before.ok
    assert not died.ok and died.problem == "exit status 9: device lost"
