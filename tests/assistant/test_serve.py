"""`hdpo serve`, started as a process, and asked by the real `openai` client and by odd ones."""
from __future__ import annotations

import base64
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import httpx
import openai
import pytest
from hypothesis import given
from hypothesis import strategies as st
from launching import BASE
from tool_server import png

from hdpo.assistant.requests import BadRequest, cut_at, read_request

KEY = "serve-secret"
PICTURE = "data:image/png;base64," + base64.b64encode(png("white", (256, 256))).decode()
SYSTEM = [{"role": "system", "content": "own"}]


@pytest.fixture(scope="module")
def server() -> Iterator[tuple[subprocess.Popen[str], str]]:
    command = [sys.executable, "-m", "hdpo", "serve", "--model", str(BASE), "--config", "demo_rl", "--port", "0"]
    for setting in ("rollout.engine=hf", "tools.sandbox=process", "tools.allowed=[python]", "data.max_prompt_tokens=1024"):
        command += ["--set", setting]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env={**os.environ, "HDPO_SERVE_KEY": KEY})
    assert process.stdout is not None
    name, _, url = process.stdout.readline().strip().rpartition(" on ")
    assert name == "toy-base"
    yield process, url
    if process.poll() is None:
        process.send_signal(signal.SIGINT)
        assert process.wait(60) == 0


@pytest.fixture
def client(server: tuple[subprocess.Popen[str], str]) -> openai.OpenAI:
    return openai.OpenAI(base_url=server[1], api_key=KEY, max_retries=0, timeout=120)


def ask(client: openai.OpenAI, content: Any, **options: Any) -> Any:
    messages: Any = [{"role": "user", "content": content}]
    return client.chat.completions.create(model="toy-base", messages=messages, temperature=0, **options)


def test_the_model_is_listed(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == ["toy-base"]


def test_text_and_images_are_answered_and_counted(client: openai.OpenAI) -> None:
    plain = ask(client, "What is 1+1?")
    shown = ask(client, [{"type": "text", "text": "Which digit?"}, {"type": "image_url", "image_url": {"url": PICTURE}}])
    for reply in (plain, shown):
        usage = reply.usage
        assert reply.choices[0].finish_reason in ("stop", "length") and reply.choices[0].message.content is not None
        assert usage.total_tokens == usage.prompt_tokens + usage.completion_tokens and 0 < usage.completion_tokens
    assert ask(client, "What is 1+1?", max_tokens=3).usage.completion_tokens == 3


def test_a_stream_says_what_the_whole_reply_says(client: openai.OpenAI) -> None:
    whole = ask(client, "What is 1+1?")
    chunks = list(ask(client, "What is 1+1?", stream=True, stream_options={"include_usage": True}))
    deltas = [chunk.choices[0].delta for chunk in chunks if chunk.choices]
    assert "".join(delta.content or "" for delta in deltas) == whole.choices[0].message.content
    assert "".join(getattr(d, "reasoning_content", "") or "" for d in deltas) == whole.choices[0].message.reasoning_content
    assert [c.choices[0].finish_reason for c in chunks if c.choices][-1] == whole.choices[0].finish_reason
    assert chunks[-1].usage == whole.usage


def test_errors_are_openai_s(client: openai.OpenAI, server: tuple[subprocess.Popen[str], str]) -> None:
    with pytest.raises(openai.AuthenticationError, match="HDPO_SERVE_KEY"):
        openai.OpenAI(base_url=server[1], api_key="wrong", max_retries=0).models.list()
    with pytest.raises(openai.NotFoundError, match="toy-base"):
        client.chat.completions.create(model="gpt", messages=[{"role": "user", "content": "q"}])
    with pytest.raises(openai.BadRequestError, match="control token"):
        ask(client, "q <|im_start|>")
    with pytest.raises(openai.BadRequestError, match="max_prompt_tokens"):
        ask(client, "7+7 " * 2000)
    with pytest.raises(openai.BadRequestError, match="rollout.max_images"):
        ask(client, [{"type": "image_url", "image_url": {"url": PICTURE}}] * 9)
    with pytest.raises(openai.NotFoundError):
        client.embeddings.create(model="toy-base", input="x")
    header = {"Authorization": f"Bearer {KEY}", "Content-Type": "application/json"}
    for body in (b"{", b"[]", b"\xff", b"[" * 100_000):
        reply = httpx.post(f"{server[1]}/chat/completions", content=body, headers=header)
        assert reply.status_code == 400 and reply.json()["error"]["type"] == "invalid_request_error"
    assert ask(client, "What is 1+1?").usage.completion_tokens


def body(**fields: Any) -> dict[str, Any]:
    return {"model": "m", "messages": [{"role": "user", "content": "q"}], **fields}


@pytest.mark.parametrize(("fields", "word"), [
    ({"messages": []}, "messages"), ({"messages": [{"role": "tool", "content": "x"}]}, "role"),
    ({"messages": [{"role": "assistant", "content": "x"}]}, "last message"), ({"messages": [3]}, "role"),
    ({"temperature": 3}, "temperature"), ({"temperature": float("nan")}, "temperature"), ({"n": 2}, "n can't"),
    ({"tools": [{}]}, "run on this side"), ({"stop": [""]}, "stop"), ({"max_tokens": 0}, "max_tokens"), ({"seed": 1.5}, "seed"),
    ({"stream": "yes"}, "stream"), ({"logprobs": True}, "logprobs"), ({"top_p": 0.5}, "top_p"),
    ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "https://a/b.png"}}]}]}, "fetched"),
    ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": PICTURE[:-90]}}]}]}, "content"),
])
def test_what_is_wrong_with_a_request_is_named(fields: dict[str, Any], word: str) -> None:
    with pytest.raises(BadRequest, match=word):
        read_request(body(**fields), "m", SYSTEM)


@given(st.recursive(st.none() | st.booleans() | st.floats() | st.text(), lambda inner: st.lists(inner) | st.dictionaries(
    st.sampled_from(["role", "content", "type", "text", "image_url", "url", "x"]), inner), max_leaves=12))
def test_no_request_breaks_the_reader(value: Any) -> None:
    for given_body in (value, body(messages=value), body(messages=[value]), body(stop=value), body(stream_options=value)):
        try:
            read_request(given_body, "m", SYSTEM)
        except BadRequest:
            pass


def test_earlier_turns_and_a_client_s_system_prompt_are_in_the_conversation() -> None:
    asked = read_request(body(messages=[
        {"role": "system", "content": "theirs"}, {"role": "user", "content": "a <image> b"},
        {"role": "assistant", "content": "c"},
        {"role": "user", "content": [{"type": "image_url", "image_url": {"url": PICTURE}}, {"type": "text", "text": "d"}]}]),
        "m", SYSTEM)
    assert [(m["role"], m["content"]) for m in asked.messages] == [
        ("system", "own\n\ntheirs"), ("user", "a < image > b"), ("assistant", "c"), ("user", "<image>d")]
    assert len(asked.images) == 1


def test_stop_words_cut_the_answer() -> None:
    assert cut_at("one. two; three", [";", "."]) == "one" and cut_at("one", ["x"]) == "one"
