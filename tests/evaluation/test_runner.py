"""`hdpo eval --benchmarks`: killed and started again on other ranks it ends with the same files; arms; what is refused."""
from __future__ import annotations

import json
import os
import signal
import subprocess
import sys

import pyarrow.parquet as pq
import pytest
from launching import BASE, Running, command, settings
from published import base64_picture, json_lines, refused, tsv

from hdpo.evaluation.items import Item
from hdpo.evaluation.questions import Pictures, chosen
from hdpo.state.dump import read_rollouts
from hdpo.toyworld.demo import cpu_environment
from hdpo.toyworld.eval_demo import write_miniatures
from hdpo.toyworld.words import PLAIN_SYSTEM, SYSTEM
from hdpo.toyworld.world import make_world

ROWS = 24


@pytest.fixture(scope="module")
def miniatures(tmp_path_factory):
    folder = tmp_path_factory.mktemp("miniatures")
    make_world(folder / "world", seed=1, train_rows=0, val_rows=200, demos=0)
    write_miniatures(folder / "world", folder / "data", ROWS)
    (folder / "tools.txt").write_text(SYSTEM)
    (folder / "plain.txt").write_text(PLAIN_SYSTEM)
    return folder


def _arguments(miniatures, run, *more: str) -> list[str]:
    return ["--benchmarks", "mathvista,logicvista", "--data", str(miniatures / "data"), "--arms", "tools,no_tools", "--bare",
            "--system", str(miniatures / "tools.txt"), "--system-plain", str(miniatures / "plain.txt"), "--samples", "2",
            "--config", "launch/configs/demo_rl.yaml", *more,
            *settings(run__folder=run, run__name="r", model__path=BASE, rollout__engine="hf", rollout__max_num_seqs=4,
                      data__cache=miniatures / "cache", tools__text_index=miniatures / "world/facts.sqlite",
                      tools__image_index=miniatures / "world/badges")]


def _kept(run) -> int:
    return sum(len(path.read_text().splitlines()) for path in (run / "r/benchmarks/answers").glob("*.jsonl"))


def _results(run) -> tuple[str, dict, list]:
    folder = run / "r/benchmarks"
    return ((folder / "predictions.jsonl").read_text(), json.loads((folder / "results.json").read_text()),
            pq.read_table(folder / "questions.parquet").to_pylist())


@pytest.mark.engine
@pytest.mark.slow
def test_killed_on_two_ranks_and_resumed_on_one_the_files_are_the_same(miniatures, tmp_path):
    whole = subprocess.run(command("launch/evaluate.py", _arguments(miniatures, tmp_path / "whole"), 1), capture_output=True,
                           text=True,
                           env=os.environ | cpu_environment(1), timeout=240)
    assert whole.returncode == 0, whole.stderr[-3000:]
    killed = Running(command("launch/evaluate.py", _arguments(miniatures, tmp_path / "killed"), 2), tmp_path / "log", {})
    killed.until(lambda: _kept(tmp_path / "killed") >= 20)
    os.killpg(killed.process.pid, signal.SIGKILL)
    killed.process.wait()
    assert 20 <= _kept(tmp_path / "killed") < 8 * ROWS, "it was killed in the middle"
    again = subprocess.run([sys.executable, "-m", "hdpo", "eval", *_arguments(miniatures, tmp_path / "killed")],
                           capture_output=True,
                           text=True, env=os.environ | cpu_environment(1), timeout=240)
    assert again.returncode == 0, again.stderr[-3000:]
    first, second = _results(tmp_path / "whole"), _results(tmp_path / "killed")
    assert first == second and len(first[2]) == 8 * ROWS
    assert {row["arm"] for row in first[2]} == {"tools", "no_tools"} and any(row["images"] for row in first[2])
    assert "wisdom" in first[1]["mathvista"] and first[1]["mathvista"]["settings"]["turns"] == 3
    rows = read_rollouts(tmp_path / "killed/r/benchmarks/eval/tools.parquet")
    assert len(rows) == 2 * ROWS and rows[0].images and "MathVista" in again.stdout and "not comparable" in again.stdout
    page = (tmp_path / "killed/r/benchmarks/report.html").read_text()
    assert "no_tools" in page and "data:image/png" in page
    other = subprocess.run([sys.executable, "-m", "hdpo", "eval", *_arguments(miniatures, tmp_path / "killed"), "--no-tools-form",
                            "refused"], capture_output=True, text=True, env=os.environ | cpu_environment(1), timeout=240)
    assert other.returncode == 2 and "no_tools_form" in other.stderr and "run.name" in other.stderr


def test_a_limit_takes_whole_clusters_spread_over_the_benchmark():
    items = [Item(str(k), "", "A", cluster=str(k // 4)) for k in range(80)]
    few = chosen(items, 10)
    assert len(few) == 12 and [item.id for item in few] == sorted((item.id for item in few), key=int)
    clusters = {item.cluster for item in few}
    assert len(clusters) == 3 and max(map(int, clusters)) > 9 and all(sum(i.cluster == c for i in few) == 4 for c in clusters)
    assert chosen(items, 0) == items and chosen([*items, Item("x", "", "", dropped="empty")], 100) == items


def test_pictures_are_found_in_rows_and_in_files(tmp_path):
    from hdpo.evaluation.benchmarks import open_benchmarks
    tsv(tmp_path / "vstar" / "VStarBench.tsv", [
        {"index": k, "question": "?", "A": "x", "B": "y", "answer": "A", "category": "c",
         "image": base64_picture(k)} for k in range(3)])
    benchmark = open_benchmarks("vstar")[0]
    items = list(benchmark.items(tmp_path / "vstar"))
    assert all(item.image is None for item in items), "no picture is held"
    pictures = Pictures(tmp_path / "vstar", str(tmp_path / "cache"))
    found = [pictures.read(item) for item in items]
    assert all(len(one) == 1 and one[0].startswith(b"\x89PNG") for one in found) and len(set(found)) == 3


@pytest.mark.parametrize(("arguments", "says"), [
    (["--benchmarks", "vstat"], "unknown benchmark vstat; did you mean vstar?"),
    (["--benchmarks", "vstar"], "there is no folder"), (["--benchmarks", "seed2plus"], "no published file of seed2plus is there"),
    (["--benchmarks", "treebench"], "column answer is missing; there are index, question, A, B"),
    (["--benchmarks", "charxiv_rq"], "scored by a judge and none is configured"),
    (["--benchmarks", "mathverse"], "scored by a judge and none is configured"),
    (["--benchmarks", "logicvista", "--arms", "tool"], "unknown arm tool"),
    (["--benchmarks", "logicvista", "--against", "nowhere.jsonl"], "no such file"),
])
def test_what_can_be_mended_is_one_line_before_anything_is_loaded(tmp_path, capsys, monkeypatch, arguments, says):
    monkeypatch.delenv("JUDGE_BASE_URL", raising=False)
    monkeypatch.setitem(sys.modules, "hdpo.compose.stage", None)        # nothing that loads a model may be imported
    (tmp_path / "seed2plus").mkdir()
    tsv(tmp_path / "treebench" / "TreeBench.tsv", [{"index": 0, "question": "?", "A": "x", "B": "y"}])
    tsv(tmp_path / "logicvista" / "LogicVista.tsv", [{"index": 0, "question": "?", "answer": "A", "skill": "x", "image": ""}])
    assert says in refused(["eval", "--data", str(tmp_path), *arguments], capsys)
    if "--arms" in arguments:
        return
    file = json_lines(tmp_path / "p.jsonl", [{"id": "0", "answer": "A"}])
    if "mathverse" not in arguments:
        assert says in refused(["score", "--data", str(tmp_path), "--predictions", str(file), *arguments], capsys)


@pytest.mark.parametrize(("line", "says"), [
    ("{", "line 2: not valid JSON"), ('{"id": "0", "answer": "B"}', "a second answer to '0'"),
    ('{"answer": "B"}', 'not an object with "id"'),
    ('{"id": "1"}', '"answer" is missing'), ('{"id": "1", "answer": "A", "calls": "two"}', '"calls" must be a whole number'),
    ('{"id": "9", "answer": "A", "benchmark": "logicvista"}', "logicvista has no row '9'")])
def test_a_bad_line_of_predictions_is_named(tmp_path, capsys, line, says):
    tsv(tmp_path / "logicvista" / "LogicVista.tsv",
        [{"index": k, "question": "?", "answer": "A", "skill": "x"} for k in range(2)])
    file = tmp_path / "p.jsonl"
    file.write_text('{"id": "0", "answer": "A"}\n' + line + "\n")
    assert says in refused(["score", "--benchmarks", "logicvista", "--data", str(tmp_path), "--predictions", str(file)], capsys)


def test_score_loads_neither_torch_nor_an_engine(tmp_path):
    tsv(tmp_path / "logicvista" / "LogicVista.tsv", [{"index": 0, "question": "?", "answer": "A", "skill": "x"}])
    json_lines(tmp_path / "p.jsonl", [{"id": "0", "answer": "A"}])
    program = ("import sys; from hdpo.cli import main; assert main(sys.argv[1:]) == 0; "
               "print([m for m in ('torch', 'vllm', 'transformers', 'datasets') if m in sys.modules])")
    done = subprocess.run([sys.executable, "-c", program, "score", "--benchmarks", "logicvista", "--data", str(tmp_path),
                           "--predictions",
                           str(tmp_path / "p.jsonl")], capture_output=True, text=True, check=True)
    assert done.stdout.endswith("[]\n"), done.stdout
