"""DeepSpeed's extension is compiled once for an installation, by the installation's own ninja."""
from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

LOAD = """
import os
from hdpo.adapters.extension_lock import load_communication_extension
load_communication_extension()
folder = os.environ["TORCH_EXTENSIONS_DIR"]
print("loaded", [(path.name, path.stat().st_mtime_ns) for path in sorted(__import__("pathlib").Path(folder).rglob("*.so"))])
"""


def load(path: str) -> str:
    done = subprocess.run([sys.executable, "-c", LOAD], env=os.environ | {"PATH": path}, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()[-1]


def test_a_machine_without_ninja_or_with_another_one_compiles_no_more_than_once(tmp_path: Path) -> None:
    for name in ("c++", "g++", "sh", "which"):
        for folder in ("/usr/bin", "/bin"):
            if Path(folder, name).exists() and not (tmp_path / name).exists():
                (tmp_path / name).symlink_to(Path(folder, name))
    first = load(str(tmp_path))
    other = tmp_path / "other"
    other.mkdir()
    (other / "ninja").write_text("#!/bin/sh\nexit 1\n")
    (other / "ninja").chmod(0o755)
    assert "deepspeed_shm_comm.so" in first and load(f"{other}:{tmp_path}") == first
