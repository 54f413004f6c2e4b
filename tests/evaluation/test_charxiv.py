"""CharXiv: four descriptive questions and one reasoning question a figure, all judged, under their own rubrics."""
from __future__ import annotations

import json

import pytest
from judge_server import JudgeServer, say
from published import as_json, ids, json_lines, parquet, picture, refused, scored

FIGURES = {"7": ([1, 8, 13, 19], ["Loss", "0.5", "a, b", "4"], [0, 0], "1.20", 4),
           "3": ([2, 11, 16, 18], ["Not Applicable", "Yes", "rises", "1 by 2"], [1, 2], "Red, Blue", 1),
           "12": ([3, 10, 17, 12], ["y", "2", "3", "9"], "lower plot", "about", 2)}


def _json(folder):
    descriptive, reasoning, about = {}, {}, {}
    for figure, (qids, answers, place, gold, kind) in FIGURES.items():
        descriptive[figure] = {"figure_id": int(figure), "num_subplots": 2, "subplot_loc": place, "qids": qids,
                               "answers": answers}
        reasoning[figure] = {"figure_id": int(figure), "query": "Why?", "answer": gold, "inst_category": kind, "qa_source": 3}
        about[figure] = {"category": "cs", "figure_path": f"{figure}.jpg"}
    as_json(folder / "descriptive_val.json", descriptive)
    as_json(folder / "descriptive_test.json", {"99": {"figure_id": 99, "qids": [1, 2, 3, 4], "answers": None}})
    as_json(folder / "reasoning_val.json", reasoning)
    as_json(folder / "image_metadata_val.json", about)


def _parquet(folder):
    rows = []
    for figure, (qids, answers, place, gold, kind) in FIGURES.items():
        line, column = place if isinstance(place, list) else (0, 0)
        rows.append({
            "image": {"bytes": picture(), "path": None}, "category": "cs", "figure_path": f"images/{figure}.jpg",
            "num_subplots": 2,
            "subplot_row": line, "subplot_col": column, "subplot_loc": place if isinstance(place, str) else None,
            "reasoning_q": "Why?", "reasoning_q_source": 3, "reasoning_a": gold, "reasoning_a_type": kind,
            **{f"descriptive_q{k + 1}": qids[k] for k in range(4)}, **{f"descriptive_a{k + 1}": answers[k] for k in range(4)}})
    parquet(folder / "val.parquet", rows)
    parquet(folder / "test.parquet", [{"descriptive_q1": 1, "descriptive_a1": None, "figure_path": "images/99.jpg"}])


def _verdict(body, count):
    """CORRECT where the prediction holds "right"; a broken reply where it holds "noise"."""
    shown = body["messages"][1]["content"].split("## Prediction")[1]
    seen.append(body["messages"][1]["content"])
    if "noise" in shown:
        return say("Perhaps, who knows")
    if "json" in shown:
        return say(json.dumps({"extracted_answer": "x", "score": 1}) if "new" in shown else '{"extract_answer": "x", "score": 0}')
    return say("CORRECT" if "right" in shown else "INCORRECT")


seen: list[str] = []


@pytest.fixture
def judge(monkeypatch):
    seen.clear()
    server = JudgeServer(_verdict)
    monkeypatch.setenv("JUDGE_BASE_URL", server.url)
    yield server
    server.close()


@pytest.mark.parametrize("write", [_json, _parquet])
def test_descriptive_questions_are_all_asked_and_judged_by_their_template(tmp_path, capsys, judge, write):
    write(tmp_path / "charxiv_dq")
    assert ids("charxiv_dq", tmp_path, capsys) == [f"{figure}_{k}" for figure in FIGURES for k in range(4)]
    answers = ["Loss", "right", "wrong", "wrong"] + ["right", "wrong", "right", "wrong"] + ["noise", "wrong", "", "right"]
    found = scored("charxiv_dq", tmp_path, answers, capsys)
    assert found["score"] == pytest.approx(5 / 11) and found["n"] == 11 and found["unscored"] == 1 and found["unparsed"] == 1
    assert found["clusters"] == 3 and found["by"] == {"judge": 10, "rule": 2}
    assert {name: part["n"] for name, part in found["parts"].items() if name[0] in "ICEP"} == {
        "Information Extraction": 2, "Enumeration": 2, "Pattern Recognition": 3, "Counting": 3, "Compositionality": 1}
    assert any("same labels, all of them and in the same order" in text and "subplot" not in text for text in seen)
    assert any("subplot at row 1 and column 2" in text for text in seen) and any("lower plot" in text for text in seen)
    assert found["parts"]["cs"]["n"] == 11


@pytest.mark.parametrize("write", [_json, _parquet])
def test_reasoning_uses_the_answers_type_and_not_the_questions_source(tmp_path, capsys, judge, write):
    write(tmp_path / "charxiv_rq")
    assert ids("charxiv_rq", tmp_path, capsys) == list(FIGURES)
    found = scored("charxiv_rq", tmp_path, ["right", "wrong", "right"], capsys)
    assert found["score"] == pytest.approx(2 / 3)
    assert {name: part["n"] for name, part in found["parts"].items() if "-" in name and "subplots" not in name} == {
        "number-in-general": 1, "text-in-chart": 1, "text-in-general": 1}


def test_a_judge_that_replies_in_charxivs_json_is_read_under_both_names_of_its_key(tmp_path, capsys, judge):
    _json(tmp_path / "charxiv_rq")
    found = scored("charxiv_rq", tmp_path, ["json new", "json old", "json new"], capsys)
    assert found["score"] == pytest.approx(2 / 3) and found["unscored"] == 0


def test_every_judged_answer_is_in_the_audit_and_is_asked_once(tmp_path, capsys, judge):
    _json(tmp_path / "charxiv_rq")
    scored("charxiv_rq", tmp_path, ["right", "wrong", "noise"], capsys)
    audit = [json.loads(line) for line in (tmp_path / ".work/out.audit.jsonl").read_text().splitlines()]
    assert [line["verdict"] for line in audit] == ["correct", "wrong", "unscored"] and audit[0]["by"] == "judge"
    before = len(seen)
    again = scored("charxiv_rq", tmp_path, ["right", "wrong", None], capsys)
    assert len(seen) == before and again["by"] == {"cache": 2}, "verdicts are kept"


def test_without_a_judge_charxiv_is_refused_before_anything_is_read(tmp_path, capsys, monkeypatch):
    monkeypatch.delenv("JUDGE_BASE_URL", raising=False)
    file = json_lines(tmp_path / "p.jsonl", [{"id": "1", "answer": "x"}])
    for name in ("charxiv_dq", "charxiv_rq"):
        error = refused(["score", "--benchmarks", name, "--data", str(tmp_path / "nowhere"), "--predictions", str(file)], capsys)
        assert "scored by a judge" in error and "JUDGE_BASE_URL" in error
