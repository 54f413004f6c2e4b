"""DeepSpeed's extension is compiled by the installation's own ninja, wherever it is started from."""
from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import ninja
import pytest

from hdpo.adapters.extension_lock import use_own_ninja


@pytest.mark.parametrize("machine_has_one", [True, False])
def test_the_ninja_that_is_started_by_name_is_the_installations_own(
        machine_has_one: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if machine_has_one:
        (tmp_path / "ninja").write_text("#!/bin/sh\necho 0.1\n")
        (tmp_path / "ninja").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    use_own_ninja()
    use_own_ninja()
    said = subprocess.run(["ninja", "--version"], capture_output=True, text=True, check=True).stdout
    assert said.startswith(ninja.__version__[:4])
    assert os.environ["PATH"] == f"{ninja.BIN_DIR}{os.pathsep}{tmp_path}"


@pytest.mark.parametrize(("compiler", "said"), [
    ("nowhere-c++", "nowhere-c++: not found"), ("{folder}/headless", "fatal error: Python.h: No such file or directory")])
def test_a_machine_that_cannot_compile_is_told_in_one_line_what_it_lacks(compiler: str, said: str, tmp_path: Path) -> None:
    """The compiler here ends as one does without Python's headers."""
    headless = tmp_path / "headless"
    headless.write_text("#!/bin/sh\n[ \"$1\" = --version ] && exec c++ --version\necho 'shm.cpp:1:10: fatal error: Python.h: "
                        "No such file or directory' >&2\nexit 1\n")
    headless.chmod(0o755)
    code = ("from hdpo.errors import ConfigError\nfrom hdpo.adapters.extension_lock import load_communication_extension\n"
            "try:\n    load_communication_extension()\nexcept ConfigError as exc:\n    print('REFUSED', exc)")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300, env={
        **os.environ, "CXX": compiler.format(folder=tmp_path), "TORCH_EXTENSIONS_DIR": str(tmp_path)})
    refused = done.stdout.split("REFUSED ")[1].strip()
    assert "apt-get install g++ python3-dev" in refused and refused.endswith(said) and "\n" not in refused
