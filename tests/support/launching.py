"""Start real stages under accelerate, as a user would, and hand back what they printed."""
from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import psutil

from hdpo.state.folders import step_folders
from hdpo.toyworld.demo import cpu_environment
from hdpo.toyworld.world import World

ROOT = Path(__file__).resolve().parents[2]
BASE = ROOT / "src" / "hdpo" / "toyworld" / "assets" / "toy-base"


def command(script: str, arguments: Sequence[str], ranks: int = 2, *options: str) -> list[str]:
    """What starts a script on `ranks` processes on this machine's CPU."""
    return [sys.executable, "-m", "hdpo.adapters.launcher", "--config_file", str(ROOT / "launch/accelerate/cpu2.yaml"),
            "--num_processes", str(ranks), "--main_process_port", "0", *options, str(ROOT / script), *arguments]


def accelerate(script: str, arguments: Sequence[str], ranks: int = 2, timeout: float = 600.0) -> subprocess.CompletedProcess[str]:
    """Run a script on `ranks` processes on this machine's CPU."""
    return subprocess.run(command(script, arguments, ranks), cwd=ROOT, env=os.environ | cpu_environment(ranks),
                          capture_output=True, text=True, timeout=timeout)


def settings(**values: object) -> list[str]:
    """`--set` arguments; a__b stands for a.b."""
    return [part for key, value in values.items() for part in ("--set", f"{key.replace('__', '.')}={value}")]


class Running:
    """A launcher that was started and is watched: its output is a file, its ranks are processes to find and to kill."""

    def __init__(self, arguments: Sequence[str], log: Path, environment: dict[str, str], ranks: int = 2) -> None:
        self.log = log
        with log.open("w") as output:
            self.process = subprocess.Popen(list(arguments), cwd=ROOT, env=os.environ | cpu_environment(ranks) | environment,
                                            stdout=output, stderr=subprocess.STDOUT, start_new_session=True)

    def text(self) -> str:
        return self.log.read_text().replace("\r", "\n")

    def lines(self, beginning: str = "hdpo") -> list[str]:
        return [line for line in self.text().splitlines() if line.startswith(beginning)]

    def until(self, condition: Callable[[], object], timeout: float = 240.0) -> None:
        """Wait for the condition while the launcher runs."""
        deadline = time.monotonic() + timeout
        while not condition():
            assert self.process.poll() is None, self.text()[-3000:]
            assert time.monotonic() < deadline, self.text()[-3000:]
            time.sleep(0.05)

    def rank(self, number: int) -> psutil.Process:
        """The process of a rank."""
        for child in psutil.Process(self.process.pid).children(recursive=True):
            with contextlib.suppress(psutil.Error):
                environment = child.environ()
                if environment.get("RANK") == str(number) and environment.get("TORCHELASTIC_RUN_ID"):
                    return child
        raise AssertionError(f"no rank {number} of {self.process.pid}")

    def end(self, timeout: float = 120.0) -> int:
        return self.process.wait(timeout)

    def kill(self) -> None:
        """Everything, whatever state it is in."""
        with contextlib.suppress(psutil.NoSuchProcess):
            processes = psutil.Process(self.process.pid).children(recursive=True)
            for process in [*processes, psutil.Process(self.process.pid)]:
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.kill()
        self.process.wait()


def family(process: psutil.Process) -> list[psutil.Process]:
    return [process, *process.children(recursive=True)]


def kill_as_a_lost_machine(run: Running) -> None:
    """Launcher and ranks at once. The tool server has a session of its own and has to notice by itself."""
    session = os.getsid(run.process.pid)
    for process in family(psutil.Process(run.process.pid)):
        if os.getsid(process.pid) in (session, process.pid) and "toolserver" not in " ".join(process.cmdline()):
            os.kill(process.pid, signal.SIGKILL)
    run.process.wait()


def rl_settings(sft: Path, world: World, name: str, **values: object) -> list[str]:
    return ["--config", "launch/configs/demo_rl.yaml", *settings(**{
        "run__folder": sft.parent, "run__name": name, "model__path": step_folders(sft)[-1], "data__train": f"[{world.train}]",
        "data__val": f"[{world.val}]", "tools__text_index": world.text_index, "tools__image_index": world.image_index,
        "rollout__prompts_per_step": 8, "optim__mini_batch_prompts": 4, "rollout__group_size": 4, "optim__steps": 2,
        "checkpoint__every_steps": 1, "run__deterministic": "true", "eval__before": "false", "eval__after": "false",
        "optim__warmup_steps": 0, **values})]
