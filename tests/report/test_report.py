"""The report: self-contained, escaped, and its numbers are those of the run's files."""
from __future__ import annotations

import base64
import dataclasses
import hashlib
import io
import json
import re
import signal
import subprocess
import sys
from html.parser import HTMLParser

import pytest
from PIL import Image
from synthetic_run import make_task, make_trajectory, score, write_run

from hdpo.errors import DataError
from hdpo.evaluation.evaluate import COLUMNS, format_value, table_rows
from hdpo.report.charts import Series, line_chart, short, stack_chart
from hdpo.report.page import write_report
from hdpo.report.rollouts import choose
from hdpo.reward.audit import AuditLog, audit_record
from hdpo.state.dump import read_rollouts, write_rollouts
from hdpo.types import Judgement, Verdict

VOID = {"meta", "img", "link"}


class Page(HTMLParser):
    """Checks nesting while it reads; keeps tags with attributes, and the text of every table cell and image."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open, self.tags, self.cells, self.text = [], [], [], ""
        self.feed(text)
        self.close()
        assert self.open == [], f"never closed: {self.open}"

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)
        if tag in ("td", "th"):
            self.cells.append("")

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open and self.open.pop() == tag, f"</{tag}> closes something else"

    def handle_data(self, data):
        if {"style", "script"} & set(self.open):
            return
        self.text += data
        if {"td", "th"} & set(self.open):
            self.cells[-1] += data


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return write_run(tmp_path_factory.mktemp("runs") / "toy_hdpo")


@pytest.fixture(scope="module")
def html(run):
    return write_report(run).read_text()


@pytest.fixture(scope="module")
def page(html):
    return Page(html)


def test_the_page_loads_nothing_from_anywhere_and_runs_our_script_alone(html, page):
    for tag, attributes in page.tags:
        assert tag not in ("iframe", "object", "embed", "base", "form"), tag
        if tag in ("a", "link"):
            assert attributes.pop("href").startswith("#" if tag == "a" else "data:,")
        assert not any(name.startswith("on") for name in attributes), "no event handlers"
        for name in ("src", "href", "srcset", "xlink:href", "data", "action", "poster", "background"):
            assert attributes.get(name, "data:image/").startswith("data:image/"), attributes
    assert "url(" not in html and "@import" not in html
    policy = next(a["content"] for t, a in page.tags if t == "meta" and a.get("http-equiv") == "Content-Security-Policy")
    assert policy.startswith("default-src 'none'; img-src data:; connect-src 'none'")
    assert scripts(page) == [{"type": "application/json", "id": "data"}, {}]
    body = html.rpartition("<script>")[2].partition("</script>")[0]
    digest = base64.b64encode(hashlib.sha256(body.encode()).digest()).decode()
    assert f"script-src 'sha256-{digest}'" in policy and "unsafe" not in policy.partition("script-src")[2]


def scripts(page):
    return [attributes for tag, attributes in page.tags if tag == "script"]


def test_every_number_of_the_table_is_that_of_summary_json(run, page):
    summary = json.loads((run / "summary.json").read_text())
    after = dict(table_rows(summary["rl"]))
    for label, before in table_rows(summary["sft"]):
        start = page.cells.index(label)
        cells = page.cells[start + 1:start + 2 + len(COLUMNS)]
        assert cells[0] == str(before["rows"])
        shown = [tuple(cell.split()) for cell in cells[1:]]
        assert shown == [(format_value(name, before[name]), format_value(name, after[label][name])) for _, name in COLUMNS]


def test_the_last_value_of_each_curve_is_in_its_legend(run, page):
    last = json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])
    for label, name, share in (("where not needed", "tool/rate_not_needed", True), ("mean", "hdpo/q_size_mean", False),
                               ("k3", "mismatch/k3", False), ("rollout", "time/rollout", False)):
        assert f"{label} {short(last[name], share)}" in page.text


def test_pictures_are_those_of_the_dump_and_open(run, page):
    sources = [attributes["src"] for tag, attributes in page.tags if tag == "img"]
    decoded = [base64.b64decode(source.partition(",")[2]) for source in sources]
    dumped = {image for stage in ("sft", "rl") for row in read_rollouts(run / "eval" / f"{stage}.parquet")
              for image in row.images}
    assert decoded and set(decoded) <= dumped
    assert {Image.open(io.BytesIO(image)).size for image in decoded} == {(448, 320), (320, 240)}, "pictures and crops"


def test_the_tasks_shown_have_a_crop_where_needed_and_a_dropped_call_elsewhere(run, page):
    before, after = (read_rollouts(run / "eval" / f"{stage}.parquet") for stage in ("sft", "rl"))
    shown = choose(before, after)
    assert len(shown) == len(dict(shown)) == 10
    new = {row.task_id: row for row in after}
    old = {row.task_id: row for row in before}
    for task, why in shown:
        assert task in page.text
        if why == "a tool is needed, and called":
            assert new[task].tool_needed and new[task].num_tool_calls
        if why == "a needless call, dropped":
            assert old[task].num_tool_calls and not new[task].num_tool_calls
    whys = {why for _, why in shown}
    assert {"a tool is needed, and called", "a needless call, dropped"} <= whys
    assert "wrong after training" in whys, "failures are shown too"


NASTY = "</pre><script>alert(1)</script><img src=x onerror=alert(2)>\"'&amp; http://evil.example/x.js"


def test_text_of_models_tools_and_data_stays_text(tmp_path):
    run = write_run(tmp_path / "nasty<b>", steps=2)
    task = make_task(0, True)
    task = dataclasses.replace(task, id="nasty", data_source=NASTY, ground_truth=NASTY,
                               messages=[{"role": "user", "content": "<image>" + NASTY}])
    made = make_trajectory(make_task(0, True), 0, call=True, right=True)
    calls = tuple(dataclasses.replace(c, name=NASTY, arguments={"code": NASTY}, observation=NASTY) for c in made.calls)
    turns = (f"<reason>{NASTY}</reason>{NASTY}<tool_call>{NASTY}</tool_call>", f"{NASTY}<answer>{NASTY}</answer>{NASTY}")
    trajectory = dataclasses.replace(made, calls=calls, turns=turns, error=NASTY)
    group = dataclasses.replace(score((trajectory,)), task=task, trajectories=(dataclasses.replace(trajectory, task=task),))
    for stage in ("sft", "rl"):
        write_rollouts(run / "eval" / f"{stage}.parquet", [group], step=0)
    (run / "config.yaml").write_text(NASTY)
    AuditLog(run / "audit").write(1, [audit_record(
        group.trajectories[0], Judgement(Verdict.WRONG, "rule", NASTY), Judgement(Verdict.CORRECT, "judge", NASTY))])
    html = write_report(run).read_text()
    page = Page(html)
    assert len(scripts(page)) == 2
    assert all(attributes["src"].startswith("data:image/") for tag, attributes in page.tags if tag == "img")
    assert page.text.count("<script>alert(1)</script>") >= 12, "shown, in every place, as text"


def test_the_name_of_a_stage_stays_text(tmp_path):
    run, stage = write_run(tmp_path / "run", steps=1), "<script>alert(1)<b>"
    (run / "eval" / "rl.parquet").rename(run / "eval" / f"{stage}.parquet")
    summary = json.loads((run / "summary.json").read_text())
    (run / "summary.json").write_text(json.dumps({stage if name == "rl" else name: part for name, part in summary.items()}))
    page = Page(write_report(run).read_text())
    assert len(scripts(page)) == 2 and page.text.count(stage) >= 2


def test_a_picture_of_an_unknown_kind_is_left_out(tmp_path, run):
    from hdpo.report.rollouts import task_card

    row = read_rollouts(run / "eval" / "rl.parquet")[0]
    card = task_card("", [("x", dataclasses.replace(row, images=[b"<svg onload=alert(1)>"], num_prompt_images=1))])
    assert "<img" not in card


def test_disagreements_of_rule_and_judge_are_listed_and_counted(page):
    assert "1 of 2 cross-checked verdicts differ." in page.text
    start = page.cells.index("<wrong>") - 6
    assert page.cells[start + 1:start + 7] == ["3", "3", "correct", "exact", "wrong", "<wrong>"]
    assert "<correct>" not in page.cells


def test_an_evaluation_on_a_line_of_its_own_is_part_of_its_step(tmp_path):
    rows = [{"step": 0, "eval/accuracy": 0.0}, {"step": 1, "time/rollout": 2.0, "tool/rate": 0.5},
            {"step": 2, "time/rollout": 4.0, "tool/rate": 0.25}, {"step": 2, "eval/accuracy": 0.125}]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    page = Page(write_report(tmp_path).read_text())
    assert "step 1\nrollout: 2" in page.text and "step 0\nrollout" not in page.text
    assert "accuracy 12.5%" in page.text and "rollout 4" in page.text and "2 steps" in page.text


def test_stages_are_in_the_order_of_training_whichever_was_evaluated_first(tmp_path, run):
    summary = json.loads((run / "summary.json").read_text())
    (tmp_path / "summary.json").write_text(json.dumps({"rl": summary["rl"], "sft": summary["sft"]}))
    assert "after SFT → after RL" in Page(write_report(tmp_path).read_text()).text


def test_the_configuration_is_in_the_page(run, page):
    assert (run / "config.yaml").read_text() in page.text


@pytest.mark.parametrize("missing", [("eval", "audit", "config.yaml"), ("summary.json",), ("metrics.jsonl",)])
def test_a_run_that_lacks_parts_still_has_a_report(tmp_path, missing):
    import shutil

    run = write_run(tmp_path / "run", steps=1)
    for name in missing:
        shutil.rmtree(run / name) if (run / name).is_dir() else (run / name).unlink()
    Page(write_report(run).read_text())


def test_a_run_with_one_stage_and_unknown_need_has_a_report(tmp_path):
    from hdpo.evaluation.evaluate import summarise, write_summary
    from hdpo.train.rollout_metrics import rollout_rows

    task = dataclasses.replace(make_task(0, True), extra={})
    group = score((make_trajectory(task, 0, call=True, right=True),))
    write_rollouts(tmp_path / "eval" / "base.parquet", [group], step=0)
    write_summary(tmp_path / "summary.json", {"base": summarise(rollout_rows([group]))})
    page = Page(write_report(tmp_path).read_text())
    assert "→" not in page.text and "toy_0000" in page.text


def test_an_empty_folder_is_one_line(tmp_path):
    with pytest.raises(DataError, match="no metrics.jsonl, no summary.json and no rollouts"):
        write_report(tmp_path)


def _numbers(path: str) -> list[float]:
    return [float(number) for number in re.findall(r"-?\d+\.?\d*", path)]


def test_one_level_too_high_the_folder_below_is_named(tmp_path):
    write_run(tmp_path / "outer" / "inner")
    with pytest.raises(DataError, match="outer/inner has some"):
        write_report(tmp_path / "outer")


@pytest.mark.parametrize(("file", "content", "named"), [
    ("metrics.jsonl", b"\xff\xfe\x00", False), ("metrics.jsonl", b'{"step": 1}\n\0\0\0\n{"step": 2}\n', True),
    ("metrics.jsonl", b'[]\n{"step": 3, "actor/grad_norm": "no", "time/rollout": [1], "actor/lr": Infinity}\n', True),
    ("summary.json", b"", True), ("summary.json", b"\xff\x00", True), ("summary.json", b"[]", True),
    ("summary.json", b'{"rl": 3, "sft": {"rows": 1}}', True), ("config.yaml", b"\xff\xfe\x00", False),
    ("timeline.jsonl", b"\xff\xfe\x00", False), ("timeline.jsonl", b'{"step": 1, "seconds": "x", "ranks": [1]}\n[]\n', False),
    ("audit/step_000001_rank0.jsonl", b'\xff\n[]\n{"judge_verdict": "x"}\n{"a"', False), ("eval/rl.parquet", b"", True),
    ("rollouts/step_000001.parquet", b"PAR1", True), ("rollouts/step_000001.rankX.parquet", b"", False),
    ("rollouts/step_²²²²²².parquet", b"", False)])
def test_a_file_that_is_torn_or_holds_something_else_costs_its_own_part_alone(tmp_path, file, content, named):
    folder = write_run(tmp_path / "run")
    (folder / file).parent.mkdir(exist_ok=True)
    (folder / file).write_bytes(content)
    text = Page(write_report(folder).read_text()).text
    assert ("Left out, because" in text) == named and (str(folder / file) in text) == named
    other = "Configuration" if file != "config.yaml" else "held-out tasks"
    assert other in text


def test_a_dump_of_something_else_is_named(tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq
    folder = write_run(tmp_path / "run")
    (folder / "rollouts").mkdir(exist_ok=True)
    pq.write_table(pa.table({"a": [1, 2]}), folder / "rollouts" / "step_000001.parquet")
    assert "step_000001.parquet: no dump of hdpo's, it has no column" in Page(write_report(folder).read_text()).text


def test_a_run_that_ended_before_its_first_line_of_metrics_shows_its_rollouts(tmp_path):
    task = make_task(0, needed=True)
    group = score(tuple(make_trajectory(task, n, call=True, right=n == 0) for n in range(2)), 0)
    write_rollouts(tmp_path / "run" / "rollouts" / "step_000001.parquet", [group], step=1, advantages=[(1.0, 0.0), (-1.0, 0.0)])
    assert "Rollouts of step 1" in Page(write_report(tmp_path / "run").read_text()).text


def test_a_report_that_can_not_be_written_says_what_shows_it_without(tmp_path):
    (write_run(tmp_path / "run") / "report.html").mkdir()
    with pytest.raises(DataError, match="can't be written: .*--serve"):
        write_report(tmp_path / "run")


def test_a_curve_is_drawn_where_its_values_are():
    svg = line_chart([0, 5, 10], [Series("a", [0.0, None, 1.0])], share=True)
    assert _numbers(re.search(r'd="([^"]+)" class="line"', svg)[1]) == [56.0, 176.0, 408.0, 10.0]


@pytest.mark.parametrize("values", [[0.0], [3.0], [-2.0, -2.0], [1e-9, 2e-9], [1e9, None], [5.0] * 1000, [-1.0, 1.0]])
def test_any_values_give_a_chart_inside_its_frame(values):
    for svg in (line_chart(range(len(values)), [Series("a<b", values)]),
                stack_chart(range(len(values)), [Series("a<b", [abs(v or 0) for v in values])])):
        for path in re.findall(r' d="([^"]*)"', svg):
            ys = _numbers(path)[1::2]
            assert all(10 <= y <= 176 for y in ys)
        assert "nan" not in svg and "a<b" not in svg
        assert svg.count("<rect") <= 160


def test_ticks_of_a_narrow_range_differ_and_leave_room_for_their_labels():
    for values in ([1.0001, 1.00012], [1e-7, -2e-7], [12345.6, 12345.9], [0.1, 0.9]):
        svg = line_chart([0, 1], [Series("ratio", values)])
        labels = re.findall(r'text-anchor="end">([^<s]+)</text>', svg)
        assert len(labels) >= 3 and len(set(labels)) == len(labels), labels
        assert all(len(label) * 6 <= 49 for label in labels), labels


def test_an_sft_run_has_a_curve_of_its_loss(tmp_path):
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps({"step": i, "sft/loss": 2 - i / 10}) + "\n" for i in range(1, 5)))
    page = Page(write_report(tmp_path).read_text())
    assert "SFT loss, nat a token" in page.text and "1.6" in page.text


def test_a_run_without_evaluation_shows_rollouts_of_its_last_step(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 2, "tool/rate": 0.5}\n')
    (tmp_path / "config.yaml").write_text("log: {samples: 2}\n")
    for step in (1, 2):
        groups = [score((make_trajectory(make_task(10 * step + i, i % 2 == 0), 0, call=True, right=True),
                         make_trajectory(make_task(10 * step + i, i % 2 == 0), 1, call=False, right=True))) for i in range(5)]
        write_rollouts(tmp_path / "rollouts" / f"step_{step:06d}.parquet", groups, step=step)
    page = Page(write_report(tmp_path).read_text())
    assert "Rollouts of step 2" in page.text and page.text.count("2 rollouts") == 2
    assert "rollout 1" in page.text and "rollout 2" in page.text


def test_a_served_report_ends_at_ctrl_c_without_a_word(run):
    process = subprocess.Popen([sys.executable, "-m", "hdpo", "report", str(run), "--serve", "--port", "0"],
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                               preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))     # a shell's & ignores it
    assert process.stdout.readline().startswith("http://127.0.0.1:")
    process.send_signal(signal.SIGINT)
    assert process.communicate(timeout=60) == ("", "") and process.returncode == 0


def test_what_no_row_knows_has_no_column_and_a_folder_with_benchmarks_shows_them(tmp_path, capsys):
    from hdpo.evaluation.evaluate import summarise, write_summary
    from hdpo.report.command import main
    from hdpo.train.rollout_metrics import rollout_rows

    task = dataclasses.replace(make_task(0, True), extra={})
    groups = [score((make_trajectory(task, 0, call=called, right=called),)) for called in (False, True)]
    for stage, group in zip(("no_tools", "tools"), groups, strict=True):
        write_rollouts(tmp_path / "benchmarks" / "eval" / f"{stage}.parquet", [group], step=0)
    write_summary(tmp_path / "benchmarks" / "summary.json",
                  {stage: summarise(rollout_rows([group])) for stage, group in zip(("tools", "no_tools"), groups[::-1])})
    assert main([str(tmp_path)]) == 0
    page = Page((tmp_path / "benchmarks" / "report.html").read_text())
    assert str(tmp_path / "benchmarks") in capsys.readouterr().out
    assert "without tools → with tools" in page.text and "accuracy" in page.cells and "blind" not in page.cells
