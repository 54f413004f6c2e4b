"""`hdpo serve`, started as a process, and asked by the real `openai` client and by odd ones."""
from __future__ import annotations

import argparse
import asyncio
import base64
import json
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from hypothesis import given
from hypothesis import strategies as st
from launching import BASE
from scripted import ScriptedEngine
from tool_server import png

from hdpo.assistant.requests import BadRequest, cut_at, read_request
from hdpo.assistant.service import Service
from hdpo.compose.asked import add_model_options, read_model
from hdpo.compose.stage import Stage
from hdpo.protocols import GenerateRequest

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


def test_one_model_is_looked_up_by_its_name(client: openai.OpenAI) -> None:
    name = client.models.list().data[0].id
    assert client.models.retrieve(name).id == name
    with pytest.raises(openai.NotFoundError, match="there is no model 'a/b'"):
        client.models.with_raw_response.retrieve("a/b")


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


def writes(prompt: str, request: GenerateRequest) -> str:
    """What stands for a trained policy: it computes with Python what it is asked, and says what the tool has shown."""
    code, shown = ("print(image_1.size[0])", "256") if request.images else ("print(891*684)", "609444")
    if shown in prompt:
        return f"<reason>The tool shows it.</reason><answer>{shown}</answer>"
    call = json.dumps({"name": "python", "arguments": {"code": code}})
    return f"<reason>I compute it with Python.</reason><tool_call>{call}</tool_call>"


@pytest.fixture
def agent(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[openai.OpenAI]:
    """The service with a real tool server and real HTTP; only the tokens are written by `writes`."""
    parser = argparse.ArgumentParser()
    add_model_options(parser)
    options = ["--model", str(BASE), "--config", "demo_rl"]
    for setting in ("tools.sandbox=process", "tools.allowed=[python]", "data.max_prompt_tokens=1024"):
        options += ["--set", setting]
    asked = read_model(parser.parse_args(options), tmp_path)
    monkeypatch.setattr("hdpo.compose.stage.open_engine", lambda config, chat, stage: ScriptedEngine(chat, writes))
    ended, stop = asyncio.Event(), threading.Event()
    with Stage(asked.config) as stage, socket.create_server(("127.0.0.1", 0)) as listener:
        assistant = stage.assistant()
        service = Service(assistant, "toy-base", asked.system, lambda request: asked.question(
            request.messages, request.images, request.temperature, request.max_tokens, request.seed),
            key="", host="127.0.0.1", allowed_hosts=[], most=4)
        thread = threading.Thread(target=assistant.drive, args=(service.serve(listener, ended), stop, ended.set))
        thread.start()
        url = f"http://127.0.0.1:{listener.getsockname()[1]}/v1"
        yield openai.OpenAI(base_url=url, api_key="none", max_retries=0, timeout=120)
        stop.set()
        thread.join(60)
        assert not thread.is_alive()


def test_a_tool_call_runs_on_our_side_and_its_result_reaches_the_client(agent: openai.OpenAI) -> None:
    content = [{"type": "image_url", "image_url": {"url": PICTURE}}, {"type": "text", "text": "How wide is it?"}]
    for question, shown in (("What is 891*684?", "609444"), (content, "256")):
        message = ask(agent, question).choices[0].message
        assert message.content == shown
        assert "I compute it with Python." in message.reasoning_content and "[python]" in message.reasoning_content
        assert "[result]" in message.reasoning_content and shown in message.reasoning_content.partition("[result]")[2]
        deltas = [chunk.choices[0].delta for chunk in ask(agent, question, stream=True)]
        assert "".join(delta.content or "" for delta in deltas) == message.content
        assert "".join(getattr(d, "reasoning_content", "") or "" for d in deltas) == message.reasoning_content


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
