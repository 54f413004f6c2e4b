"""Python sessions with full isolation beside a fresh Jupyter kernel per session and `docker run` per call. (goals S1 to S6)

    python benchmarks/bench_sandbox.py [--short] [--backend docker|process] [--json FILE]

Last, honest trajectories work alone and beside 10 % that attack. Contenders take turns in one run, so a busy machine slows
all of them; ratios are medians of paired rounds, times are wall clock and as good as the machine was quiet. The kernel needs
ipykernel; without it its ratios are left out.
"""
from __future__ import annotations

import asyncio
import contextlib
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import psutil
from common import Figure, arguments, report
from large_pictures import sixteen_8k

from hdpo.errors import ToolServerError
from hdpo.toolserver.client import ToolClient
from hdpo.toolserver.process import start_tool_server
from hdpo.types import Task

IMAGE = "hdpo-sandbox:latest"
CELL = "1 + 1"
HELD = 64
"""Sessions whose memory is measured together, as many as a container has: they share the template's pages."""
TASK = Task("bench", "bench", [{"role": "user", "content": "?"}], (), "")
TIMEOUTS = {"python loop": "while True: pass", "printing loop": "while True: print('x')", "C loop": "sum(range(10 ** 13))",
            "ignored signals": "import signal; signal.signal(signal.SIGINT, signal.SIG_IGN)\nwhile True: pass"}


def make_sandbox(backend: str) -> Any:
    if backend == "docker":
        from hdpo.toolserver.backends.docker_sandbox import DockerSandbox
        return DockerSandbox(sessions_per_container=512)
    from hdpo.toolserver.backends.process_sandbox import ProcessSandbox
    return ProcessSandbox()


def template_pid(sandbox: Any) -> int:
    if hasattr(sandbox, "_shards"):
        container = sandbox._shards[0].container
        container.reload()
        return container.attrs["State"]["Pid"]
    return sandbox._process.pid


def descendants(pid: int) -> list[int]:
    return [child.pid for child in psutil.Process(pid).children(recursive=True)]


def memory(pids: list[int], key: str = "Pss") -> float:
    """MB of the processes together; shared pages counted once, in shares."""
    total = 0
    for pid in pids:
        for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
            if line.startswith(f"{key}:"):
                total += int(line.split()[1])
    return total / 1024


async def timed(work: Awaitable[Any]) -> float:
    started = time.perf_counter()
    await work
    return time.perf_counter() - started


class Kernel:
    """A fresh ipykernel, as the reference gives each trajectory."""

    def __init__(self) -> None:
        from jupyter_client.manager import start_new_kernel
        started = time.perf_counter()
        self.manager, self.client = start_new_kernel(stderr=subprocess.DEVNULL)
        self.run(CELL)
        self.start_s = time.perf_counter() - started

    def run(self, code: str) -> float:
        started = time.perf_counter()
        self.client.execute_interactive(code, store_history=False, output_hook=lambda message: None, timeout=60)
        return time.perf_counter() - started

    def memory(self) -> float:
        pid = self.manager.provisioner.pid
        return memory([pid, *descendants(pid)])

    def close(self) -> None:
        self.client.stop_channels()
        self.manager.shutdown_kernel(now=True)


async def first_result(sandbox: Any, name: str) -> None:
    await sandbox.open(name, [])
    result = await sandbox.run(name, CELL, 30.0)
    assert result.stdout == "2\n", result


async def against_kernels(sandbox: Any, rounds: int) -> dict[str, list[float]]:
    """Paired starts and round trips; the kernel's lists stay empty without ipykernel."""
    found: dict[str, list[float]] = {"session start": [], "kernel start": [], "cell": [], "kernel cell": [], "kernel MB": []}
    try:
        import ipykernel  # noqa: F401
    except ImportError:
        print("ipykernel is not installed: no comparison with kernels", file=sys.stderr)
        rounds = 0
    await first_result(sandbox, "warm")
    for k in range(rounds):
        kernel = await asyncio.to_thread(Kernel)
        found["kernel start"].append(kernel.start_s)
        starts = []
        for i in range(10):
            starts.append(await timed(first_result(sandbox, f"{k}-{i}")))
            await sandbox.close(f"{k}-{i}")
        found["session start"].append(statistics.median(starts))
        found["kernel cell"].append(statistics.median([await asyncio.to_thread(kernel.run, CELL) for _ in range(30)]))
        found["cell"].append(statistics.median([await timed(sandbox.run("warm", CELL, 30.0)) for _ in range(100)]))
        found["kernel MB"].append(kernel.memory())
        await asyncio.to_thread(kernel.close)
    return found


async def settled(pid: int) -> list[int]:
    """Descendants once none of them is leaving any more: their number has not fallen for half a second."""
    found = descendants(pid)
    for _ in range(100):
        await asyncio.sleep(0.5)
        known, found = found, descendants(pid)
        if len(found) >= len(known):
            break
    return found


async def alone(sandbox: Any, lives: int, held: int) -> dict[str, float]:
    """Throughput, memory and growth without anything beside."""
    starts = []
    for k in range(200):
        starts.append(await timed(first_result(sandbox, f"s{k}")))
        await sandbox.close(f"s{k}")
    pid = template_pid(sandbox)
    before = await settled(pid)
    for k in range(held):
        await first_result(sandbox, f"held{k}")
    added = [p for p in descendants(pid) if p not in before]
    per_session = memory(added) / held
    for k in range(held):
        await sandbox.close(f"held{k}")

    async def life(k: int) -> None:
        await sandbox.open(f"life{k}", [])
        for code in ("x = 1", "import subprocess; subprocess.Popen(['sleep', '1000'])" if k % 10 == 0 else "x += 1", "x"):
            await sandbox.run(f"life{k}", code, 30.0)
        await sandbox.close(f"life{k}")

    for k in range(50):
        await life(k)
    rss = memory([pid], "Rss")
    started = time.perf_counter()
    for first in range(0, lives, 4):
        await asyncio.gather(*(life(k) for k in range(first, first + 4)))
    seconds = time.perf_counter() - started
    left = len(await settled(pid)) - len(before)
    return {"start_p50_ms": 1e3 * statistics.median(starts), "start_p95_ms": 1e3 * statistics.quantiles(starts, n=20)[18],
            "sessions_per_s": 1 / statistics.mean(starts), "session_MB": per_session, "lives_per_s": lives / seconds,
            "left_processes": left, "template_growth_%": 100 * (memory([pid], "Rss") / rss - 1)}


def python_action(code: str) -> str:
    return f'<tool_call>{json.dumps({"name": "python", "arguments": {"code": code}})}</tool_call>'


async def over_http(url: str, trajectories: int, cells: int) -> dict[str, float]:
    """Latency of one trajectory, then all at once through the real server and client."""
    action = python_action(CELL)
    client = ToolClient(url, timeout=300)
    await client.call("one", action, TASK)
    alone_s = [await timed(client.call("one", action, TASK)) for _ in range(200)]
    failed = 0

    async def trajectory(k: int) -> None:
        nonlocal failed
        for _ in range(cells):
            failed += not (await client.call(f"t{k}", action, TASK)).ok
        await client.finish(f"t{k}")

    started = time.perf_counter()
    await asyncio.gather(*(trajectory(k) for k in range(trajectories)))
    seconds = time.perf_counter() - started
    sessions = 64
    await asyncio.gather(*(client.call(f"c{k}", action, TASK) for k in range(sessions)))
    before = time.perf_counter()
    for _ in range(20):
        await asyncio.gather(*(client.call(f"c{k}", action, TASK) for k in range(sessions)))
    cells_per_s = 20 * sessions / (time.perf_counter() - before)
    await client.close()
    return {"p50_ms": 1e3 * statistics.median(alone_s), "cells_per_s": cells_per_s, "failed": failed,
            "whole_s": seconds, "trajectories": trajectories}


HONEST = ("x = sum(k * k for k in range(200_000)); x", "y = np.arange(1_000_000.0).sum(); y",
          "import subprocess; subprocess.run(['echo', str(x + int(y))], capture_output=True, text=True).stdout")
TOLD = ("2666646666700000", "499999500000.0", "2667146666200000")
FORK = "import os, time\nfor _ in range(60):\n  if os.fork() == 0:\n    "
HOSTILE = (
    "while True: pass", FORK + "while True: pass\nwhile True: pass",
    "import os\nwhile True:\n  try: os.fork()\n  except OSError: pass",
    FORK + "x = bytearray(100 << 20); time.sleep(60)\ntime.sleep(60)", "x = [bytearray(1 << 28) for _ in range(64)]",
    "import threading, time\nwhile True: threading.Thread(target=time.sleep, args=(100,), daemon=True).start()",
    "while True: print('x' * (1 << 20))", "f = open('big', 'wb')\nwhile True: f.write(bytes(1 << 22))",
    "import os; os._exit(1)", "import ctypes; ctypes.string_at(0)", FORK + "while True: pass",      # left behind
    "import os\nfor fd in range(3, 256):\n  try: os.write(fd, b'\\xff' * 64)\n  except OSError: pass",
    "import signal\nsignal.pthread_sigmask(signal.SIG_BLOCK, range(1, 65))\nwhile True: pass", "'x' * 500_000_000")


async def beside_attackers(url: str, trajectories: int, hostile: int) -> dict[str, float]:
    """Honest trajectories' calls while each of `hostile` others makes three attacks, one of a mix after the other."""
    client = ToolClient(url, timeout=300)
    waits, wrong = [], 0

    async def attack(k: int) -> None:
        for turn in range(3):
            with contextlib.suppress(ToolServerError):
                await client.call(f"h{k}", python_action(HOSTILE[(k + 5 * turn) % len(HOSTILE)]), TASK)
        await client.finish(f"h{k}")

    async def honest(k: int) -> None:
        nonlocal wrong
        for code, told in zip(HONEST, TOLD, strict=True):
            started = time.perf_counter()
            try:
                wrong += told not in (await client.call(f"t{k}", python_action(code), TASK)).text
            except ToolServerError as exc:
                wrong += 1
                print(f"honest trajectory {k}: {exc}", file=sys.stderr)
            waits.append(time.perf_counter() - started)
        await client.finish(f"t{k}")
    attacks = [asyncio.create_task(attack(k)) for k in range(hostile)]
    await asyncio.gather(*(honest(k) for k in range(trajectories - hostile)))
    for task in attacks:      # the honest ones are what is measured
        task.cancel()
    await asyncio.gather(*attacks, return_exceptions=True)
    await client.close()
    return {"p50_s": statistics.median(waits), "p95_s": statistics.quantiles(waits, n=20)[18], "wrong": wrong}


async def worst_overrun(sandbox: Any) -> float:
    """Largest time an answer came after its limit, seconds."""
    worst = 0.0
    await sandbox.open("late", [])
    for code in TIMEOUTS.values():
        worst = max(worst, await timed(sandbox.run("late", code, 1.0)) - 1.0)
    await sandbox.close("late")
    return worst


async def measure(backend: str, short: bool) -> dict[str, Any]:
    sandbox = make_sandbox(backend)
    await sandbox.start()
    try:
        return {"paired": await against_kernels(sandbox, 3 if short else 10),
                "alone": await alone(sandbox, 200 if short else 2000, HELD),
                "overrun_s": await worst_overrun(sandbox), "controls": getattr(sandbox, "controls", None)}
    finally:
        await sandbox.shutdown()


def served(backend: str, work: Callable[[str], Awaitable[dict[str, float]]]) -> dict[str, float]:
    server, url = start_tool_server(["--sandbox", backend, "--tools", "python"])
    try:
        return asyncio.run(work(url))   # type: ignore[arg-type]
    finally:
        server.terminate()
        server.wait(60)


def docker_run_s(rounds: int) -> float:
    command = ["docker", "run", "--rm", "--network", "none", "--entrypoint", "python3", IMAGE, "-c",
               "import numpy, PIL.Image; print(1 + 1)"]
    times = []
    for _ in range(rounds):
        started = time.perf_counter()
        subprocess.run(command, check=True, capture_output=True)
        times.append(time.perf_counter() - started)
    return statistics.median(times)


def main() -> int:
    parser = arguments(__doc__)
    parser.add_argument("--backend", choices=("docker", "process"), default="docker")
    args = parser.parse_args()
    direct = asyncio.run(measure(args.backend, args.short))
    trajectories = 64 if args.short else 256
    http = served(args.backend, lambda url: over_http(url, trajectories, 3))
    quiet, loud = ([served(args.backend, lambda url, hostile=hostile: beside_attackers(url, trajectories, hostile))
                    for _ in range(1 if args.short else 2)] for hostile in (0, trajectories // 10))
    beside = min(part["p95_s"] for part in loud) / min(part["p95_s"] for part in quiet)
    paired, one = direct["paired"], direct["alone"]
    figures: dict[str, Figure] = {}
    if paired["kernel start"]:
        figures["S1 kernel start / session start"] = Figure(
            statistics.median(k / s for k, s in zip(paired["kernel start"], paired["session start"])), "x", "higher", 40)
        figures["S2 kernel cell / cell, socket"] = Figure(
            statistics.median(k / s for k, s in zip(paired["kernel cell"], paired["cell"])), "x", "higher", 30)
        figures["S4 kernel memory / session memory"] = Figure(
            statistics.median(paired["kernel MB"]) / one["session_MB"], "x", "higher", 6)
    figures |= {
        "S1 session start, p50": Figure(one["start_p50_ms"], "ms", "lower", None, 0.5),
        "S1 session start, p95": Figure(one["start_p95_ms"], "ms", "lower", 40, 0.5),
        "S2 cell over HTTP, p50": Figure(http["p50_ms"], "ms", "lower", 3, 0.5),
        "S3 sessions": Figure(one["sessions_per_s"], "/s", "higher", 60, 0.5),
        "S3 cells over HTTP": Figure(http["cells_per_s"], "/s", "higher", 1000, 0.5),
        "S3 whole lives": Figure(one["lives_per_s"], "/s", "higher", 35, 0.5),
        "S4 memory of a session": Figure(one["session_MB"], "MB", "lower", 6),
        "S5 processes left": Figure(one["left_processes"], "", "lower", 0, 0),
        "S5 growth of the template": Figure(one["template_growth_%"], "%", "lower", 5, 1),
        "S6 worst answer after its limit": Figure(direct["overrun_s"], "s", "lower", 0.5, 0.5),
        f"failed calls of {trajectories} trajectories at once": Figure(http["failed"], "", "lower", 0, 0),
        "honest calls, p95 beside 10 % attackers / alone": Figure(beside, "x", "lower", 2, 0.5),
        "honest calls, p95 beside 10 % attackers": Figure(min(part["p95_s"] for part in loud), "s", "lower", None, 0.5),
        "honest answers wrong or late": Figure(sum(part["wrong"] for part in quiet + loud), "", "lower", 0, 0),
    }
    if args.backend == "docker":
        large = asyncio.run(sixteen_8k())
        figures["A7 cells lost, 16 sessions with 8K pictures"] = Figure(large["lost"], "", "lower", 0, 0)
        figures["A7 containers they start"] = Figure(large["containers"], "", "lower", 16, 0)
        figures["A7 time until the last of them is open"] = Figure(large["all_open_s"], "s", "lower", None, 0.5)
        figures["docker run per call"] = Figure(1e3 * docker_run_s(3), "ms", "lower")
    details = {"direct": direct, "http": http, "quiet": quiet, "loud": loud, "backend": args.backend}
    return not report("sandbox", figures, details, args.json, args.short)


if __name__ == "__main__":
    sys.exit(main())
