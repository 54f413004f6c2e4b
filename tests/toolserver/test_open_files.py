"""A server under a low limit of open files: it raises it, and where it can't the failure is ours, named, and fills no log."""
from __future__ import annotations

import asyncio
import io
import logging
import resource
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from tool_server import ToolServer, python, task, until

from hdpo import descriptors
from hdpo.errors import ToolServerError, UserError
from hdpo.toolserver.client import ToolClient
from hdpo.toolserver.process import start_tool_server
from hdpo.toolserver.repeats import Counting

LOW = 128
CALLS = 60      # trajectories; at three files each more than LOW


@pytest.fixture
def soft() -> Iterator[None]:
    """This process, and what it starts, has a low soft limit."""
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (LOW, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, before)


def answers(url: str, count: int) -> list[str]:
    """What came back on the first call of so many live trajectories, one after the other: "" or the failure."""
    async def go() -> list[str]:
        client, said = ToolClient(url, timeout=120, retries=0), []
        for number in range(count):
            try:
                result = await client.call(f"t{number}", python("1 + 1"), task())
                said.append("" if result.ok else result.text)
            except ToolServerError as exc:
                said.append(str(exc))
        await client.close()
        return said
    return asyncio.run(go())


def test_a_low_soft_limit_is_raised_and_no_call_fails(soft: None) -> None:
    server = ToolServer("--tools", "python", "--trajectories", str(CALLS))
    try:
        assert answers(server.url, CALLS) == [""] * CALLS
        assert psutil.Process(server.process.pid).num_fds() > LOW
    finally:
        server.close()


def test_a_hard_limit_that_the_kernel_does_not_take_leaves_the_soft_one(monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*_: object) -> None:
        raise ValueError("not allowed to raise maximum limit")
    monkeypatch.setattr(resource, "getrlimit", lambda _: (LOW, resource.RLIM_INFINITY))
    monkeypatch.setattr(resource, "setrlimit", refused)
    assert descriptors.raise_limit() == LOW


def test_where_files_run_out_calls_fail_as_ours_with_the_cause_and_others_go_on(tmp_path: Path) -> None:
    log = tmp_path / "log"
    code = (f"import resource, sys; resource.setrlimit(resource.RLIMIT_NOFILE, ({LOW}, {LOW}));"
            "from hdpo.toolserver.app import main; sys.exit(main(sys.argv[1:]))")
    with log.open("w") as said:
        command = [sys.executable, "-c", code, "--tools", "python"]
        server = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=said, text=True)
    try:
        assert server.stdout is not None
        url = server.stdout.readline().strip()
        failed = [said for said in answers(url, CALLS) if said]
        assert failed and all("too many open files" in said and f"{LOW} (ulimit -n)" in said for said in failed)

        async def crowd() -> None:
            """More connections than the server may accept."""
            opened = [await asyncio.open_connection("127.0.0.1", int(url.rsplit(":", 1)[1])) for _ in range(2 * LOW)]
            while "out of system resource" not in log.read_text():
                await asyncio.sleep(0.05)
            for _, writer in opened:
                writer.close()
        asyncio.run(asyncio.wait_for(crowd(), 60))
        assert until(lambda: not answers(url, 1)[0] or "too many open files" in answers(url, 1)[0], 60)
    finally:
        server.terminate()
        assert server.wait(60) == 0
    lines = log.read_text().splitlines()
    assert sum("too many open files" in line for line in lines) <= 6 and len(lines) < 60, lines


def test_a_server_that_may_not_open_files_enough_does_not_start_and_says_the_way_out(tmp_path: Path) -> None:
    with pytest.raises(ToolServerError, match=r"1000000000 live trajectories need \d+ open files .* raise it \(`ulimit -Hn`"):
        start_tool_server(["--tools", "python", "--trajectories", "1000000000"], tmp_path / "log")


def test_the_limit_is_checked_against_live_trajectories_shared_by_servers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resource, "getrlimit", lambda kind: (1024, 4096))
    with pytest.raises(UserError, match="2048 live trajectories need 8448 open files .* the hard limit here is 4096"):
        descriptors.check_limit(2048)
    assert "4096 allowed" in descriptors.check_limit(2048, servers=4) and "4096 allowed" in descriptors.check_limit(900)


def test_a_line_that_repeats_is_written_once_and_counted() -> None:
    stream = io.StringIO()
    counting = Counting(stream, period_s=3600)
    log = logging.Logger("test")
    log.addHandler(counting)
    for number in range(1000):
        log.warning("socket %d at %s failed", number, hex(number))
    log.warning("another")
    assert stream.getvalue() == "socket 0 at 0x0 failed\nanother\n"
    counting.tell()
    assert stream.getvalue().splitlines()[2:] == ["socket 999 at 0x3e7 failed (this and 998 more like it)"]
    log.warning("another")
    assert stream.getvalue().endswith("another\n")
    counting.close()


def test_repetitions_are_told_when_the_period_is_over_though_nothing_more_is_logged() -> None:
    stream = io.StringIO()
    log = logging.Logger("test")
    log.addHandler(Counting(stream, period_s=0.2))
    log.warning("once")
    log.warning("once")
    assert until(lambda: "(this and 0 more like it)" in stream.getvalue(), 60)
