"""Odd rows of the published layouts: what can be meant in one way alone is read and trains, the rest is unreadable."""
from __future__ import annotations

import base64
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from hdpo.agent.chat import ChatFormat
from hdpo.agent.demonstration import encode_demonstration
from hdpo.agent.images import decode_image
from hdpo.agent.parse import ParsedCall, parse_tool_call
from hdpo.curation.chunks import KEPT, Entry, read_chunk, write_chunk
from hdpo.curation.record import Record, Unreadable
from hdpo.curation.source import READERS
from hdpo.toyworld.families import png

RED, BLUE = png(Image.new("RGB", (60, 40), "red")), png(Image.new("RGB", (30, 20), "blue"))
CODE = "<code>\n```python\nprint('ü 数 😀')\n```\n</code>"
OUTPUT = "Code execution result:\nstdout:\n```\nü 数 😀\n```\n\nstderr:\n```\n\n```\n\nImages:\n<image>"


def b64(data: bytes) -> str:
    return base64.b64encode(data).decode()


def uri(data: bytes) -> str:
    return f"data:image/png;base64,{b64(data)}"


def chat_row() -> dict[str, Any]:
    return {"messages": [
        {"role": "system", "content": "You may write python."}, {"role": "user", "content": "<image>\nHow many, 几个?"},
        {"role": "assistant", "content": f"<think>Look – closely.</think>\n{CODE}"}, {"role": "user", "content": OUTPUT},
        {"role": "assistant", "content": "<think>Three.</think>\n<answer>3 “é”</answer>"}], "images": [uri(RED), uri(BLUE)]}


def long_text() -> str:
    return (f"<think>Look – closely.\n{CODE}\n<sandbox_output>ü 数 😀\n<image></sandbox_output>\nThree.</think>\n"
            "<answer>3 “é”</answer>")


ROWS: dict[str, Callable[[], dict[str, Any]]] = {
    "deepeyes": chat_row, "coldstart": chat_row, "demonstrations": chat_row,
    "thyme": lambda: {"image": [b64(RED), b64(BLUE)], "response": long_text(),
                      "question": '<image>\nHow many, 几个?\n### User Image Path:** "/d/ä b.jpg"\n### User Image Size:** "60x40"'},
    "v_interaction": lambda: {"question": "How many, 几个?", "image": {"bytes": RED, "path": None}, "edited_image": uri(BLUE),
                              "CoT_with_code": long_text(), "answer": 3},
    "openmm": lambda: {"messages": [
        {"role": "user", "content": [{"type": "image_url", "image_url": {"url": uri(RED)}, "text": None},
                                     {"type": "text", "text": "How many, 几个?", "image_url": None}]},
        {"role": "assistant", "content": [{"type": "text", "text": "<think>Three.</think>\n<answer>3 “é”</answer>"}]}]}}


def windows(value: Any) -> Any:
    """The same row from a machine whose lines end in another way."""
    if isinstance(value, str):
        return value.replace("\n", "\r\n")
    if isinstance(value, list):
        return [windows(item) for item in value]
    return {key: windows(item) for key, item in value.items()} if isinstance(value, dict) else value


def as_text(row: dict[str, Any]) -> dict[str, Any]:
    """Every list as JSON text, as tables without nested columns have them."""
    return {key: json.dumps(value) if isinstance(value, list) else value for key, value in row.items()}


def read(source: str, row: dict[str, Any]) -> Record:
    return READERS[source](row, 7, [])


@pytest.mark.parametrize("change", [lambda row: row, windows, as_text, lambda row: as_text(as_text(row))],
                         ids=["as_it_is", "windows", "json_text", "json_text_of_that"])
@pytest.mark.parametrize("source", READERS)
def test_a_row_of_every_layout_trains_on_exactly_the_assistants_own_text(
        source: str, change: Callable[[Any], Any], chat: ChatFormat, tmp_path: Path) -> None:
    record, plain = read(source, change(ROWS[source]())), read(source, ROWS[source]())
    assert record == plain and "\r" not in json.dumps(record.messages())
    write_chunk(tmp_path / "chunk.parquet", [Entry(7, KEPT, record)])
    (entry,) = read_chunk(tmp_path / "chunk.parquet") or ()
    assert entry.record == record
    messages = record.messages()
    ids, mask, _ = encode_demonstration(chat, messages, [decode_image(image, "row") for image in record.all_images()])
    turns: list[list[int]] = [[]]
    for token, trained in zip(ids, mask, strict=True):
        if trained:
            turns[-1].append(token)
        elif turns[-1]:
            turns.append([])
    said = [message["content"] for message in messages if message["role"] == "assistant"]
    assert [chat.decode(turn).removesuffix("<|im_end|>") for turn in turns if turn] == said
    assert said[-1].endswith("<answer>3 “é”</answer>") and "几个" in messages[-2 if source == "openmm" else -4]["content"]
    if source != "openmm":
        call = parse_tool_call(said[0][said[0].index("<tool_call>"):])
        assert isinstance(call, ParsedCall) and "print('ü 数 😀')" in call.arguments["code"]


def edited(**changes: Any) -> dict[str, Any]:
    """chat_row with other contents: q, call, output, end, images, messages."""
    row = chat_row()
    for place, name in ((1, "q"), (2, "call"), (3, "output"), (4, "end")):
        if name in changes:
            row["messages"][place]["content"] = changes.pop(name)
    return row | changes


PART = {"type": "text", "text": "How many, 几个?"}


@pytest.mark.parametrize("row", [
    edited(q=[{"type": "image"}, PART]), edited(q=[{"type": "image", "image_url": None}, PART]),
    edited(q=[{"type": "image_url", "image_url": {"url": uri(RED)}}, PART], images=[uri(BLUE)]),
    edited(q=[{"type": "image_url", "image_url": uri(RED)}, PART], images=[uri(BLUE)]),
    edited(q=[{"type": "image", "image": {"bytes": RED, "path": None}}, PART], images=[uri(BLUE)]),
    edited(q=[{"type": "input_image", "image_url": uri(RED)}, {"type": "input_text", "text": PART["text"]}], images=[uri(BLUE)]),
    edited(q=["<image>", PART["text"]]), edited(q=[{"text": "<image>" + PART["text"]}]),
    edited(q=json.dumps([{"type": "image"}, PART])), edited(images=[{"url": uri(RED)}, {"bytes": BLUE}]),
    edited(images=[b64(RED).rstrip("="), base64.urlsafe_b64encode(BLUE).decode()]),
    edited(images=[bytearray(RED), memoryview(BLUE)]),
    edited(images=["DATA:image/png;charset=utf-8;base64," + b64(RED), "data:;base64," + b64(BLUE)]),
    edited(call=f"<think>Look – closely.</think>\n{CODE}<|im_end|>",
           end="<think>Three.</think>\n<answer>3 “é”</answer><|im_end|>\n"),
    edited(messages=[{"from": {"user": "human", "assistant": "gpt"}.get(m["role"], m["role"]), "value": m["content"]}
                     for m in chat_row()["messages"]]),
    edited(messages=[m | {"role": m["role"].title()} for m in chat_row()["messages"]]),
    edited(messages={key: [m[key] for m in chat_row()["messages"]] for key in ("role", "content")})])
def test_other_ways_to_write_a_row_are_the_same_record(row: dict[str, Any]) -> None:
    found, usual = read("deepeyes", row), read("deepeyes", chat_row())
    assert found.question.replace("\n", "") == usual.question.replace("\n", "")
    assert (found.images, found.steps) == (usual.images, usual.steps)
    assert (found.reasoning, found.answer) == (usual.reasoning, usual.answer)


def search(call: str) -> dict[str, Any]:
    return edited(call=call, output="<tool_response>Page</tool_response>", images=[uri(RED)])


@pytest.mark.parametrize("call", [
    '<tool_call>{"name": "search", "arguments": "{\\"query\\": \\"x\\"}"}</tool_call>',
    '<tool_call>\r\n```json\r\n{"name": "search", "arguments": {"query": "x"}}\r\n```\r\n</tool_call>'])
def test_a_call_in_a_fence_or_with_arguments_as_text_is_that_call(call: str) -> None:
    assert read("deepeyes", search(call)).steps[0].call == ParsedCall("text_search", {"query": "x"})


@pytest.mark.parametrize(("row", "reason"), [
    (edited(q=None), "messages_unreadable"), (edited(q=5), "messages_unreadable"), (edited(q=[]), "no_question"),
    (edited(q=[], output="nothing", images=[]), "no_question"), (edited(q=[{"type": "video", "video": "v.mp4"}]), "part_unknown"),
    (edited(q=[{"type": ["text"], "text": "q"}]), "part_unknown"), (edited(q=[7]), "part_unknown"),
    (edited(end=[]), "no_answer"), (edited(end=[{"type": "image", "image": uri(RED)}]), "picture_in_a_turn"),
    (edited(messages=[]), "messages_unreadable"), (edited(messages={}), "messages_unreadable"),
    (edited(messages=None), "column_missing"),
    (edited(messages=[None]), "messages_unreadable"), (edited(messages="[{"), "messages_unreadable"),
    (edited(images=[]), "images_do_not_fit_markers"), (edited(images=None), "images_do_not_fit_markers"),
    (edited(images=[uri(RED)] * 3), "images_do_not_fit_markers"), (edited(images=5), "image_missing"),
    (edited(images=[uri(RED), None]), "image_missing"), (edited(images=["http://x/y.png", uri(RED)]), "image_missing"),
    (edited(images=[uri(RED[:-30]), uri(BLUE)]), "image_broken"),
    (edited(images=["data:image/png;base64,####", uri(RED)]), "image_missing"),
    (edited(end="<think>so </tool_call></think><answer>3</answer>"), "tag_in_text"),
    (search('<tool_call>{"name": "search", "arguments": "x"}</tool_call>'), "call_malformed"),
    (search('<tool_call>{"name": "browse", "arguments": {}}</tool_call>'), "call_malformed")])
def test_what_may_be_meant_in_several_ways_or_none_is_unreadable_for_a_reason(row: dict[str, Any], reason: str) -> None:
    with pytest.raises(Unreadable) as error:
        read("deepeyes", row)
    assert error.value.reason == reason and str(error.value)


@pytest.mark.parametrize("source", ["thyme", "v_interaction"])
@pytest.mark.parametrize(("change", "reason"), [
    (lambda text: None, "column_missing"), (lambda text: [text], "column_missing"), (lambda text: " ", "column_missing"),
    (lambda text: text.replace("</sandbox_output>", ""), "call_without_output"),
    (lambda text: text.replace("<image>", "<image><image>"), "images_do_not_fit_markers"),
    (lambda text: text.replace("</code>", ""), "call_not_closed"), (lambda text: text.split("<answer>")[0], "no_answer"),
    (lambda text: text.replace("3 “é”", " "), "no_answer")])
def test_a_long_string_of_another_shape_is_unreadable_for_a_reason(
        source: str, change: Callable[[str], Any], reason: str) -> None:
    column = "response" if source == "thyme" else "CoT_with_code"
    with pytest.raises(Unreadable) as error:
        read(source, ROWS[source]() | {column: change(long_text())})
    assert error.value.reason == reason


def test_code_that_holds_a_closing_tag_or_half_a_character_is_a_call_that_parses(chat: ChatFormat, tmp_path: Path) -> None:
    code = "<code>```python\nprint('</tool_call>', \"\ud800\")\n```</code>"
    record = read("deepeyes", edited(call=code, output="x", images=[uri(RED)]))
    write_chunk(tmp_path / "chunk.parquet", [Entry(7, KEPT, record)])
    said = record.messages()[2]["content"]
    call = parse_tool_call(said)
    assert isinstance(call, ParsedCall) and call.arguments["code"] == "print('</tool_call>', \"\ufffd\")"
    encode_demonstration(chat, record.messages(), [decode_image(RED, "row")])


def test_the_sources_own_answer_is_read_as_number_text_or_first_alternative() -> None:
    row = ROWS["v_interaction"]()
    for answer, truth in ((40, "40"), (40.5, "40.5"), ("B", "B"), (["4", "four"], "4"), (None, ""), ({}, "")):
        assert read("v_interaction", row | {"answer": answer}).truth == truth
    for model in ({"ground_truth": 7}, json.dumps({"ground_truth": ["7", "seven"]})):
        assert read("demonstrations", chat_row() | {"reward_model": model}).truth == "7"
