"""`hdpo score`: arms, samples, two runs against each other, the paper's row, Markdown; datasets by name."""
from __future__ import annotations

import json

import pytest
from published import ids, json_lines, parquet, picture, refused, tsv

from hdpo.cli import main
from hdpo.evaluation.benchmarks import BENCHMARKS, open_benchmarks
from hdpo.evaluation.table import markdown, text

GOLDS = ["A", "B", "C", "D", "A", "B", "C", "D", "A", "B"]


@pytest.fixture
def data(tmp_path):
    tsv(tmp_path / "logicvista" / "LogicVista.tsv", [
        {"index": k, "question": "?", "answer": gold, "skill": "inductive"} for k, gold in enumerate(GOLDS)])
    return tmp_path


def _score(data, lines, *options):
    file = json_lines(data / "p.jsonl", lines)
    assert main(["score", "--benchmarks", "logicvista", "--data", str(data), "--predictions", str(file), "--json",
                 str(data / "o.json"),
                 *options]) == 0
    return json.loads((data / "o.json").read_text())["logicvista"]


def _lines(right: set[int], arm: str = "tools", sample: int = 0, calls: int | None = None, of: int = 10) -> list[dict]:
    lines = [{"id": str(k), "answer": GOLDS[k] if k in right else "I", "arm": arm, "sample": sample} for k in range(of)]
    return [{**line, "calls": calls} for line in lines] if calls is not None else lines


def test_two_runs_are_compared_row_by_row(data, capsys):
    other = json_lines(data / "other.jsonl", _lines({0, 1}))
    found = _score(data, _lines({1, 2, 3, 4, 5, 6, 7}), "--against", str(other))["against"]
    assert (found["won"], found["lost"], found["n"]) == (6, 1, 10) and found["difference"] == pytest.approx(0.5)
    assert found["p"] == pytest.approx(2 * (1 + 7) / 2**7) and found["test"] == "McNemar, exact"
    shown = capsys.readouterr().out
    assert "+50.0" in shown and "Against" in shown


def test_both_arms_say_what_calls_rescued_and_harmed(data, capsys):
    lines = _lines({0, 1, 2, 3, 4, 5}, calls=1) + _lines({0, 1, 8}, "no_tools", calls=0)
    found = _score(data, lines)
    assert found["score"] == 0.6 and found["arms"]["no_tools"]["score"] == 0.3 and found["tool_use"]["tool_rate"] == 1.0
    wise = found["wisdom"]
    assert (wise["rescued"], wise["harmed"], wise["p0"], wise["p1"]) == (4, 1, pytest.approx(0.3), pytest.approx(0.6))
    assert wise["blind_call"] == 1.0 and wise["unneeded"] == pytest.approx(0.3) and not wise["split_samples"]
    assert "rescued 4, harmed 1 of 10" in capsys.readouterr().out


def test_samples_are_averaged_and_split(data):
    lines: list[dict] = []
    for k in range(4):
        lines += _lines({0, 1, 2}, sample=k, calls=1 if k < 2 else 0) + _lines({0}, "no_tools", k, calls=0)
    found = _score(data, lines)
    assert found["samples"] == 4 and found["score"] == pytest.approx(0.3) and found["n"] == 10 and found["answers"] == 40
    assert found["wisdom"]["needed"] == pytest.approx(0.2) and found["wisdom"]["needed_call"] == pytest.approx(0.5)
    assert found["wisdom"]["blind_call"] == pytest.approx(0.5) and found["wisdom"]["missed_call"] == pytest.approx(0.5)


def test_an_answer_that_failed_for_our_reasons_is_unscored(data):
    found = _score(data, [*_lines(set(range(9)), of=9), {"id": "9", "answer": None, "error": "tool server unreachable"}])
    assert (found["score"], found["n"], found["unscored"], found["unparsed"]) == (1.0, 9, 1, 0)
    found = _score(data, [*_lines(set(range(9)), of=9), {"id": "9", "answer": None}])
    assert (found["score"], found["n"], found["unscored"], found["unparsed"]) == (0.9, 10, 0, 1)


def test_the_papers_row_stands_beside_and_markdown_is_written(data, capsys):
    _score(data, _lines({0}), "--paper", "--markdown", str(data / "t.md"))
    assert "54.9" in capsys.readouterr().out and "| LogicVista | 10.0 |" in (data / "t.md").read_text()
    assert markdown([["a", "b", "c"], ["x|y", "1", "z"]]).splitlines()[2] == "| x\\|y | 1 | z |"
    assert len({len(line) for line in text([["a", "b", "c"], ["long", "1", "z"]]).splitlines()[:1]}) == 1


def test_a_file_that_answers_several_benchmarks_is_shared_out(data, capsys):
    tsv(data / "treebench" / "TreeBench.tsv", [{"index": k, "question": "?", "A": "x", "B": "y", "answer": "B", "category": "P/Q"}
                                               for k in range(2)])
    file = json_lines(data / "p.jsonl", [{"id": "0", "answer": "A", "benchmark": "logicvista"}, {"id": "1", "answer": "B"},
                                         {"id": "0", "answer": "A", "benchmark": "treebench"}])
    assert main(["score", "--benchmarks", "logicvista,treebench", "--data", str(data), "--predictions", str(file), "--json",
                 str(data / "o.json")]) == 0
    found = json.loads((data / "o.json").read_text())
    assert found["logicvista"]["score"] == 1.0 and found["treebench"]["score"] == 0.5
    assert [found[name]["n"] for name in found] == [2, 2]


def test_answers_to_nothing_are_refused_with_the_way_out(data, capsys):
    file = json_lines(data / "p.jsonl", [{"id": "v1_7", "answer": "A"}])
    error = refused(["score", "--benchmarks", "logicvista", "--data", str(data), "--predictions", str(file)], capsys)
    assert "no answer to any row of logicvista" in error and "'v1_7'" in error and "--ids" in error


def test_all_thirteen_columns_are_there_and_all_names_them():
    assert [benchmark.name for benchmark in open_benchmarks("all")] == list(BENCHMARKS) and len(BENCHMARKS) == 15
    assert [benchmark.name for benchmark in open_benchmarks("MMERealWorld_Lite,vstar")] == ["mmerealworld-lite", "vstar"]


def test_a_dataset_is_read_by_name(tmp_path, capsys, monkeypatch):
    """The hub is another machine's: what `datasets` would bring is read from a file under the same name."""
    import hdpo.data.store as store
    parquet(tmp_path / "test.parquet", [{"index": k, "question": "?", "answer": "A", "skill": "x",
                                         "image": {"bytes": picture(k), "path": None}} for k in range(3)])
    opened, real = [], store.open_rows

    def open_rows(sources, **how):
        opened.extend(sources)
        return real([str(tmp_path / "test.parquet")], **how)
    monkeypatch.setattr(store, "open_rows", open_rows)
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    assert ids("logicvista", "lscpku/LogicVista", capsys) == ["0", "1", "2"] and opened == ["lscpku/LogicVista:test"]
    monkeypatch.setattr(store, "open_rows", real)
    error = refused(["score", "--benchmarks", "logicvista", "--data", "nobody/nothing", "--ids"], capsys)
    assert "nobody/nothing:test" in error
