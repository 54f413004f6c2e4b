"""A sampled turn becomes a call; what is wrong with it is told, what fails on our side is marked as ours."""
from __future__ import annotations

import asyncio

import pytest
from scripted import ScriptedTools

from hdpo.agent.parse import EXAMPLES
from hdpo.agent.tools import AgentTools, ToolOutcome
from hdpo.config import ToolsConfig
from hdpo.errors import ToolServerError
from hdpo.protocols import ToolResult
from hdpo.types import Task

TASK = Task("t", "toy", [{"role": "user", "content": "q"}], (), "4")


def run(turn: str, tools: ScriptedTools, **config: object) -> ToolOutcome:
    return asyncio.run(AgentTools(tools, ToolsConfig(**config)).run("id", turn, TASK))


def test_a_good_call_reaches_the_backend_as_it_was_written() -> None:
    tools = ScriptedTools(lambda action, task: ToolResult("seen", (b"image",), ok=True))
    turn = "<reason>r</reason>\n" + EXAMPLES["python"]
    outcome = run(turn, tools)
    assert tools.calls == [("id", turn)]
    assert outcome.call.ok and not outcome.call.infrastructure and outcome.call.arguments == {"code": "print(1 + 1)"}
    assert (outcome.call.name, outcome.call.observation, outcome.call.num_images) == ("python", "seen", 1)
    assert outcome.images == (b"image",)


@pytest.mark.parametrize("turn", ["<tool_call>{</tool_call>", '<tool_call>{"name": "rm", "arguments": {}}</tool_call>'])
def test_a_malformed_call_is_answered_here_and_never_sent(turn: str) -> None:
    tools = ScriptedTools()
    outcome = run(turn, tools)
    assert tools.started == [] and not outcome.call.ok and not outcome.call.infrastructure
    assert "A correct call looks like this" in outcome.call.observation


def test_a_tool_that_is_not_allowed_is_refused_with_the_names_of_those_that_are() -> None:
    tools = ScriptedTools()
    outcome = run(EXAMPLES["image_search"], tools, allowed=["python", "text_search"])
    assert tools.started == [] and "available: python, text_search" in outcome.call.observation
    assert EXAMPLES["python"] in outcome.call.observation
    assert "Answer without tools" in run(EXAMPLES["python"], tools, allowed=[]).call.observation


def test_the_policys_own_error_is_not_ours() -> None:
    outcome = run(EXAMPLES["python"], ScriptedTools(lambda action, task: ToolResult("Traceback", ok=False)))
    assert not outcome.call.ok and not outcome.call.infrastructure and outcome.call.observation == "Traceback"


def test_a_failing_server_and_a_missed_deadline_are_ours() -> None:
    async def fail(action: str) -> None:
        raise ToolServerError("server down")

    async def hang(action: str) -> None:
        await asyncio.Event().wait()

    for before, error in ((fail, "server down"), (hang, "no answer to a python call within 0.05 s")):
        outcome = run(EXAMPLES["python"], ScriptedTools(before=before), call_timeout_s=0.05)
        assert outcome.call.infrastructure and outcome.error == error


def test_a_bug_in_the_backend_is_not_hidden() -> None:
    async def bug(action: str) -> None:
        raise KeyError("bug")
    with pytest.raises(KeyError):
        run(EXAMPLES["python"], ScriptedTools(before=bug))
