"""Text and image search: embedded indexes, and hosted providers against a local server with their response formats."""
from __future__ import annotations

import asyncio
import base64
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from aiohttp import web
from PIL import Image

from hdpo.errors import ConfigError, DataError
from hdpo.toolserver import layout
from hdpo.toolserver.image_cache import ImageCache
from hdpo.toolserver.image_index import ImageIndex
from hdpo.toolserver.image_search import MAX_SIDE, ImageQuery, InTurn, run_image_search
from hdpo.toolserver.lens import QUERY_SIDE, SerperLens, Showcase
from hdpo.toolserver.providers import BrightData, HttpProvider, SearchError, SerpApi, Serper, hosted_provider
from hdpo.toolserver.search_cache import CachedSearch
from hdpo.toolserver.text_search import TextIndex, build_text_index

PAGES = [("Mount Fuji", "l1", "Mount Fuji is 3776 metres high."), ("Danube", "l2", "The Danube is a river, not a mount."),
         ("Quotes", "l3", 'He said "AND OR NOT NEAR(" and left.')]


@pytest.fixture
def index(tmp_path: Path) -> TextIndex:
    assert build_text_index(tmp_path / "text.db", PAGES) == 3
    return TextIndex(tmp_path / "text.db", results=2)


# -- text ------------------------------------------------------------------------------------------------------------
def test_pages_with_more_of_the_query_rank_first_and_the_number_is_bounded(index: TextIndex) -> None:
    assert [title for title, _, _ in index.lookup("how high is mount fuji")] == ["Mount Fuji", "Danube"]


@pytest.mark.parametrize("query", ['"', "AND", "NEAR(a b)", "title:fuji", "fuji*", "a OR", "'; DROP TABLE pages; --",
                                   "(", "-", "", "  ", "\x00", "é" * 2000, "fuji " * 5000])
def test_no_query_is_a_syntax_error(index: TextIndex, query: str) -> None:
    assert len(index.lookup(query)) <= 2
    assert index.lookup("danube")[0][0] == "Danube"


def test_a_file_that_is_no_index_is_named(tmp_path: Path) -> None:
    (tmp_path / "x.db").write_text("not a database, but long enough to be looked at as one")
    with pytest.raises(DataError, match="x.db"):
        TextIndex(tmp_path / "x.db")
    with pytest.raises(DataError, match="no such text index"):
        TextIndex(tmp_path / "missing.db")


def test_repeated_snippets_are_shown_once_and_an_empty_result_says_so() -> None:
    text = layout.COMPACT.search_results("q", [("a", "1", "same"), ("b", "2", "same"), ("c", "3", "x" * 30_000)])
    assert "found 2 results" in text and "Page 2. [Title: c](Link: 3)" in text and len(text) < 21_000
    assert layout.COMPACT.search_results("q", []) == "No search results found for q."


# -- hosted providers ------------------------------------------------------------------------------------------------
def ask(make: Callable[[str], HttpProvider], *answers: tuple[int, Any]) -> tuple[Any, list[dict[str, Any]]]:
    """(results or the SearchError, requests seen) of one search against a server that gives `answers` in turn."""
    seen: list[dict[str, Any]] = []

    async def handler(request: web.Request) -> web.Response:
        status, body = answers[min(len(seen), len(answers) - 1)]
        seen.append({"method": request.method, "headers": dict(request.headers), "query": dict(request.query),
                     "json": await request.json() if request.can_read_body else None})
        return web.Response(status=status, text=body if isinstance(body, str) else json.dumps(body))

    async def go() -> Any:
        app = web.Application()
        app.router.add_route("*", "/", handler)
        runner = web.AppRunner(app)
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        provider = make(f"http://127.0.0.1:{runner.addresses[0][1]}/")
        try:
            return await provider.search('who "is" it')
        except SearchError as exc:
            return exc
        finally:
            await provider.close()
            await runner.cleanup()
    return asyncio.run(go()), seen


def row(snippet: str = "snippet") -> dict[str, Any]:
    return {"position": 1, "title": "T", "link": "https://l", snippet: "S"}


def test_serper_is_asked_and_read_as_documented() -> None:
    body = {"searchParameters": {"q": "x"}, "organic": [row()], "credits": 1}
    results, (seen,) = ask(lambda url: Serper("key", url, 10), (200, body))
    assert results == [("T", "https://l", "S")]
    assert seen["method"] == "POST" and seen["headers"]["X-API-KEY"] == "key"
    assert seen["json"] == {"q": "who is it", "num": 10}


def test_serpapi_rows_are_read_from_organic_results() -> None:
    body = {"search_metadata": {"status": "Success"}, "organic_results": [row()] * 12}
    results, (seen,) = ask(lambda url: SerpApi("key", url, 10), (200, body))
    assert results == [("T", "https://l", "S")] * 10
    assert seen["method"] == "GET" and seen["query"]["api_key"] == "key" and seen["query"]["engine"] == "google"


def test_brightdata_is_asked_through_its_zone() -> None:
    results, (seen,) = ask(lambda url: BrightData("tok", url, 10, "zone1"), (200, {"organic": [row("description")]}))
    assert results == [("T", "https://l", "S")]
    assert seen["headers"]["Authorization"] == "Bearer tok" and seen["json"]["zone"] == "zone1"
    assert "q=who+is+it" in seen["json"]["url"] and "&hl=en&gl=us&" in seen["json"]["url"] and "brd_json=1" in seen["json"]["url"]


def test_serpapis_error_for_no_result_is_an_empty_result_and_any_other_is_a_failure() -> None:
    nothing = {"error": "Google hasn't returned any results for this query."}
    empty, _ = ask(lambda url: SerpApi("key", url, 10), (200, nothing))
    assert empty == []
    failure, _ = ask(lambda url: SerpApi("key", url, 10), (200, {"error": "Your account has run out of searches."}))
    assert isinstance(failure, SearchError) and "run out" in str(failure)


def test_a_busy_provider_is_asked_again_and_a_refusal_is_not() -> None:
    results, seen = ask(lambda url: Serper("key", url, 10), (429, "slow down"), (503, ""), (200, {"organic": [row()]}))
    assert len(seen) == 3 and results == [("T", "https://l", "S")]
    failure, seen = ask(lambda url: Serper("key", url, 10), (403, {"message": "Unauthorized.", "statusCode": 403}))
    assert len(seen) == 1 and isinstance(failure, SearchError) and "403" in str(failure)


@pytest.mark.parametrize("body", ["<html>busy</html>", "[]", ""])
def test_an_answer_that_is_no_result_is_a_failure_not_an_empty_result(body: str) -> None:
    failure, _ = ask(lambda url: Serper("key", url, 10), (200, body))
    assert isinstance(failure, SearchError)


def test_the_provider_follows_the_keys_and_a_missing_key_is_named() -> None:
    assert hosted_provider("auto", 10, {}) is None
    assert hosted_provider("embedded", 10, {"SERPER_API_KEY": "k"}) is None
    assert isinstance(hosted_provider("auto", 10, {"BRIGHTDATA_API_TOKEN": "k", "BRIGHTDATA_ZONE": "z"}), BrightData)
    with pytest.raises(ConfigError, match="SERPER_API_KEY"):
        hosted_provider("serper", 10, {})
    with pytest.raises(ConfigError, match="SERPAPI_API_KEY"):
        hosted_provider("serpapi", 10, {})


def test_serper_api_key_is_serpapis_too_where_serpapi_is_named_as_the_reference_has_it() -> None:
    def key(name: str, **environment: str) -> tuple[type, str]:
        provider = hosted_provider(name, 10, environment)
        assert provider is not None
        return type(provider), provider._key
    assert key("serpapi", SERPER_API_KEY="a") == (SerpApi, "a")
    assert key("serpapi", SERPER_API_KEY="a", SERPAPI_API_KEY="b") == (SerpApi, "b")
    assert key("auto", SERPER_API_KEY="a") == (Serper, "a")


# -- images ----------------------------------------------------------------------------------------------------------
def badge(seed: int) -> Image.Image:
    """A random field of coloured cells, 64 to 256 pixels."""
    random = np.random.default_rng(seed)
    cells = random.integers(0, 256, (int(random.integers(3, 7)), int(random.integers(3, 7)), 3), dtype=np.uint8)
    return Image.fromarray(cells).resize([int(n) for n in random.integers(64, 257, 2)], Image.Resampling.NEAREST)


def encoded(image: Image.Image, kind: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> ImageIndex:
    folder = tmp_path_factory.mktemp("photos")
    for seed in range(500):
        badge(seed).save(folder / f"{seed}.png")
    (folder / "labels.json").write_text(json.dumps({f"{seed}.png": f"badge {seed}" for seed in range(500)}))
    return ImageIndex(folder)


def test_each_of_500_badges_is_found_again_after_re_encoding_and_scaling(photos: ImageIndex) -> None:
    for seed in range(0, 500, 5):
        image = badge(seed)
        for query in (encoded(image, "JPEG", quality=60), encoded(image.resize((200, 150)), "WEBP", quality=60)):
            best = photos.lookup(query)[0]
            assert best.title == f"badge {seed}"


def test_an_image_that_is_not_in_the_index_has_no_result(photos: ImageIndex) -> None:
    found = [photos.lookup(encoded(badge(seed), "PNG")) for seed in range(1000, 1100)]
    assert sum(bool(matches) for matches in found) == 0


def test_returned_images_are_bounded(tmp_path: Path) -> None:
    badge(0).resize((4000, 3000)).save(tmp_path / "big.jpg")
    (tmp_path / "labels.json").write_text('{"big.jpg": "big"}')
    reply = asyncio.run(run_image_search(ImageIndex(tmp_path), (encoded(badge(0), "PNG"),), words=layout.COMPACT))
    assert reply.text == "1. [big]" and max(Image.open(io.BytesIO(reply.images[0])).size) == MAX_SIDE


def test_a_row_without_image_has_no_result(photos: ImageIndex) -> None:
    assert asyncio.run(run_image_search(photos, ())).text == layout.NO_IMAGE_RESULT


def test_a_part_of_an_image_can_be_the_query(photos: ImageIndex) -> None:
    scene = Image.new("RGB", (900, 700), "white")
    part = badge(7)
    scene.paste(part, (500, 300))
    box = [500, 300, 500 + part.width, 300 + part.height]
    images = (encoded(badge(3), "PNG"), encoded(scene, "PNG"))
    for arguments, title in (({"image": 2, "box": box}, "1. [badge 7]"), ({"image": 2}, layout.NO_IMAGE_RESULT),
                             ({}, "1. [badge 3]"), ({"image": 1, "box": [-50, -50, 9999, 9999]}, "1. [badge 3]")):
        assert asyncio.run(run_image_search(photos, images, "", arguments, layout.COMPACT)).text == title


def test_a_query_that_does_not_exist_is_the_models_mistake(photos: ImageIndex) -> None:
    images = (encoded(badge(3), "PNG"),)
    for arguments, says in (({"image": 2}, "numbered 1 to 1"), ({"box": [5000, 5000, 6000, 6000]}, "outside of image 1")):
        reply = asyncio.run(run_image_search(photos, images, "", arguments))
        assert not reply.valid and not reply.infrastructure and says in reply.text


def test_an_unusable_image_folder_names_the_file(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="labels.json"):
        ImageIndex(tmp_path)
    (tmp_path / "labels.json").write_text('{"a.png": "a"}')
    with pytest.raises(DataError, match="a.png"):
        ImageIndex(tmp_path)


# -- recorded image searches -----------------------------------------------------------------------------------------
def recorded(folder: Path, rows: Any) -> Path:
    (folder / "images").mkdir(exist_ok=True)
    for seed in range(5):
        badge(seed).resize((2000, 1500)).save(folder / "images" / f"{seed}.jpg")
    (folder / "cache.json").write_text(json.dumps(rows))
    return folder / "cache.json"


def test_the_references_recorded_searches_answer_by_the_rows_index_as_recorded(tmp_path: Path) -> None:
    cache = ImageCache(recorded(tmp_path, {
        "source_1": {"tool_returned_web_title": [f"page {n}" for n in range(20)],
                     "cached_images_path": [f"images/{n}.jpg" for n in range(5)]},
        "source_2": {"tool_returned_web_title": ["only a title"], "cached_images_path": []}}))
    images = (encoded(badge(3), "PNG"),)
    first = asyncio.run(run_image_search(cache, images, "source_1"))
    assert "found 5 results" in first.text and "\n5. <image>\n[page 4]" in first.text and first.text.count("[page") == 5
    assert [Image.open(io.BytesIO(image)).size for image in first.images] == [(2000, 1500)] * 5
    second = asyncio.run(run_image_search(cache, images, "source_2"))
    assert second.text.endswith("## Web Results\n1. [only a title]\n") and not second.images
    for index, arguments in (("unknown", {}), ("source_1", {"box": [0, 0, 9, 9]})):
        assert asyncio.run(run_image_search(cache, images, index, arguments)).text == layout.NO_IMAGE_RESULT


def test_sources_are_asked_in_turn_until_one_knows(tmp_path: Path, photos: ImageIndex) -> None:
    both = InTurn([ImageCache(recorded(tmp_path, {"i": {"tool_returned_web_title": ["recorded"]}})), photos])
    images = (encoded(badge(3), "PNG"),)
    assert asyncio.run(run_image_search(both, images, "i", words=layout.COMPACT)).text == "1. [recorded]"
    assert asyncio.run(run_image_search(both, images, "j", words=layout.COMPACT)).text == "1. [badge 3]"


@pytest.mark.parametrize("rows, says", [
    ([], "expected an object"), ({"i": 3}, "row i"), ({"i": {"tool_returned_web_title": "text"}}, "row i"),
    ({"i": {"cached_images_path": ["images/9.jpg"]}}, "no such image: images/9.jpg"),
    ({"i": {"cached_images_path": ["/etc/hostname"]}}, "outside of"), ({"i": {"cached_images_path": ["../x"]}}, "outside of"),
])
def test_a_cache_that_is_wrong_or_reaches_outside_its_folder_is_refused_by_row(tmp_path: Path, rows: Any, says: str) -> None:
    with pytest.raises(DataError, match=says):
        ImageCache(recorded(tmp_path, rows))


# -- hosted image search ---------------------------------------------------------------------------------------------
def lens_search(image: bytes, *answers: tuple[int, Any]) -> tuple[Any, list[dict[str, Any]], list[str]]:
    """(matches or the SearchError, requests seen, further paths fetched) against a local server that speaks Serper's
    format. Like the real service it fetches the query image from the address it is given."""
    seen: list[dict[str, Any]] = []
    fetched: list[str] = []

    async def go() -> Any:
        app = web.Application()
        runner = web.AppRunner(app)
        app.router.add_route("*", "/{path:.*}", lambda request: handler(request))
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        base = f"http://127.0.0.1:{runner.addresses[0][1]}"
        showcase = Showcase(base + "/public")
        lens = SerperLens("key", base + "/lens", showcase, thumbnail_hosts=("127.0.0.1",))

        async def handler(request: web.Request) -> web.Response:
            if request.path.startswith("/public/query-image/"):
                return web.Response(body=showcase.get(request.match_info["path"].rsplit("/", 1)[1]))
            if request.path != "/lens":
                fetched.append(request.path)
                if "redirect" in request.path:
                    raise web.HTTPFound("/internal")
                return web.Response(body=encoded(badge(1).resize((2000, 2000)), "JPEG")
                                    if "good" in request.path else b"x" * (3 << 20))
            body = await request.json()
            async with lens.session().get(body["url"]) as shown:
                image = Image.open(io.BytesIO(await shown.read()))
            seen.append({"headers": dict(request.headers), "json": body, "size": image.size, "info": image.info})
            status, answer = answers[min(len(seen), len(answers)) - 1]
            text = answer if isinstance(answer, str) else json.dumps(answer)
            return web.Response(status=status, text=text.replace("BASE", base))

        try:
            return await lens.search(ImageQuery(image, "i"))
        except SearchError as exc:
            return exc
        finally:
            assert not showcase._shown      # nothing stays public
            await lens.close()
            await runner.cleanup()
    return asyncio.run(go()), seen, fetched


def lens_row(title: str, thumbnail: str, **more: Any) -> dict[str, Any]:
    return {"title": title, "source": "Site", "link": "BASE/page", "imageUrl": "BASE/full.jpg", "thumbnailUrl": thumbnail, **more}


def test_lens_is_shown_the_query_without_metadata_and_only_while_it_looks() -> None:
    exif = Image.Exif()
    exif[0x010F] = "secret camera"
    body = {"searchParameters": {"url": "x", "type": "lens"}, "organic": [lens_row("Mount Fuji", "BASE/good.jpg")], "credits": 3}
    matches, (seen,), fetched = lens_search(encoded(badge(2).resize((3000, 1500)), "JPEG", exif=exif), (200, body))
    assert [match.title for match in matches] == ["Mount Fuji"] and fetched == ["/good.jpg"]
    assert Image.open(io.BytesIO(matches[0].image)).size == (MAX_SIDE, MAX_SIDE)
    assert seen["headers"]["X-API-KEY"] == "key" and list(seen["json"]) == ["url"]
    assert seen["size"] == (QUERY_SIDE, QUERY_SIDE // 2) and "exif" not in seen["info"]


def test_a_thumbnail_that_is_no_image_or_lies_elsewhere_is_left_out_and_its_title_is_kept() -> None:
    data = "data:image/png;base64," + base64.b64encode(encoded(badge(4), "PNG")).decode()
    rows = [lens_row("too big", "BASE/big.jpg"), lens_row("elsewhere", "http://169.254.169.254/latest"), lens_row("inline", data),
            *(lens_row(f"more {n}", "BASE/good.jpg") for n in range(20)), {"link": "no title"}, 7]
    matches, _, fetched = lens_search(encoded(badge(2), "PNG"), (200, {"organic": rows}))
    assert [match.title for match in matches][:4] == ["too big", "elsewhere", "inline", "more 0"] and len(matches) == 10
    assert [match.image is not None for match in matches] == [False, False, True] + [False] * 7
    assert fetched == ["/big.jpg"]
    _, _, fetched = lens_search(encoded(badge(2), "PNG"), (200, {"organic": [lens_row("moved", "BASE/redirect")]}))
    assert fetched == ["/redirect"]


def test_lens_finding_nothing_is_an_empty_result_and_its_errors_are_failures() -> None:
    image = encoded(badge(2), "PNG")
    assert lens_search(image, (200, {"searchParameters": {}, "organic": []}))[0] == []
    for status, body, says, attempts in (
            (400, {"message": "Not enough credits", "statusCode": 400}, "Not enough credits", 1),
            (403, {"message": "Unauthorized.", "statusCode": 403}, "403", 1), (200, "<html>", "", 3),
            (200, {"organic": "x"}, "no list", 1)):
        failure, seen, _ = lens_search(image, (status, body))
        assert isinstance(failure, SearchError) and says in str(failure) and len(seen) == attempts
    matches, seen, _ = lens_search(image, (429, "slow down"), (200, {"organic": [lens_row("at last", "")]}))
    assert len(seen) == 2 and [match.title for match in matches] == ["at last"]


# -- the cache -------------------------------------------------------------------------------------------------------
class Counting:
    """A provider that counts its questions and fails on demand."""

    def __init__(self) -> None:
        self.asked: list[str] = []
        self.failing = False

    async def search(self, query: str) -> list[tuple[str, str, str]]:
        self.asked.append(query)
        await asyncio.sleep(0.01)
        if self.failing:
            raise SearchError("down")
        return [("title", "link", f"about {query}")]

    async def close(self) -> None: ...


def test_a_query_is_asked_once_however_many_ask_and_survives_a_restart(tmp_path: Path) -> None:
    source = Counting()

    async def go() -> None:
        cache = CachedSearch(tmp_path / "c.db", source)
        answers = await asyncio.gather(*(cache.search("a  b") for _ in range(20)), cache.search("other"))
        assert answers[0] == answers[19] == [("title", "link", "about a  b")]
        await cache.close()
        again = CachedSearch(tmp_path / "c.db", source)
        assert await again.search("a b") == answers[0]
        await again.close()
    asyncio.run(go())
    assert sorted(source.asked) == ["a  b", "other"]


def test_replay_answers_from_the_file_and_fails_for_what_is_not_there(tmp_path: Path) -> None:
    async def go() -> None:
        cache = CachedSearch(tmp_path / "c.db", Counting())
        recorded = await cache.search("known")
        await cache.close()
        replay = CachedSearch(tmp_path / "c.db", None)
        assert await replay.search("known") == recorded
        with pytest.raises(SearchError, match="replay"):
            await replay.search("unknown")
        await replay.close()
    asyncio.run(go())
    with pytest.raises(DataError, match="no search cache"):
        CachedSearch(tmp_path / "missing.db", None)


def test_a_failure_is_not_remembered(tmp_path: Path) -> None:
    source = Counting()

    async def go() -> None:
        cache = CachedSearch(tmp_path / "c.db", source)
        source.failing = True
        with pytest.raises(SearchError):
            await cache.search("q")
        source.failing = False
        assert await cache.search("q")
        await cache.close()
    asyncio.run(go())
