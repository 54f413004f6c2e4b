"""What a stage decides: comparison of observations, necessity with three-valued verdicts, strict grades."""
from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest

from hdpo.agent.parse import ParsedCall
from hdpo.compose.tools import NoTools
from hdpo.config.curation import ExecutionSettings, NecessitySettings
from hdpo.curation.record import Observation, Outcome, Record, Step, Waits
from hdpo.curation.stages.compare import same_text, streams
from hdpo.curation.stages.execution import Execution
from hdpo.curation.stages.judgement import read_scores
from hdpo.curation.stages.run import NecessityStage
from hdpo.protocols import ToolResult
from hdpo.types import EndReason, Judgement, Reward, RewardedGroup, Trajectory, Verdict


@pytest.mark.parametrize(("recorded", "real", "same"), [
    ("3.14159", "3.1416", True), ("3", "4", False), ("3.0", "3", True), ("<A at 0x7f01>", "<A at 0x9c22>", True),
    ("/home/a/out.png", "out.png", True), ("a  b\n\nc", "a b c", True), ("[1, 2]", "[1, 3]", False), ("", "x", False),
    ("10000001", "10000002", False), ("1e-3", "0.001", True), ("yes", "no", False)])
def test_outputs_are_the_same_up_to_space_addresses_paths_and_rounding(recorded: str, real: str, same: bool) -> None:
    assert same_text(recorded, real, 1e-3) is same


def test_streams_are_found_in_both_layouts_and_no_output_is_empty() -> None:
    reference = "Code execution result:\nstdout:\n```\n3\n\n```\n\nstderr:\n```\n\n```\n\nImages:\n"
    ours = "Code execution result:\nstdout:\n```\nScript executed successfully (no output).\n```"
    assert streams(reference) == ("3", "") and streams(ours) == ("", "")
    assert streams("Code execution result:\n1 image") == ("", "") and streams("plain 3") == ("plain 3", "")


def record(row: int) -> Record:
    step = Step("t", ParsedCall("python", {"code": "1"}), Observation("1"))
    return Record("deepeyes", row, "use tools", "How many?", (), (step,), "r", "3")


class Sampled:
    """Rollouts and scorer of stage 2: row k's samples get the verdicts of `table[k]` (c, w, u for unscored)."""

    def __init__(self, table: dict[str, str]) -> None:
        self.table, self.systems = table, set[str]()

    def collect(self, tasks: Any, *, group_size: int, **_: Any) -> list[tuple[Trajectory, ...]]:
        self.systems |= {task.messages[0]["content"] for task in tasks}
        return [tuple(Trajectory(task, index, [1], [1], [0.0], 0, (), (), EndReason.ANSWERED, ("x",)) for _ in range(group_size))
                for index, task in enumerate(tasks)]

    def score(self, groups: Any) -> list[RewardedGroup]:
        return [RewardedGroup(group[0].task, group, tuple(Judgement(Verdict.UNSCORED, "none") for _ in group), tuple(
            Reward(0.0, 0.0, v == "c", True, v != "u") for v in self.table[group[0].task.id]), number)
            for number, group in enumerate(groups)]


def test_necessity_drops_what_is_solved_without_tools_and_an_unscored_sample_counts_neither_way() -> None:
    table = {"deepeyes_0": "cccccccc", "deepeyes_1": "cccccccw", "deepeyes_2": "ccccccuu", "deepeyes_3": "uuuuuccc",
             "deepeyes_4": "wwwwwwww"}
    sampled = Sampled(table)
    found = NecessityStage(sampled, sampled, NecessitySettings()).run([record(row) for row in range(5)])
    assert [outcome.reason if isinstance(outcome, Outcome) else "waits" for outcome in found] == [
        "solved_without_tools", "", "solved_without_tools", "waits", ""]
    assert isinstance(found[1], Outcome) and found[1].record.extra == {"pass8": 7, "pass_samples": 8}
    assert sampled.systems == {NecessitySettings().system}
    strict = NecessityStage(sampled, sampled, NecessitySettings(threshold=0.125)).run([record(1), record(4)])
    assert [isinstance(o, Outcome) and o.reason for o in strict] == ["solved_without_tools", ""]
    bare = Record("openmm", 9, "", "?", (), (), "r", "3")
    kept = NecessityStage(sampled, sampled, NecessitySettings()).run([bare])[0]
    assert isinstance(kept, Outcome) and not kept.reason


@pytest.mark.parametrize("reply", ["", "5", "{}", '{"visual_relevance": 5}', "[1,2,3]", "visual_relevance: 4",
                                   '{"visual_relevance": 6, "reasoning_coherence": 5, "tool_rationale": 5}',
                                   '{"visual_relevance": true, "reasoning_coherence": 5, "tool_rationale": 5}',
                                   '{"visual_relevance": 4.5, "reasoning_coherence": 5, "tool_rationale": 5}'])
def test_scores_are_strict_json_of_three_whole_numbers(reply: str) -> None:
    assert read_scores(reply) is None
    good = {"visual_relevance": 4, "reasoning_coherence": 5, "tool_rationale": 1}
    assert read_scores(json.dumps(good)) == read_scores(f"```json\n{json.dumps(good)}\n```") == good


def test_a_tool_server_that_fails_lets_rows_wait() -> None:
    with pytest.raises(Waits, match="no tool server"):
        asyncio.run(Execution(NoTools(), ExecutionSettings())(record(0)))


class Restarting:
    """A tool server whose first session ends under a cell; named as a stand-in for a machine that is too busy."""

    def __init__(self, times: int) -> None:
        self.times, self.sessions = times, list[str]()

    async def call(self, trajectory_id: str, action: str, task: Any) -> ToolResult:
        self.sessions.append(trajectory_id)
        if len(self.sessions) <= self.times:
            return ToolResult("stderr:\n```\ngone\n```", ok=False, metrics={"session_restarted": True})
        return ToolResult("1")

    async def finish(self, trajectory_id: str) -> None: ...

    async def close(self) -> None: ...


def test_a_session_that_ends_is_tried_anew_before_the_row_is_dropped_for_it() -> None:
    for times, reason in ((0, ""), (2, ""), (3, "session_ended")):
        server = Restarting(times)
        assert asyncio.run(Execution(server, ExecutionSettings())(record(0))).reason == reason
        assert len(set(server.sessions)) == min(times + 1, 3)
