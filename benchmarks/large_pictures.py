"""Sessions with 8K pictures in containers: placed by what their pixels will take, and by their number alone.

Used by bench_sandbox.py and bench_scale.py.
"""
from __future__ import annotations

import asyncio
import io
import time

from PIL import Image

from hdpo.toolserver.backends import docker_sandbox
from hdpo.toolserver.sessions import SandboxError

SESSIONS, MEMORY_MIB = 16, 2048      # a quarter of the default container
CELLS = ("a = np.asarray(image_1)", "b = image_1.crop((0, 0, 3000, 2000)).resize((1500, 1000)); (a.shape, b.size)")


async def sixteen_8k(by_pixels: bool = True) -> dict[str, float]:
    """Two ordinary cells of each, all at once: cells that were lost, containers, and seconds until the last session was open."""
    weight, lost = docker_sandbox.BYTES_PER_PIXEL, 0
    buffer = io.BytesIO()
    Image.new("RGB", (7680, 4320)).save(buffer, "JPEG")

    async def session(name: str) -> float:
        nonlocal lost
        started = time.perf_counter()
        await sandbox.open(name, [buffer.getvalue()])
        opened = time.perf_counter() - started
        for code in CELLS:
            try:
                lost += not (await sandbox.run(name, code, 300.0)).ok
            except SandboxError:
                lost += 1
        return opened
    docker_sandbox.BYTES_PER_PIXEL = weight if by_pixels else 0
    sandbox = docker_sandbox.DockerSandbox(memory_mib=MEMORY_MIB, sessions_per_container=SESSIONS)
    try:
        await sandbox.start()
        opened = await asyncio.gather(*(session(f"s{k}") for k in range(SESSIONS)))
        return {"lost": lost, "containers": len(sandbox._shards), "all_open_s": max(opened)}
    finally:
        docker_sandbox.BYTES_PER_PIXEL = weight
        await sandbox.shutdown()
