"""Who is charged for what: own limits, neighbours, the engine, the server, time. Nothing unknown is charged to the policy."""
from __future__ import annotations

import contextlib
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import psutil
import pytest
from test_sandbox import STARVED, Box, Session

from hdpo.toolserver.blame import Blame, who_ended, who_took_the_time
from hdpo.toolserver.sessions import SandboxError


@pytest.mark.parametrize("seen, blame", [
    ({"evidence": b"x"}, Blame.POLICY),                                # exit, crash, its own signal
    ({"evidence": b"m"}, Blame.POLICY),                                # its own limit
    ({"evidence": b"", "alone": True}, Blame.POLICY),                  # nobody else could have
    ({"evidence": b"n"}, Blame.OURS),                                  # neighbours
    ({"evidence": b"n", "alone": True}, Blame.OURS),
    ({"evidence": b"f"}, Blame.OURS),                                  # the container's processes are used up
    ({"evidence": b"", "template_ended": True}, Blame.OURS),           # the engine
    ({"evidence": b"k", "template_ended": True}, Blame.OURS),
    ({"evidence": b"", "template_ended": True, "alone": True}, Blame.OURS),
    ({"evidence": b"x", "template_ended": True}, Blame.POLICY),        # it had ended before
    ({"evidence": b"", "abandoned": True}, Blame.OURS),                # the server
    ({"evidence": b"x", "abandoned": True}, Blame.OURS),
    ({"evidence": b"k"}, Blame.UNKNOWN),
    ({"evidence": b""}, Blame.UNKNOWN),
    ({"evidence": b"?"}, Blame.UNKNOWN),
], ids=str)
def test_who_is_charged_for_the_end_of_a_session(seen: dict[str, Any], blame: Blame) -> None:
    assert who_ended(**seen)[0] is blame


@pytest.mark.parametrize("said, alone, blame", [
    (b"i", False, Blame.POLICY),         # it burned or slept its time
    (b"i", True, Blame.POLICY),
    (b"s", False, Blame.OURS),           # neighbours, or the machine
    (b"s", True, Blame.OURS),
    (b"", True, Blame.POLICY),           # it has ended its supervisor, as nobody else could
    (b"", False, Blame.UNKNOWN),
    (None, False, Blame.UNKNOWN),        # the supervisor didn't get to say
    (None, True, Blame.UNKNOWN),
    (b"?", False, Blame.UNKNOWN),
])
def test_who_is_charged_for_a_cell_that_was_not_done_in_its_time(said: bytes | None, alone: bool, blame: Blame) -> None:
    assert who_took_the_time(said, alone)[0] is blame


SPIN = "while True: pass"


@contextlib.contextmanager
def no_processor_for(process: psutil.Process) -> Iterator[None]:
    """Its processor is taken by a dozen others."""
    own = process.cpu_affinity()
    hogs = []
    try:
        process.cpu_affinity([0])
        code = "import os; os.sched_setaffinity(0, [0])\n" + SPIN
        for _ in range(12):
            hogs.append(subprocess.Popen([sys.executable, "-S", "-c", code], start_new_session=True))
        yield
    finally:
        for hog in hogs:
            hog.kill()
            hog.wait()
        process.cpu_affinity(own)


@pytest.fixture(scope="module", params=["process", pytest.param("docker", marks=pytest.mark.docker),
                                        pytest.param("docker-strict", marks=pytest.mark.docker)])
def box(request: pytest.FixtureRequest) -> Iterator[Box]:
    if request.param == "docker-strict":
        from hdpo.toolserver.backends.docker_sandbox import DockerSandbox
        running = Box("docker", DockerSandbox(mode="strict", warm=1))
    else:
        running = Box(request.param)
    yield running
    running.close()


def process_of(session: Session) -> psutil.Process:
    """The one that runs its cells; it was opened last."""
    template = session.box.sandbox._sessions[session.name].template
    if (container := getattr(template, "container", None)) is not None:
        container.reload()
    pid = container.attrs["State"]["Pid"] if container is not None else session.box.template_pid
    (process,) = max(psutil.Process(pid).children(), key=lambda supervisor: supervisor.create_time()).children()
    return process


def test_a_cell_that_others_left_no_processor_is_a_loss_of_ours_and_its_session_goes_on(box: Box) -> None:
    session = box.session()
    session.run("kept = 1")
    with no_processor_for(process_of(session)), pytest.raises(SandboxError, match=STARVED):
        box.do(box.sandbox.run(session.name, SPIN, 3.0))
    assert session.run("kept").stdout == "1\n"
    session.close()


CROWD = "import os, time\nfor _ in range(40):\n  if os.fork() == 0:\n    time.sleep(60)\n" + SPIN


@pytest.mark.parametrize("code, limit", [("import time; time.sleep(60)", 2.0), (CROWD, 4.0)], ids=["slept", "crowd"])
def test_a_cell_that_slept_or_crowded_itself_out_is_charged_also_where_processors_are_scarce(code: str, limit: float) -> None:
    box = Box("process")
    session = box.session()
    with no_processor_for(process_of(session)):
        result = box.do(box.sandbox.run(session.name, code, limit))
    box.close()
    assert result.timed_out


def test_a_session_cannot_change_its_place_in_the_queue_for_processors(box: Box) -> None:
    session = box.session()
    tried = ("os.nice(1)", "os.setpriority(os.PRIO_PROCESS, 0, 19)", "os.sched_setaffinity(0, [0])",
             "os.sched_setparam(0, os.sched_param(0))",
             *(f"os.sched_setscheduler(0, os.{kind}, os.sched_param(0))" for kind in ("SCHED_IDLE", "SCHED_BATCH")))
    told = session.run(f"import os\nfor what in {tried!r}:\n  try: exec(what); print(what)\n  except PermissionError: pass")
    assert told.ok and told.stdout == ""
    session.close()
