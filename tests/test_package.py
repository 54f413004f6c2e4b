"""The wheel carries everything that a checkout has: code, assets, launch files, the sandbox's worker."""
from __future__ import annotations

import subprocess
import sys
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def test_the_wheel_carries_everything_a_run_needs(tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    files = subprocess.run(["git", "ls-files", "--cached", "--others", "--exclude-standard"], cwd=ROOT, capture_output=True,
                           text=True, check=True).stdout.split()
    for name in files:   # a copy, so that building leaves nothing in the checkout
        if (ROOT / name).is_file():
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            (source / name).write_bytes((ROOT / name).read_bytes())
    subprocess.run([sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--wheel-dir",
                    str(tmp_path), str(source)], check=True, capture_output=True)
    (wheel,) = tmp_path.glob("hdpo-*.whl")
    names = set(zipfile.ZipFile(wheel).namelist())
    modules = {f"hdpo/{f.relative_to(ROOT / 'src/hdpo')}" for f in (ROOT / "src/hdpo").rglob("*.py")}
    assert modules <= names
    for needed in ("hdpo/toyworld/assets/toy-base/model.safetensors", "hdpo/report/assets/report.css", "hdpo/py.typed",
                   "hdpo/launch/configs/demo_rl.yaml", "hdpo/launch/accelerate/cpu2.yaml", "hdpo/sandbox/worker.py",
                   "hdpo/sandbox/Dockerfile"):
        assert needed in names, needed
