"""A session lost between two calls: ours when server or sandbox died, the policy's when its code did it."""
from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from tool_server import ToolServer, all_gone, call_text, containers, png, python, task, until

from hdpo.background import BackgroundLoop
from hdpo.errors import ToolServerError
from hdpo.protocols import ToolResult
from hdpo.toolserver.client import ToolClient
from hdpo.toolserver.own import OwnTools
from hdpo.toolserver.process import KeptToolServer
from hdpo.toolserver.text_search import build_text_index

LOST = "the session of this trajectory was lost: "
SEARCH = call_text("text_search", query="fuji")
BACKENDS = ["process", pytest.param("docker", marks=pytest.mark.docker)]
Start = Callable[..., ToolServer]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    """Starts tool servers that are closed afterwards."""
    build_text_index(tmp_path / "text.db", [("Mount Fuji", "l", "3776")])
    running: list[ToolServer] = []

    def begin(*options: str) -> ToolServer:
        running.append(ToolServer("--text-index", str(tmp_path / "text.db"), "--search-provider", "embedded", *options))
        return running[-1]
    yield begin
    for server in running:
        server.close()


class Agent:
    """Our client on a loop of its own."""

    def __init__(self, url: str, background: BackgroundLoop, token: str = "") -> None:
        self.client, self.background = ToolClient(url, timeout=60, token=token), background

    def begin(self, action: str, trajectory: str = "t") -> Any:
        return self.background.submit(self.client.call(trajectory, action, task(png())))

    def call(self, action: str, trajectory: str = "t") -> ToolResult:
        return self.begin(action, trajectory).result(60)

    def finish(self, trajectory: str = "t") -> None:
        self.background.run(self.client.finish(trajectory))

    def refused(self, trajectory: str = "t") -> str:
        """Why a python call was not executed."""
        with pytest.raises(ToolServerError, match=LOST) as caught:
            self.call(python("print('executed')"), trajectory)
        return str(caught.value).split(LOST)[1]


@pytest.fixture
def agent(background: BackgroundLoop) -> Iterator[Callable[[ToolServer], Agent]]:
    agents: list[Agent] = []

    def make(server: ToolServer) -> Agent:
        agents.append(Agent(server.url, background))
        return agents[-1]
    yield make
    for one in agents:
        background.run(one.client.close())


def test_a_restarted_server_executes_no_call_that_relies_on_what_it_lost_and_all_others(
        start: Start, agent: Callable[[ToolServer], Agent]) -> None:
    server = start()
    policy = agent(server)
    policy.call(python("v = 1"), "used")
    policy.call(SEARCH, "searched")
    server.kill()
    server.start()
    assert policy.refused("used") == ("the tool server restarted, or closed it because nobody had called for 3600 s "
                                      "(--idle-limit)")
    assert policy.call(SEARCH, "used").ok                                       # needs no session
    policy.refused("used")                                                      # and brings none back
    assert "(64, 48)" in policy.call(python("image_1.size"), "searched").text   # never had one
    policy.finish("used")
    assert policy.call(python("'v' in globals()"), "used").ok                   # another trajectory of that name


def test_a_first_call_cut_by_a_restart_is_executed_again_and_a_later_one_is_not(
        start: Start, agent: Callable[[ToolServer], Agent]) -> None:
    server = start()
    policy = agent(server)
    policy.call(python("v = 1"), "second")
    slow = "import time; time.sleep(1); print('executed')"
    first, second = policy.begin(python(slow), "first"), policy.begin(python(slow), "second")
    assert until(lambda: len(server.below()) == 1 + 2 * 2)
    time.sleep(0.2)     # both cells are running
    server.kill()
    server.start()
    assert "executed" in first.result(60).text
    with pytest.raises(ToolServerError, match=LOST):
        second.result(60)


def test_a_trainers_own_server_that_dies_comes_back_at_its_address_until_it_is_stopped(
        tmp_path: Path, background: BackgroundLoop) -> None:
    server = KeptToolServer(["--tools", "python"], tmp_path / "log")
    policy = Agent(server.url, background, server.token)
    try:
        for _ in range(2):
            policy.call(python("v = 1"), "used")
            before = psutil.Process(server.pid)
            below = before.children(recursive=True)
            before.kill()
            assert "True" in policy.call(python("print(True)"), "new").text     # waited for it
            assert server.pid != before.pid
            policy.refused("used")
            policy.finish("used")
            policy.finish("new")
            assert all_gone(below)
        last = psutil.Process(server.pid)
        below = [last, *last.children(recursive=True)]
    finally:
        background.run(policy.client.close())
        server.stop()
    assert all_gone(below) and server.pid == last.pid


def test_an_idle_trajectory_that_was_closed_is_not_continued_in_a_fresh_session(
        start: Start, agent: Callable[[ToolServer], Agent]) -> None:
    server = start("--idle-limit", "0.5")
    policy = agent(server)
    policy.call(python("v = 1"))
    assert until(lambda: server.sessions() == 0)
    assert "nobody had called for 0.5 s" in policy.refused()


def test_a_session_of_an_earlier_trainer_that_is_gone_is_missed_also_beside_the_users_own_tools(
        start: Start, agent: Callable[[ToolServer], Agent]) -> None:
    policy = agent(start())
    policy.background.run(_expect(OwnTools(policy.client, {})))
    assert policy.refused()
    assert policy.call(python("1"), "another").ok


async def _expect(tools: OwnTools) -> None:
    tools.expect("t")


def test_a_session_that_fewer_calls_made_than_the_client_remembers_is_not_continued(
        start: Start, agent: Callable[[ToolServer], Agent]) -> None:
    server = start()
    policy, stranger = agent(server), agent(server)
    for code in ("v = 1", "v + 1"):
        assert policy.call(python(code)).ok
    stranger.finish()
    assert stranger.call(python("v = 7")).ok      # the same trajectory for the server, in a session of its own
    assert "2 Python calls were executed, of which this server knows 1" in policy.refused()


def test_a_call_the_server_gave_up_leaves_no_session_to_go_on_in(start: Start, agent: Callable[[ToolServer], Agent]) -> None:
    policy = agent(start("--call-timeout", "0.5"))
    policy.call(python("v = 1"))
    with pytest.raises(ToolServerError, match="longer than 0.5 s"):
        policy.call(python("import time; time.sleep(5)"))
    assert policy.refused() == "its last cell took longer than the server waits"


def kill_sandbox(server: ToolServer, backend: str) -> None:
    """The template process, or the container, of the sessions is gone, and they with it."""
    if backend == "process":
        below = server.below()
        below[0].kill()
        assert all_gone(below)
    else:
        (container,) = containers(server.process.pid)
        container.kill()


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_session_lost_with_its_sandbox_is_ours_and_the_next_trajectory_gets_a_new_one(
        start: Start, agent: Callable[[ToolServer], Agent], backend: str) -> None:
    server = start("--sandbox", backend)
    policy = agent(server)
    for name in ("idle", "running"):
        policy.call(python("v = 1"), name)
    running = policy.begin(python("import time; time.sleep(60)"), "running")
    time.sleep(0.2)
    kill_sandbox(server, backend)
    with pytest.raises(ToolServerError, match=f"{LOST}its sandbox died"):
        running.result(60)
    for name in ("idle", "running"):
        assert policy.refused(name) == "its sandbox died"
        assert policy.call(SEARCH, name).ok
    assert "(64, 48)" in policy.call(python("image_1.size"), "new").text


def test_a_trainer_that_knows_nothing_of_lost_sessions_is_refused_and_told_in_the_references_format(start: Start) -> None:
    server = start()
    body = {"trajectory_ids": ["ref"], "actions": [python("v = 1")], "request_ids": ["1"]}
    server.post(body)
    kill_sandbox(server, "process")
    again = {**body, "actions": [python("print(v)")], "request_ids": ["2"]}
    replies = [server.post(again)[1] for _ in range(2)]      # the repeated request is answered as the first was
    for reply in replies:
        assert reply["observations"][0]["infrastructure"] is True and reply["valids"] == [False]
        assert reply["observations"][0]["obs"] == f"Tool unavailable: {LOST}its sandbox died"
    assert "NameError" not in str(server.post({**again, "request_ids": ["3"]})[1])
    assert "answered before" in server.post(body)[1]["observations"][0]["obs"]       # an older one is not executed again


def test_a_client_that_does_not_say_that_it_expects_a_session_is_told_when_a_restart_has_lost_it(start: Start) -> None:
    server = start()

    def observed(trajectory: str, action: str, **more: Any) -> str:
        reply = server.post({"trajectory_ids": [trajectory], "actions": [action], **more})[1]["observations"][0]
        return reply if isinstance(reply, str) else reply["obs"]
    for trajectory in ("used", "finished"):
        observed(trajectory, python("v = 1"))
        assert "restarted" not in observed(trajectory, python("print(v)"))
    observed("searched", SEARCH)
    observed("finished", "", finish=[True])
    server.kill()
    server.start()
    assert "restarted" not in observed("searched", python("1")) + observed("finished", python("1")) + observed("new", python("1"))
    told = observed("used", python("print('v' in globals())"))
    assert "False" in told and "The tool server was restarted after Python call 2." in told and "variables are lost" in told
    assert "restarted" not in observed("used", python("1"))                    # said once
    for trajectory in ("used", "searched", "finished", "new"):
        observed(trajectory, "", finish=[True])


@pytest.mark.parametrize("code", [
    "import os; os._exit(1)", "import ctypes; ctypes.string_at(0)",
    "import os, threading; threading.Timer(0.2, lambda: os._exit(0)).start()"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_session_that_the_policys_code_ends_stays_the_policys(
        start: Start, agent: Callable[[ToolServer], Agent], backend: str, code: str) -> None:
    policy = agent(start("--sandbox", backend))
    policy.call(python("v = 1"))
    told = [policy.call(python(code)).text]
    time.sleep(0.5)
    told += [policy.call(python("print('v' in globals())")).text for _ in range(4)]      # timers go on in a later cell
    assert "False" in told[-1] and sum("restarted" in text for text in told) == 1


@pytest.mark.docker
def test_a_session_killed_for_want_of_memory_stays_the_policys(start: Start, agent: Callable[[ToolServer], Agent]) -> None:
    policy = agent(start("--sandbox", "docker", "--container-memory", "512"))
    policy.call(python("v = 1"), "neighbour")
    result = policy.call(python("x = b'x' * (900 << 20)"))       # one process alone is refused the memory
    assert not result.ok and "MemoryError" in result.text and "restarted" not in result.text
    many = "import os, time\nfor _ in range(8):\n  if os.fork() == 0:\n    x = b'x' * (90 << 20); time.sleep(60)\ntime.sleep(60)"
    result = policy.call(python(many))
    assert not result.ok and "restarted" in result.text and "more memory than a session may" in result.text
    assert policy.call(python("print('x' in globals())")).text.count("False") == 1
    assert "1" in policy.call(python("v"), "neighbour").text
