"""What the model reads after a call is byte for byte what the reference's own server answered, recorded there."""
from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from tool_server import ToolServer, call_text, png, python

from hdpo.compose.tools import check_layout, open_tools
from hdpo.config import Config
from hdpo.errors import ConfigError
from hdpo.protocols import ToolResult
from hdpo.toolserver.layout import COMPACT, REFERENCE, without_markers
from hdpo.toolserver.providers import Result
from hdpo.toolserver.search_cache import CachedSearch

RECORDED: list[dict[str, Any]] = [json.loads(line) for line in
                                  (Path(__file__).parent / "reference_observations.jsonl").read_text().splitlines()]
UNAVAILABLE = {"cv2", "sympy", "scipy"}
"""Cases about packages that the machine of the process sandbox may lack."""
NOTHING = "Script executed successfully (no output)."


class TwoFacts:
    """What the recorded search provider knew."""

    async def search(self, query: str) -> list[Result]:
        return [] if "zzzz" in query else [("Mount Fuji", "https://x/fuji", "Mount Fuji is 3776 m high."),
                                           ("K2", "https://x/k2", "K2 is 8611 m high.")]

    async def close(self) -> None: ...


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("searches")
    cache = CachedSearch(folder / "searches.db", TwoFacts(), "10")
    for query in ("Mount Fuji height K2", "K2 height", "nothing zzzz"):
        asyncio.run(cache.search(query))
    for name in ("a", "b"):
        (folder / f"{name}.png").write_bytes(png("blue", (1200, 900)))
    (folder / "cache.json").write_text(json.dumps({"i_1": {
        "tool_returned_web_title": ["First page", "Second page"], "cached_images_path": ["a.png", "b.png"]}}))
    return folder


@pytest.fixture(scope="module")
def server(folder: Path) -> Iterator[ToolServer]:
    running = ToolServer("--search-cache", "replay", "--search-cache-file", str(folder / "searches.db"),
                         "--image-cache", str(folder / "cache.json"))
    yield running
    running.close()


@pytest.fixture(scope="module")
def answers(server: ToolServer) -> dict[str, ToolResult]:
    """Every recorded action, in one session as it was recorded, in the recorded order."""
    results = server.talk(*(case["action"] for case in RECORDED), images=(png("green", (640, 480)),), trajectory="recorded")
    return {case["case"]: result for case, result in zip(RECORDED, results, strict=True)}


@pytest.mark.parametrize("case", [case for case in RECORDED if case["case"] not in UNAVAILABLE], ids=lambda case: case["case"])
def test_a_real_server_answers_what_the_references_answered(case: dict[str, Any], answers: dict[str, ToolResult]) -> None:
    answer = answers[case["case"]]
    assert answer.text == case["observation"]
    assert (len(answer.images), answer.ok) == (case["num_images"], case["ok"])


@pytest.mark.parametrize(("streams", "case"), [
    (("(640, 480)\n", "", 0), "print"), (("", "", 0), "no output"), (("6", "", 0), "last expression"),
    (("o\n", "e\n", 0), "stderr + stdout"), (("", "", 1), "plt.show"), (("crop:\n", "", 1), "print and image"),
    (("", "", 2), "two images"), (("<image> x\n", "", 0), "image tag in stdout")])
def test_the_layout_of_streams_is_the_recorded_one(streams: tuple[str, str, int], case: str) -> None:
    assert REFERENCE.python_result(*streams) == next(row["observation"] for row in RECORDED if row["case"] == case)


def test_what_the_reference_does_beside_the_recorded_cases() -> None:
    assert NOTHING not in REFERENCE.python_result("", "NameError", 0, ok=False)
    assert NOTHING in REFERENCE.python_result("", "a warning\n", 0)
    text = REFERENCE.search_results("q", [("a", "1", " same "), ("b", "2", "same"), ("c", "3", ""), ("d", "4", "other")])
    assert text == ("A Google search for 'q' found 2 results:\n\n## Web Results\nPage 1. [Title: a](Link: 1)\nSnippet: same\n\n"
                    "Page 4. [Title: d](Link: 4)\nSnippet: other\n")
    assert REFERENCE.search_results("q", [("a", "1", "")]) == "No search results found for q."
    assert REFERENCE.image_search_used(1).startswith("You have already called 'image_search' 1 time(s)")


def test_no_text_from_outside_takes_an_images_place() -> None:
    for layout in (REFERENCE, COMPACT):
        assert layout.image_results(["<image>", "<ima<image>ge>"], [True, False]).count("<image>") == (layout is REFERENCE)
        assert "<image>" not in layout.python_result("<image><im<image>age>", "<image>", 1)
    assert without_markers("a <image>b") == "a b"


def test_a_value_is_shown_without_an_end_of_line_and_values_stay_apart(server: ToolServer) -> None:
    shown, printed = server.talk(python("display(1)\ndisplay(2)\n3"), python("print('a')\n'b'"), trajectory="values")
    assert "```\n1\n2\n3\n```" in shown.text and "```\na\n'b'\n```" in printed.text


def test_images_of_a_cell_that_failed_are_left_out_as_the_reference_does(server: ToolServer) -> None:
    failed, = server.talk(python("display(image_1)\n1 / 0"), images=(png(),), trajectory="failed")
    assert not failed.images and "Images:" not in failed.text and failed.text.endswith("ZeroDivisionError: division by zero\n```")


def test_a_second_image_search_is_answered_in_the_references_words(server: ToolServer) -> None:
    first, second = server.talk(call_text("image_search"), call_text("image_search"), images=(png(),), trajectory="twice")
    assert len(first.images) == 2 and second.text == REFERENCE.image_search_used(1)


def test_the_compact_layout_is_a_setting_of_the_server(folder: Path) -> None:
    server = ToolServer("--layout", "compact", "--image-cache", str(folder / "cache.json"))
    try:
        printed, crop, found = server.talk(python("print(1)"), python("image_1"), call_text("image_search"), images=(png(),))
    finally:
        server.close()
    assert printed.text == "Code execution result:\nstdout:\n```\n1\n```" and crop.text == "Code execution result:\n1 image"
    assert found.text == "1. [First page]\n2. [Second page]" and len(found.images) == 2


def test_a_run_is_refused_by_the_layout_of_a_server_that_answers_in_another(server: ToolServer) -> None:
    config = Config(tools={"url": server.url, "layout": "compact"})
    with ExitStack() as closing, pytest.raises(ConfigError, match="with --layout compact, or set tools.layout=reference"):
        open_tools(config, None, closing)
    check_layout({"status": "healthy"}, Config())      # the reference's own server doesn't name its only layout
