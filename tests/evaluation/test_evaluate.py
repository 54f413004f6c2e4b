"""Evaluation: greedy, sharded over ranks, the same numbers for any number of ranks, tables that say what was counted."""
from __future__ import annotations

import json
import os
import threading

import pytest
from synthetic_run import CoinRollouts, make_task

from hdpo.agent.queue import static_queue
from hdpo.evaluation.evaluate import evaluate, format_table, summarise, write_summary

TASKS = [make_task(index, needed=index % 3 == 0) for index in range(10)]


def _evaluate_on(world: int):
    """Every rank in a thread of its own, gathering through a barrier as a collective does."""
    box, barrier, results = [None] * world, threading.Barrier(world), [None] * world

    def rank_main(rank):
        def gather(item):
            box[rank] = item
            barrier.wait()
            return list(box)
        policy = CoinRollouts(1, eager=0.5, useful=0.5)
        results[rank] = evaluate(policy, policy, TASKS, gather=gather, rank=rank, queue=static_queue(rank, world))
    threads = [threading.Thread(target=rank_main, args=(rank,)) for rank in range(world)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results


@pytest.mark.parametrize("world", [2, 3, 16])
def test_any_number_of_ranks_gives_the_same_summary_on_every_rank(world):
    alone = _evaluate_on(1)[0]
    results = _evaluate_on(world)
    assert all(result.summary == alone.summary for result in results)
    done = sorted(group.task.id for result in results for group in result.groups)
    assert done == [task.id for task in TASKS], "every task once, whatever the number of ranks"


def test_evaluation_is_greedy_with_one_trajectory_per_task():
    asked = {}

    class Watched(CoinRollouts):
        def collect(self, tasks, **settings):
            asked.update(settings)
            return super().collect(tasks, **settings)
    policy = Watched(1, 0.5, 0.5)
    result = evaluate(policy, policy, TASKS, step=7, weight_version=4)
    assert asked.pop("queue") and asked == {"group_size": 1, "temperature": 0.0, "step": 7, "weight_version": 4}
    assert result.summary["rows"] == len(TASKS) == len(result.rows)


def test_a_policy_that_calls_only_where_needed_has_the_rates_it_should():
    policy = CoinRollouts(1, eager=0.0, useful=1.0)
    summary = evaluate(policy, policy, TASKS).summary
    assert (summary["tool_rate_needed"], summary["tool_rate_not_needed"], summary["tool_rate"]) == (1.0, 0.0, 0.4)
    assert summary["blind_call_rate"] == summary["missed_call_rate"] == 0
    assert set(summary["families"]) == {"toy/small_print", "toy/large_print"}
    assert summary["need"]["needed"]["rows"] == 4 and summary["need"]["not_needed"]["calls_mean"] == 0
    assert sum(part["rows"] for part in summary["families"].values()) == summary["rows"]


def test_no_task_at_all_is_a_summary_of_nothing():
    policy = CoinRollouts(1, 0.5, 0.5)
    result = evaluate(policy, policy, [])
    assert result.summary["rows"] == 0 and result.summary["accuracy"] is None
    assert "accuracy" not in {name.removeprefix("eval/") for name in result.scalars()}
    assert "–" in format_table(result.summary)


def test_the_log_gets_every_family():
    policy = CoinRollouts(1, eager=0.0, useful=1.0)
    scalars = evaluate(policy, policy, TASKS).scalars()
    assert scalars["eval/tool_rate"] == 0.4 and scalars["eval/toy/small_print/tool_rate"] == 1.0
    assert all(isinstance(value, float) for value in scalars.values())


def test_the_table_shows_before_and_after_aligned():
    eager, wise = CoinRollouts(1, 1.0, 1.0), CoinRollouts(1, 0.0, 1.0)
    table = format_table(evaluate(eager, eager, TASKS).summary, evaluate(wise, wise, TASKS).summary)
    lines = table.splitlines()
    assert "100.0% → 40.0%" in lines[2] and lines[2].startswith("all")
    assert any(line.startswith("tool not needed") and "100.0% → 0.0%" in line for line in lines)
    assert len({len(line) for line in lines[1:]}) == 1


def test_a_family_missing_from_one_side_is_a_dash():
    policy = CoinRollouts(1, 1.0, 1.0)
    both = evaluate(policy, policy, TASKS).summary
    few = evaluate(policy, policy, [task for task in TASKS if task.extra["tool_needed"]]).summary
    row = next(line for line in format_table(both, few).splitlines() if line.startswith("toy/large_print"))
    assert "→ –" in row


def test_the_summary_file_is_valid_json_written_whole(tmp_path, monkeypatch):
    path = tmp_path / "run" / "summary.json"
    write_summary(path, {"sft": summarise([])})
    assert json.loads(path.read_text())["sft"]["accuracy"] is None

    def failing(*_):
        raise OSError("disk full")
    monkeypatch.setattr(os, "replace", failing)
    with pytest.raises(OSError, match="disk full"):
        write_summary(path, {"sft": {}})
    assert list(path.parent.iterdir()) == [path] and json.loads(path.read_text())["sft"]["rows"] == 0
