"""`hdpo demo`: the embedded world through SFT, HDPO and evaluation, with the real engines, in one folder.

Stages are separate processes, as on a cluster, and each continues where it was interrupted; a finished stage is not run
again. What it shows: after SFT the agent calls a tool for everything, after HDPO only where one is needed.
"""
from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from importlib import resources
from pathlib import Path

from hdpo.compose.commands import PART_OF
from hdpo.config.shipped import launch_folder
from hdpo.errors import HdpoError, UserError, boundary
from hdpo.evaluation.evaluate import format_table
from hdpo.state.folders import step_folders
from hdpo.state.lock import RunLock
from hdpo.toyworld.world import make_world

DEMO_LOCK = ".demo.lock"

ABOUT = """\
Trains a tiny Qwen3-VL on this machine: SFT on demonstrations that call a tool almost always, then HDPO. Writes
RUN/{world,sft,metrics.jsonl,summary.json,report.html,checkpoints}. Ctrl-C stops and saves; the same command goes on."""


def main(argv: Sequence[str]) -> int:
    """Returns the exit status. Raises UserError for bad options and HdpoError when a stage failed."""
    parser = argparse.ArgumentParser(prog="hdpo demo", description=ABOUT, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, default=Path("runs/demo"), help="folder to write (%(default)s)")
    parser.add_argument("--seed", type=int, default=1, help="seed of world and training (%(default)s)")
    parser.add_argument("--ranks", type=int, default=2, help="ZeRO-3 processes, each with an engine (%(default)s)")
    parser.add_argument("--model", type=Path, help="base model folder (default: the toy base that ships with hdpo)")
    parser.add_argument("--set-sft", action="append", default=[], metavar="KEY=VALUE", help="override a setting of SFT")
    parser.add_argument("--set-rl", action="append", default=[], metavar="KEY=VALUE", help="override a setting of RL")
    parser.add_argument("--fresh", action="store_true", help="discard an earlier demo in the folder first")
    parser.add_argument("--steal-lock", action="store_true", help="take the folder over from a demo that is known to be gone")
    options = parser.parse_args(argv)
    if options.ranks < 1:
        raise UserError(f"--ranks {options.ranks}: at least 1")
    if options.fresh and options.run.exists() and not (options.run / "world").is_dir():
        raise UserError(f"--fresh: {options.run} holds no demo and stays as it is; remove it yourself or name another --run")
    started = time.monotonic()
    lock = hold(options.run, options.steal_lock)
    try:
        if options.fresh:
            discard(options.run)
        run_demo(options)
    finally:
        lock.release()
    print(f"\n{(time.monotonic() - started) / 60:.1f} minutes; report: {options.run / 'report.html'}")
    return 0


def hold(run: Path, steal: bool) -> RunLock:
    """Hold the folder for the whole demo; each stage holds its own for itself, and may have outlived an earlier demo.

    Raises ConfigError that says who holds one of them.
    """
    lock = RunLock(run, steal, DEMO_LOCK, "--run")
    try:
        for folder in (run, run / "sft") if not steal else ():
            if folder.is_dir():
                RunLock(folder).release()
    except HdpoError:
        lock.release()
        raise
    return lock


def discard(run: Path) -> None:
    """Everything but the lock."""
    for path in run.iterdir():
        if path.is_dir():
            shutil.rmtree(path)
        elif path.name != DEMO_LOCK:
            path.unlink()


def run_demo(options: argparse.Namespace) -> None:
    run: Path = options.run
    base = options.model or Path(str(resources.files("hdpo").joinpath("toyworld/assets/toy-base")))
    if not (base / "config.json").is_file():
        raise UserError(f"{base} is not a model folder; `make toy-base` makes one, --model names it")
    world = run / "world"
    if not (world / "done.json").is_file():
        print("world: drawing pictures, facts and demonstrations")
        with boundary(UserError, f"--run {run}", OSError):
            make_world(world, seed=options.seed)
        (world / "done.json").write_text(json.dumps({"seed": options.seed}))
    sft = run / "sft"
    common = [f"run.seed={options.seed}"]
    flags = ["--steal-lock"] if options.steal_lock else []
    curated = curate(world / "demos.parquet", run / "curated", options.ranks)
    launch("sft", "demo_sft.yaml", options.ranks, [
        *common, f"run.folder={run}", "run.name=sft", f"model.path={base}", f"data.train=[{curated}]",
        *options.set_sft], flags)
    if not step_folders(sft):
        raise HdpoError(f"SFT left no checkpoint in {sft}")
    launch("rl", "demo_rl.yaml", options.ranks, [
        *common, f"run.folder={run.parent}", f"run.name={run.name}", f"model.path={step_folders(sft)[-1]}",
        f"data.train=[{world / 'train.parquet'}]", f"data.val=[{world / 'val.parquet'}]",
        f"tools.text_index={world / 'facts.sqlite'}", f"tools.image_index={world / 'badges'}", *options.set_rl], flags)
    summary = json.loads((run / "summary.json").read_text())
    if "sft" in summary and "rl" in summary:
        print("\nHeld-out rows, after SFT → after HDPO:\n")
        print(format_table(summary["sft"], summary["rl"]))
    from hdpo.report.page import write_report
    write_report(run)


def curate(demonstrations: Path, out: Path, ranks: int) -> Path:
    """The demonstrations that SFT trains on: those whose recorded calls give what was recorded (stage 1), as for any source."""
    if not (out / "manifest.json").is_file():
        print("curation: every recorded Python call is made again")
        launch("curate", "demo_rl.yaml", ranks, ["curation.chunk_rows=256", "curation.concurrency=16"], [
            "--source", f"demonstrations={demonstrations}", "--stages", "1", "--out", str(out)])
    return out / "kept.parquet"


def launch(command: str, config: str, ranks: int, overrides: Sequence[str], flags: Sequence[str] = (),
           again: str = "make demo") -> None:
    """Run one stage under accelerate, with its progress on this terminal. Raises HdpoError when it fails.

    A stage that was stopped politely has saved; the demo then stops too (exit status 130).
    """
    root = launch_folder()
    arguments = [
        sys.executable, "-m", "hdpo.adapters.launcher", "--config_file", str(root / "accelerate" / "cpu2.yaml"),
        "--num_processes", str(ranks), "--main_process_port", "0", "-m", "hdpo", command, "--config",
        str(root / "configs" / config), *flags]
    for item in overrides:
        arguments += ["--set", item]
    process = subprocess.Popen(arguments, env=os.environ | cpu_environment(ranks) | {PART_OF: again})
    status = _wait(process)
    if status == 130:
        raise KeyboardInterrupt
    if status:
        raise HdpoError(f"the {command} stage failed (exit status {status}); see the message above. `{again}` goes on from "
                        "its last checkpoint")


def _wait(process: subprocess.Popen[bytes]) -> int:
    """Wait for a stage. Ctrl-C is handed on: at a terminal the stage has it already, and takes both for one."""
    while True:
        try:
            return process.wait()
        except KeyboardInterrupt:
            process.send_signal(signal.SIGINT)


def cpu_environment(ranks: int) -> dict[str, str]:
    """Threads for several ranks on few cores: spinning OpenMP threads make everything five to ten times slower."""
    threads = max(1, (os.cpu_count() or 1) // ranks)
    return {"OMP_NUM_THREADS": str(threads), "OMP_WAIT_POLICY": "passive", "TOKENIZERS_PARALLELISM": "false",
            "DS_ACCELERATOR": os.environ.get("DS_ACCELERATOR", "cpu"), "CUDA_VISIBLE_DEVICES": "",
            "TORCH_CPP_LOG_LEVEL": "ERROR", "PYTHONWARNINGS": "ignore", "DS_LOG_LEVEL": "error"}
