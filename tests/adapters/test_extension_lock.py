"""DeepSpeed's extension is compiled by the installation's own ninja, wherever it is started from."""
from __future__ import annotations

import os
import subprocess
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
