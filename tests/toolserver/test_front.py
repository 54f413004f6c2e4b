"""Several server processes behind one address are one server to everybody, and one that dies takes its own sessions alone."""
from __future__ import annotations

import os
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from tool_server import ToolServer, all_gone, call_text, png, post, python, until

from hdpo.background import BackgroundLoop
from hdpo.errors import ToolServerError
from hdpo.toolserver.client import ToolClient
from hdpo.toolserver.front import parts_of, place_of, summed
from hdpo.toolserver.layout import session_gone
from hdpo.types import Task

NAMES = [f"t{number}" for number in range(8)]


@pytest.fixture(scope="module")
def server() -> Iterator[ToolServer]:
    running = ToolServer("--processes", "2", "--tools", "python", environment={"HDPO_TOOL_SERVER_TOKEN": "open"})
    yield running
    below = running.below()
    assert running.close() == 0 and all_gone(below)


def processes(server: ToolServer) -> list[psutil.Process]:
    """In the order of their numbers."""
    found = {line[line.index("--behind") + 1]: one for one in psutil.Process(server.process.pid).children()
             if "--behind" in (line := one.cmdline())}
    return [found[name] for name in sorted(found)]


def batch(server: ToolServer, codes: dict[str, str], token: str = "open", **more: Any) -> tuple[int, dict[str, Any], Any]:
    """As the reference's client sends one."""
    body = {"trajectory_ids": list(codes), "actions": [python(code) for code in codes.values()], **more}
    return server.post(body, {"Authorization": f"Bearer {token}"} if token else {})


def said(observation: Any) -> str:
    return observation if isinstance(observation, str) else observation["obs"]


def test_a_batch_is_answered_in_its_order_and_every_trajectory_goes_on_in_its_own_session(server: ToolServer) -> None:
    assert {place_of(name, 2) for name in NAMES} == {0, 1}
    status, answer, headers = batch(server, {name: f"v = '{name}'; import uuid; print(uuid.uuid4())" for name in NAMES})
    assert status == 200 and "X-Process-Time" in headers and answer["valids"] == [True] * 8
    assert len({said(one) for one in answer["observations"]}) == 8
    _, answer, _ = batch(server, {name: "print(v)" for name in reversed(NAMES)})
    assert [name in said(one) for name, one in zip(reversed(NAMES), answer["observations"])] == [True] * 8
    with urllib.request.urlopen(server.url + "/health", timeout=60) as health:
        text = health.read().decode()
    assert '"trajectories": 8' in text and '"tools": ["python"]' in text
    request = urllib.request.Request(server.url + "/metrics", headers={"Authorization": "Bearer open"})
    with urllib.request.urlopen(request, timeout=60) as metrics:
        lines = metrics.read().decode().splitlines()
    assert 'hdpo_tool_calls_total{tool="python",outcome="ok"} 16' in lines and "hdpo_tool_python_sessions 8" in lines
    batch(server, dict.fromkeys(NAMES, ""), finish=[True] * 8)
    assert until(lambda: b'"trajectories": 0' in urllib.request.urlopen(server.url + "/health", timeout=60).read(), 60)


@pytest.mark.parametrize("token", ["", "wrong"])
def test_the_front_asks_for_the_token_and_so_does_every_process(server: ToolServer, token: str) -> None:
    assert batch(server, {"stranger": "1"}, token)[0] == 401
    headers = {"Authorization": f"Bearer {token}"} if token else {}
    for one in processes(server):
        ports = [c.laddr.port for c in one.net_connections("tcp") if c.status == psutil.CONN_LISTEN]
        for port in ports:
            assert post(f"http://127.0.0.1:{port}", {"trajectory_ids": ["t"], "actions": [python("1")]}, headers)[0] == 401
        assert len(ports) == 1


@pytest.mark.parametrize(("body", "field"), [
    ({}, "trajectory_ids"), ({"trajectory_ids": ["a", "b"], "actions": ["x"]}, "actions"), ([], "body"),
    ({"trajectory_ids": ["a", 3], "actions": ["x", "y"]}, "trajectory_ids[1]"), ({"trajectory_ids": [], "actions": []}, "traj")])
def test_what_is_no_request_is_422_with_the_field_as_of_one_server(server: ToolServer, body: Any, field: str) -> None:
    status, answer, _ = server.post(body, {"Authorization": "Bearer open"})
    assert status == 422 and field in str(answer["detail"])


def test_a_picture_is_brought_once_for_the_trajectories_of_all_processes(server: ToolServer, background: BackgroundLoop) -> None:
    client, sent = ToolClient(server.url, timeout=60, token="open"), []
    attempt = client._attempt

    async def watched(method: str, path: str, *rest: Any) -> Any:
        sent.append(method)
        return await attempt(method, path, *rest)
    client._attempt = watched   # type: ignore[method-assign]
    shared = Task("t", "toy", [], (png("green", (61, 47)),), "")
    try:
        for name in NAMES:
            found = background.submit(client.call(name, python("image_1.size, image_1.crop((0, 0, 9, 9))"), shared)).result(60)
            assert found.ok and "(61, 47)" in found.text, found.text
        assert sent.count("PUT") == 1
        for name in NAMES:
            background.run(client.finish(name))
    finally:
        background.run(client.close())


def test_a_process_that_dies_comes_back_and_loses_its_own_sessions_alone_and_they_are_ours(
        server: ToolServer, background: BackgroundLoop) -> None:
    client = ToolClient(server.url, timeout=60, token="open")

    def call(name: str, code: str) -> str:
        return background.submit(client.call(name, python(code), Task("t", "toy", [], (png(),), ""))).result(60).text
    foreign = {f"f{number}": "w = 5" for number in range(8)}      # of the reference's client, which expects nothing
    lost = [name for name in NAMES if place_of(name, 2) == 1]
    try:
        batch(server, foreign)
        for name in NAMES:
            call(name, f"v = '{name}'")
        before = processes(server)
        before[1].kill()
        for name in NAMES:
            if name in lost:
                with pytest.raises(ToolServerError, match="the session of this trajectory was lost"):
                    call(name, "v")
            else:
                assert name in call(name, "v")
        assert call("new one", "40 + 2").count("42") == 1
        _, answer, _ = batch(server, dict.fromkeys(foreign, "w"))
        told = [session_gone(1) in said(one) for one in answer["observations"]]
        assert told == [place_of(name, 2) == 1 for name in foreign] and any(told) and not all(told)
        after = processes(server)
        assert after[0].pid == before[0].pid and after[1].pid != before[1].pid
    finally:
        for name in NAMES:
            background.run(client.finish(name))
        background.run(client.close())
        batch(server, dict.fromkeys(foreign, ""), finish=[True] * 8)


def test_nothing_is_left_of_a_front_that_was_killed() -> None:
    killed = ToolServer("--processes", "2", "--tools", "python")
    assert killed.talk(python("1 + 1"))[0].ok
    below = killed.below()
    killed.kill()
    assert all_gone(below, 60)


def test_what_keeps_a_process_from_starting_is_said_once_with_its_status(tmp_path: Path) -> None:
    ended = subprocess.run([sys.executable, "-m", "hdpo.toolserver.app", "--processes", "3", "--tools", "text_search",
                            "--search-provider", "embedded"], capture_output=True, text=True, timeout=120,
                           env={**os.environ, "TMPDIR": str(tmp_path), "SERPER_API_KEY": ""})
    assert ended.returncode == 2 and not ended.stdout
    assert ended.stderr.count("text_search: give --text-index FILE") == 1 and "Traceback" not in ended.stderr


def test_one_process_more_moves_only_those_trajectories_that_move_to_it() -> None:
    ids = [f"{number}-x" for number in range(2000)]
    for count in (1, 2, 5):
        moved = [one for one in ids if place_of(one, count) != place_of(one, count + 1)]
        assert all(place_of(one, count + 1) == count for one in moved)
        assert abs(len(moved) - 2000 / (count + 1)) < 200


def test_rows_of_a_batch_keep_all_their_fields() -> None:
    body = {"trajectory_ids": NAMES, "actions": [n.upper() for n in NAMES], "extra_fields": [{"k": n} for n in NAMES], "x": 1}
    rows = {}
    for part, numbers in parts_of(body, 3).values():
        assert part["x"] == 1
        for name, action, extra, number in zip(part["trajectory_ids"], part["actions"], part["extra_fields"], numbers):
            rows[number] = (name, action, extra)
    assert rows == {n: (name, name.upper(), {"k": name}) for n, name in enumerate(NAMES)}


def test_numbers_of_all_processes_are_added_up() -> None:
    one = '# TYPE a gauge\na 1\n# TYPE c counter\nc{x="1"} 2\n'
    other = '# TYPE a gauge\na 3\n# TYPE c counter\nc{x="2"} 5\n'
    assert summed([one, other], {"a": 9.0}) == '# TYPE a gauge\na 9\n# TYPE c counter\nc{x="1"} 2\nc{x="2"} 5\n'


def test_a_search_of_any_trajectory_is_answered_through_the_front(tmp_path: Path) -> None:
    from hdpo.toolserver.text_search import build_text_index
    build_text_index(tmp_path / "text.db", [("Mount Fuji", "l", "3776")])
    searching = ToolServer("--processes", "2", "--tools", "text_search", "--text-index", str(tmp_path / "text.db"))
    try:
        for name in NAMES[:4]:
            assert "3776" in searching.talk(call_text("text_search", query="fuji"), trajectory=name)[0].text
    finally:
        assert searching.close() == 0
