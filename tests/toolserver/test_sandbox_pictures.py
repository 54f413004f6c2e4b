"""Pictures of real size in sessions: what they cost before they are touched, and how many sessions share a container."""
from __future__ import annotations

import asyncio
import io
import os
from collections.abc import Iterator

import numpy as np
import pytest
from PIL import Image
from test_sandbox import Box
from tool_server import containers, png, until

from hdpo.toolserver.sessions import CellResult

ORIENTATION = 0x0112


def encoded(image: Image.Image, kind: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def turned() -> Image.Exif:
    exif = Image.Exif()
    exif[ORIENTATION] = 6
    return exif


@pytest.fixture(scope="module")
def box() -> Iterator[Box]:
    running = Box("process")
    yield running
    running.close()


PICTURES = {
    "png": encoded(Image.new("RGB", (40, 30), "red"), "PNG"), "jpeg": encoded(Image.new("RGB", (40, 30), "red"), "JPEG"),
    "turned jpeg": encoded(Image.new("RGB", (30, 40), "red"), "JPEG", exif=turned()),
    "turned png": encoded(Image.new("RGB", (30, 40), "red"), "PNG", exif=turned()),
    "transparent": encoded(Image.new("RGBA", (40, 30)), "PNG"), "grey": encoded(Image.new("L", (40, 30)), "PNG"),
    "palette": encoded(Image.new("P", (40, 30)), "GIF")}


@pytest.mark.parametrize("use", [
    "image_1.size", "(image_1.width, image_1.height)", "np.asarray(image_1).shape[1::-1]", "image_1.copy().size",
    "image_1.crop((0, 0, 40, 30)).size", "import copy; copy.deepcopy(image_1).size",
    "import pickle; pickle.loads(pickle.dumps(image_1)).size", "from PIL import ImageDraw; ImageDraw.Draw(image_1).im.size",
    "Image.blend(image_1, image_1, 0.5).size", "tuple(map(int, repr(image_1).split('size=')[1].split()[0].split('x')))",
    "with image_1 as image: print(image.size)"])
def test_a_picture_is_what_it_is_whatever_is_asked_of_it_first(box: Box, use: str) -> None:
    session = box.session(*PICTURES.values())
    for number in range(1, len(PICTURES) + 1):
        assert session.run(use.replace("image_1", f"image_{number}")).stdout == "(40, 30)\n", list(PICTURES)[number - 1]
    session.close()


def test_pictures_of_one_kind_say_so_and_all_are_pictures_of_pillow(box: Box) -> None:
    session = box.session(PICTURES["jpeg"], PICTURES["transparent"])
    told = session.run("(image_1.format, isinstance(image_1, Image.Image), isinstance(image_2, Image.Image), image_2.mode)")
    assert told.stdout == "('JPEG', True, True, 'RGB')\n" and "PIL." in session.run("repr(image_2)").stdout
    session.close()


def test_a_picture_costs_its_file_until_it_is_used(box: Box) -> None:
    large = Image.new("RGB", (7680, 4320), (200, 30, 30))
    session = box.session(encoded(large, "PNG"), encoded(large.convert("RGBA"), "PNG"), encoded(large, "JPEG", exif=turned()))
    small = box.session(png())
    held = [int(each.run("import os, resource; resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10").stdout)
            for each in (session, small)]
    assert held[0] - held[1] < 50      # MiB; each decoded picture takes more than 100
    assert session.run("image_3.size").stdout == "(4320, 7680)\n"
    session.close()
    small.close()


@pytest.mark.docker
def test_sessions_with_8k_pictures_at_the_default_ratio_all_live_and_take_containers_by_their_pixels() -> None:
    from hdpo.toolserver.backends.docker_sandbox import DockerSandbox
    box = Box("docker", DockerSandbox(memory_mib=2048, sessions_per_container=16))      # a quarter of 64 in 8 GiB
    try:
        picture = encoded(Image.fromarray(np.zeros((4320, 7680, 3), np.uint8)), "JPEG")

        async def work(name: str) -> list[CellResult]:
            await box.sandbox.open(name, [picture])
            cells = ["a = np.asarray(image_1); a.shape", "b = image_1.crop((0, 0, 3000, 2000)).resize((1500, 1000)); b.size",
                     "(a.shape, b.size)"]
            return [await box.sandbox.run(name, code, 120.0) for code in cells]

        async def all_of_them() -> list[list[CellResult]]:
            return await asyncio.gather(*(work(f"s{k}") for k in range(6)))
        results = box.loop.run(all_of_them(), timeout=400)
        assert [[cell.stdout for cell in cells] for cells in results] == [
            ["(4320, 7680, 3)\n", "(1500, 1000)\n", "((4320, 7680, 3), (1500, 1000))\n"]] * 6
        assert not any(cell.restarted for cells in results for cell in cells)
        assert len(containers(os.getpid())) == 3      # two such sessions each
    finally:
        box.close()


@pytest.mark.docker
def test_containers_that_many_sessions_need_at_once_start_side_by_side_and_no_more_than_they_fill() -> None:
    from hdpo.toolserver.backends.docker_sandbox import DockerSandbox
    box = Box("docker", DockerSandbox(sessions_per_container=2))
    try:
        async def all_of_them() -> int:
            tasks = [asyncio.create_task(box.sandbox.open(f"s{k}", [])) for k in range(8)]
            starting = 0
            while not all(task.done() for task in tasks):
                starting = max(starting, len(box.sandbox._starting))
                await asyncio.sleep(0.01)
            await asyncio.gather(*tasks)
            return starting
        assert box.loop.run(all_of_them(), timeout=300) == 3      # beside the first
        assert len(containers(os.getpid())) == 4
    finally:
        box.close()
    assert until(lambda: not containers(os.getpid()))
