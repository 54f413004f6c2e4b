"""The published layouts as they are, and every other shape unreadable for a reason that is counted."""
from __future__ import annotations

import base64
from typing import Any

import pytest
from PIL import Image

from hdpo.curation.paths import rewrite
from hdpo.curation.record import Record, Unreadable
from hdpo.curation.source import READERS
from hdpo.toyworld.families import png

RED, BLUE = png(Image.new("RGB", (60, 40), "red")), png(Image.new("RGB", (30, 20), "blue"))


def read(source: str, **row: Any) -> Record:
    return READERS[source](row, 0, [])


def test_a_thyme_row_is_split_into_turns_and_its_paths_become_the_sessions() -> None:
    record = read(
        "thyme", image=[base64.b64encode(RED).decode(), base64.b64encode(BLUE).decode()],
        question='<image>\nWhat does the sign say?\n### User Image Path:** "/d/s.jpg"\n### User Image Size:** "1600x900"',
        response="<think>Zoom.\n<code>\n```python\nimport cv2\nim=cv2.imread('/d/s.jpg')[10:30,40:60]\n"
                 "cv2.imwrite('/t/s_1.jpg',im); print('/t/s_1.jpg')\n```\n</code>\n<sandbox_output><image></sandbox_output>\n"
                 "It says MILL.</think>\n<answer>MILL</answer>")
    assert record.question == "<image>\nWhat does the sign say?" and record.answer == "MILL"
    (step,) = record.steps
    assert step.reasoning == "Zoom." and step.observation.images == (BLUE,) and record.reasoning == "It says MILL."
    code = step.call.arguments["code"]
    assert code.startswith('image_1.save("image_1.png")\nimport cv2') and "/d/" not in code and "/t/" not in code
    assert code.endswith("display(_Image.open('s_1.jpg'))")


def test_a_text_only_thyme_row_has_no_picture_and_keeps_its_output() -> None:
    record = read("thyme", image=[], question="6 x 7?", response="<think>Run.<code>```python\nprint(6*7)\n```</code>"
                  "<sandbox_output>42</sandbox_output></think><answer>42</answer>")
    assert record.images == () and record.steps[0].observation.text == "42"
    assert record.steps[0].call.arguments["code"] == "print(6*7)"


def test_a_v_interaction_row_takes_its_edited_picture_as_the_observation() -> None:
    record = read(
        "v_interaction", id="vi_7", question="Find angle x.", image={"bytes": RED}, edited_image={"bytes": BLUE}, answer="40",
        CoT_with_code="<think>Add a line.\n<code>\n```python\nfrom PIL import Image, ImageDraw\nim=Image.open(image_path); "
        "ImageDraw.Draw(im).line((5,5,9,9)); im.save('out.png'); print('out.png')\n```\n</code>\n<sandbox_output><image>"
        "</sandbox_output>\nNow x=40.</think>\n<answer>40</answer>")
    assert record.question == "<image>\nFind angle x." and record.truth == "40"
    code = record.steps[0].call.arguments["code"]
    assert 'image_path = "image_1.png"' in code and code.endswith("display(_Image.open('out.png'))")
    assert record.steps[0].observation.images == (BLUE,)


def test_typed_parts_are_text_with_markers_and_addresses_are_pictures(tmp_path: Any) -> None:
    (tmp_path / "images").mkdir()
    (tmp_path / "images/12.png").write_bytes(RED)
    row = {"id": "wm_12", "messages": [
        {"role": "user", "content": [{"type": "image_url", "image_url": {"url": "images/12.png"}},
                                     {"type": "text", "text": "Area of the square?"}]},
        {"role": "assistant", "content": [{"type": "text", "text": "<think>Side 3, so 9.</think><answer>9</answer>"}]}]}
    record = READERS["openmm"](row, 3, [tmp_path])
    assert record.question == "<image>Area of the square?" and record.images == (RED,) and not record.steps
    assert record.messages()[-1]["content"] == "<reason>Side 3, so 9.</reason>\n<answer>9</answer>"


@pytest.mark.parametrize("column", ["messages", "prompt", "conversations"])
def test_coldstart_is_read_under_any_of_its_likely_columns_and_says_which_are_missing(column: str) -> None:
    messages = [{"role": "user", "content": "<image>Which bar?"},
                {"role": "assistant", "content": "<reason>Legible.</reason>\n<answer>Q3</answer>"}]
    assert read("coldstart", **{column: messages}, images=[{"bytes": RED}]).answer == "Q3"
    with pytest.raises(Unreadable, match="none of the columns messages, prompt, conversations; there are dialogue"):
        read("coldstart", dialogue=messages)


CHAT = [{"role": "user", "content": "<image>How many?"},
        {"role": "assistant", "content": "<think>t</think><code>\n```python\nprint(3)\n```\n</code>"},
        {"role": "user", "content": "Code execution result:\nstdout:\n```\n3\n```"},
        {"role": "assistant", "content": "<think>Three.</think>\n<answer>3</answer>"}]


def with_call(text: str) -> Any:
    return [CHAT[0], {"role": "assistant", "content": text}, *CHAT[2:]]


@pytest.mark.parametrize(("messages", "reason"), [
    (CHAT[:-1], "no_answer"), ([CHAT[0], *CHAT], "turns_do_not_alternate"), ("text", "messages_unreadable"),
    (with_call('<tool_call>{"name": "python", "arguments": {"code": "1"}}</tool_call> and then'), "text_behind_a_call"),
    (with_call("<code>```python\nx\n```</code>" * 2), "several_calls_in_a_turn"), (with_call("<code>x = 1"), "call_not_closed"),
    (with_call("<tool_call>{}</tool_call>"), "call_malformed"), (with_call("<code>```python\n\n```</code>"), "empty_code"),
    ([{"role": "user", "content": "<image><image>?"}, *CHAT[1:]], "images_do_not_fit_markers"),
    ([{"role": "moderator", "content": "?"}, *CHAT[1:]], "role_unknown"), (CHAT[1:], "no_question"),
    ([*CHAT[:-1], {"role": "assistant", "content": "Three."}], "no_answer")])
def test_a_chat_of_another_shape_is_unreadable_for_a_reason(messages: Any, reason: str) -> None:
    assert read("deepeyes", messages=CHAT, images=[{"bytes": RED}]).steps[0].call.arguments == {"code": "print(3)"}
    with pytest.raises(Unreadable) as error:
        read("deepeyes", messages=messages, images=[{"bytes": RED}])
    assert error.value.reason == reason


def test_search_calls_of_deepeyes_are_read_under_the_servers_name() -> None:
    record = read("deepeyes", images=[], messages=[
        {"role": "user", "content": "Who?"},
        {"role": "assistant", "content": '<tool_call>{"name": "search", "arguments": {"query": "x"}}</tool_call>'},
        {"role": "user", "content": "<tool_response>\nPage 1\n</tool_response>"},
        {"role": "assistant", "content": "<answer>Ada</answer>"}])
    assert record.steps[0].call.name == "text_search" and record.steps[0].observation.text == "Page 1"


@pytest.mark.parametrize(("code", "paths", "expected"), [
    ("x = Image.open(r'C:\\data\\a.png')", ["C:\\data\\a.png"], 'image_1.save("image_1.png")\nx = Image.open(r\'image_1.png\')'),
    ("plt.imshow(image_1)\nplt.show()", [], "plt.imshow(image_1)\nplt.show()"),
    ("open('/etc/passwd')", [], "open('/etc/passwd')"),
    ("image_path = 'mine.png'\nImage.open(image_path)", [], "image_path = 'mine.png'\nImage.open(image_path)")])
def test_only_paths_of_pictures_are_rewritten(code: str, paths: list[str], expected: str) -> None:
    assert rewrite(code, paths, 1, False) == expected
