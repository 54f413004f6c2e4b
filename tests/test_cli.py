"""Bad input: one clear line on standard error, a non-zero exit, and nothing written."""
from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from hdpo.cli import main
from hdpo.compose.stage import Stage
from hdpo.config import Config
from hdpo.errors import DataError

ROOT = Path(__file__).resolve().parents[1]
RL = "launch/configs/metis_8b_rl.yaml"
REFERENCE_VARIABLES = ("MODEL_PATH", "TRAIN_DATA", "VAL_DATA", "JUDGE_BASE_URL", "REMOTE_TOOL_SERVER_URL", "SERPER_API_KEY")


def hdpo(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    env = {k: v for k, v in os.environ.items() if k not in REFERENCE_VARIABLES} | environment
    return subprocess.run([sys.executable, "-m", "hdpo", *arguments], cwd=ROOT, env=env, capture_output=True, text=True,
                          timeout=120)


def one_line(done: subprocess.CompletedProcess[str]) -> str:
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr
    lines = [line for line in done.stderr.splitlines() if line.startswith("hdpo: error: ")]
    assert len(lines) == 1, done.stderr
    return lines[0]


def test_no_arguments_teach_the_commands() -> None:
    done = hdpo()
    assert done.returncode == 0 and "hdpo demo" in done.stdout and "--dry-run" in done.stdout


@pytest.mark.parametrize("command", ["demo", "sft", "rl", "eval", "report", "settings", "doctor", "tool-server", "judge"])
def test_every_command_has_help(command: str) -> None:
    done = hdpo(command, "--help")
    assert done.returncode == 0 and "usage" in done.stdout.lower()


@pytest.mark.parametrize("command", ["--help", "settings"])
def test_where_nobody_reads_the_output_any_more_nothing_is_said(command: str) -> None:
    process = subprocess.Popen([sys.executable, "-m", "hdpo", command], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    process.stdout.close()
    assert (process.stderr.read(), process.wait(timeout=60)) == (b"", 141)


def test_a_terminal_of_another_encoding_is_shown_what_it_can_show(tmp_path: Path) -> None:
    run = tmp_path / "läuft→"
    run.mkdir()
    (run / "metrics.jsonl").write_text('{"step": 1, "actor/grad_norm": 1.0}\n')
    done = hdpo("report", str(run), PYTHONIOENCODING="ascii")
    assert done.returncode == 0 and done.stdout.endswith("/l?uft?/report.html\n"), done.stderr


def test_an_unknown_command_names_the_known_ones() -> None:
    assert "unknown command train; commands are demo" in one_line(hdpo("train"))


def test_an_unknown_key_names_the_nearest_one() -> None:
    assert "did you mean hdpo.w_tool?" in one_line(hdpo("rl", "--config", RL, "--set", "hdpo.wtool=1"))


@pytest.mark.parametrize(("arguments", "message"), [
    ("rl", "model.path is not set: give --set model.path=FOLDER or MODEL_PATH=FOLDER"),
    ("rl --config launch", "launch is not a readable YAML file (Is a directory)"),
    ("rl --config nothing.yaml", "nothing.yaml: no such configuration file"),
    ("rl --set data.train=rows.parquet", "data.train: expected a list: data.train=[rows.parquet]"),
    ("rl --set reward.tool_cost.python=2", "reward.tool_cost is set as a whole: reward.tool_cost={python: ...}"),
    ("rl --set tools.own.x.function=a:b", "tools.own is set as a whole: tools.own={x: ...}"),
    ("rl --set run.seed=x", "run.seed: Input should be a valid integer"),
    ("doctor --gpus 8", "--gpus plans the memory of a run: name its --config too"),
    (f"doctor --config {RL} --gpus -1", "--gpus -1: must be above 0"),
    ("judge --set judge.base_url=http://127.0.0.1:9/v1", "judge.base_url: http://127.0.0.1:9/v1/models: "),
    ("demo --ranks 0", "--ranks 0: at least 1"),
    ("demo --run /dev/null/demo", "--run /dev/null/demo: "),
    ("demo --fresh --run tests", "--fresh: tests holds no demo and stays as it is"),
    ("report tests", "tests: no metrics.jsonl")])
def test_a_mistake_is_one_line_that_names_it(
        arguments: str, message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    for variable in (*REFERENCE_VARIABLES, "RANK", "WORLD_SIZE"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr("hdpo.errors._said", set())
    assert main(arguments.split()) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("hdpo: error: ") and message in line


def test_a_full_disk_anywhere_in_a_run_is_one_line(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hdpo.errors._said", set())
    base = str(ROOT / "src" / "hdpo" / "toyworld" / "assets" / "toy-base")
    with pytest.raises(DataError, match="^runs/run: No space left on device; checkpoints are intact, and the same"):
        with Stage(Config.model_validate({"model": {"path": base}})):
            Path("/dev/full").write_text("a metric")
    assert capsys.readouterr().err.count("No space left") == 1


def test_doctor_shows_what_there_is() -> None:
    done = hdpo("doctor")
    shown = {line.split()[0] for line in done.stdout.splitlines()}
    assert done.returncode == 0 and {"python", "hdpo", "torch", "vllm", "devices", "memory", "disk", "docker"} <= shown


@pytest.mark.parametrize(("settings", "message"), [
    ([], "model.path is not set"), (["--set", "model.path=/nowhere"], "model.path: /nowhere is no model folder")])
def test_doctor_goes_on_where_a_configuration_lacks_something_and_ends_with_1(settings: list[str], message: str) -> None:
    done = hdpo("doctor", "--config", RL, *settings)
    lines = done.stdout.splitlines()
    assert done.returncode == 1 and not done.stderr
    assert any(line.startswith("memory") and "MISSING" in line and message in line for line in lines)
    assert {"tools", "judge"} <= {line.split()[0] for line in lines}


def test_print_config_shows_the_reference_variables_and_no_secret() -> None:
    done = hdpo("rl", "--config", RL, "--print-config", MODEL_PATH="/models/8b", TRAIN_DATA="[a.parquet]",
                JUDGE_API_KEY="sk-very-secret")
    assert done.returncode == 0
    assert "path: /models/8b" in done.stdout and "- a.parquet" in done.stdout and "w_tool: 0.15" in done.stdout
    assert "secret" not in done.stdout


def test_a_dry_run_names_each_missing_thing_on_its_own_line() -> None:
    done = hdpo("rl", "--config", RL, "--dry-run")
    missing = [line for line in done.stdout.splitlines() if line.startswith("MISSING")]
    assert done.returncode == 2 and "4 things missing" in done.stdout
    assert [line.split()[1].rstrip(":") for line in missing] == ["model", "training", "tools", "judge"]


def test_a_parquet_without_a_needed_column_is_named(tiny_folder: Path, tmp_path: Path) -> None:
    pq.write_table(pa.table({"data_source": ["a"], "images": [[]]}), tmp_path / "rows.parquet")
    done = hdpo("rl", "--config", RL, "--dry-run", "--set", f"data.train=[{tmp_path / 'rows.parquet'}]")
    assert any("rows.parquet" in line and "prompt" in line for line in done.stdout.splitlines() if line.startswith("MISSING"))


def test_a_dry_run_says_that_copies_of_the_data_can_be_kept_nowhere(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from hdpo.cli import main
    (tmp_path / "file").touch()
    assert main(["rl", "--config", RL, "--dry-run", "--set", f"data.train=[{tmp_path / 'rows.parquet'}]", "--set",
                 f"data.cache={tmp_path / 'file'}"]) == 2
    said = f"MISSING  training data: {tmp_path / 'file'}: copies of data files can't be kept there (File exists); set data.cache"
    assert said in capsys.readouterr().out


def test_an_unreachable_tool_server_is_named() -> None:
    done = hdpo("rl", "--config", RL, "--dry-run", REMOTE_TOOL_SERVER_URL="http://127.0.0.1:9")
    assert any(line.startswith("MISSING  tools: http://127.0.0.1:9") for line in done.stdout.splitlines())
