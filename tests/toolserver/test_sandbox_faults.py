"""What is left, and who is told, when a part of the container backend dies."""
from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from test_sandbox import Box, Session
from tool_server import ToolServer, containers, png, python, task, until

from hdpo.errors import ConfigError
from hdpo.toolserver.client import ToolClient
from hdpo.toolserver.sessions import SandboxError, SessionLostError


@pytest.fixture
def box() -> Iterator[Box]:
    running = Box("docker")
    yield running
    running.close()
    assert until(lambda: not containers(os.getpid()))


def test_a_template_without_a_required_control_refuses_to_start() -> None:
    from hdpo.background import BackgroundLoop
    from hdpo.toolserver.backends.process_sandbox import ProcessSandbox
    loop = BackgroundLoop()
    sandbox = ProcessSandbox(["--require", "unobtainium"])
    with pytest.raises(SandboxError):
        loop.run(sandbox.start(), timeout=120)
    loop.run(sandbox.shutdown())
    loop.close()


def test_an_engine_that_lacks_a_control_is_named() -> None:
    pytest.importorskip("docker")
    from hdpo.toolserver.backends.docker_container import missing_controls
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
    with pytest.raises(SessionLostError, match="its sandbox died"):
        call.result(30)
    assert session.run("print('kept' in globals(), image_1.size)").stdout == "False (64, 48)\n"
    session.close()


class Proxy:
    """A unix socket in front of the engine's, which can be cut: connections break, new ones are refused."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.open: list[socket.socket] = []
        self.listen()

    def listen(self) -> None:
        self.listener = socket.socket(socket.AF_UNIX)
        self.listener.bind(str(self.path))
        self.listener.listen(64)
        threading.Thread(target=self._accept, args=(self.listener,), daemon=True).start()

    def _accept(self, listener: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while True:
                client, _ = listener.accept()
                engine = socket.socket(socket.AF_UNIX)
                engine.connect("/var/run/docker.sock")
                self.open += [client, engine]
                for source, target in ((client, engine), (engine, client)):
                    threading.Thread(target=self._pump, args=(source, target), daemon=True).start()

    def _pump(self, source: socket.socket, target: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(1 << 16):
                target.sendall(data)
            target.shutdown(socket.SHUT_WR)

    def cut(self) -> None:
        self.path.unlink()
        for end in (self.listener, *self.open):
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
            end.close()
        self.open.clear()


@pytest.mark.docker
def test_an_engine_that_is_gone_in_mid_call_stops_no_cell_and_is_used_again_when_it_is_back(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    proxy = Proxy(tmp_path / "docker.sock")
    monkeypatch.setenv("DOCKER_HOST", f"unix://{proxy.path}")
    box = Box("docker")
    session = box.session(png())
    call = box.loop.submit(box.sandbox.run(session.name, "import time; time.sleep(0.5); kept = 7", 20))
    proxy.cut()
    assert call.result(20).ok                        # cells do not go through the engine
    other = box.session()                            # nor do sessions of a container that runs
    assert other.run("1").stdout == "1\n" and session.run("kept").stdout == "7\n"
    with monkeypatch.context() as direct:            # its container dies while nobody can start another
        direct.delenv("DOCKER_HOST")
        (container,) = containers(os.getpid())
        call = box.loop.submit(box.sandbox.run(session.name, "import time; time.sleep(60)", 60))
        container.kill()
    with pytest.raises(SessionLostError):
        call.result(20)
    started = time.monotonic()
    with pytest.raises(SandboxError):
        session.run("1")
    assert time.monotonic() - started < 20
    proxy.listen()
    assert session.run("print('kept' in globals(), image_1.size)").stdout == "False (64, 48)\n"
    proxy.cut()                                      # and it is away again at the end
    box.close()
    monkeypatch.delenv("DOCKER_HOST")
    assert until(lambda: not containers(os.getpid()))


@pytest.mark.docker
def test_a_killed_runtime_shim_leaves_nothing_and_the_trajectory_goes_on(box: Box) -> None:
    session = box.session(png())
    call = box.loop.submit(box.sandbox.run(session.name, "import time; time.sleep(1)", 20))
    shim = Path(f"/proc/{box.template_pid}/status").read_text().split("PPid:")[1].split()[0]
    os.kill(int(shim), signal.SIGKILL)
    with contextlib.suppress(SessionLostError):      # it ran to its end, or it was lost and says so
        assert call.result(30).ok
    assert until(lambda: _answers(session))


def _answers(session: Session) -> bool:
    with contextlib.suppress(SessionLostError):
        return session.run("print(6 * 7)").stdout == "42\n"
    return False


@pytest.mark.docker
@pytest.mark.parametrize("count", [80, pytest.param(256, marks=pytest.mark.long)])
def test_more_trajectories_than_a_container_holds_are_all_answered_at_once_and_all_containers_go(count: int) -> None:
    server = ToolServer("--sandbox", "docker", "--tools", "python")

    async def trajectory(client: ToolClient, number: int) -> bool:
        for code in (f"mine = {number}", "import subprocess; subprocess.Popen(['sleep', '1000']); None", "(mine, image_1.size)"):
            result = await client.call(f"t{number}", python(code), task(png()))
        await client.finish(f"t{number}")
        return f"({number}, (64, 48))" in result.text

    async def all_at_once() -> list[bool]:
        client = ToolClient(server.url, timeout=300)
        try:
            return await asyncio.gather(*(trajectory(client, number) for number in range(count)))
        finally:
            await client.close()
    try:
        assert all(asyncio.run(all_at_once()))
    finally:
        assert server.close() == 0
    assert not containers(server.process.pid)


@pytest.mark.docker
def test_a_session_killed_from_outside_is_lost_but_not_charged_and_its_neighbour_is_not_touched(box: Box) -> None:
    one, two = box.session(), box.session()
    one.run("x = 1")
    two.run("x = 2")
    children = subprocess.check_output(["pgrep", "-P", str(box.template_pid)], text=True).split()
    (inner,) = subprocess.check_output(["pgrep", "-P", children[0]], text=True).split()
    os.kill(int(inner), signal.SIGKILL)
    with pytest.raises(SessionLostError, match="killed from outside"):
        one.run("x")
    assert two.run("x").stdout == "2\n"


@pytest.mark.docker
def test_containers_of_dead_owners_are_removed_at_the_next_start_and_those_that_cannot_be_judged_are_left(tmp_path: Path) -> None:
    import docker

    from hdpo.toolserver.backends.docker_container import OWNER_LABEL
    from hdpo.toolserver.backends.docker_sandbox import IMAGE
    client = docker.from_env()
    (tmp_path / "lock").write_text("dead")
    labels = {"dead": f"1:dead:{tmp_path / 'lock'}", "elsewhere": f"1:alive:{tmp_path / 'not in sight'}",
              "another": f"1:other:{tmp_path / 'lock'}"}
    left = {name: client.containers.run(IMAGE, detach=True, entrypoint=["sleep", "1000"], labels={OWNER_LABEL: label},
                                        network_mode="none") for name, label in labels.items()}
    try:
        box = Box("docker")
        box.close()
        with pytest.raises(docker.errors.NotFound):
            left.pop("dead").reload()
        for container in left.values():
            container.reload()
    finally:
        for container in left.values():
            container.remove(force=True)
        client.close()


@pytest.mark.docker
def test_a_killed_server_leaves_no_container() -> None:
    server = ToolServer("--sandbox", "docker", "--tools", "python")
    assert len(containers(server.process.pid)) == 1
    server.kill()
    assert until(lambda: not containers(server.process.pid))


@pytest.mark.docker
@pytest.mark.parametrize("mode", ["docker", "docker-strict"])
def test_every_container_of_a_server_has_all_controls_and_the_limits_asked_for(mode: str) -> None:
    server = ToolServer("--sandbox", mode, "--tools", "python", "--container-memory", "1024", "--container-cpus", "1.5")
    found = containers(server.process.pid)
    settings = [container.attrs["HostConfig"] for container in found]
    users = [container.attrs["Config"]["User"] for container in found]
    assert server.close() == 0
    assert len(found) == (1 if mode == "docker" else 4)
    for host, user in zip(settings, users):
        assert host["NetworkMode"] == "none" and host["ReadonlyRootfs"] and host["CapDrop"] == ["ALL"]
        assert not host["Privileged"] and not host["CapAdd"] and not user.startswith("0")
        assert (host["Memory"], host["MemorySwap"], host["NanoCpus"]) == (1 << 30, 1 << 30, 1_500_000_000)
        assert host["PidsLimit"] == (64 * 65 + 63 if mode == "docker" else 128) and host["IpcMode"] == "private"
        assert "no-new-privileges:true" in host["SecurityOpt"]
        assert any(option.startswith("seccomp=") for option in host["SecurityOpt"]) == (mode == "docker")
        assert [bind.split(":")[1] for bind in host["Binds"]] == ["/run/hdpo/socket"] and host["Binds"][0].endswith(":ro")


@pytest.mark.docker
def test_strict_mode_gives_each_session_a_container_of_its_own_and_keeps_some_warm() -> None:
    from hdpo.toolserver.backends.docker_sandbox import DockerSandbox
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
