"""Pictures on their way to and from a tool server: by content, once, as raw bytes, in a bounded store on its disk."""
from __future__ import annotations

import asyncio
import base64
import errno
import gzip
import hashlib
import json
import os
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from tool_server import ToolServer, png, python, task, until

from hdpo.toolserver.client import ToolClient
from hdpo.toolserver.picture_store import MissingPictures, PictureStore, key_of
from hdpo.toolserver.token import VARIABLE, token_for
from hdpo.toolserver.wire import RAW, Reply, WireError, parse_response, response_body


@pytest.fixture(scope="module")
def server() -> Iterator[ToolServer]:
    running = ToolServer("--tools", "python", "--picture-store", "0")
    yield running
    assert running.close() == 0


def put(server: ToolServer, key: str, data: bytes, **headers: str) -> int:
    usual = {"Content-Type": "application/octet-stream", "Authorization": f"Bearer {token_for(server.url)}"}
    request = urllib.request.Request(f"{server.url}/images/{key}", data, {**usual, **headers}, method="PUT")
    try:
        with urllib.request.urlopen(request, timeout=60) as response:
            return response.status
    except urllib.error.HTTPError as exc:
        return exc.code


def ask(server: ToolServer, trajectory: str, code: str, accept: str = "", request_id: str = "", **extra: Any) -> Reply:
    body = {"trajectory_ids": [trajectory], "actions": [python(code)], "extra_fields": [extra], "request_ids": [request_id]}
    request = urllib.request.Request(f"{server.url}/get_observation", json.dumps(body).encode(), {
        "Content-Type": "application/json", "Authorization": f"Bearer {token_for(server.url)}", "Accept": accept})
    with urllib.request.urlopen(request, timeout=60) as response:
        (reply,) = parse_response(response.read())
    return reply


# -- over HTTP -------------------------------------------------------------------------------------------------------
def test_a_server_names_the_pictures_it_lacks_and_takes_them_once(server: ToolServer) -> None:
    first, second = png("red", size=(41, 31)), png("blue", size=(43, 33))
    keys = [key_of(first), key_of(second)]
    assert ask(server, "lacks", "1", image_keys=keys).metrics == {"need_images": keys}
    assert put(server, keys[0], first) == 200
    assert ask(server, "lacks", "1", image_keys=[*keys, keys[0]]).metrics["need_images"][-1] == keys[1]
    assert put(server, keys[1], second) == 200
    assert "(41, 31) (43, 33)" in ask(server, "lacks", "print(image_1.size, image_2.size)", image_keys=keys).text


@pytest.mark.parametrize("headers, status", [
    ({"Authorization": ""}, 401), ({"Authorization": "Bearer x"}, 401), ({"Content-Type": "application/json"}, 415),
    ({"Content-Type": "text/plain"}, 415), ({"Origin": "http://evil.example"}, 403), ({"Host": "evil.example"}, 403),
    ({"Content-Encoding": "br"}, 415)], ids=str)
def test_strangers_and_web_pages_bring_no_pictures(server: ToolServer, headers: dict[str, str], status: int) -> None:
    assert put(server, key_of(b"x"), b"x", **headers) == status


def test_what_is_not_what_its_name_says_is_refused(server: ToolServer) -> None:
    key = key_of(b"x")
    assert put(server, key, b"y") == 422 and put(server, "../../etc", b"x") == 404 and put(server, "a" * 63, b"x") == 422
    assert put(server, key.upper(), b"x") == 422 and put(server, key, b"x") == 200
    assert put(server, key, gzip.compress(b"x"), **{"Content-Encoding": "gzip"}) == 200
    assert put(server, key, gzip.compress(bytes(100 << 20)), **{"Content-Encoding": "gzip"}) == 413


@pytest.mark.parametrize("keys", ["x", [1], ["a" * 63], ["A" * 64], ["../" + "a" * 61]], ids=str)
def test_keys_that_are_none_are_422(server: ToolServer, keys: Any) -> None:
    with pytest.raises(urllib.error.HTTPError, match="422"):
        ask(server, "keys", "1", image_keys=keys)


def test_a_picture_comes_back_the_same_as_raw_bytes_as_a_data_url_and_asked_for_again(server: ToolServer) -> None:
    code = "n = globals().get('n', 0) + 1; Image.fromarray((np.random.rand(300, 300, 3) * 255).astype('uint8'))"
    raw = ask(server, "forms", code, accept=RAW, request_id="a")
    again, url = (ask(server, "forms", code, accept=accept, request_id="a") for accept in (RAW, "*/*"))
    assert len(raw.images[0]) > 100_000 and raw.images[0] == again.images[0] == url.images[0]
    assert "1" in ask(server, "forms", "n").text


def test_many_trajectories_share_a_store_that_keeps_nothing_and_all_get_their_pictures(server: ToolServer) -> None:
    async def go() -> list[str]:
        client = ToolClient(server.url, timeout=120)
        tasks = [task(png(size=(50 + number, 40)), png(size=(30, 20 + number))) for number in range(6)]
        calls = [client.call(f"share {number}", python("print(image_1.size, image_2.size)"), tasks[number % 6])
                 for number in range(24)]
        said = [result.text for result in await asyncio.gather(*calls)]
        await client.close()
        return said
    said = asyncio.run(go())
    assert all(f"({50 + number % 6}, 40) (30, {20 + number % 6})" in text for number, text in enumerate(said))


def test_a_call_that_is_cancelled_before_its_pictures_are_named_ends_no_other_of_its_task(server: ToolServer) -> None:
    async def go() -> str:
        client, busy, shared = ToolClient(server.url, timeout=120), threading.Event(), task(png() + bytes(1 << 17))
        assert await client._server_takes_uploads()
        client._pool.submit(busy.wait)
        first, second = (asyncio.create_task(client.call(f"cancelled {number}", python("1 + 1"), shared)) for number in (1, 2))
        await asyncio.sleep(0)        # both have begun, and wait for the names
        assert len(client._live) == 2
        first.cancel()
        await asyncio.wait((first,))
        busy.set()
        said = (await second).text
        await client.close()
        return said
    assert "2" in asyncio.run(go())


def test_a_server_of_the_references_kind_is_sent_data_urls_once_a_trajectory() -> None:
    bodies: list[dict[str, Any]] = []

    class Reference(BaseHTTPRequestHandler):
        def answer(self, body: Any) -> None:
            data = json.dumps(body).encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def do_GET(self) -> None:      # noqa: N802
            self.answer({"status": "ok", "workers": 8})

        def do_POST(self) -> None:     # noqa: N802
            bodies.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
            picture = "data:image/png;base64," + base64.b64encode(png()).decode()
            self.answer({"observations": [{"obs": "seen", "image": [picture]}], "dones": [False], "valids": [True],
                         "processing_time_ms": 1.0, "queue_time_ms": 0.0})

        def log_message(self, *args: Any) -> None:
            pass

    reference = ThreadingHTTPServer(("127.0.0.1", 0), Reference)
    threading.Thread(target=reference.serve_forever, daemon=True).start()

    async def go() -> None:
        client = ToolClient(f"http://127.0.0.1:{reference.server_port}", timeout=60)
        for _ in range(2):
            result = await client.call("t", python("1"), task(png()))
            assert result.text == "seen" and result.images == (png(),)
        await client.close()
    asyncio.run(go())
    reference.shutdown()
    assert ["images" in body["extra_fields"][0] for body in bodies] == [True, False]
    assert not any("image_keys" in body["extra_fields"][0] for body in bodies)


def test_a_killed_servers_pictures_are_removed_by_the_next_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, "t")
    place = {"TMPDIR": str(tmp_path)}
    running = ToolServer("--tools", "python", environment=place)
    running.talk("no call", images=(png(),), finish=False)
    (folder,) = tmp_path.glob("hdpo-sandbox-pictures-*")
    assert [path.name for path in (folder / "all").iterdir()] == [key_of(png())] and folder.stat().st_mode & 0o077 == 0
    running.kill()
    running.start()
    assert not folder.exists()
    assert running.close() == 0
    assert until(lambda: not list(tmp_path.glob("hdpo-sandbox-pictures-*")))


# -- the store -------------------------------------------------------------------------------------------------------
def files(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def test_a_store_drops_the_longest_unused_that_nobody_holds_and_frees_what_is_let_go(tmp_path: Path) -> None:
    store = PictureStore(tmp_path, 3000)
    pictures = [bytes([number]) * 1000 for number in range(8)]
    keys = [hashlib.sha256(picture).hexdigest() for picture in pictures]
    held = store.take(pictures[:2])
    for key, picture in zip(keys[2:], pictures[2:]):
        assert store.put(key, picture)
        for older in files(tmp_path / "all") - {key}:                   # hours ago, one after the other
            os.utime(tmp_path / "all" / older, ns=(keys.index(older), keys.index(older)))
    assert files(tmp_path / "all") == {*keys[:2], *keys[5:]}            # two are held, three are within the bound
    again = store.hold(keys[:1])
    del held
    assert files(store._held) == {keys[0]} and list(again) == pictures[:1]
    del again
    assert not files(store._held)
    with pytest.raises(MissingPictures) as caught:
        store.hold([keys[7], "0" * 64])
    assert caught.value.keys == ["0" * 64] and not files(store._held)


def test_servers_that_share_a_folder_hold_what_another_lets_go(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one = PictureStore(tmp_path, 0)
    monkeypatch.setattr(os, "getpid", lambda: 1)
    other = PictureStore(tmp_path, 0)
    mine, theirs = one.take([b"x" * 99]), other.hold([key_of(b"x" * 99)])
    del mine
    one.put(key_of(b"y"), b"y")
    one.put(key_of(b"z"), b"z")
    assert list(theirs) == [b"x" * 99]


def test_a_disk_that_fails_while_pictures_are_held_leaves_none_held(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store, real = PictureStore(tmp_path, 0), os.link
    keys = [key_of(data) for data in (b"a", b"b")]
    for key, data in zip(keys, (b"a", b"b")):
        store.put(key, data)

    def link(source: Path, target: Path) -> None:
        if source.name == keys[1]:
            raise OSError(errno.EDQUOT, "Disk quota exceeded")
        real(source, target)
    with monkeypatch.context() as patched, pytest.raises(OSError, match="quota"):
        patched.setattr(os, "link", link)
        store.hold(keys)
    assert not files(store._held) and list(store.hold(keys)) == [b"a", b"b"]


def test_a_replys_picture_is_out_of_memory_until_it_is_asked_for_and_goes_with_it(tmp_path: Path) -> None:
    store = PictureStore(tmp_path, 0)
    kept = store.keep((bytes(1 << 16), b"small"))
    assert list(kept) == [bytes(1 << 16), b"small"] and len(files(store._held)) == 2
    del kept
    assert not files(store._held) and store.keep((b"small",)) == (b"small",)


@pytest.mark.parametrize("body", [b"\0", b"\0\xff\xff\xff\xff", b"\0\x02\0\0\0{}"])
def test_a_torn_raw_answer_is_no_answer(body: bytes) -> None:
    with pytest.raises((WireError, ValueError)):
        parse_response(body)


def test_a_raw_answer_keeps_every_reply_with_its_pictures() -> None:
    replies = [Reply("a", (b"12", b"")), Reply("b"), Reply("c", (b"3",), metrics={"x": 1})]
    found = parse_response(response_body(replies, 0.0, 0.0, raw=True))
    assert [(reply.text, tuple(reply.images)) for reply in found] == [("a", (b"12", b"")), ("b", ()), ("c", (b"3",))]
    with pytest.raises(WireError, match="image_bytes"):
        parse_response(response_body(replies, 0.0, 0.0, raw=True)[:-1])
