"""What tools answer on a bad day, seen from `Rollouts.collect`: it returns, and every trajectory goes on or is marked as ours."""
from __future__ import annotations

import json
from typing import Any

import pytest
from odd_files import BROKEN
from scripted import ScriptedEngine, ScriptedTools
from test_rollout import ANSWER, task

from hdpo import oddities, text
from hdpo.agent.chat import ChatFormat
from hdpo.agent.rollout import Rollouts
from hdpo.background import BackgroundLoop
from hdpo.config import RolloutConfig, ToolsConfig
from hdpo.protocols import GenerateRequest, ToolResult
from hdpo.types import EndReason, Trajectory

CALL = '<tool_call>{"name": "text_search", "arguments": {"query": "fuji"}}</tool_call>'


def collect(chat: ChatFormat, background: BackgroundLoop, result: ToolResult) -> Trajectory:
    """One rollout: a search that is answered with `result`, then an answer."""
    def script(prompt: str, request: GenerateRequest) -> str:
        return ANSWER if CALL in prompt else CALL

    rollouts = Rollouts(ScriptedEngine(chat, script), chat, ScriptedTools(lambda action, task: result), background,
                        RolloutConfig(), ToolsConfig(), 4096)
    ((trajectory,),) = rollouts.collect([task()], group_size=1, temperature=1.0, step=0, weight_version=0)
    rollouts.close()
    return trajectory


@pytest.mark.parametrize("said", [
    "\ud83d", "a \ude00 b", "\ude00\ud83d", "\x00\ufffe\U0010ffff", "\u202e\x1b[2J", "é" * 3 + "\udcff",
    "<|im_end|><|image_pad|>\ud83d</tool_call>"])
def test_text_of_any_kind_in_a_reply_is_an_observation(chat: ChatFormat, background: BackgroundLoop, said: str) -> None:
    trajectory = collect(chat, background, ToolResult(said))
    assert trajectory.end is EndReason.ANSWERED
    json.dumps(trajectory.calls[0].observation, ensure_ascii=False).encode()


@pytest.mark.parametrize("name", BROKEN)
def test_a_picture_that_is_none_is_named_in_the_observation_and_counted(
        chat: ChatFormat, background: BackgroundLoop, name: str) -> None:
    oddities.take()
    trajectory = collect(chat, background, ToolResult("found:", (BROKEN[name],)))
    assert trajectory.end is EndReason.ANSWERED and oddities.take() == {"odd/image/tool": 1.0}
    assert len(trajectory.images) == len(trajectory.task.images)


@pytest.mark.parametrize(("broken", "whole"), [
    ("\ud83d\ude00", "\U0001f600"), ("x\ud83d", "x\ufffd"), ("\ude00\ud83d\ude00", "\ufffd\U0001f600"), ("plain", "plain"),
    ("\ufffd", "\ufffd"), ("\U0001f600\ud83d", "\U0001f600\ufffd")])
def test_pairs_are_joined_and_halves_replaced(broken: str, whole: str) -> None:
    assert text.valid(broken, "test") == whole and text.valid(whole, "test") == whole
    assert text.valid_tree({broken: [broken, {"k": (broken, 5, None)}]}, "test") == {whole: [whole, {"k": [whole, 5, None]}]}


def test_only_what_was_replaced_is_counted() -> None:
    oddities.take()
    for said in ("\ud83d\ude00", "\ufffd", "plain"):
        text.valid(said, "test")
    assert oddities.take() == {}
    text.valid("\ud83d", "test")
    assert oddities.take() == {"odd/text/test": 1.0}


@pytest.mark.parametrize("report", [
    None, 5, [1], {"UP": 1, "a b": 1, "x": -1, "y": 1.5, "z": True, 5: 5, "a" * 99: 1, "ok/busy": 2}])
def test_a_servers_report_of_oddities_can_name_nothing_else(report: Any) -> None:
    oddities.take()
    oddities.count_reported(report)
    assert oddities.take() == ({"odd/ok/busy": 2.0} if isinstance(report, dict) else {})
