"""V*, HR-Bench, TreeBench, MME-RealWorld and SEED-Bench-2-Plus: every published layout, scored by hand."""
from __future__ import annotations

import math

import pytest
from published import as_json, base64_picture, ids, json_lines, parquet, picture, scored, tsv

TABLE = [
    {"index": 3, "question": "Which colour?", "A": "red", "B": "blue", "C": "", "D": "", "answer": "B",
     "category": "direct_attributes"},
    {"index": 7, "question": "Left or right?", "A": "left", "B": "right", "C": "", "D": "", "answer": "A",
     "category": "relative_position"},
    {"index": 8, "question": "Which animal?", "A": "cat", "B": "dog", "C": "cow", "D": "hen", "answer": "D",
     "category": "direct_attributes"}]


def _vstar_tsv(folder):
    tsv(folder / "VStarBench.tsv", [{**row, "image": base64_picture(k)} for k, row in enumerate(TABLE)])


def _vstar_official(folder):
    json_lines(folder / "test_questions.jsonl", [
        {"question_id": row["index"], "image": f"{row['category']}/{k}.jpg", "category": row["category"], "label": row["answer"],
         "text": row["question"] + "\n" + "\n".join(f"({x}) {row[x]}" for x in "ABCD" if row[x]) + "\nAnswer with the letter."}
        for k, row in enumerate(TABLE)])
    for part in ("direct_attributes", "relative_position", "GPT4V-hard"):      # the raw files beside must not be read twice
        as_json(folder / part / "0.json", {"target_object": ["x"], "question": "?", "options": ["a", "b"]})


def _vstar_parquet(folder):
    parquet(folder / "data" / "test-00000-of-00001.parquet", [
        {"question_id": str(row["index"]), "text": f"{row['question']}\n(A) {row['A']}\n(B) {row['B']}" + (
            f"\n(C) {row['C']}\n(D) {row['D']}" if row["C"] else ""), "label": row["answer"], "category": row["category"],
         "image": {"bytes": picture(k), "path": None}} for k, row in enumerate(TABLE)])


@pytest.mark.parametrize("write", [_vstar_tsv, _vstar_official, _vstar_parquet])
def test_vstar_is_micro_accuracy_in_every_layout(tmp_path, capsys, write):
    write(tmp_path / "vstar")
    found = scored("vstar", tmp_path, ["<answer>B</answer>", "the right one", "D"], capsys)
    assert found["score"] == pytest.approx(2 / 3) and found["n"] == 3 and found["unparsed"] == found["unscored"] == 0
    assert found["parts"] == {"direct_attributes": {"score": 1.0, "n": 2}, "relative_position": {"score": 0.0, "n": 1}}
    assert found["se"] == pytest.approx(math.sqrt(2 / 3 * 1 / 3 / 3)) and found["ci95"][0] < 2 / 3 < found["ci95"][1]
    assert ids("vstar", tmp_path, capsys) == ["3", "7", "8"]


def test_vstars_raw_order_says_nothing_about_the_answer(tmp_path, capsys):
    for k in range(40):
        as_json(tmp_path / "vstar" / "direct_attributes" / f"sa_{k}.json",
                {"target_object": ["sign"], "bbox": [[1, 2, 3, 4]], "question": "What?",
                 "options": ["right", "wrong", "false", "no"]})
    names = ids("vstar", tmp_path, capsys)
    assert names[:3] == ["direct_attributes/sa_0", "direct_attributes/sa_1", "direct_attributes/sa_2"] and len(names) == 40
    always_first = scored("vstar", tmp_path, ["A"] * 40, capsys)
    assert 0.05 < always_first["score"] < 0.5, "the first option is right in a quarter of the questions, not in all"
    assert scored("vstar", tmp_path, ["right"] * 40, capsys)["score"] == 1.0
    assert scored("vstar", tmp_path, ["A"] * 40, capsys) == always_first, "the order is the same every time"


def test_an_answer_without_a_letter_is_wrong_and_counted(tmp_path, capsys):
    _vstar_tsv(tmp_path / "vstar")
    found = scored("vstar", tmp_path, ["", "A or B", "something"], capsys)
    assert (found["score"], found["unparsed"], found["n"]) == (0.0, 3, 3)


def test_rows_without_an_answer_deflate_nothing_and_are_named(tmp_path, capsys):
    _vstar_tsv(tmp_path / "vstar")
    found = scored("vstar", tmp_path, ["B", None, None], capsys)
    assert (found["score"], found["n"], found["rows"]) == (1.0, 1, 3) and "2 of 3 rows have no answer" in found["notes"][0]


def _rotations(question: str, texts: list[str], right: str, category: str, shade: int) -> list[dict]:
    rows = []
    for turn in range(4):
        order = texts[turn:] + texts[:turn]
        rows.append({"index": 0, "question": question, "answer": "ABCD"[order.index(right)], "category": category,
                     **dict(zip("ABCD", order)), "cycle_category": str(turn), "image": base64_picture(shade)})
    return rows


def _hr_rows() -> list[dict]:
    # the second and the third question have the same words and options, and other pictures
    rows = (_rotations("Where?", ["top", "low", "left", "right"], "low", "single", 1)
            + _rotations("What number?", ["1", "2", "3", "4"], "4", "cross", 2)
            + _rotations("What number?", ["1", "2", "3", "4"], "2", "cross", 3))
    return [{**row, "index": k} for k, row in enumerate(rows)]


@pytest.mark.parametrize(("name", "file"), [
    ("hrbench4k", "hr_bench_4k.tsv"), ("hrbench4k", "hr_bench_4k.parquet"),
    ("hrbench8k", "hrbench_version_split/hrbench_8k-00000-of-00001.parquet"), ("hrbench8k", "hr_bench_8k.tsv")])
def test_hrbench_averages_over_rotations_and_knows_which_are_one_question(tmp_path, capsys, name, file):
    rows = _hr_rows()
    (tsv if file.endswith("tsv") else parquet)(tmp_path / name / file, rows)
    answers = ["low"] * 4 + [row["answer"] for row in rows[4:8]] + [rows[8]["answer"], "A", "A", "A"]
    right = [True] * 8 + [a == row["answer"] for a, row in zip(answers[8:], rows[8:])]
    found = scored(name, tmp_path, answers, capsys)
    assert found["score"] == pytest.approx(sum(right) / 12) and found["n"] == 12 and found["clusters"] == 3
    assert found["variants"]["all_four_right"] == pytest.approx(2 / 3)
    assert found["parts"]["single"] == {"score": 1.0,
                                        "n": 4} and found["parts"]["cross"]["score"] == pytest.approx(sum(right[4:]) / 8)
    mean = sum(right) / 12
    sums = [4 - 4 * mean, 4 - 4 * mean, sum(right[8:]) - 4 * mean]
    assert found["se"] == pytest.approx(math.sqrt(sum(s * s for s in sums)) / 12), "four rotations are one question"


def test_a_question_that_was_not_asked_in_all_rotations_is_not_all_right(tmp_path, capsys):
    rows = _hr_rows()
    tsv(tmp_path / "hrbench4k" / "hr_bench_4k.tsv", rows)
    answers = [row["answer"] for row in rows[:4]] + [rows[4]["answer"], None, None, None] + ["Z"] * 4
    found = scored("hrbench4k", tmp_path, answers, capsys)
    assert found["variants"]["all_four_right"] == 0.5 and found["n"] == 9


@pytest.mark.parametrize("options", ["columns", "list"])
def test_treebench_reads_the_answer_and_not_the_first_capital(tmp_path, capsys, options):
    choices = {"A": "Above it", "B": "Below it", "C": "Behind it", "D": "Nowhere"}
    listed = {"multi-choice options": str([f"{k}. {v}" for k, v in choices.items()])}
    rows = [{"index": k, "image": base64_picture(k), "question": "Where is the boat?",
             **(choices if options == "columns" else listed),
             "answer": answer, "category": category, "target_instances": "[[1, 2, 3, 4]]"}
            for k, (answer, category) in enumerate([("C", "Perception/OCR"), ("B", "Reasoning/Ordering"),
                                                    ("A", "Perception/OCR")])]
    tsv(tmp_path / "treebench" / "TreeBench.tsv", rows)
    found = scored("treebench", tmp_path, ["Based on the picture, Clearly it is (C)", "<answer>below it</answer>",
                                           "Because Dogs And Cats are seen"], capsys)
    assert found["score"] == pytest.approx(2 / 3) and found["unparsed"] == 1
    assert found["parts"]["Perception/OCR"] == {"score": 0.5, "n": 2} and found["parts"]["Perception"]["n"] == 2
    assert found["parts"]["Reasoning/Ordering"] == found["parts"]["Reasoning"] == {"score": 1.0, "n": 1}


CHOICES = ["(A) A red van", "(B) A blue van", "(C) Two vans", "(D) No van", "(E) The image does not feature the van"]


def _mme_json(folder, name):
    as_json(folder / f"{name}.json", [
        {"Question_id": f"q{k}", "Image": f"images/{k // 2}.jpg", "Text": "Which van?", "Question Type"
         if k else "Question type": "x",
         "Answer choices": CHOICES, "Ground truth": gold, "Task": "Perception" if k else "perception", "Subtask": subtask,
         "Category": "color"} for k, (gold,
                                      subtask) in enumerate([("A", "Monitoring"), ("E", "Monitoring"), ("B", "Remote Sensing")])])
    as_json(folder / "MME_RealWorld_CN.json" if "CN" not in name else folder / "x_lite.json", [])


def _mme_base64(folder, name):
    as_json(folder / name / "part_1.json", [
        {"index": f"q{k}", "image": base64_picture(k // 2), "question": "Which van?", "multi-choice options": CHOICES,
         "answer": gold,
         "category": f"{'Perception' if k else 'perception'}/{subtask}", "l2-category": "color"}
        for k, (gold, subtask) in enumerate([("A", "Monitoring"), ("E", "Monitoring"), ("B", "Remote Sensing")])])


def _mme_parquet(folder, name):
    parquet(folder / "data" / "train-00000-of-00001.parquet", [
        {"index": f"q{k}", "bytes": base64_picture(k // 2), "question": "Which van?", "multi-choice options": CHOICES,
         "answer": gold,
         "category": f"Perception/{subtask}", "l2-category": "color"}
        for k, (gold, subtask) in enumerate([("A", "Monitoring"), ("E", "Monitoring"), ("B", "Remote Sensing")])])


def _mme_lite(folder, name):
    tsv(folder / "mme_realworld_lite.tsv", [
        {"index": f"q{k}", "image": base64_picture(k // 2), "question": "Which van?", "multi-choice options": str(CHOICES),
         "answer": gold, "category": f"Perception/{subtask}", "l2-category": "color"}
        for k, (gold, subtask) in enumerate([("A", "Monitoring"), ("E", "Monitoring"), ("B", "Remote Sensing")])])


@pytest.mark.parametrize(("name", "write", "file"), [
    ("mmerealworld", _mme_json, "MME_RealWorld"), ("mmerealworld", _mme_base64, "MME-RealWorld"),
    ("mmerealworld", _mme_parquet, ""), ("mmerealworld-lite", _mme_lite, ""), ("mmerealworld-cn", _mme_json, "MME_RealWorld_CN")])
def test_mmerealworld_takes_e_for_an_option_and_no_article_for_a_letter(tmp_path, capsys, name, write, file):
    write(tmp_path / name, file)
    assert ids(name, tmp_path, capsys) == ["q0", "q1", "q2"]
    found = scored(name, tmp_path, ["The best answer is: A", "E", "A blue van"], capsys)
    assert found["score"] == 1.0 and found["share_e"] == pytest.approx(1 / 3) and found["clusters"] == 2
    assert found["parts"]["Perception"]["n"] == 3 and found["parts"]["Perception/Monitoring"]["n"] == 2
    wrong = scored(name, tmp_path, ["", "A big thing", "C"], capsys)
    assert (wrong["score"], wrong["unparsed"]) == (0.0, 2), "an empty answer is no A"
    one = scored(name, tmp_path, ["A", "E", "A"], capsys)
    assert one["score"] == pytest.approx(2 / 3) and one["variants"]["avg_c"] == pytest.approx(0.5), "over domains, not rows"


def test_mmerealworld_cn_reads_full_width_brackets(tmp_path, capsys):
    tsv(tmp_path / "mmerealworld-cn" / "mme_realworld_cn.tsv", [
        {"index": 0, "image": base64_picture(), "question": "几辆车？", "multi-choice options": str(["（A）一辆", "（B）两辆", "（C）三辆"]),
         "answer": "B", "category": "Perception/监控", "l2-category": "count"}])
    assert scored("mmerealworld-cn", tmp_path, ["（B）"], capsys)["score"] == 1.0
    assert scored("mmerealworld-cn", tmp_path, ["答案是：两辆"], capsys)["score"] == 1.0


SEED = [{"question_id": f"s{k}", "question_image_type": kind, "question": "How many?", "choice_a": "one", "choice_b": "two",
         "choice_c": "three", "choice_d": "four", "answer": answer}
        for k, (kind, answer) in enumerate([("chart", "A"), ("map", "D"), ("web", "C"), ("chart", "B")])]


@pytest.mark.parametrize("layout", ["json", "parquet", "tsv"])
def test_seed2plus_by_kind(tmp_path, capsys, layout):
    folder = tmp_path / "seed2plus"
    if layout == "json":
        as_json(folder / "SEED-Bench-2-plus-text-rich.json", {"questions": SEED, "question_type": {"1": "chart"}})
    elif layout == "parquet":
        parquet(folder / "data/test-00000-of-00001.parquet", [
            {**{k.replace("choice_", "choice_").title() if k.startswith("choice") else k: v for k, v in row.items()},
             "image": {"bytes": picture(), "path": None}} for row in SEED])
    else:
        tsv(folder / "SEEDBench2_Plus.tsv", [
            {"index": row["question_id"], "image": base64_picture(), "question": row["question"], "answer": row["answer"],
             **{letter: row[f"choice_{letter.lower()}"] for letter in "ABCD"},
             "category": row["question_image_type"]} for row in SEED])
    found = scored("seed2plus", tmp_path, ["A", "Definitely four", "C", "Because it is so"], capsys)
    assert found["score"] == 0.75 and found["unparsed"] == 1, "the first character of a reply is no answer"
    assert {k: v["score"] for k, v in found["parts"].items()} == {"chart": 0.5, "map": 1.0, "web": 1.0}
