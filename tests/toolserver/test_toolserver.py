"""The tool server over HTTP: a real server process, real Python sessions, real indexes."""
from __future__ import annotations

import asyncio
import base64
import io
import json
import os
import socket
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import numpy as np
import pytest
from PIL import Image
from tool_server import ToolServer, all_gone, call_text, png, python, task, until

from hdpo.errors import ToolServerError
from hdpo.protocols import ToolResult
from hdpo.toolserver.client import ToolClient, wait_until_healthy
from hdpo.toolserver.layout import REFERENCE
from hdpo.toolserver.process import start_tool_server
from hdpo.toolserver.text_search import build_text_index
from hdpo.toolserver.token import token_for


def badge(seed: int) -> Image.Image:
    cells = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    return Image.fromarray(cells).resize((128, 128), Image.Resampling.NEAREST)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ToolServer]:
    folder = tmp_path_factory.mktemp("indexes")
    build_text_index(folder / "text.db", [
        ("Mount Fuji", "https://x/fuji", "Mount Fuji is 3776 metres high."), ("Danube", "https://x/danube", "A river.")])
    (folder / "photos").mkdir()
    for i in range(3):
        badge(i).save(folder / "photos" / f"{i}.png")
    (folder / "photos" / "labels.json").write_text(json.dumps({f"{i}.png": f"badge {i}" for i in range(3)}))
    running = ToolServer("--text-index", str(folder / "text.db"), "--image-index", str(folder / "photos"),
                         "--python-timeout", "3", "--search-provider", "embedded")
    yield running
    running.close()


# -- wire format -----------------------------------------------------------------------------------------------------
def test_a_reference_trainers_request_is_answered_in_the_references_format(server: ToolServer) -> None:
    url = "data:image/jpeg;base64," + base64.b64encode(png()).decode()
    extra = {"index": "source_index_1", "question": "q", "answer": "42", "pass8": 0, "images": [url]}
    status, body, headers = server.post({
        "trajectory_ids": ["ref-1", "ref-2"], "actions": [python("image_1.crop((0, 0, 9, 7))"), python("print('hi')")],
        "extra_fields": [extra, extra], "finish": [False, False], "is_last_step": [False, True]})
    assert status == 200
    assert set(body) == {"observations", "dones", "valids", "processing_time_ms", "queue_time_ms"}
    first, second = body["observations"]
    assert first["image"][0].startswith("data:image/png;base64,")
    assert second["obs"] == REFERENCE.python_result("hi\n", "", 0) and second["timeout"] is False
    assert second["metrics"]["code_success"] is True and second["metrics"]["code_lines"] == 1
    assert body["dones"] == [False, False] and body["valids"] == [True, True]
    assert float(headers["X-Process-Time"]) > 0


def test_finish_answers_done_and_an_unknown_trajectory_may_finish_too(server: ToolServer) -> None:
    status, body, _ = server.post({"trajectory_ids": ["nobody"], "actions": [""], "finish": [True]})
    assert status == 200 and body["dones"] == [True] and body["observations"] == [""]


@pytest.mark.parametrize("body, field", [
    ({"actions": ["a"]}, "trajectory_ids"),
    ({"trajectory_ids": ["a"], "actions": []}, "actions"),
    ({"trajectory_ids": ["a"], "actions": [3]}, "actions[0]"),
    ({"trajectory_ids": [], "actions": []}, "trajectory_ids"),
    ({"trajectory_ids": ["a\n"], "actions": ["x"]}, "trajectory_ids[0]"),
    ({"trajectory_ids": ["a"], "actions": ["x"], "finish": ["yes"]}, "finish[0]"),
    ({"trajectory_ids": ["a"], "actions": ["x"], "extra_fields": [{"images": ["data:image/png;base64,%%"]}]},
     "extra_fields[0].images[0]"),
    ({"trajectory_ids": ["a"], "actions": ["x"], "extra_fields": [{"images": "no list"}]}, "extra_fields[0].images"),
    (["no object"], "body"),
])
def test_a_request_that_breaks_the_format_is_422_and_names_the_field(server: ToolServer, body: Any, field: str) -> None:
    status, answer, _ = server.post(body)
    assert status == 422 and answer["detail"][0]["loc"] == ["body", field]


@pytest.mark.parametrize("body", [b"{", b"[" * 200_000, b"\xff\xfe"])
def test_a_body_that_is_no_json_is_422(server: ToolServer, body: bytes) -> None:
    assert server.post(body)[0] == 422


def test_health_lists_the_tools(server: ToolServer) -> None:
    body = wait_until_healthy(server.url, 5)
    assert body["status"] == "healthy" and body["tools"] == ["python", "text_search", "image_search"]


def test_metrics_count_calls_by_tool_and_outcome(server: ToolServer) -> None:
    server.talk(python("1"), python("1/0"), "no call", trajectory="metrics")
    request = urllib.request.Request(f"{server.url}/metrics", headers={"Authorization": f"Bearer {token_for(server.url)}"})
    text = urllib.request.urlopen(request).read().decode()
    for line in ('hdpo_tool_calls_total{tool="python",outcome="ok"}', 'hdpo_tool_calls_total{tool="python",outcome="failed"}',
                 'hdpo_tool_calls_total{tool="none",outcome="failed"}', 'hdpo_tool_call_seconds_bucket{tool="python",le="+Inf"}',
                 "hdpo_tool_trajectories ", "# TYPE hdpo_tool_call_seconds histogram"):
        assert line in text


@pytest.mark.parametrize("action, says", [
    ("no call at all", "<tool_call>"),
    ("<tool_call>{not json}</tool_call>", "not valid JSON"),
    ('<tool_call>["python"]</tool_call>', "object"),
    ('<tool_call>{"name": "browser", "arguments": {}}</tool_call>', "browser"),
    ('<tool_call>{"name": "python", "arguments": "x"}</tool_call>', "object"),
    ('<tool_call>{"name": "python", "arguments": {"code": 3}}</tool_call>', "code"),
    ('<tool_call>{"name": "text_search", "arguments": {"query": []}}</tool_call>', "query"),
])
def test_a_malformed_call_is_explained_with_an_example_and_the_trajectory_goes_on(
        server: ToolServer, action: str, says: str) -> None:
    bad, good = server.talk(action, python("1 + 1"))
    assert not bad.ok and not bad.done and says in bad.text and "<tool_call>{" in bad.text
    assert good.ok and "2" in good.text


# -- sessions --------------------------------------------------------------------------------------------------------
def test_variables_and_functions_persist_across_turns(server: ToolServer) -> None:
    results = server.talk(python("def f(n): return n * 2\nx = 20"), python("f(x) + 2"))
    assert "Script executed successfully (no output)." in results[0].text and "42" in results[1].text


def test_images_arrive_at_original_resolution_and_a_crop_comes_back_as_an_image(server: ToolServer) -> None:
    size, crop, figure = server.talk(
        python("print(image_1.size, image_2.size)"), python("image_1.crop((0, 0, 30, 20))"),
        python("plt.imshow(image_2); plt.show()"), images=(png(size=(3001, 2003)), png("blue")))
    assert "(3001, 2003) (64, 48)" in size.text
    assert Image.open(io.BytesIO(crop.images[0])).size == (30, 20)
    assert len(figure.images) == 1 and "AxesImage" not in figure.text
    assert "<image>" not in crop.text + figure.text


def test_a_repeated_request_id_is_answered_twice_but_executed_once(server: ToolServer) -> None:
    body = {"trajectory_ids": ["twice"], "actions": [python("n = globals().get('n', 0) + 1\nprint('n is', n)")],
            "request_ids": ["r1"]}
    answers = [server.post(body)[1]["observations"][0]["obs"] for _ in range(3)]
    server.post({**body, "request_ids": ["r2"], "finish": [True]})
    assert all("n is 1" in answer for answer in answers)


def test_a_retry_that_arrives_while_the_first_attempt_still_runs_joins_it(server: ToolServer) -> None:
    body = {"trajectory_ids": ["join"] * 2, "request_ids": ["r"] * 2,
            "actions": [python("import time; time.sleep(0.3); m = globals().get('m', 0) + 1; print('m', m)")] * 2}
    observations = server.post(body)[1]["observations"]
    assert [o["obs"] for o in observations] == [REFERENCE.python_result("m 1\n", "", 0)] * 2


def test_images_and_nothing_else_of_the_task_travel_and_only_once_for_all_trajectories(server: ToolServer) -> None:
    sent: list[tuple[str, bytes]] = []
    picture = png("orange", size=(313, 211))

    async def go() -> None:
        client = ToolClient(server.url)
        attempt = client._attempt

        async def spying(method: str, path: str, body: bytes = b"", *more: Any) -> Any:
            sent.append((method, body))
            return await attempt(method, path, body, *more)

        client._attempt = spying  # type: ignore[method-assign]
        group = task(picture)
        first = [client.call(f"once {number}", python("image_1.size"), group) for number in range(8)]
        said = [*await asyncio.gather(*first), *[await client.call("once 0", python("image_1.size"), task(picture))]]
        assert all("(313, 211)" in result.text for result in said)
        for number in range(8):
            await client.finish(f"once {number}")
        await client.close()
    asyncio.run(go())
    assert [body for method, body in sent if method == "PUT"] == [picture]
    assert not any(b"data:image" in body or b"SECRET-GROUND-TRUTH" in body for _, body in sent)


def test_a_server_that_lost_the_trajectory_asks_for_its_images_again(server: ToolServer) -> None:
    async def go() -> ToolResult:
        client = ToolClient(server.url)
        await client.call("lost", call_text("image_search", box=[0]), task(png(size=(70, 30))))
        server.post({"trajectory_ids": ["lost"], "actions": [""], "finish": [True]})    # as a restarted server would
        result = await client.call("lost", python("image_1.size"), task(png(size=(70, 30))))
        await client.finish("lost")
        await client.close()
        return result
    assert "(70, 30)" in asyncio.run(go()).text


def test_a_trajectory_id_is_never_a_path(server: ToolServer, tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    victim.mkdir()
    for name in (str(victim), f"../../../{victim}", "a/../b", "~root", "%2e%2e"):
        assert server.talk(python("open('f', 'w').write('x')"), trajectory=name)[0].ok
    assert victim.is_dir() and not list(victim.iterdir())


def test_a_timeout_says_so_and_keeps_the_variables(server: ToolServer) -> None:
    _, slow, after = server.talk(python("kept = 7"), python("import time; time.sleep(60)"), python("kept"))
    assert "timed out after 3 s" in slow.text and not slow.ok and slow.metrics["timed_out"]
    assert "7" in after.text


def test_finish_frees_the_sessions_processes(server: ToolServer) -> None:
    before = server.below()
    server.talk(python("import subprocess; subprocess.Popen(['sleep', '1000'])"), trajectory="p", finish=False)
    started = [process for process in server.below() if process not in before]
    assert len(started) == 3       # supervisor, session, sleep
    server.post({"trajectory_ids": ["p"], "actions": [""], "finish": [True]})
    assert all_gone(started)


def test_no_secret_of_the_server_reaches_the_code(server: ToolServer) -> None:
    code = """
import os, glob
seen = dict(os.environ)
for path in glob.glob('/proc/[0-9]*/environ'):
    try: seen[path] = open(path).read()
    except OSError: pass
print('KEY' in str(seen).upper())
"""
    (result,) = server.talk(python(code))
    assert result.text == REFERENCE.python_result("False\n", "", 0)


def test_64_trajectories_at_once_keep_their_variables_apart(server: ToolServer) -> None:
    async def one(client: ToolClient, number: int) -> bool:
        name = f"many-{number}"
        await client.call(name, python(f"mine = {number}"), task(png()))
        result = await client.call(name, python("print('mine is', mine, image_1.size)"), task(png()))
        await client.finish(name)
        return f"mine is {number} (64, 48)" in result.text

    async def go() -> list[bool]:
        client = ToolClient(server.url)
        results = await asyncio.gather(*(one(client, number) for number in range(64)))
        await client.close()
        return results
    before = server.sessions()
    assert all(asyncio.run(go()))
    assert until(lambda: server.sessions() <= before)


# -- search ----------------------------------------------------------------------------------------------------------
def test_text_search_answers_in_the_references_layout_under_both_names(server: ToolServer) -> None:
    for name, query in (("text_search", "fuji height"), ("search", ["fuji height", "ignored"])):
        (result,) = server.talk(call_text(name, query=query))
        assert result.text == ("A Google search for 'fuji height' found 1 results:\n\n## Web Results\n"
                               "Page 1. [Title: Mount Fuji](Link: https://x/fuji)\n"
                               "Snippet: Mount Fuji is 3776 metres high.\n")
        assert result.ok and result.metrics["search_success"]


def test_image_search_finds_the_rows_image_once_per_trajectory(server: ToolServer) -> None:
    buffer = io.BytesIO()
    badge(1).save(buffer, "JPEG")
    first, second = server.talk(call_text("image_search"), call_text("image_search"), images=(buffer.getvalue(),))
    assert first.text == REFERENCE.image_results(["badge 1"], [True]) and len(first.images) == 1
    assert "already called" in second.text and second.ok and second.metrics["deduplicated"]


def test_code_only_mode_offers_accepts_and_mentions_python_alone(tmp_path: Path) -> None:
    build_text_index(tmp_path / "text.db", [("Mount Fuji", "l", "3776")])
    running = ToolServer("--tools", "python", "--text-index", str(tmp_path / "text.db"))
    assert wait_until_healthy(running.url, 5)["tools"] == ["python"]
    good, *bad = running.talk(
        python("6 * 7"), call_text("text_search", query="fuji"), call_text("image_search"), call_text("browser"), "no call",
        "<tool_call>{</tool_call>", "<tool_call>[]</tool_call>", call_text("python", code=3), images=(png(),))
    running.close()
    assert good.ok and "42" in good.text
    for result in bad:
        assert not result.ok and not result.done and not result.images and "3776" not in result.text
        offered = result.text.replace("text_search is not available", "").replace("image_search is not available", "")
        assert "python" in offered and "search" not in offered


def test_a_hosted_image_search_fetches_the_query_from_the_server_without_its_token_and_nobody_can_afterwards() -> None:
    seen: list[tuple[str, bytes]] = []

    class Lens(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            address = json.loads(self.rfile.read(int(self.headers["Content-Length"])))["url"]
            with urllib.request.urlopen(address, timeout=10) as response:
                seen.append((address, response.read()))
            self.send_response(200)
            self.end_headers()
            self.wfile.write(json.dumps({"organic": [{"title": "Found it", "link": "l"}]}).encode())

        def log_message(self, *_: Any) -> None: ...

    lens = ThreadingHTTPServer(("127.0.0.1", 0), Lens)
    Thread(target=lens.serve_forever, daemon=True).start()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    running = ToolServer(
        "--port", str(port), "--public-url", f"http://127.0.0.1:{port}", "--tools", "image_search", "--lens-url",
        f"http://127.0.0.1:{lens.server_port}/lens",
        environment={"HDPO_TOOL_SERVER_TOKEN": "letmein", "SERPER_API_KEY": "k", "NO_PROXY": "127.0.0.1"})
    box = {"trajectory_ids": ["x"], "actions": [call_text("image_search", box=[0, 0, 10, 20])],
           "extra_fields": [{"images": ["data:image/png;base64," + base64.b64encode(png()).decode()]}]}
    status, body, _ = running.post(box, {"Authorization": "Bearer letmein"})
    assert status == 200 and body["observations"][0]["obs"] == REFERENCE.image_results(["Found it"], [False])
    ((address, shown),) = seen
    assert Image.open(io.BytesIO(shown)).size == (10, 20)
    with pytest.raises(urllib.error.HTTPError, match="404"):
        urllib.request.urlopen(address)
    running.close()
    lens.shutdown()


@pytest.mark.parametrize("options, says", [
    (("--public-url", "https://x"), "SERPER_API_KEY"), (("--tools", "image_search"), "--image-cache"),
    (("--public-url", "https://x", "--search-cache", "replay", "--search-cache-file", "f"), "never touches the network")])
def test_image_search_that_can_not_be_served_is_one_clear_line(options: tuple[str, ...], says: str) -> None:
    refused = subprocess.run([sys.executable, "-m", "hdpo.toolserver.app", *options], capture_output=True, text=True,
                             timeout=60, env={**os.environ, "SERPER_API_KEY": ""})
    assert refused.returncode == 2 and says in refused.stderr and "Traceback" not in refused.stderr


# -- life and death --------------------------------------------------------------------------------------------------
def test_a_server_that_does_not_start_is_an_error_with_its_last_line(tmp_path: Path) -> None:
    with pytest.raises(ToolServerError, match="did not start .*tool_server.log.*--image-cache FILE"):
        start_tool_server(["--tools", "image_search"], tmp_path / "tool_server.log")


def busy_server(*options: str, **environment: str) -> ToolServer:
    running = ToolServer(*options, environment=environment)
    running.post({"trajectory_ids": ["x"], "actions": [python("import subprocess; subprocess.Popen(['sleep', '1000'])")]})
    return running


def test_a_killed_server_leaves_no_process_behind() -> None:
    running = busy_server()
    below = running.below()
    assert len(below) >= 4
    running.kill()
    assert all_gone(below)


def test_sigterm_answers_the_running_call_and_ends_cleanly() -> None:
    running = ToolServer()
    below = running.below()
    started = subprocess.Popen([sys.executable, "-c", f"""
import json, urllib.request
body = json.dumps({{"trajectory_ids": ["d"], "actions": [{python("import time; time.sleep(1); print('drained')")!r}]}})
headers = {{"Content-Type": "application/json", "Authorization": "Bearer {token_for(running.url)}"}}
print(urllib.request.urlopen(urllib.request.Request("{running.url}/get_observation", body.encode(), headers)).read().decode())
"""], stdout=subprocess.PIPE, text=True)
    assert until(lambda: wait_until_healthy(running.url)["concurrent_requests"] == 1)
    running.process.terminate()
    assert "drained" in started.communicate(timeout=30)[0]
    assert running.process.wait(10) == 0
    assert all_gone(below)


def test_a_server_ends_with_its_parent() -> None:
    parent = subprocess.Popen(["sleep", "1000"])
    running = busy_server("--parent-pid", str(parent.pid))
    parent.kill()
    parent.wait()
    assert running.process.wait(20) == 0


def test_an_idle_trajectory_is_closed() -> None:
    running = busy_server("--idle-limit", "0.5")
    assert until(lambda: running.sessions() == 0)
    running.close()


def test_a_full_server_answers_429_and_our_client_waits_it_out() -> None:
    running = ToolServer("--max-queue", "1", "--workers", "1")

    async def go() -> list[ToolResult]:
        client = ToolClient(running.url, timeout=30)
        results = await asyncio.gather(*(client.call(f"q{i}", python("import time; time.sleep(0.2); 5"), task())
                                         for i in range(4)))
        await client.close()
        return results
    results = asyncio.run(go())
    running.close()
    assert all(result.ok for result in results)


def test_a_server_open_to_other_machines_needs_a_token() -> None:
    refused = subprocess.run([sys.executable, "-m", "hdpo.toolserver.app", "--host", "0.0.0.0"], capture_output=True,
                             text=True, timeout=30)
    assert refused.returncode == 2 and "HDPO_TOOL_SERVER_TOKEN" in refused.stderr and "Traceback" not in refused.stderr
    running = ToolServer(environment={"HDPO_TOOL_SERVER_TOKEN": "letmein"})
    body = {"trajectory_ids": ["x"], "actions": [python("1")]}
    statuses = [running.post(body, headers)[0] for headers in (
        {}, {"Authorization": "Bearer wrong"}, {"Authorization": "Bearer letmein"})]
    running.close()
    assert statuses == [401, 401, 200]


def test_an_unreachable_server_is_our_failure_not_the_policys() -> None:
    async def go() -> None:
        client = ToolClient("http://127.0.0.1:9", timeout=1, retries=1)
        await client.finish("x")      # never raises
        try:
            await client.call("x", python("1"), task())
        finally:
            await client.close()
    with pytest.raises(ToolServerError, match="127.0.0.1:9"):
        asyncio.run(go())


def test_help_teaches() -> None:
    text = subprocess.run([sys.executable, "-m", "hdpo.toolserver.app", "--help"], capture_output=True, text=True).stdout
    for word in ("examples:", "--text-index", "SERPER_API_KEY", "--parent-pid", "security boundary"):
        assert word in text


def test_the_launch_script_prints_the_url(tmp_path: Path) -> None:
    script = Path(__file__).parents[2] / "launch" / "start_tool_server.sh"
    parent = subprocess.Popen(["sleep", "1000"])
    environment = {**os.environ, "PYTHON": sys.executable, "TOOL_SERVER_LOG": str(tmp_path / "log"),
                   "TOOL_SERVER_ARGS": f"--tools python --parent-pid {parent.pid}"}
    done = subprocess.run([str(script), "0", "2"], capture_output=True, text=True, env=environment, timeout=60)
    try:
        assert wait_until_healthy(done.stdout.strip(), 5)["tools"] == ["python"]
    finally:
        parent.kill()
        parent.wait()
