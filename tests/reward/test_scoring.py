"""Scoring: three values all the way, order kept, overlap with rollouts, and nothing guessed when no verdict comes."""
from __future__ import annotations

import asyncio
import threading
import time
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from trajectories import trajectory

from hdpo.background import BackgroundLoop
from hdpo.config import HdpoConfig, RewardConfig
from hdpo.errors import UnscoredLimitError
from hdpo.losses import hdpo_loss
from hdpo.reward.audit import AuditLog, disagreements, read_audit
from hdpo.reward.scoring import Scorer, check_unscored, unscored_reasons, unscored_share
from hdpo.train.samples import group_advantages
from hdpo.types import EndReason, Judgement, RewardedGroup, ToolCall, Trajectory, Verdict


class TableJudge:
    """A judge that knows some answers by heart and counts what it is asked; "hang" is never answered."""

    def __init__(self, table: dict[str, Verdict]) -> None:
        self.table = table
        self.asked: list[str] = []
        self.started = threading.Event()

    async def judge(self, question: str, ground_truth: str | list[str], prediction: str) -> Judgement:
        self.asked.append(prediction)
        self.started.set()
        if prediction == "hang":
            await asyncio.Event().wait()
        verdict = self.table.get(prediction, Verdict.UNSCORED)
        return Judgement(verdict, "judge", f"raw reply about {prediction}")

    async def close(self) -> None:
        pass


def test_verdicts_come_back_in_order_with_who_decided(background: BackgroundLoop) -> None:
    judge = TableJudge({"a scarlet kite": Verdict.CORRECT, "a plane": Verdict.WRONG})
    scorer = Scorer(RewardConfig(), judge, background)
    groups = [tuple(trajectory(a, index=i) for i, a in enumerate(["A red kite.", "a plane", "a scarlet kite", None, "?"])),
              (trajectory("7", "8", task="u"), trajectory("x", end=EndReason.INFRASTRUCTURE, task="u"))]
    for t in reversed([t for g in groups for t in g]):
        scorer.submit(t)
    first, second = scorer.score(groups)
    assert [(j.verdict, j.by) for j in first.judgements] == [
        (Verdict.CORRECT, "rule"), (Verdict.WRONG, "judge"), (Verdict.CORRECT, "judge"), (Verdict.WRONG, "rule"),
        (Verdict.UNSCORED, "judge")]
    assert [j.verdict for j in second.judgements] == [Verdict.WRONG, Verdict.UNSCORED]
    assert second.judgements[1].detail == "sandbox is down"
    assert [r.scored for r in first.rewards] == [True, True, True, True, False]
    assert [r.correct for r in first.rewards] == [True, False, True, False, False]
    assert first.trajectories == groups[0] and first.task is groups[0][0].task
    assert unscored_share([first, second]) == (2, 7)


def test_the_answer_of_an_unscorable_end_never_reaches_the_judge(background: BackgroundLoop) -> None:
    judge = TableJudge({"kite-like": Verdict.CORRECT})
    scorer = Scorer(RewardConfig(), judge, background)
    (group,) = scorer.score([tuple(trajectory("kite-like", index=i, end=end) for i, end in enumerate(EndReason))])
    for t, j, r in zip(group.trajectories, group.judgements, group.rewards, strict=True):
        assert r.scored == t.end.scorable and (j.verdict is Verdict.CORRECT) == t.end.scorable
    assert len(judge.asked) == sum(end.scorable for end in EndReason)


def test_without_a_judge_doubt_is_unscored_and_never_wrong(background: BackgroundLoop) -> None:
    for config, judge in ((RewardConfig(), None), (RewardConfig(judge=False), TableJudge({"a bird": Verdict.WRONG}))):
        (group,) = Scorer(config, judge, background).score([(trajectory("a bird"), trajectory("a red kite"))])
        assert [j.verdict for j in group.judgements] == [Verdict.UNSCORED, Verdict.CORRECT]


def test_a_trajectory_is_scored_while_others_still_run_and_only_once(background: BackgroundLoop) -> None:
    judge = TableJudge({"a plane": Verdict.WRONG})
    scorer = Scorer(RewardConfig(), judge, background)
    early, late = trajectory("a plane"), trajectory("a plane", index=1)
    background.run(_submit_inside(scorer, early))   # as a rollout does it: on the loop, without waiting
    assert judge.started.wait(10) and judge.asked == ["a plane"]
    scorer.score([(early, late)])
    assert len(judge.asked) == 2


async def _submit_inside(scorer: Scorer, t: Trajectory) -> None:
    scorer.submit(t)


def test_leftovers_of_a_phase_are_forgotten_and_cancelled(background: BackgroundLoop) -> None:
    judge = TableJudge({})
    scorer = Scorer(RewardConfig(), judge, background)
    scorer.submit(trajectory("hang"))
    assert judge.started.wait(10)
    scorer.score([(trajectory("a red kite"), trajectory("a red kite", index=1))])
    assert not scorer._pending
    left = background.run(_count_tasks())
    assert left == 1   # only the one that counts


async def _count_tasks() -> int:
    return len(asyncio.all_tasks())


def test_slow_mathematics_does_not_block_the_loop(background: BackgroundLoop) -> None:
    pytest.importorskip("math_verify")
    scorer = Scorer(RewardConfig(rules={"*": "maths"}), TableJudge({}), background)
    scorer.submit(trajectory("2^{9^{9^{9^{9}}}}", "x^2"))   # burns its whole time limit
    started = time.monotonic()
    background.run(_count_tasks())
    assert time.monotonic() - started < 1.0
    scorer.close()


def test_rules_are_chosen_by_data_source(background: BackgroundLoop) -> None:
    scorer = Scorer(RewardConfig(rules={"*": "auto", "toy/*": "text", "toy/free": "judge"}), None, background)
    (group,) = scorer.score([(trajectory("a bird", source="toy/perception"), trajectory("a bird", source="web"),
                              trajectory("a red kite", source="toy/free"))])
    assert [j.verdict for j in group.judgements] == [Verdict.WRONG, Verdict.UNSCORED, Verdict.UNSCORED]


def test_an_empty_ground_truth_is_unscored(background: BackgroundLoop) -> None:
    for truth in ("", [], [" "]):
        (group,) = Scorer(RewardConfig(), TableJudge({}), background).score([(trajectory("x", truth),)])
        assert group.judgements[0].verdict is Verdict.UNSCORED and "no ground truth" in group.judgements[0].detail


def test_the_limit_stops_a_step_with_one_clear_line(background: BackgroundLoop) -> None:
    groups = Scorer(RewardConfig(), TableJudge({}), background).score(
        [tuple(trajectory("a bird" if i < 2 else "a red kite", index=i) for i in range(10))])
    unscored, total = unscored_share(groups)
    assert (unscored, total) == (2, 10)
    check_unscored(unscored, total, 0.2)
    with pytest.raises(UnscoredLimitError, match="2 of 10 .*2 judge: raw reply about a bird"):
        check_unscored(unscored, total, 0.1, unscored_reasons(groups))
    check_unscored(0, 0, 0.1)


def test_counts_are_per_call_and_can_be_summed_over_ranks(background: BackgroundLoop) -> None:
    scorer = Scorer(RewardConfig(), TableJudge({"a plane": Verdict.WRONG}), background)
    scorer.score([(trajectory("a plane"), trajectory("a red kite"), trajectory("kite", end=EndReason.ABORTED))])
    stats = scorer.stats()
    assert stats["score/wrong_by_judge"] == stats["score/correct_by_rule"] == stats["score/unscored_by_none"] == 1
    assert "score/wrong_by_judge" not in scorer.stats()


def test_the_audit_file_tells_who_decided_and_where_rule_and_judge_disagree(background: BackgroundLoop, tmp_path) -> None:
    judge = TableJudge({"a plane": Verdict.WRONG, "A red kite": Verdict.CORRECT, "8": Verdict.CORRECT})
    scorer = Scorer(RewardConfig(cross_check=1.0), judge, background, AuditLog(tmp_path, rank=3))
    scorer.score([(trajectory("a plane"), trajectory("A red kite", index=1), trajectory("8", "7", index=2))], step=12)
    assert [p.name for p in tmp_path.iterdir()] == ["step_000012_rank3.jsonl"]
    plane, kite, eight = read_audit(tmp_path)
    assert plane["by"] == "judge" and plane["detail"] == "raw reply about a plane" and "judge_verdict" not in plane
    assert kite["question"] == "What flies there?" and kite["ground_truth"] == "a red kite"
    assert kite["by"] == "rule" and kite["judge_verdict"] == "correct" and kite["step"] == 12
    assert disagreements([plane, kite, eight]) == [eight] and eight["verdict"] == "wrong"


def test_a_hanging_cross_check_costs_a_step_little_and_changes_nothing(background, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr("hdpo.reward.scoring._CROSS_CHECK_GRACE_S", 0.1)
    scorer = Scorer(RewardConfig(cross_check=1.0), TableJudge({}), background, AuditLog(tmp_path))
    (group,) = scorer.score([(trajectory("hang", "hang"),)], step=1)
    assert group.judgements[0].verdict is Verdict.CORRECT
    assert "judge_verdict" not in read_audit(tmp_path)[0]


# --- withheld verdicts leave no trace ---------------------------------------------------------------------------------

class Withholding:
    """Judges by table and withholds some verdicts: an outage that hits single trajectories."""

    def __init__(self, verdicts: dict[str, Verdict], withheld: set[str]) -> None:
        self.verdicts, self.withheld = verdicts, withheld

    async def judge(self, question: str, ground_truth: str | list[str], prediction: str) -> Judgement:
        known = prediction not in self.withheld
        return Judgement(self.verdicts[prediction] if known else Verdict.UNSCORED, "judge", "")

    async def close(self) -> None:
        pass


def _with_calls(t: Trajectory, calls: int, well_formed: bool) -> Trajectory:
    made = tuple(ToolCall("python", {}, True, "ok") for _ in range(calls))
    return replace(t, calls=made, turns=t.turns if well_formed else ("<reason>" + t.final_turn,))


def _loss_and_gradient(groups: list[RewardedGroup], log_probs: dict[int, torch.Tensor]
                       ) -> tuple[dict[int, tuple[list[float], list[bool]]], torch.Tensor, dict[int, torch.Tensor]]:
    """What training makes of the groups: per trajectory (keyed by sample index) advantages and gradient, and the loss."""
    rows = [t.sample_index for group in groups for t in group.trajectories]
    advantages, member = group_advantages(groups, HdpoConfig())
    leaves = {i: log_probs[i].clone().requires_grad_() for i in rows}
    loss, _ = hdpo_loss(torch.stack([leaves[i] for i in rows]), torch.stack([log_probs[i] - 0.3 for i in rows]),
                        torch.tensor(advantages, dtype=torch.float64).T, torch.ones(len(rows), 5, dtype=torch.float64),
                        member=torch.tensor(member).T)
    loss.backward()
    return dict(zip(rows, zip(advantages, member, strict=True), strict=True)), loss.detach(), {
        i: leaf.grad for i, leaf in leaves.items() if leaf.grad is not None}


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_withheld_verdicts_leave_the_run_as_if_those_trajectories_had_never_existed(data: st.DataObject) -> None:
    sizes = data.draw(st.lists(st.integers(1, 6), min_size=1, max_size=4), label="group sizes")
    total = sum(sizes)
    flags = data.draw(st.lists(st.tuples(st.booleans(), st.booleans(), st.booleans(), st.integers(0, 3)),
                               min_size=total, max_size=total), label="right, withheld, well-formed, calls")
    verdicts = {f"bird no{'x' * i}": Verdict.CORRECT if right else Verdict.WRONG for i, (right, *_) in enumerate(flags)}
    withheld = {f"bird no{'x' * i}" for i, (_, hidden, *_) in enumerate(flags) if hidden}
    every = [_with_calls(trajectory(f"bird no{'x' * i}", index=i), calls, formed)
             for i, (_, _, formed, calls) in enumerate(flags)]
    full, kept, start = [], [], 0
    for size in sizes:
        full.append(tuple(every[start:start + size]))
        kept.append(tuple(t for t in full[-1] if not flags[t.sample_index][1]))
        start += size
    kept = [group for group in kept if group]
    generator = torch.Generator().manual_seed(total)
    log_probs = {i: torch.randn(5, generator=generator, dtype=torch.float64) - 3 for i in range(total)}
    background = BackgroundLoop()
    try:
        outage = Scorer(RewardConfig(), Withholding(verdicts, withheld), background).score(full)
        without = Scorer(RewardConfig(), Withholding(verdicts, set()), background).score(kept)
    finally:
        background.close()
    assert unscored_share(outage) == (sum(hidden for _, hidden, *_ in flags), total)
    advantages, loss, gradients = _loss_and_gradient(outage, log_probs)
    hidden_rows = {i for i, flag in enumerate(flags) if flag[1]}
    for i in hidden_rows:
        assert advantages[i] == ([0.0, 0.0], [False, False]) and not gradients[i].any()
    if kept:
        expected_advantages, expected_loss, expected_gradients = _loss_and_gradient(without, log_probs)
        assert {i: a for i, a in advantages.items() if i not in hidden_rows} == expected_advantages
        torch.testing.assert_close(loss, expected_loss, rtol=1e-12, atol=0)
        for i, gradient in expected_gradients.items():
            torch.testing.assert_close(gradients[i], gradient, rtol=1e-12, atol=0)


def test_a_judges_verdict_is_a_sign_of_progress_and_a_rules_verdict_costs_none(background: BackgroundLoop) -> None:
    scorer, seen = Scorer(RewardConfig(), TableJudge({"a scarlet kite": Verdict.CORRECT}), background), []
    scorer.progress = lambda: seen.append(1)
    scorer.score([(trajectory("a scarlet kite"), trajectory("A red kite.", index=1))])
    assert seen == [1]
