"""The text rules: calls, answers and the format verdict."""
from __future__ import annotations

import json
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hdpo.agent.parse import EXAMPLES, MalformedCall, ParsedCall, extract_answer, format_ok, parse_tool_call


def call(payload: object) -> str:
    return f"<reason>look</reason>\n<tool_call>{json.dumps(payload)}</tool_call>"


@pytest.mark.parametrize("name", EXAMPLES)
def test_every_example_shown_to_the_model_parses_to_its_own_tool(name: str) -> None:
    parsed = parse_tool_call(EXAMPLES[name])
    assert isinstance(parsed, ParsedCall) and parsed.name == name


def test_search_is_another_name_of_text_search_and_a_list_query_takes_its_first_item() -> None:
    parsed = parse_tool_call(call({"name": "search", "arguments": {"query": ["first", "second"]}}))
    assert parsed == ParsedCall("text_search", {"query": "first"})


def test_the_last_of_several_calls_counts() -> None:
    text = call({"name": "image_search", "arguments": {}}) + call({"name": "python", "arguments": {"code": "2"}})
    assert parse_tool_call(text) == ParsedCall("python", {"code": "2"})


def test_an_opening_tag_quoted_in_the_reason_does_not_swallow_the_call() -> None:
    text = "<reason>I could write <tool_call> now</reason>" + call({"name": "image_search", "arguments": {}})
    assert parse_tool_call(text) == ParsedCall("image_search", {})


def test_image_search_may_name_an_image_and_a_part_of_it_and_ignores_the_rest() -> None:
    text = call({"name": "image_search", "arguments": {"image": 2, "box": [0, 1.5, 20, 30], "why": "small"}})
    assert parse_tool_call(text) == ParsedCall("image_search", {"image": 2, "box": [0, 1.5, 20, 30]})


def test_code_may_hold_real_line_breaks() -> None:
    text = '<tool_call>{"name": "python", "arguments": {"code": "a = 1\nprint(a)"}}</tool_call>'
    assert parse_tool_call(text) == ParsedCall("python", {"code": "a = 1\nprint(a)"})


@pytest.mark.parametrize(("text", "hint"), [
    ("no call at all", "no <tool_call>"),
    ("</tool_call>{}<tool_call>", "no <tool_call>"),
    ("<tool_call>{'name': 1}</tool_call>", "not valid JSON"),
    (f"<tool_call>{'[' * 200_000}</tool_call>", "not valid JSON"),
    (call([1, 2]), "must be an object"),
    (call({"arguments": {}}), "the tools are"),
    (call({"name": {"a": 1}}), "the tools are"),
    (call({"name": "rm", "arguments": {}}), "the tools are"),
    (call({"name": "python", "arguments": "print(1)"}), "must be a JSON object"),
    (call({"name": "python", "arguments": None}), "must be a JSON object"),
    (call({"name": "python", "arguments": {"code": 7}}), '"code"'),
    (call({"name": "python", "arguments": {"code": "  "}}), '"code"'),
    (call({"name": "text_search", "arguments": {"query": []}}), '"query"'),
    (call({"name": "text_search", "arguments": {"query": [3]}}), '"query"'),
    (call({"name": "image_search", "arguments": {"image": 0}}), '"image"'),
    (call({"name": "image_search", "arguments": {"image": True}}), '"image"'),
    (call({"name": "image_search", "arguments": {"box": [1, 2, 3]}}), '"box"'),
    (call({"name": "image_search", "arguments": {"box": [5, 0, 5, 9]}}), "empty"),
    ('<tool_call>{"name": "image_search", "arguments": {"box": [0, 0, NaN, 9]}}</tool_call>', '"box"'),
])
def test_a_malformed_call_says_what_is_wrong_and_shows_a_correct_one(text: str, hint: str) -> None:
    parsed = parse_tool_call(text)
    assert isinstance(parsed, MalformedCall)
    assert hint in parsed.message
    assert any(example in parsed.message for example in EXAMPLES.values())
    assert len(parsed.message) < 1000


def test_half_a_surrogate_pair_from_a_json_escape_can_be_encoded_later() -> None:
    parsed = parse_tool_call('<tool_call>{"name": "python", "arguments": {"code": "x=\\ud800"}}</tool_call>')
    assert isinstance(parsed, ParsedCall)
    parsed.arguments["code"].encode("utf-8")


@given(st.text())
def test_any_text_inside_the_tags_gives_a_call_or_a_message_never_an_exception(text: str) -> None:
    assert isinstance(parse_tool_call(f"<tool_call>{text}</tool_call>"), ParsedCall | MalformedCall)


@given(st.recursive(st.none() | st.booleans() | st.integers() | st.text(),
                    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner), max_leaves=8))
def test_any_json_as_arguments_gives_a_call_or_a_message(arguments: object) -> None:
    for name in (*EXAMPLES, "search"):
        assert isinstance(parse_tool_call(call({"name": name, "arguments": arguments})), ParsedCall | MalformedCall)


@pytest.mark.parametrize(("turn", "answer"), [
    ("<answer> 4 </answer>", "4"),
    ("<answer>3</answer> no, <answer>4</answer>", "4"),
    ("<answer>3</answer> <answer>", "3"),
    ("<answer> wait <answer>4</answer>", "4"),
    ("</answer>4<answer>", None),
    ("4", None),
    ("<answer></answer>", ""),
    ("<answer>two\nlines</answer>", "two\nlines"),
])
def test_the_last_well_formed_answer_of_the_turn_is_extracted(turn: str, answer: str | None) -> None:
    assert extract_answer(turn) == answer


@pytest.mark.parametrize(("turns", "ok"), [
    (["<reason>r</reason><answer>4</answer>"], True),
    (["<answer>4</answer>"], True),                                      # a reason is not required
    (["<reason>r</reason><answer>3</answer><answer>4</answer>"], True),  # as in the reference
    (["<reason>r</reason><tool_call>{}</tool_call>", "<reason>s</reason><answer>4</answer>"], True),
    (["<answer>4</answer><reason>r</reason>"], False),                   # an answer before the reasoning
    (["<reason>r<answer>4</answer>"], False),
    (["<reason>r</reason><answer>4"], False),
    (["<reason>r</reason>"], False),
    (["</answer>4<answer>"], False),                                     # reversed tags pass in the reference
    (["</reason>r<reason><answer>4</answer>"], False),
    (["</tool_call>x<tool_call>", "<answer>4</answer>"], False),
    (["<tool_call>x", "<answer>4</answer>"], False),
    (["<answer>4</answer>", "<reason>r</reason> four"], False),          # only the final turn answers
    ([], False),
])
def test_format_rule(turns: list[str], ok: bool) -> None:
    assert format_ok(turns) is ok


def test_parse_loads_no_third_party_module() -> None:
    code = ("import sys; import hdpo.agent.parse; "
            "print([m for m in ('torch', 'numpy', 'PIL', 'transformers', 'pydantic') if m in sys.modules])")
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"
