"""Who may call a tool server, and what a stranger's request costs it."""
from __future__ import annotations

import gzip
import json
import os
import stat
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from tool_server import ToolServer, png, post, python

from hdpo.toolserver.token import VARIABLE, token_file, token_for

CALL = {"trajectory_ids": ["x"], "actions": [python("print(40 + 2)")]}
LAUNCH = Path(__file__).parents[2] / "launch"


@pytest.fixture(scope="module")
def server() -> Iterator[ToolServer]:
    running = ToolServer("--tools", "python", "--allow-host", "tools.cluster.local")
    yield running
    assert running.close() == 0


def port(server: ToolServer) -> int:
    return int(server.url.rsplit(":", 1)[1])


def test_a_server_started_by_hand_has_a_token_that_only_its_user_can_read(server: ToolServer) -> None:
    path = token_file(port(server))
    token = path.read_text()
    assert len(token) >= 32 and stat.S_IMODE(path.stat().st_mode) == 0o600 and stat.S_IMODE(path.parent.stat().st_mode) == 0o700
    assert token not in " ".join(psutil.Process(server.process.pid).cmdline())
    assert post(server.url, CALL)[0] == 200                                       # the same user's client finds it
    for wrong in ("", "Bearer", "Bearer ", f"Bearer {token[:-1]}", f"Bearer {token}x", "Bearer \u00ff"):
        assert post(server.url, CALL, {"Authorization": wrong})[0] == 401
    assert post(server.url, CALL, {"Authorization": f"Bearer {token}"})[0] == 200


def test_a_token_ends_with_its_server_and_outlives_a_kill_so_that_clients_go_on() -> None:
    running = ToolServer("--tools", "python")
    token = token_for(running.url)
    running.kill()
    running.start()
    assert token_for(running.url) == token
    running.close()
    assert token_for(running.url) == ""


@pytest.mark.parametrize("headers, status", [
    ({"Content-Type": "text/plain"}, 415), ({"Content-Type": "application/x-www-form-urlencoded"}, 415),
    ({"Content-Type": "multipart/form-data; boundary=x"}, 415), ({"Content-Type": "application/json; charset=utf-8"}, 200),
    ({"Origin": "http://evil.example"}, 403), ({"Origin": "null"}, 403), ({"Origin": "http://127.0.0.1:1"}, 403),
    ({"Host": "evil.example"}, 403), ({"Host": "evil.example:80"}, 403), ({"Host": "127.0.0.1.evil.example"}, 403),
    ({"Host": "[::1"}, 403), ({"Host": ""}, 403), ({"Host": "localhost:1"}, 200), ({"Host": "10.0.0.1"}, 200),
    ({"Host": "[::1]:80"}, 200), ({"Host": "tools.cluster.local:30080"}, 200), ({"Host": os.uname().nodename}, 200),
], ids=str)
def test_no_page_of_a_browser_and_no_foreign_name_reaches_a_tool(
        server: ToolServer, headers: dict[str, str], status: int) -> None:
    assert post(server.url, CALL, headers)[0] == status
    if status == 403:       # before anything else is looked at
        assert post(server.url, b"no json", {**headers, "Authorization": "", "Content-Type": "text/plain"})[0] == 403
        request = urllib.request.Request(f"{server.url}/health", headers=headers)
        with pytest.raises(urllib.error.HTTPError, match="403"):
            urllib.request.urlopen(request, timeout=20)


@pytest.mark.parametrize("options, environment, says", [
    (("--host", "0.0.0.0"), {}, VARIABLE), (("--host", "0.0.0.0", "--no-token"), {}, VARIABLE),
    (("--host", "::"), {}, VARIABLE), (("--public-url", "https://x"), {}, VARIABLE),
    (("--public-url", "https://x", "--no-token"), {}, VARIABLE), (("--no-token",), {VARIABLE: "t"}, "contradicts")])
def test_what_others_can_reach_needs_a_token_that_they_are_told(
        options: tuple[str, ...], environment: dict[str, str], says: str) -> None:
    refused = subprocess.run([sys.executable, "-m", "hdpo.toolserver.app", *options], capture_output=True, text=True, timeout=30,
                             env={**os.environ, "SERPER_API_KEY": "k", **environment})
    assert refused.returncode == 2 and says in refused.stderr and refused.stderr.count("\n") == 1


def test_without_a_token_on_loopback_if_asked_for() -> None:
    running = ToolServer("--tools", "python", "--no-token")
    assert post(running.url, CALL)[0] == 200 and not token_file(port(running)).exists()
    assert post(running.url, CALL, {"Content-Type": "text/plain"})[0] == 415
    running.close()


def test_a_compressed_body_costs_no_more_than_its_bound(server: ToolServer) -> None:
    process = psutil.Process(server.process.pid)
    packed = {"Content-Encoding": "gzip"}
    assert post(server.url, gzip.compress(json.dumps(CALL).encode()), packed)[0] == 200
    bomb = gzip.compress(bytes(600 << 20), 9)
    before = process.memory_info().rss
    assert post_status(server, bomb, packed) == 413
    assert process.memory_info().rss - before < 100 << 20
    assert post_status(server, b"nonsense", packed) == 400 and post_status(server, bomb, {"Content-Encoding": "br"}) == 415


def post_status(server: ToolServer, body: bytes, headers: dict[str, str]) -> int:
    """For refusals whose body is no JSON."""
    request = urllib.request.Request(f"{server.url}/get_observation", body, {
        "Content-Type": "application/json", "Authorization": f"Bearer {token_for(server.url)}", **headers})
    with pytest.raises(urllib.error.HTTPError) as caught:
        urllib.request.urlopen(request, timeout=60)
    return caught.value.code


def test_one_reply_with_pictures_is_kept_of_a_trajectory(server: ToolServer) -> None:
    process = psutil.Process(server.process.pid)
    noise = "Image.fromarray((np.random.rand(1000, 1000, 3) * 255).astype('uint8'))"
    code = python(f"for _ in range(2): display({noise})")         # 6 MB of PNG
    server.talk(*[code] * 2, images=(png(),), trajectory="pictures", finish=False)
    before = process.memory_info().rss
    for number in range(6):
        server.talk(code, images=(png(),), trajectory=f"pictures {number}", finish=False)
        server.talk(code, python("1"), images=(png(),), trajectory=f"pictures {number}", finish=False)
    assert process.memory_info().rss - before < 40 << 20            # 12 kept replies would be 72 MB at least


@pytest.mark.parametrize("arguments, key, says", [
    (("m", "8000", "--host", "0.0.0.0"), "", "JUDGE_API_KEY"), (("m", "8000", "--host=10.0.0.1"), "", "JUDGE_API_KEY"),
    (("m", "8000"), "", "--host 127.0.0.1"), (("m", "8000", "--host", "127.0.0.1"), "", "--host 127.0.0.1"),
    (("m", "8000", "--host", "0.0.0.0"), "k", "--host 0.0.0.0")])
def test_a_judge_without_a_key_is_for_this_machine_alone(tmp_path: Path, arguments: tuple[str, ...], key: str, says: str) -> None:
    stub = tmp_path / "python"                                      # in place of vLLM: says how it would be started
    stub.write_text("#!/bin/sh\ncase \"$*\" in *import*) exit 0;; esac\necho \"$@\"\n")
    (tmp_path / "vllm").write_text("#!/bin/sh\necho \"$@\"\n")
    for file in (stub, tmp_path / "vllm"):
        file.chmod(0o755)
    done = subprocess.run([str(LAUNCH / "start_judge.sh"), *arguments], capture_output=True, text=True, timeout=30, env={
        "PATH": os.environ["PATH"], "PYTHON": str(stub), "JUDGE_API_KEY": key})
    assert says in (done.stdout if done.returncode == 0 else done.stderr), done
    assert done.returncode == (2 if "JUDGE" in says else 0) and (not key or key not in done.stdout.split())


KEYS = """
import os, subprocess, sys
from hdpo.keys import environment_with_keys, key, withdraw
withdraw()
seen = subprocess.run([sys.executable, "-c", "import os; print(dict(os.environ))"], capture_output=True, text=True).stdout
assert "topsecret" not in seen and "topsecret" not in str(dict(os.environ)) and "harmless" in seen
assert key("JUDGE_API_KEY_2") == "topsecret2" and environment_with_keys()["WANDB_API_KEY"] == "topsecret3" and key("NO") == ""
try:
    if os.getuid() == 0:      # others of this user, who is not root
        os.setresuid(65534, 65534, 65534)
        withdraw()
    subprocess.run(["cat", f"/proc/{os.getpid()}/environ"], check=True, capture_output=True)
    print("READ")
except subprocess.CalledProcessError:
    print("hidden")
"""


def test_keys_leave_the_environment_for_children_and_for_others_of_the_same_user() -> None:
    environment = {"JUDGE_API_KEY": "topsecret1", "JUDGE_API_KEY_2": "topsecret2", "WANDB_API_KEY": "topsecret3",
                   "SERPER_API_KEY": "topsecret4", "PYTHONPATH": os.environ.get("PYTHONPATH", ""), "OTHER": "harmless"}
    done = subprocess.run([sys.executable, "-c", KEYS], env=environment, capture_output=True, text=True, timeout=60)
    assert done.stdout == "hidden\n", done.stderr


def test_the_process_sandbox_refuses_where_user_namespaces_are_forbidden_unless_the_model_is_trusted() -> None:
    if subprocess.run(["unshare", "-Ur", "true"], capture_output=True).returncode:
        pytest.skip("this machine forbids them already")
    command = ["unshare", "-Ur", "sh", "-c", f"echo 0 > /proc/sys/user/max_user_namespaces; exec {sys.executable} -m "
               "hdpo.toolserver.app --tools python $0"]
    refused = subprocess.run([*command, ""], capture_output=True, text=True, timeout=60)
    assert refused.returncode == 2 and "user namespaces" in refused.stderr and "Traceback" not in refused.stderr
    assert all(way in refused.stderr for way in ("tools.sandbox=docker", "sysctl", "i_trust_the_model"))
    trusted = subprocess.Popen([*command, "--i-trust-the-model"], stdout=subprocess.PIPE, text=True)
    assert trusted.stdout is not None
    url = trusted.stdout.readline().strip()
    assert post(url, CALL)[1]["observations"][0]["metrics"]["code_success"]
    trusted.terminate()
    assert trusted.wait(30) == 0
