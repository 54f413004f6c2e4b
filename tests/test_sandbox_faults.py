"""What is left, and who is told, when a part of the container backend dies."""
from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from test_sandbox import Box, png

from hdpo.errors import ConfigError
from hdpo.toolserver.sessions import SandboxError


def until(condition: Callable[[], bool], seconds: float = 20.0) -> bool:
    deadline = time.monotonic() + seconds
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.05)
    return condition()


def containers(pid: int) -> list[Any]:
    """Sandbox containers that process `pid` owns."""
    import docker

    from hdpo.adapters.docker_container import OWNER_LABEL
    client = docker.from_env()
    try:
        found = client.containers.list(all=True, filters={"label": OWNER_LABEL}, ignore_removed=True)
        return [container for container in found if container.labels[OWNER_LABEL].startswith(f"{pid}:")]
    finally:
        client.close()


@pytest.fixture
def box() -> Iterator[Box]:
    running = Box("docker")
    yield running
    running.close()
    assert until(lambda: not containers(os.getpid()))


def test_a_template_without_a_required_control_refuses_to_start() -> None:
    from hdpo.adapters.process_sandbox import ProcessSandbox
    from hdpo.background import BackgroundLoop
    loop = BackgroundLoop()
    sandbox = ProcessSandbox(["--require", "unobtainium"])
    with pytest.raises(SandboxError):
        loop.run(sandbox.start(), timeout=120)
    loop.run(sandbox.shutdown())
    loop.close()


def test_an_engine_that_lacks_a_control_is_named() -> None:
    pytest.importorskip("docker")
    from hdpo.adapters.docker_container import missing_controls
    good = {"MemoryLimit": True, "PidsLimit": True, "CpuCfsQuota": True, "SecurityOptions": ["name=seccomp,profile=default"]}
    assert missing_controls(good) == []
    assert missing_controls({**good, "PidsLimit": False, "SecurityOptions": None}) == ["process limits", "seccomp"]


def test_no_engine_and_no_image_are_one_clear_line(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("docker")
    monkeypatch.setenv("DOCKER_HOST", "unix:///nowhere/docker.sock")
    with pytest.raises(ConfigError, match="no Docker engine"):
        Box("docker")


@pytest.mark.docker
def test_a_container_killed_in_mid_call_is_replaced_and_the_cell_is_not_replayed(box: Box) -> None:
    session = box.session(png())
    session.run("kept = 1")
    call = box.loop.submit(box.sandbox.run(session.name, "import time; time.sleep(60)", 60))
    (container,) = containers(os.getpid())
    container.kill()
    result = call.result(30)
    assert result.restarted and not result.ok
    assert session.run("print('kept' in globals(), image_1.size)").stdout == "False (64, 48)\n"
    session.close()


@pytest.mark.docker
def test_a_session_killed_from_outside_is_told_and_its_neighbour_is_not_touched(box: Box) -> None:
    one, two = box.session(), box.session()
    one.run("x = 1")
    two.run("x = 2")
    children = subprocess.check_output(["pgrep", "-P", str(box.template_pid)], text=True).split()
    (inner,) = subprocess.check_output(["pgrep", "-P", children[0]], text=True).split()
    os.kill(int(inner), signal.SIGKILL)
    results = [session.run("print('x' in globals())") for session in (one, two)]
    assert sorted(result.restarted for result in results) == [False, True]
    assert {result.stdout for result in results} == {"False\n", "True\n"} or results[0].stdout == ""


@pytest.mark.docker
def test_containers_of_dead_owners_are_removed_at_the_next_start() -> None:
    import docker

    from hdpo.adapters.docker_container import OWNER_LABEL
    from hdpo.adapters.docker_sandbox import IMAGE
    client = docker.from_env()
    orphan = client.containers.run(IMAGE, detach=True, entrypoint=["sleep", "1000"], labels={OWNER_LABEL: "999999:1"},
                                   network_mode="none")
    box = Box("docker")
    box.close()
    with pytest.raises(docker.errors.NotFound):
        client.containers.get(orphan.id)
    client.close()


@pytest.mark.docker
def test_a_killed_server_leaves_no_container() -> None:
    server = subprocess.Popen([sys.executable, "-m", "hdpo.toolserver.app", "--sandbox", "docker", "--tools", "python"],
                              stdout=subprocess.PIPE, text=True)
    assert server.stdout is not None and server.stdout.readline().startswith("http://")
    assert len(containers(server.pid)) == 1
    server.kill()
    server.wait(10)
    assert until(lambda: not containers(server.pid))


@pytest.mark.docker
def test_strict_mode_gives_each_session_a_container_of_its_own_and_keeps_some_warm() -> None:
    from hdpo.adapters.docker_sandbox import DockerSandbox
    box = Box("docker", DockerSandbox(mode="strict", warm=2))
    one, two = box.session(png()), box.session()
    assert one.run("x = 1; image_1.size").stdout == "(64, 48)\n"
    assert two.run("print('x' in globals())").stdout == "False\n"
    ids = {shard.container.id for shard in box.sandbox._assigned.values()}
    assert len(ids) == 2
    assert until(lambda: len(containers(os.getpid())) >= 3)      # refilled
    one.close()
    assert until(lambda: ids - {c.id for c in containers(os.getpid())} != set())
    box.close()
    assert until(lambda: not containers(os.getpid()))
