"""Metrics: exact over any split, one transfer, resumable file; statistics of trajectories from gathered rows."""
from __future__ import annotations

import dataclasses
import json
import math
import subprocess
import sys

import pytest
import torch
from synthetic_run import make_task, make_trajectory, score

from hdpo.errors import DataError
from hdpo.train.jsonl import JsonlSink, read_metrics
from hdpo.train.metrics import Metrics, memory_scalars
from hdpo.train.rollout_metrics import behaviour, rollout_rows, rollout_scalars, silence
from hdpo.types import EndReason, ToolCall


def _gathers(parts: list[Metrics]):
    """Run `reduce_over_ranks` of several ranks as a collective would: every rank sees every rank's object."""
    sent: list[object] = []
    for part in parts[1:]:
        part.reduce_over_ranks(lambda item: sent.append(item) or [item])
    return parts[0].reduce_over_ranks(lambda item: [item, *sent])


def test_every_reduction_is_the_same_for_any_split_over_micro_batches_and_ranks():
    values, weights = torch.randn(12), torch.randint(0, 5, (12,)).float()
    whole, ranks = Metrics(), [Metrics() for _ in range(3)]
    for index, (value, weight) in enumerate(zip(values, weights, strict=True)):
        for metrics in (whole, ranks[index % 3]):
            metrics.add("mean", value, weight)
            metrics.total("sum", value)
            metrics.maximum("max", value if index % 2 else value.item())    # tensors and floats mix
            metrics.minimum("min", value)
    once, split = whole.reduce_over_ranks(), _gathers(ranks)
    assert split == pytest.approx(once, abs=1e-6)
    assert once["mean"] == pytest.approx(((values * weights).sum() / weights.sum()).item(), abs=1e-6)
    assert (once["max"], once["min"]) == pytest.approx((values.max().item(), values.min().item()))


def test_no_tensor_is_read_before_the_end_and_all_are_moved_together(monkeypatch):
    reads = []
    for name in ("item", "tolist", "__bool__", "__float__", "cpu"):
        original = getattr(torch.Tensor, name)
        monkeypatch.setattr(torch.Tensor, name, lambda self, *a, _o=original, _n=name: reads.append(_n) or _o(self, *a))
    metrics = Metrics()
    for _ in range(4):
        metrics.add("a", torch.rand(()), torch.tensor(3.0))
        metrics.maximum("b", torch.rand(()))
        metrics.minimum("b/min", torch.rand(()))
        metrics.add_mismatch(torch.randn(9), torch.randn(9), torch.ones(9))
    assert reads == []
    metrics.reduce_over_ranks()
    assert reads == ["tolist"]


def test_a_name_with_no_weight_is_absent_even_if_its_value_was_nan():
    metrics = Metrics()
    metrics.add("empty", torch.tensor(float("nan")), torch.tensor(0.0))
    metrics.add("kept", float("nan"), 0.0)
    metrics.add("kept", 2.0, 3.0)
    assert metrics.reduce_over_ranks() == {"kept": 2.0}
    assert metrics.reduce_over_ranks() == {}, "the accumulator starts again"


def test_ranks_may_have_measured_different_names():
    ranks = [Metrics(), Metrics()]
    ranks[0].total("only/first", 1.0)
    ranks[1].total("only/second", 2.0)
    assert _gathers(ranks) == {"only/first": 1.0, "only/second": 2.0}


def test_one_name_cannot_be_two_kinds():
    metrics = Metrics()
    metrics.total("a", 1.0)
    with pytest.raises(ValueError, match="metric a was a sum and is now added as a max"):
        metrics.maximum("a", 1.0)


def test_a_phase_adds_up_within_a_rank_and_is_the_mean_over_ranks(monkeypatch):
    clock = iter([0.0, 2.0, 10.0, 13.0, 0.0, 4.0])
    monkeypatch.setattr("hdpo.train.metrics.time.perf_counter", lambda: next(clock))
    fast, slow = Metrics(), Metrics()
    for _ in range(2):
        with slow.timed("rollout"):
            pass
    with pytest.raises(RuntimeError), fast.timed("rollout"):
        raise RuntimeError("the time of a failed phase still counts")
    found = _gathers([fast, slow])
    assert found.pop("memory/rollout_gb") > 0.01      # of this process, or of the device
    assert found == {"time/rollout": (2.0 + 3.0 + 4.0) / 2}


def test_phases_and_the_rest_add_up_to_the_wall_clock_of_the_step_over_ranks():
    ranks = [Metrics(), Metrics()]
    for number, metrics in enumerate(ranks):
        for phase, seconds in (("rollout", 4.0 + number), ("score", 3.0 - number)):
            metrics._merge(f"time/{phase}", "time", [seconds])
        metrics.close_step(7.5)
    found = _gathers(ranks)
    assert found == {"time/rollout": 4.5, "time/score": 2.5, "time/other": 0.5, "time/step": 7.5}
    metrics = Metrics()
    metrics._merge("time/early", "time", [9.0])
    metrics.add("loss", 1.0)
    metrics.forget_times()
    assert metrics.reduce_over_ranks() == {"loss": 1.0}


def test_mismatch_counts_only_sampled_tokens_and_agrees_with_the_formulas():
    torch.manual_seed(0)
    trainer, engine = torch.randn(5000) * 0.1 - 2, torch.randn(5000) * 0.1 - 2
    mask = (torch.rand(5000) < 0.7).float()
    trainer[mask == 0] = 50.0
    metrics = Metrics()
    for part in (slice(0, 1700), slice(1700, 5000)):
        metrics.add_mismatch(trainer[part], engine[part], mask[part])
    found = metrics.reduce_over_ranks()
    d = (trainer - engine)[mask.bool()].double()
    assert found["mismatch/k1"] == pytest.approx(-d.mean().item(), abs=1e-6)
    assert found["mismatch/k3"] == pytest.approx((d.exp() - 1 - d).mean().item(), abs=1e-6)
    assert found["mismatch/ratio_max"] == pytest.approx(d.abs().max().exp().item(), rel=1e-5)
    for name, share in (("p50", 0.5), ("p99", 0.99)):
        expected = d.abs().quantile(share).item()
        assert math.log(found[f"mismatch/ratio_{name}"]) == pytest.approx(expected, rel=0.04), name


def test_a_log_prob_the_engine_could_not_state_is_counted_and_spoils_no_other_number():
    d = torch.tensor([0.1, torch.nan, -0.1, torch.inf])
    metrics = Metrics()
    metrics.add_mismatch(d, torch.zeros(4), torch.ones(4))
    found = metrics.reduce_over_ranks()
    assert found["mismatch/unknown"] == 0.5 and found["mismatch/abs"] == pytest.approx(0.1)
    assert found["mismatch/ratio_max"] == pytest.approx(math.exp(0.1))


def test_mismatch_of_an_empty_micro_batch_is_no_number():
    metrics = Metrics()
    metrics.add_mismatch(torch.zeros(0), torch.zeros(0), torch.zeros(0))
    assert "mismatch/k1" not in metrics.reduce_over_ranks()


def _rows(*cases, advantages=None):
    """cases: (needed, calls?, right?, end)."""
    groups = [score((make_trajectory(make_task(i, needed), 0, call=call, right=right, end=end),))
              for i, (needed, call, right, end) in enumerate(cases)]
    return rollout_rows(groups, advantages=advantages)


OK = EndReason.ANSWERED


def test_behaviour_counts_blind_and_missed_calls_among_tasks_of_known_need():
    found = behaviour(_rows((True, True, True, OK), (True, False, False, OK), (True, False, True, OK),
                            (False, True, True, OK), (False, False, True, OK)))
    assert found["accuracy"] == 4 / 5 and found["tool_rate"] == 2 / 5
    assert found["tool_rate_needed"] == pytest.approx(1 / 3) and found["tool_rate_not_needed"] == 1 / 2
    assert found["blind_call_rate"] == 1 / 5
    assert found["missed_call_rate"] == 1 / 5, "not calling and being right is no missed call"


def test_a_trajectory_that_failed_on_our_side_counts_as_unscored_and_nowhere_else():
    good = [(False, False, True, OK), (False, True, False, OK)]
    with_failure = behaviour(_rows(*good, (False, True, True, EndReason.INFRASTRUCTURE)))
    without = behaviour(_rows(*good))
    assert with_failure.pop("unscored") == pytest.approx(1 / 3) and without.pop("unscored") == 0
    assert with_failure.pop("rows") == 3 and without.pop("rows") == 2
    assert with_failure == without


def test_a_statistic_over_nothing_is_absent():
    assert behaviour([])["accuracy"] is None
    scalars = rollout_scalars(_rows((False, False, True, OK)))
    assert "tool/rate_needed" not in scalars and "reward/wrong_response_length/mean" not in scalars
    assert "tool/failed_call_rate" not in scalars and scalars["tool/rate"] == 0.0
    assert rollout_scalars([]) == {"tool/infrastructure": 0.0}


def test_calls_are_counted_per_tool_and_failures_by_whose_they_are():
    task = make_task(0, True)
    base = make_trajectory(task, 0, call=True, right=True)
    calls = (ToolCall("python", {}, False, "error"), ToolCall("text_search", {}, True, "found"),
             ToolCall("python", {}, False, "down", infrastructure=True), ToolCall("", {}, False, "Tool call error"))
    fields = {name: getattr(base, name) for name in base.__dataclass_fields__}
    scalars = rollout_scalars(rollout_rows([score((type(base)(**{**fields, "calls": calls}),))]))
    assert scalars["tool/calls_mean"] == 3 and scalars["tool/infrastructure"] == 1
    assert scalars["tool/failed_call_rate"] == pytest.approx(2 / 3)
    assert scalars["tool/rate/text_search"] == 1 and scalars["tool/rate/unparseable"] == 1


def test_group_signals_follow_q():
    def group(index, *members):
        return score(tuple(make_trajectory(make_task(index, True), n, call=call, right=right)
                           for n, (call, right) in enumerate(members)))
    groups = [group(0, (True, True), (False, True)),        # Q = 2, calls differ: tool signal, no accuracy signal
              group(1, (True, True), (True, True)),         # Q = 2, same calls: neither
              group(2, (True, True), (False, False)),       # Q = 1: accuracy signal only
              group(3, (True, False), (False, False))]      # Q = 0
    scalars = rollout_scalars(rollout_rows(groups))
    assert scalars["hdpo/q_size_mean"] == 5 / 4
    assert scalars["hdpo/groups_with_tool_signal"] == 1 / 4 and scalars["hdpo/groups_with_accuracy_signal"] == 1 / 4
    assert (scalars["hdpo/q_empty"], scalars["hdpo/q_one"], scalars["hdpo/q_all"]) == (1 / 4, 1 / 4, 2 / 4)


def test_gathered_rows_give_the_statistics_of_the_whole():
    groups = [score(tuple(make_trajectory(make_task(i, i % 2 == 0), n, call=n == 0, right=(n + i) % 3 > 0)
                          for n in range(3)))
              for i in range(6)]
    advantages = [[float(n), -float(n % 2)] for n in range(18)]
    whole = rollout_scalars(rollout_rows(groups, advantages=advantages))
    ranks = (rollout_rows(groups[:2], rank=0, advantages=advantages[:6])
             + rollout_rows(groups[2:], rank=1, advantages=advantages[6:]))
    assert rollout_scalars(ranks) == pytest.approx(whole)
    assert whole["actor/qualifying_ratio_rho"] == 0.5
    tokens = [row.sampled_length for row in ranks]
    tool = 0.15 * sum((n % 2) * tokens[n] for n in range(18))
    assert whole["hdpo/tool_advantage_mass"] == pytest.approx(tool / (tool + sum(n * tokens[n] for n in range(18))))


def test_end_reasons_and_deciders_are_shares_of_all_rows():
    scalars = rollout_scalars(_rows((True, True, True, OK), (True, True, True, EndReason.MAX_TOKENS),
                                    (True, False, True, EndReason.INFRASTRUCTURE), (True, False, True, OK)))
    assert sum(value for name, value in scalars.items() if name.startswith("end/")) == pytest.approx(1.0)
    assert scalars["end/max_tokens"] == scalars["response_length/clip_ratio"] == 1 / 4
    assert scalars["score/unscored"] == 1 / 4 and scalars["score/by_rule"] == 3 / 4


@pytest.mark.parametrize(("rows", "words"), [
    ([(True, False, False, OK), (True, True, False, OK)], "no rollout is right"),
    ([(True, True, True, OK), (True, True, True, OK)], "every rollout is right"),
    ([(True, False, True, EndReason.INFRASTRUCTURE)], "no rollout has a verdict")])
def test_a_step_that_can_move_nothing_says_why_and_any_other_says_nothing(rows, words):
    rows = _rows(*rows)
    still = [dataclasses.replace(row, advantages=(0.0, 0.0)) for row in rows]
    if words.startswith("no rollout has"):
        still = [dataclasses.replace(row, reward=dataclasses.replace(row.reward, scored=False)) for row in still]
    assert silence(rollout_scalars(still)).startswith(words)
    moved = [dataclasses.replace(rows[0], advantages=(0.0, 0.5)), *still[1:]]
    assert not silence(rollout_scalars(moved)) and not silence(rollout_scalars(rows))     # rows: without any advantages


def test_metrics_jsonl_is_valid_json_and_keeps_every_line_as_soon_as_it_is_written(tmp_path):
    sink = JsonlSink(tmp_path / "metrics.jsonl")
    sink.write(1, {"a": 1.5, "b": float("nan"), "c": math.inf})
    line = (tmp_path / "metrics.jsonl").read_text()     # before close
    assert json.loads(line, parse_constant=pytest.fail) == {"step": 1, "a": 1.5, "b": None, "c": None}


def test_resuming_leaves_every_step_once_and_drops_a_torn_line(tmp_path):
    path = tmp_path / "metrics.jsonl"
    first = JsonlSink(path)
    for step in range(1, 6):
        first.write(step, {"value": 1.0})
    first.close()
    with path.open("a") as file:
        file.write('{"step": 6, "val')
    again = JsonlSink(path, resume_step=4)
    again.write(4, {"value": 2.0})
    again.close()
    assert [(row["step"], row["value"]) for row in read_metrics(path)] == [(1, 1.0), (2, 1.0), (3, 1.0), (4, 2.0)]


def test_a_damaged_line_in_the_middle_is_named(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\nbroken\n{"step": 3}\n')
    with pytest.raises(DataError, match="line 2 is not JSON"):
        read_metrics(tmp_path / "metrics.jsonl")


def test_tensorboard_holds_scalars_text_and_pictures(tmp_path):
    pytest.importorskip("tensorboard")
    from PIL import Image
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    from hdpo.adapters.tensorboard import TensorBoardSink
    from hdpo.protocols import ShownRollout

    sink = TensorBoardSink(tmp_path)
    sink.write(3, {"tool/rate": 0.25, "bad": float("nan"), "hdpo/groups": 4.0, "hdpo/q_size_is/0": 0.25,
                   "hdpo/q_size_is/1": 0.0, "hdpo/q_size_is/2": 0.75})
    sink.write_rollouts(3, [ShownRollout("t", "s", "<reason>**kept as it is**</reason>", (Image.new("RGB", (20, 10), "red"),),
                                         "correct", "rule", "7", 1, (0.5, -1.25))])
    sink.close()
    events = EventAccumulator(str(tmp_path)).Reload()
    assert [(e.step, e.value) for e in events.Scalars("tool/rate")] == [(3, 0.25)]
    assert "bad" not in events.Tags()["scalars"]
    said = events.Tensors("rollouts/0/text_summary")[0].tensor_proto.string_val[0].decode()
    assert "    <reason>**kept" in said
    assert "    [correct by rule; truth: 7; advantages: accuracy +0.50, tool -1.25]" in said
    assert (events.Images("rollouts/0/image_1")[0].width, events.Images("rollouts/0/image_1")[0].height) == (20, 10)
    sizes = events.Histograms("hdpo/q_size")[0].histogram_value
    assert list(zip(sizes.bucket_limit, sizes.bucket)) == [(0.5, 1.0), (1.5, 0.0), (2.5, 3.0)] and sizes.sum == 6.0


def test_wandb_is_imported_only_when_asked_for_and_its_absence_is_one_line():
    code = ("import sys; sys.modules['wandb'] = None\n"
            "from hdpo.adapters.wandb import WandbSink\nfrom hdpo.errors import ConfigError\n"
            "try: WandbSink('n', '.', {})\nexcept ConfigError as exc: print(exc)")
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.startswith("log.wandb is true but wandb is not installed") and found.stdout.count("\n") == 1


def test_host_memory_is_measured_in_gib():
    assert 0 < memory_scalars()["perf/cpu_memory_used_gb"] < 100_000
