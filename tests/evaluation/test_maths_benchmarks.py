"""MathVista, MathVerse, We-Math, DynaMath and LogicVista: every published layout and pitfall, scored by hand."""
from __future__ import annotations

import pytest
from published import as_json, base64_picture, ids, parquet, picture, refused, scored, tsv

VISTA = [  # question_type and answer_type, precision, choices, answer
    ("1", "text", None, ["40°", "50°", "40°"], "40°"), ("2", "text", None, ["Yes", "No"], "No"),
    ("3", "integer", None, None, "14"),
    ("4", "float", 1.0, None, "1.2"), ("5", "float", 2.0, None, "0.80"), ("6", "list", None, None, "[5, 7]"),
    ("7", "text", None, ["acute triangle", "right triangle"], "right triangle")]


def _vista_rows(image):
    return [{"pid": pid, "question": f"Question {pid}?", "query": f"Hint. Question {pid}?", "choices": choices, "unit": None,
             "precision": precision, "answer": answer, "question_type": "multi_choice" if choices else "free_form",
             "answer_type": kind, **image(int(pid)),
             "metadata": {"task": "geometry problem solving" if choices else "textbook question answering",
                          "skills": ["numeric commonsense", "algebraic reasoning"], "grade": "high school", "category": "math",
                          "context": "table"}} for pid, kind, precision, choices, answer in VISTA]


def _vista(folder, layout):
    if layout == "json":
        as_json(folder / "testmini.json", {row["pid"]: row for row in _vista_rows(lambda k: {"image": f"images/{k}.jpg"})})
        as_json(folder / "test.json", {"9": {"pid": "9", "question": "no label", "answer": "", "answer_type": "text"}})
    elif layout == "parquet":
        parquet(folder / "data/testmini-00000-of-00001.parquet", _vista_rows(
            lambda k: {"image": f"images/{k}.jpg", "decoded_image": {"bytes": picture(k), "path": None}}))
        parquet(folder / "data/test-00000-of-00002.parquet", [{"pid": "9", "question": "?", "answer": "", "answer_type": "text"}])
    else:
        rows = _vista_rows(lambda k: {"image": base64_picture(k)})
        tsv(folder / "MathVista_MINI.tsv", [
            {**{k: v for k, v in row.items() if k not in ("metadata", "pid")}, "index": row["pid"],
             "choices": str(row["choices"] or ""),
             "question": row["query"] + "\r\n", **{k: str(v) for k, v in row["metadata"].items()}} for row in rows])


@pytest.mark.parametrize("layout", ["json", "parquet", "tsv"])
@pytest.mark.parametrize(("answers", "right"), [
    (["40°", "B", "14.0", "1.23", "0.8", "[5, 7]", "(B)"], 7),
    (["(C)", "no", "14", "1.19", "0.804", "[5,7]", "a right triangle"], 7),     # the third option reads as the first
    (["B", "Yes", "15", "1.3", "0.81", "[7, 5]", "A"], 0),
    (["A", "The answer is No", "x = 14", "1.2 cm", "80/100", "So [5, 7].", "rigt triangle"], 7),
])
def test_mathvista_in_every_layout(tmp_path, capsys, layout, answers, right):
    _vista(tmp_path / "mathvista", layout)
    found = scored("mathvista", tmp_path, answers, capsys)
    assert round(found["score"] * 7) == right and found["n"] == 7 and found["unparsed"] == 0
    assert found["parts"]["geometry problem solving"]["n"] == 3 and found["parts"]["algebraic reasoning"]["n"] == 7


def test_mathvista_gives_no_blank_answer_an_option(tmp_path, capsys):
    _vista(tmp_path / "mathvista", "json")
    found = scored("mathvista", tmp_path, ["", " ", "", "", "", "", "what a nice picture"], capsys)
    assert (found["score"], found["unparsed"]) == (0.0, 7)


WE = {("2steps_1", "2steps_1"): "A", ("2steps_1", "2steps_2"): "B", ("2steps_1", "2steps_multi"): "C"}


def _we_rows(problems: dict[str, int]) -> list[dict]:
    """All answers are B. `problems`: ID -> number of steps."""
    return [{"ID": name, "split": "testmini", "knowledge concept": "Area" if key.endswith("1") else "Angles",
             "question": "How much?",
             "option": "A. 3;B. 4; C. 5; D. both; and none; E. no", "answer": "B", "image_path": f"{name}.png", "key": key,
             "question number": 1, "knowledge concept description": ""}
            for name, steps in problems.items() for key in [*[f"{steps}steps_{k + 1}" for k in range(steps)],
                                                            f"{steps}steps_multi"]]


def _we(folder, rows, layout):
    if layout == "json":
        as_json(folder / "testmini.json", rows)
        as_json(folder / "knowledge_structure_nodes.json", {"nodes": [{"a": 1}]})
    elif layout == "parquet":
        parquet(folder / "data/testmini-00000-of-00001.parquet", [
            {**row, "image_path": {"bytes": picture(), "path": None}} for row in rows])
    else:
        tsv(folder / "WeMath.tsv", [
            {**{k: v for k, v in row.items() if k not in ("option", "image_path")}, "index": k, "image": base64_picture(),
             "A": "3", "B": "4", "C": "5", "D": "both; and none", "E": "no"} for k, row in enumerate(rows)])


WORKED = ["11;1", "10;1", "11;0", "01;0", "00;1", "110;1"]      # benchmarks' worked example: steps; whole


def _worked(word: str = "{}") -> list[str]:
    return [word.format("B" if bit == "1" else "A") for problem in WORKED for bit in problem.replace(";", "")]


@pytest.mark.parametrize("layout", ["json", "parquet", "tsv"])
@pytest.mark.parametrize("word",
                         ["{}", "<Thought process> Based on it. <Answer>: {}", "<answer>{}</answer>", "Both sides. Answer: {}."])
def test_wemath_strict_and_loose_of_the_worked_example(tmp_path, capsys, layout, word):
    rows = _we_rows({f"{2 + (k == 5)}steps_{k}": 2 + (k == 5) for k in range(6)})
    _we(tmp_path / "wemath", rows, layout)
    found = scored("wemath", tmp_path, _worked(word), capsys)
    assert found["score"] == found["variants"]["strict"] == pytest.approx(0.25)
    assert found["variants"]["loose"] == pytest.approx(3.5 / 6) and found["n"] == found["clusters"] == 6
    assert found["problems"]["strict"] == pytest.approx({"CM": 1 / 6, "RM": 3 / 6, "IG": 1 / 6, "IK": 1 / 6, "RM_rate": 3 / 4})
    assert found["problems"]["loose"] == pytest.approx({"CM": 3 / 6, "RM": 1 / 6, "IG": 1 / 6, "IK": 1 / 6, "RM_rate": 1 / 4})
    assert found["parts"]["S2"] == {"score": 0.6, "n": 5} and found["parts"]["S3"] == {"score": 1.0, "n": 1}
    assert found["parts"]["S1"]["score"] == pytest.approx(8 / 13)


def test_wemath_divides_by_complete_problems_and_names_the_others(tmp_path, capsys):
    rows = _we_rows({"2steps_0": 2, "2steps_1": 2, "3steps_2": 3})
    _we(tmp_path / "wemath", rows, "json")
    found = scored("wemath", tmp_path, ["B", "B", "B", "B", None, "B", "B", "B", "B", None], capsys)
    assert (found["score"], found["n"]) == (1.0, 1)
    assert "2 problems are incomplete and left out: 2steps_1, 3steps_2" in found["notes"]


def test_wemaths_first_letter_of_prose_is_no_answer(tmp_path, capsys):
    _we(tmp_path / "wemath", _we_rows({"2steps_0": 2}), "json")
    found = scored("wemath", tmp_path, ["Because of the sum", "Both are", "B because"], capsys)
    assert found["unparsed"] == 2 and found["parts"]["S1"]["score"] == 0.0 and found["parts"]["S2"]["score"] == 1.0


def _dyna(folder, rows, layout):
    if layout == "parquet":
        for variant in range(1, 11):
            parquet(folder / f"data/sample_variant{variant}-00000-of-00001.parquet", [
                {"id": seed, "question": f"{question} {variant}", "image": "x.png",
                 "decoded_image": {"bytes": picture(), "path": None},
                 "ground_truth": gold, "answer_type": kind, "subject": subject, "knowledge_level": "high school"}
                for seed, question, gold, kind, subject in rows])
    else:
        tsv(folder / "DynaMath.tsv", [
            {"index": k, "qid": seed, "varid": variant, "question": f"{question} {variant}", "answer": gold, "answer_type": kind,
             "subject": subject, "knowledge_level": "high school", "image": base64_picture()}
            for k, (variant, (seed, question, gold, kind, subject)) in enumerate((v, row) for v in range(1, 11) for row in rows)])


DYNA = [("1", "How long?", "3.142", "float", "algebra"),
        ("2", "Which? A: x B: y C: z D: u E: v F: w", "F", "multiple choice", "puzzle game"),
        ("3", "Odd or even?", "even", "text", "arithmetic")]


@pytest.mark.parametrize("layout", ["parquet", "tsv"])
def test_dynamath_average_and_worst_of_ten(tmp_path, capsys, layout):
    _dyna(tmp_path / "dynamath", DYNA, layout)
    names = ids("dynamath", tmp_path, capsys)
    assert names[:4] == ["1/1", "2/1", "3/1", "1/2"] and names[-1] == "3/10" and len(names) == 30
    answers = [["π", "(F)", "It is even"]] * 9 + [["3.1", "F", "even"]]
    found = scored("dynamath", tmp_path, [answer for row in answers for answer in row], capsys)
    assert found["score"] == found["variants"]["average"] == pytest.approx(29 / 30)
    assert found["variants"]["worst"] == pytest.approx(2 / 3) and found["n"] == 30 and found["clusters"] == 3
    assert found["parts"]["algebra"]["score"] == pytest.approx(0.9) and found["parts"]["high school"]["n"] == 30
    assert found["robustness"] == pytest.approx((2 / 3) / (29 / 30))


@pytest.mark.parametrize(("answer", "right"), [
    ('{"solution": "\\\\frac{1}{2}", "short answer": "3.142"}', True),
    ('{"solution": "so \\(x\\) \\theta", "short answer": "3.1425"}', True),
    ('Here: {"solution": "x", "short answer": 3.142} done', True), ("π", True), ("1π", True), ("3.143", True), ("3.1431", False),
    ("3.142 cm", True), ("", False), ("about nothing", False), ("3.0", False)])
def test_dynamath_floats_are_within_a_thousandth(tmp_path, capsys, answer, right):
    _dyna(tmp_path / "dynamath", DYNA[:1], "tsv")
    names = ids("dynamath", tmp_path, capsys)
    found = scored("dynamath", tmp_path, [{"id": names[0], "answer": answer}], capsys)
    assert found["score"] == float(right)


@pytest.mark.parametrize(("answer", "right"),
                         [("", False), ("e", False), ("seven", False), ("EVEN", True), ("the sum is even.", True)])
def test_dynamath_texts_hold_the_truth_and_not_the_other_way_round(tmp_path, capsys, answer, right):
    _dyna(tmp_path / "dynamath", DYNA[2:], "tsv")
    names = ids("dynamath", tmp_path, capsys)
    assert scored("dynamath", tmp_path, [{"id": names[0], "answer": answer}], capsys)["score"] == float(right)


def test_dynamaths_worst_leaves_out_seeds_without_all_variants(tmp_path, capsys):
    _dyna(tmp_path / "dynamath", DYNA, "tsv")
    names = ids("dynamath", tmp_path, capsys)
    lines = [{"id": name, "answer": "3.142" if name.startswith("1/") else "A"} for name in names if name != "2/7"]
    found = scored("dynamath", tmp_path, lines, capsys)
    assert found["variants"]["worst"] == 0.5 and found["variants"]["average"] == pytest.approx(10 / 29)


LOGIC = {"v1_0": ("Which?", "B", "inductive"), "v1_1": ("Which two?", "A, C", "deductive"),
         "v1_20": ("How many?", "3", "numerical"),
         "v1_4": ("Which?", "G", "inductive"), "v1_382": ("", "", "spatial"), "v1_5": ("Which two?", "B, D", "mechanical")}


@pytest.mark.parametrize("layout", ["json", "parquet", "tsv"])
def test_logicvista_compares_sets_of_letters_and_drops_the_empty_row(tmp_path, capsys, layout):
    folder = tmp_path / "logicvista"
    rows = [{"index": key, "question": question, "answer": answer, "skill": skill} for key,
            (question, answer, skill) in LOGIC.items()]
    if layout == "json":
        as_json(folder / "dataset.json", {row["index"]: {**row, "imagename": "1.png", "skill": [row["skill"]]} for row in rows})
    elif layout == "parquet":
        parquet(folder / "data/test-00000-of-00001.parquet",
                [{**row, "image": {"bytes": picture(), "path": None}} for row in rows])
    else:
        tsv(folder / "LogicVista.tsv", [{**row, "image": base64_picture()} for row in rows])
    assert ids("logicvista", tmp_path, capsys) == list(LOGIC)
    found = scored("logicvista", tmp_path, ["B", "C and A", "3", "g", "A", "D, B"], capsys)
    assert (found["score"], found["n"], found["unparsed"]) == (1.0, 5, 0) and "v1_382" in found["notes"][0]
    assert found["parts"]["inductive"] == {"score": 1.0, "n": 2} and "spatial" not in found["parts"]
    wrong = scored("logicvista", tmp_path, ["A", "A", "4", "no idea at all", "", "BCD"], capsys)
    assert (wrong["score"], wrong["n"], wrong["unparsed"]) == (0.0, 5, 1)


VERSE = [("1", "multi-choice", "(C)", "Find it.\nChoices:\nA:35°\nB:40°\nC:45°\nD:50°"),
         ("2", "multi-choice", "C\nD", "Which two?"),
         ("3", "free-form", "35掳", "What is the angle?")]
VERSIONS = ("Text Dominant", "Text Lite", "Vision Intensive", "Vision Dominant", "Vision Only")


def _verse(folder, layout):
    rows = [{"sample_index": str(5 * k + j), "problem_index": problem, "problem_version": version,
             "question": "" if version == "Vision Only" else question, "answer": gold, "question_type": kind,
             "metadata": {"subject": "Plane Geometry", "subfield": "Angle"}, "query_wo": "q", "query_cot": "c", "image": "i.png"}
            for k, (problem, kind, gold, question) in enumerate(VERSE) for j, version in enumerate(VERSIONS)]
    evals = {problem: question for problem, _, _, question in VERSE}
    if layout == "json":
        as_json(folder / "testmini.json", rows)
    elif layout == "parquet":
        parquet(folder / "testmini.parquet", [{**row, "question_for_eval": evals[row["problem_index"]],
                                               "image": {"bytes": picture(), "path": None}} for row in rows])
    else:
        tsv(folder / "MathVerse_MINI.tsv", [{**row, "index": row["sample_index"], "metadata": "", "image": base64_picture(),
                                             "question_for_eval": evals[row["problem_index"]]} for row in rows])


@pytest.mark.parametrize("layout", ["json", "parquet", "tsv"])
def test_mathverse_is_the_mean_of_five_versions_with_odd_golds_read_right(tmp_path, capsys, layout):
    _verse(tmp_path / "mathverse", layout)
    right = ["C", "45°", "(C)", "C. 45°", "C"] + ["C, D", "CD", "C and D", "C\nD", "(C)(D)"] + ["35°", "35", "35掳", "35 degrees",
                                                                                                "$35^\\circ$"]
    found = scored("mathverse", tmp_path, right, capsys)
    assert found["score"] == 1.0 and found["n"] == 15 and found["clusters"] == 3
    found = scored("mathverse", tmp_path, ["A"] * 5 + ["C"] * 5 + ["35°"] * 4 + ["36°"], capsys)
    assert found["score"] == found["variants"]["mean"] == pytest.approx((4 * 1 / 3 + 0) / 5)
    assert found["variants"]["vision_only"] == 0.0 and found["parts"]["Text Lite"]["score"] == pytest.approx(1 / 3)


def test_mathverses_text_only_is_in_no_mean(tmp_path, capsys):
    as_json(tmp_path / "mathverse" / "testmini.json", [
        {"sample_index": str(k), "problem_index": "1", "problem_version": version, "question": "Which?", "answer": "A",
         "question_type": "multi-choice"} for k, version in enumerate([*VERSIONS, "Text Only"])])
    found = scored("mathverse", tmp_path, ["B"] * 5 + ["A"], capsys)
    assert found["score"] == 0.0 and found["n"] == 5 and found["variants"]["text_only"] == 1.0


def test_mathverse_without_a_judge_says_so_when_rules_do_not_suffice(tmp_path, capsys, monkeypatch):
    monkeypatch.delenv("JUDGE_BASE_URL", raising=False)
    _verse(tmp_path / "mathverse", "json")
    names = ids("mathverse", tmp_path, capsys)
    from published import json_lines
    file = json_lines(tmp_path / "p.jsonl",
                      [{"id": name, "answer": "a wide angle, or so" if name == "10" else "C"} for name in names])
    command = ["score", "--benchmarks", "mathverse", "--data", str(tmp_path), "--predictions", str(file)]
    error = refused(command, capsys)
    assert "need a judge" in error and "JUDGE_BASE_URL" in error and "--rules-only" in error
    found = scored("mathverse", tmp_path, ["C"] * 10 + ["35"] * 5, capsys, "--rules-only")
    assert found["n"] == 10 and found["unscored"] == 5 and found["score"] == 0.5, "free-form questions are out as a whole"
