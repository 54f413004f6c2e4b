"""A tool server with many live trajectories, from a soft limit of 1,024 open files on: what it holds, costs and refuses.

Used by bench_scale.py. A picture of 3.4 MB is shared by a group of 16; every trajectory gets a crop of two megapixels back.
"""
from __future__ import annotations

import asyncio
import io
import os
import resource
import time

import numpy as np
import psutil
from PIL import Image

from hdpo.errors import ToolServerError
from hdpo.toolserver.client import ToolClient
from hdpo.toolserver.process import start_tool_server
from hdpo.types import Task

GROUP = 16
CROP = '<tool_call>{"name": "python", "arguments": {"code": "image_1.crop((0, 0, 1600, 1300))"}}</tool_call>'
NOTHING = '<tool_call>{"name": "python", "arguments": {"code": "1 + 1"}}</tool_call>'


def picture(seed: int) -> bytes:
    """A JPEG of about 3.4 MB."""
    coarse = np.random.default_rng(seed).integers(0, 256, (600, 800, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(coarse).resize((2400, 1800)).save(buffer, "JPEG", quality=96)
    return buffer.getvalue()


def low_limit() -> None:
    """As login shells have it."""
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(1024, hard), hard))


def held_by(processes: list[psutil.Process]) -> tuple[int, float]:
    """(bytes, CPU seconds) of all of them."""
    return sum(one.memory_info().rss for one in processes), sum(sum(one.cpu_times()[:2]) for one in processes)


def served(count: int, action: str, uploads: bool, pictures: bool = True, processes: int = 1) -> dict[str, float]:
    """Figures of `count` live trajectories after a call of each; `uploads` False sends data URLs, as to a foreign server."""
    low_limit()
    server, url = start_tool_server(["--tools", "python", "--trajectories", str(count), "--max-queue", "8192",
                                     "--processes", str(processes)])
    resource.setrlimit(resource.RLIMIT_NOFILE, (resource.getrlimit(resource.RLIMIT_NOFILE)[1],) * 2)    # ours, as a rank's
    front = psutil.Process(server.pid)
    servers = [front, *(one for one in front.children() if "--behind" in one.cmdline())]
    groups = range(-(-count // GROUP))
    tasks = [Task(f"{n}", "bench", [], (picture(n),) if pictures else (), "") for n in groups]
    (before, cpu), own, start = held_by(servers), time.process_time(), time.monotonic()

    async def go() -> tuple[int, int, float]:
        client = ToolClient(url, timeout=600, retries=0)
        client._takes_uploads = None if uploads else False

        async def one(number: int) -> int:
            try:
                return int(not (await client.call(f"t{number}", action, tasks[number // GROUP])).ok)
            except ToolServerError:
                return 1
        failed = sum(await asyncio.gather(*map(one, range(count))))
        held, seconds = held_by(servers)[0], time.monotonic() - start
        for number in range(count):
            await client.finish(f"t{number}")
        await client.close()
        return failed, held, seconds
    try:
        failed, held, seconds = asyncio.run(go())
        kept, spent = held_by(servers)
        spent -= cpu
        return {"failed": failed, "mib": (held - before) / count / 2**20, "cpu_ms": 1e3 * spent / count,
                "own_cpu_ms": 1e3 * (time.process_time() - own) / count,
                "kept_mib": (kept - before) / count / 2**20, "seconds": seconds, "count": count, "cores": os.cpu_count() or 1}
    finally:
        server.terminate()
        server.wait(60)
