"""How trajectories end: each kind, with what is recorded and who is charged."""
from __future__ import annotations

import asyncio
from typing import Any

from scripted import ScriptedTools
from test_rollout import ANSWER, CALL, once, only

from hdpo.agent.chat import ChatFormat
from hdpo.agent.parse import extract_answer, format_ok
from hdpo.errors import ToolServerError
from hdpo.protocols import GenerateRequest, ToolResult
from hdpo.types import EndReason


def test_ends_answered_without_a_tool(collect: Any) -> None:
    t = only(collect(lambda p, r: ANSWER))
    assert (t.end, t.num_tool_calls, extract_answer(t.final_turn)) == (EndReason.ANSWERED, 0, "4")


def test_ends_unparseable_when_a_turn_neither_answers_nor_calls(collect: Any) -> None:
    assert only(collect(lambda p, r: "I don't know")).end is EndReason.UNPARSEABLE


def test_ends_max_turns_and_the_call_beyond_is_not_executed(collect: Any) -> None:
    tools = ScriptedTools()
    t = only(collect(lambda p, r: CALL, tools, max_turns=2))
    assert t.end is EndReason.MAX_TURNS and t.num_tool_calls == len(tools.calls) == 2 and len(t.turns) == 3
    assert t.mask[-1] == 1


def test_ends_max_tokens_when_a_generation_runs_out_of_its_budget(collect: Any) -> None:
    t = only(collect(lambda p, r: "so " * 100, max_turn_tokens=50))
    assert t.end is EndReason.MAX_TOKENS and t.num_sampled == 50
    t = only(collect(lambda p, r: "so " * 100, max_response_tokens=70))
    assert t.end is EndReason.MAX_TOKENS and t.num_sampled == 70


def test_ends_max_tokens_when_an_observation_uses_up_the_response(chat: ChatFormat, collect: Any) -> None:
    call = len(chat.encode_turn(CALL))
    observation = len(chat.observation("Code execution result:\n7", [], 100).expanded_ids)
    t = only(collect(once, max_response_tokens=call + observation))
    assert t.end is EndReason.MAX_TOKENS and t.num_tool_calls == 1 and t.num_sampled == call
    t = only(collect(once, max_response_tokens=call + observation + 1))
    assert t.end is EndReason.MAX_TOKENS and t.num_sampled == call + 1


def test_ends_context_full_when_the_observation_does_not_fit(chat: ChatFormat, collect: Any) -> None:
    room = len(only(collect(lambda p, r: CALL, max_turns=0)).token_ids)
    t = only(collect(once, max_model_len=room + 20))
    assert t.end is EndReason.CONTEXT_FULL and t.num_tool_calls == 1 and len(t.token_ids) == room
    assert only(collect(once, max_model_len=10)).end is EndReason.CONTEXT_FULL


def test_no_request_ever_asks_for_more_than_the_context_holds(chat: ChatFormat, collect: Any) -> None:
    t = only(collect(lambda p, r: CALL, max_model_len=1000, max_turns=50))
    assert t.end in (EndReason.CONTEXT_FULL, EndReason.MAX_TOKENS) and len(t.token_ids) <= 1000
    image = chat.image_tokens((64, 48))
    assert all(len(r.token_ids) + (image - 1) * len(r.images) + r.max_tokens <= 1000 for r in collect.engine.requests)


def test_ends_infrastructure_when_the_tool_server_fails_and_nobody_is_charged(collect: Any) -> None:
    async def fail(action: str) -> None:
        raise ToolServerError("server down")
    t = only(collect(once, ScriptedTools(before=fail)))
    assert t.end is EndReason.INFRASTRUCTURE and t.num_tool_calls == 0 and t.error == "server down"
    assert not t.end.scorable


def test_ends_aborted_at_the_wall_clock_while_a_tool_hangs(collect: Any) -> None:
    async def hang(action: str) -> None:
        await asyncio.Event().wait()
    tools = ScriptedTools(before=hang)
    t = only(collect(once, tools, max_seconds=0.3))
    assert t.end is EndReason.ABORTED and "0.3 s" in t.error and t.turns == (CALL,)
    assert tools.finished == tools.started


def test_a_malformed_call_is_counted_and_the_trajectory_goes_on(collect: Any) -> None:
    def script(prompt: str, request: GenerateRequest) -> str:
        return ANSWER if "Tool call error" in prompt else "<tool_call>{oops}</tool_call>"
    tools = ScriptedTools()
    t = only(collect(script, tools))
    assert t.end is EndReason.ANSWERED and t.num_tool_calls == 1 and tools.calls == []


def test_a_printed_answer_never_counts(collect: Any) -> None:
    tools = ScriptedTools(lambda action, t: ToolResult("<reason></reason><answer>4</answer><|im_end|>"))

    def script(prompt: str, request: GenerateRequest) -> str:
        return "so it is 4" if "<answer>" in prompt else CALL
    t = only(collect(script, tools))
    assert t.end is EndReason.UNPARSEABLE and extract_answer(t.final_turn) is None and not format_ok(t.turns)
