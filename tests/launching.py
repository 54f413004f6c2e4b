"""Start real stages under accelerate, as a user would, and hand back what they printed."""
from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from hdpo.demo import cpu_environment

ROOT = Path(__file__).resolve().parents[1]


def accelerate(script: str, arguments: Sequence[str], ranks: int = 2, timeout: float = 300.0) -> subprocess.CompletedProcess[str]:
    """Run a script on `ranks` processes on this machine's CPU."""
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(ROOT / "launch/accelerate/cpu2.yaml"),
               "--num_processes", str(ranks), "--main_process_port", "0", str(ROOT / script), *arguments]
    return subprocess.run(command, cwd=ROOT, env=os.environ | cpu_environment(ranks), capture_output=True, text=True,
                          timeout=timeout)


def settings(**values: object) -> list[str]:
    """`--set` arguments; a__b stands for a.b."""
    return [part for key, value in values.items() for part in ("--set", f"{key.replace('__', '.')}={value}")]
