"""The ablation: what has ended is not run again, and its table says what its answers say."""
from __future__ import annotations

import json
import random
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import pytest
from scipy import stats

from hdpo.errors import HdpoError, UserError
from hdpo.toyworld import ablation
from hdpo.toyworld.ablation_figure import write_page
from hdpo.toyworld.ablation_table import HDPO, Result, student, subtract, table

TINY = ["--steps", "1", "--prompts", "2", "--val-rows", "16", "--sft-steps", "1", "--eval-every", "1", "--seeds", "1",
        "--ranks", "1", "--set-sft", "optim.rows_per_step=8", "--set-rl", "rollout.group_size=2"]


def _result(arm: str, seed: int, right: float, blind: float) -> Result:
    draw = random.Random(f"{arm} {seed}")
    answers: dict[str, Sequence[Any]] = {}
    for k in range(60):
        need = (True, False, None)[k % 3]
        answers[f"q{k}"] = [draw.random() < right, int(draw.random() < (blind if need is False else 0.9)), need]
    curve = ({"step": 10, "accuracy": right, "tool_rate": blind, "tool_rate_needed": 0.9, "tool_rate_not_needed": blind},)
    return Result(arm, seed, 60.0, () if arm == "sft" else curve, answers, {"p": [True, 0, None]} if arm == "sft" else {})


RESULTS = [_result(arm, seed, right, blind) for arm, right, blind in
           (("sft", 0.6, 0.9), ("coupled-2", 0.5, 0.2), (HDPO, 0.8, 0.1)) for seed in (1, 2, 3)]


def test_figures_and_intervals_are_those_of_a_reference() -> None:
    for row in table(RESULTS).rows:
        right = [answer[0] for result in row.results for answer in result.answers.values()]
        expected = stats.binomtest(sum(right), len(right)).proportion_ci(method="wilson")
        assert row.figures["accuracy"].score == pytest.approx(fmean(right))
        assert row.figures["accuracy"].interval == pytest.approx((expected.low, expected.high))
        blind = [answer[1] > 0 for result in row.results for answer in result.answers.values() if answer[2] is False]
        assert row.figures["blind calls"].score == pytest.approx(fmean(blind)) and row.figures["blind calls"].n == 60


def test_paired_tests_over_questions_and_over_seeds_are_those_of_a_reference() -> None:
    arms = {arm: [result for result in RESULTS if result.arm == arm] for arm in ("coupled-2", HDPO)}
    found = subtract(arms["coupled-2"], arms[HDPO], "accuracy")
    pairs = [(one.answers[key][0], other.answers[key][0])
             for one, other in zip(*arms.values(), strict=True) for key in one.answers]
    won, lost = sum(a > b for a, b in pairs), sum(a < b for a, b in pairs)
    assert (found.questions.won, found.questions.lost) == (won, lost)
    assert found.questions.p == pytest.approx(stats.binomtest(won, won + lost).pvalue)
    shares = [[result.share("accuracy") for result in results] for results in arms.values()]
    expected = stats.ttest_rel(*shares)
    assert found.p == pytest.approx(expected.pvalue)
    assert found.interval == pytest.approx(tuple(expected.confidence_interval()))


def test_one_seed_says_nothing_about_seeds() -> None:
    assert student([0.2]) == student([]) == (None, None)
    found = subtract(RESULTS[3:4], RESULTS[6:7], "accuracy")
    assert found.questions.n == 60 and found.interval is None
    assert subtract(RESULTS[3:4], RESULTS[7:8], "accuracy") is None      # another seed is another world


def test_the_page_holds_every_arm_and_fetches_nothing(tmp_path: Path) -> None:
    write_page(tmp_path, table(RESULTS))
    page, figure = (tmp_path / "report.html").read_text(), (tmp_path / "figure.svg").read_text()
    for arm in ("sft", "coupled-2", HDPO):
        assert f"<th>{arm}</th>" in page
    assert "default-src 'none'" in page and "src=\"data:" in page and "<script" not in page + figure
    write_page(tmp_path, table(RESULTS))
    assert (tmp_path / "figure.svg").read_text() == figure


@pytest.fixture
def stages(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Stands for the stages, which are processes of their own: writes what they would leave. The list is what was started."""
    started: list[str] = []

    def launch(command: str, config: str, ranks: int, overrides: Sequence[str], again: str) -> None:
        import pyarrow as pa
        import pyarrow.parquet as pq
        given = dict(item.split("=", 1) for item in overrides)
        folder = Path(given["run.folder"]) / given["run.name"]
        started.append(f"{command} {given['run.seed']} {given['run.name']}")
        if command == "sft":
            (folder / "checkpoints" / "step_000001").mkdir(parents=True)
            return
        if given["run.name"] == "grpo" and started.count(started[-1]) == 1:
            raise HdpoError("the rl stage failed")
        (folder / "eval").mkdir(parents=True)
        pq.write_table(pa.table({
            "task_id": ["a", "b", "c"], "data_source": ["toy/fine", "toy/fine", "plain/toy/fine"],
            "correct": [True, False, False], "scored": [True, False, True], "num_tool_calls": [1, 0, 0],
            "tool_needed": [True, True, None]}), folder / "eval" / "rl.parquet")
        (folder / "summary.json").write_text(json.dumps({"rl": {"accuracy": 1.0}}))
    monkeypatch.setattr(ablation, "launch", launch)
    return started


def test_an_arm_that_has_ended_is_not_run_again_and_one_that_failed_is(stages: list[str], tmp_path: Path) -> None:
    arguments = ["--out", str(tmp_path), *TINY, "--arms", f"grpo,{HDPO}"]
    with pytest.raises(HdpoError, match="failed"):
        ablation.main(arguments)
    assert stages == ["sft 1 sft_run", "eval 1 sft", "rl 1 grpo"]
    kept = (tmp_path / "seed_1" / "sft.json").read_bytes()
    assert ablation.main(arguments) == 0
    assert stages[3:] == ["rl 1 grpo", f"rl 1 {HDPO}"]
    assert (tmp_path / "seed_1" / "sft.json").read_bytes() == kept
    assert json.loads(kept)["answers"] == {"a": [True, 1, True]} and json.loads(kept)["plain"] == {"c": [False, 0, None]}
    assert ablation.main(arguments) == 0 and len(stages) == 5
    assert set(json.loads((tmp_path / "table.json").read_text())["arms"]) == {"sft", "grpo", HDPO}


def test_results_of_another_budget_are_not_mixed_and_unknown_arms_are_named(stages: list[str], tmp_path: Path) -> None:
    assert ablation.main(["--out", str(tmp_path), *TINY, "--arms", "sft"]) == 0
    with pytest.raises(UserError, match="steps 1, asked for is 2.*another --out"):
        ablation.main(["--out", str(tmp_path), *TINY, "--arms", "sft", "--steps", "2"])
    for bad in (["--arms", "ppo"], ["--seeds", "0"], ["--prompts", "3"], ["--report"]):
        with pytest.raises(UserError, match=bad[0].removeprefix("--report") or "no arm has ended"):
            ablation.main(["--out", str(tmp_path / "new"), *TINY, *bad])


@pytest.mark.engine
@pytest.mark.long
def test_a_real_arm_goes_on_from_the_shared_checkpoint(tmp_path: Path) -> None:
    arguments = ["--out", str(tmp_path), *TINY, "--set-rl", "rollout.engine=hf"]
    assert ablation.main([*arguments, "--arms", "sft"]) == 0
    first = (tmp_path / "seed_1" / "sft.json").read_bytes()
    assert ablation.main([*arguments, "--arms", HDPO]) == 0
    assert (tmp_path / "seed_1" / "sft.json").read_bytes() == first
    found = json.loads((tmp_path / "seed_1" / f"{HDPO}.json").read_text())
    assert len(found["answers"]) == len(json.loads(first)["answers"]) == len(json.loads(first)["plain"]) == 16
    assert [point["step"] for point in found["curve"]] == [1] and found["seconds"] > 0
