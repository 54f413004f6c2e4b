"""What trajectories can do to each other, and who is charged: memory, processes, processors, between real sessions."""
from __future__ import annotations

import contextlib
import dataclasses
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from test_sandbox import Box, Session
from tool_server import until

from hdpo.toolserver.owner import OwnedFolder, reap_folders
from hdpo.toolserver.sessions import SandboxError, SessionLostError

BACKENDS = ["process", "process that counts", pytest.param("docker", marks=pytest.mark.docker)]
"""Sessions have control groups where the tests run as root; "that counts" is how it goes elsewhere."""
SPIN = "\nfor _ in range({}):\n  if os.fork() == 0:\n    while True: pass\n"
ONE_SECOND = "import time\nbegan = time.process_time()\nwhile time.process_time() - began < 1: pass"
HOARDS = {
    "children": "import os, time\nfor _ in range(60):\n  if os.fork() == 0:\n    x = bytearray(60 << 20); time.sleep(60)\n"
                "time.sleep(60)",
    "sockets": "import os, socket, time\ndef fill():\n  keep = []\n  try:\n    while True:\n      keep += socket.socketpair()\n"
               "      keep[-1].setblocking(False)\n      try:\n        while True: keep[-1].send(bytes(65536))\n"
               "      except BlockingIOError: pass\n  except OSError: time.sleep(60)\n"
               "for _ in range(60):\n  if os.fork() == 0: fill()\ntime.sleep(60)",
    "shared_mappings": "import os, mmap, time\ndef fill():\n  keep = [mmap.mmap(-1, 1 << 27) for _ in range(3)]\n"
                       "  if os.fork() == 0:\n    for m in keep:\n      for i in range(0, 1 << 27, 4096): m[i] = 1\n"
                       "    os._exit(0)\n  time.sleep(60)\nfor _ in range(6):\n  if os.fork() == 0: fill()\ntime.sleep(60)",
}
"""More memory than a session may hold, in ways of which no single process shows it all."""


@pytest.fixture(scope="module", params=BACKENDS)
def box(request: pytest.FixtureRequest) -> Iterator[Box]:
    if request.param == "docker":
        from hdpo.toolserver.backends.docker_sandbox import DockerSandbox
        running = Box("docker", DockerSandbox(memory_mib=1536))
    else:
        from hdpo.toolserver.backends import process_sandbox
        with pytest.MonkeyPatch.context() as patch:
            if request.param == "process that counts":
                patch.setattr(process_sandbox, "session_groups", lambda pid, limit: None)
            running = Box("process", process_sandbox.ProcessSandbox(memory_mib=768))
    yield running
    running.close()


@pytest.fixture
def neighbour(box: Box) -> Iterator[Session]:
    """Holds more memory than any single process of an attack."""
    session = box.session()
    session.run("x = np.ones(200 << 17); None")
    yield session
    session.close()


def below(supervisor: psutil.Process) -> list[psutil.Process]:
    """What is alive of a session."""
    found = []
    for process in supervisor.children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):
            found += [process] if process.status() != psutil.STATUS_ZOMBIE else []
    return found


@pytest.mark.parametrize("hoard", HOARDS)
def test_a_session_over_its_memory_is_ended_and_charged_and_an_idle_larger_process_is_not_touched(
        box: Box, neighbour: Session, hoard: str) -> None:
    template = box.template_pid
    time.sleep(0.3)      # idle
    attacker = box.session()
    result = attacker.run(HOARDS[hoard], 40)
    assert result.restarted and result.ended == "it held more memory than a session may"
    assert neighbour.run("int(x.sum()) >> 17").stdout == "200\n" and box.template_pid == template
    assert attacker.run("'x' in globals()").stdout == "False\n"
    attacker.close()


@pytest.mark.docker
def test_a_session_within_its_limit_that_grows_into_the_last_of_the_memory_is_lost_as_ours() -> None:
    from hdpo.toolserver.backends.docker_sandbox import DockerSandbox
    box = Box("docker", DockerSandbox(memory_mib=1024))
    idle = [box.session() for _ in range(3)]
    for session in idle[:2]:
        session.run("x = np.ones(320 << 17); None")
    time.sleep(0.3)
    grown = idle[2]
    with pytest.raises(SessionLostError, match="within its limit"):
        grown.run("import time\nkeep = []\nfor _ in range(40):\n  keep.append(np.ones(10 << 17)); time.sleep(0.05)", 40)
    for session in idle[:2]:
        assert session.run("int(x.sum()) >> 17").stdout == "320\n"
    box.close()


@pytest.mark.docker
def test_a_fork_that_the_system_refuses_is_an_answer_and_no_session_ends_of_it() -> None:
    from hdpo.toolserver.backends.docker_sandbox import DockerSandbox
    sandbox = DockerSandbox()
    sandbox.limits = dataclasses.replace(sandbox.limits, processes=24)
    box = Box("docker", sandbox)
    first = box.session()
    first.run("import threading, time\nkept = 1\ntry:\n"
              "  while True: threading.Thread(target=time.sleep, args=(100,), daemon=True).start()\nexcept RuntimeError: pass")
    template = box.template_pid
    for _ in range(3):
        with contextlib.suppress(SandboxError):        # "no process is left for it", until the container is not asked any more
            box.session()
    assert box.session().run("1").ok                   # in another container
    assert first.run("kept").stdout == "1\n" and box.template_pid == template
    box.close()


@pytest.mark.docker
def test_limits_of_the_sessions_add_up_to_the_containers() -> None:
    from hdpo.toolserver.backends.docker_container import SESSION_PROCESSES
    from hdpo.toolserver.backends.docker_sandbox import DockerSandbox
    for sandbox in (DockerSandbox(), DockerSandbox(sessions_per_container=512), DockerSandbox(mode="strict")):
        assert sandbox.limits.processes >= sandbox.per_container * (SESSION_PROCESSES + 1) + 1


def test_what_a_finished_cell_left_at_work_ends_and_what_is_idle_stays(box: Box) -> None:
    session = box.session()
    session.run("import os, subprocess\nidle = subprocess.Popen(['sleep', '1000'])" + SPIN.format(6))
    supervisor = max(psutil.Process(box.template_pid).children(), key=lambda process: process.create_time())

    assert until(lambda: len(below(supervisor)) == 2)        # the session, and what sleeps
    before = sum(sum(process.cpu_times()[:2]) for process in below(supervisor))
    session.run("import threading\nrun = True\ndef spin():\n  while run: pass\nthreading.Thread(target=spin).start()")
    time.sleep(1.0)
    after = sum(sum(process.cpu_times()[:2]) for process in below(supervisor))
    assert after - before < 0.6                                                # its threads stop between cells, too
    assert session.run("print(idle.poll()); run = False").stdout == "None\n"   # and go on in the next one
    session.close()


def test_forty_busy_processes_of_a_neighbour_weigh_as_one(box: Box, neighbour: Session) -> None:
    supervisors = {process.pid for process in psutil.Process(box.template_pid).children()}
    attacker = box.session()
    (theirs,) = (process for process in psutil.Process(box.template_pid).children() if process.pid not in supervisors)
    attack = box.loop.submit(box.sandbox.run(attacker.name, "import os" + SPIN.format(40) + "while True: pass", 8.0))
    time.sleep(0.5)

    def used() -> float:
        return sum(sum(process.cpu_times()[:2]) for process in below(theirs))
    before = used()
    neighbour.run(ONE_SECOND, 30)
    taken = used() - before      # of two cores, beside the second that the neighbour had; 40 with equal shares
    attack.result(30)
    attacker.close()
    assert taken < 6


@pytest.mark.docker
def test_sessions_in_containers_of_their_own_share_no_quota_and_reach_no_disk_of_the_host() -> None:
    from hdpo.toolserver.backends.docker_sandbox import DockerSandbox
    box = Box("docker", DockerSandbox(mode="strict", warm=1))
    sessions = [box.session() for _ in range(4)]
    many = ("import os, threading, time\nfor _ in range({}):\n"
            "  threading.Thread(target=time.sleep, args=(100,), daemon=True).start()")
    assert all(session.run(many.format(30)).ok for session in sessions)      # 120 threads of one user of the machine
    assert sessions[0].run("import subprocess; subprocess.run(['echo', 'forked']); None").stdout == "forked\n"
    assert "can't start" in sessions[0].run(many.format(200)).stderr         # but its own limit holds
    tried = sessions[1].run("""
import os
for what in ("open('/run/hdpo/x', 'w')", "open('/run/hdpo/socket', 'w')", "os.unlink('/run/hdpo/socket')",
             "os.symlink('/etc/passwd', '/run/hdpo/link')", "os.rename('/run/hdpo/socket', '/run/hdpo/other')"):
    try: exec(what); print('ESCAPED', what)
    except OSError: pass""")
    assert "ESCAPED" not in tried.stdout
    ends = [sessions[1].run(code).restarted for code in ("os.kill(-1, 9); time.sleep(1)", "1")]
    assert ends.count(True) == 1               # whoever kills his supervisor has ended his session himself
    assert sessions[2].run("1").stdout == "1\n"
    hoard = sessions[2].run(HOARDS["children"].replace("60 << 20", "200 << 20"), 5)
    assert not hoard.ok                        # its container's memory is its own: its children end, or it does
    assert sessions[3].run("1").stdout == "1\n" and sessions[2].run("1").stdout == "1\n"
    box.close()


OTHER_JOB = """
import asyncio, sys
async def job():
    if sys.argv[1] == "docker":
        from hdpo.toolserver.backends.docker_sandbox import DockerSandbox as Sandbox
    else:
        from hdpo.toolserver.backends.process_sandbox import ProcessSandbox as Sandbox
    sandbox = Sandbox()
    await sandbox.start()
    await sandbox.open("s", [])
    print((await sandbox.run("s", "40 + 2", 20)).stdout)
    await sandbox.shutdown()
asyncio.run(job())
"""


def test_the_start_of_a_job_in_another_pid_namespace_leaves_the_sandboxes_of_this_one_alone(box: Box) -> None:
    backend = "docker" if hasattr(box.sandbox, "mode") else "process"
    session = box.session()
    session.run("kept = 1")
    own = [] if os.geteuid() == 0 else ["--user", "--map-current-user"]
    other = subprocess.run(["unshare", *own, "--pid", "--fork", "--mount-proc", sys.executable, "-c", OTHER_JOB, backend],
                           capture_output=True, text=True, timeout=120)
    assert other.stdout == "42\n\n", other.stderr[-500:]
    assert session.run("kept").stdout == "1\n" and box.session().run("1").ok      # old sessions live, new ones come
    session.close()


def test_folders_are_removed_when_their_owner_has_ended_and_not_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    mine = OwnedFolder("process")
    code = "from hdpo.toolserver.owner import OwnedFolder; import os; OwnedFolder('process'); os._exit(0)"
    subprocess.run([sys.executable, "-c", code], env={**os.environ, "TMPDIR": str(tmp_path)}, check=True)
    assert len(list(tmp_path.iterdir())) == 2
    reap_folders("docker")
    assert len(list(tmp_path.iterdir())) == 2
    reap_folders("process")
    assert list(tmp_path.iterdir()) == [mine.path]
    mine.remove()
