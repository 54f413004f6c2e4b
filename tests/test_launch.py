"""Launch scripts and several nodes: two nodes on one machine, each in its own network namespace where that is allowed."""
from __future__ import annotations

import hashlib
import importlib.util
import os
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest
import torch
from launching import BASE, ROOT, Running, accelerate, command, settings

from hdpo.compose.checks import check_devices
from hdpo.errors import ConfigError
from hdpo.ranks.nodes import interface_towards
from hdpo.state.dump import read_rollouts
from hdpo.state.folders import step_folders
from hdpo.toyworld.demo import cpu_environment
from hdpo.toyworld.world import World
from hdpo.train.jsonl import read_metrics

DEEPSPEED = str(importlib.util.find_spec("deepspeed").origin)   # type: ignore[union-attr]
COMPILED = Path.home() / ".cache" / "torch_extensions" / f"hdpo-{hashlib.sha256(DEEPSPEED.encode()).hexdigest()[:12]}"
METIS = str(ROOT / "launch" / "train_metis.sh")
VARIABLES = ("MODEL_PATH", "TRAIN_DATA", "NNODES", "NODE_RANK", "MASTER_ADDR", "MASTER_PORT", "GPUS_PER_NODE", "RUN_NAME",
             "RUN_FOLDER", "MAX_RESTARTS", "CONFIG", "WANDB_API_KEY", "n")


def script(*command: str, **environment: str) -> subprocess.CompletedProcess[str]:
    env = {k: v for k, v in os.environ.items() if k not in VARIABLES} | environment
    return subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=60)


def test_train_metis_turns_the_references_variables_into_one_launch() -> None:
    done = script(METIS, "0.2", "--set", "optim.steps=3", PYTHON="/bin/echo", MODEL_PATH="/models/sft", NNODES="2", NODE_RANK="1",
                  MASTER_ADDR="10.0.0.1", MASTER_PORT="6379", GPUS_PER_NODE="8", RUN_FOLDER="/shared", n="8", MAX_RESTARTS="2")
    assert done.returncode == 0, done.stderr
    for part in ("-m hdpo.adapters.launcher --config_file launch/accelerate/zero3.yaml", "--num_machines 2 --machine_rank 1",
                 "--main_process_ip 10.0.0.1 --main_process_port 6379", "--num_processes 16 --max_restarts 2",
                 "launch/train_rl.py --config launch/configs/metis_8b_rl.yaml --set hdpo.w_tool=0.2",
                 "--set run.name=hdpo_sft_wtool0.2 --set run.folder=/shared --set rollout.group_size=8 --set optim.steps=3"):
        assert part in done.stdout


def test_without_nvidia_smi_the_missing_number_of_devices_is_named(tmp_path: Path) -> None:
    tools = tmp_path / "bin"
    tools.mkdir()
    for name in ("bash", "dirname", "readlink", "wc", "basename", "env"):
        (tools / name).symlink_to(shutil.which(name) or "")
    done = script(METIS, PYTHON="/bin/echo", MODEL_PATH="/m", PATH=str(tools))
    assert done.returncode == 2 and "no GPU found; set GPUS_PER_NODE" in done.stderr


def test_relative_paths_start_where_the_user_stands(tmp_path: Path) -> None:
    """Also where Python's own modules would be shadowed by those of the folder."""
    (tmp_path / "types.py").write_text("raise SystemExit('shadowed')\n")
    env = {k: v for k, v in os.environ.items() if k not in VARIABLES} | {
        "MODEL_PATH": "ck/step_000100", "GPUS_PER_NODE": "1", "PYTHON": sys.executable, "CONFIG": "demo_rl",
        "ACCELERATE_CONFIG": "cpu2"} | cpu_environment(1)
    done = subprocess.run([METIS, "--dry-run"], cwd=tmp_path, env=env, capture_output=True, text=True, timeout=120)
    assert "MISSING  model: model.path: no such folder: ck/step_000100" in done.stdout, done.stdout + done.stderr
    assert "shadowed" not in done.stderr and list(tmp_path.iterdir()) == [tmp_path / "types.py"]


def test_an_accelerate_file_without_deepspeed_is_refused_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "plain.yaml").write_text("compute_environment: LOCAL_MACHINE\ndistributed_type: MULTI_CPU\nnum_machines: 1\n"
                                         "num_processes: 2\nmachine_rank: 0\nmixed_precision: 'no'\nuse_cpu: true\n")
    arguments = ["train_sft.py", "--config", "demo_sft", *settings(model__path=BASE, run__folder=tmp_path, data__train="[x]")]
    started = [sys.executable, "-m", "hdpo.adapters.launcher", "--main_process_port", "0", "--config_file"]
    for file, message in ((str(tmp_path / "plain.yaml"), "launched with a file without DeepSpeed: give --config_file"),
                          ("zero4", "--config_file zero4: no such file; shipped ones are cpu2, zero3")):
        done = subprocess.run([*started, file, *arguments], cwd=tmp_path, env=os.environ | cpu_environment(2), text=True,
                              capture_output=True, timeout=120)
        (line,) = errors_of(done)
        assert done.returncode == 2 and message in line


@pytest.mark.parametrize(("environment", "message"), [
    ({"GPUS_PER_NODE": "8"}, "set MODEL_PATH"),
    ({"MODEL_PATH": "/m", "GPUS_PER_NODE": "0"}, "no GPU found; set GPUS_PER_NODE"),
    ({"MODEL_PATH": "/m", "GPUS_PER_NODE": "8", "NNODES": "2"}, "NNODES=2 needs MASTER_ADDR"),
    ({"MODEL_PATH": "/m", "GPUS_PER_NODE": "all"}, "GPUS_PER_NODE=all is not a number"),
    ({"MODEL_PATH": "/m", "GPUS_PER_NODE": "8", "NODE_RANK": "1"}, "nodes are counted from 0 to NNODES-1, and NNODES=1")])
def test_a_missing_or_bad_variable_is_named_before_anything_starts(environment: dict[str, str], message: str) -> None:
    done = script(METIS, PYTHON="/bin/echo", **environment)
    assert done.returncode != 0 and message in done.stderr and "Traceback" not in done.stderr


def test_the_slurm_script_runs_train_metis_on_every_node_with_its_rank(tmp_path: Path) -> None:
    """With stand-ins for the two Slurm commands it calls."""
    for name, body in (("scontrol", "printf 'node7\\nnode8\\n'"),
                       ("srun", 'shift; for i in 0 1; do SLURM_NODEID=$i "$@"; done')):
        (tmp_path / name).write_text(f"#!/bin/bash\n{body}\n")
        (tmp_path / name).chmod(0o755)
    done = script("bash", "launch/slurm.sbatch", "0.1", PATH=f"{tmp_path}:{os.environ['PATH']}", PYTHON="/bin/echo",
                  MODEL_PATH="/m", GPUS_PER_NODE="4", SLURM_SUBMIT_DIR=str(ROOT), SLURM_JOB_NUM_NODES="2", SLURM_JOB_ID="12",
                  SLURM_JOB_NODELIST="node[7-8]")
    lines = done.stdout.splitlines()
    assert done.returncode == 0 and len(lines) == 2, done.stderr
    for rank, line in enumerate(lines):
        assert f"--num_machines 2 --machine_rank {rank} --main_process_ip node7 --main_process_port 20012" in line
        assert "--num_processes 8" in line and "--set hdpo.w_tool=0.1" in line


def test_a_launcher_without_a_script_and_other_scripts_without_arguments_say_what_they_need() -> None:
    done = script(sys.executable, "-m", "hdpo.adapters.launcher")
    assert done.returncode == 2 and "hdpo: error: the following arguments are required: training_script" in done.stderr
    assert len(done.stderr.splitlines()) < 4
    for name, message in (("start_judge.sh", "usage: launch/start_judge.sh MODEL [PORT]"),
                          ("slurm.sbatch", "submit this script with sbatch"), ("start_tool_server.sh x", "usage: ")):
        done = script("bash", *f"launch/{name}".split())
        assert done.returncode != 0 and message in done.stderr and len(done.stderr.splitlines()) == 1


def test_more_ranks_than_devices_are_refused_with_the_right_number(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    monkeypatch.setenv("WORLD_SIZE", "32")
    with pytest.raises(ConfigError, match="8 ranks were started on this machine, GPUs are 2: .* --num_processes 8, "):
        check_devices()


@pytest.mark.parametrize(("address", "message"), [
    ("127.0.0.1", "no answer from MASTER_ADDR 127.0.0.1, MASTER_PORT 9, within 1 s (Connection refused); is NODE_RANK=0 running"),
    ("no-such-host.invalid", "MASTER_ADDR no-such-host.invalid is no known host name or address")])
def test_an_unreachable_node_0_is_one_line_within_a_bounded_time(address: str, message: str) -> None:
    done = script(METIS, PYTHON=sys.executable, MODEL_PATH="/m", NNODES="2", NODE_RANK="1", MASTER_ADDR=address, MASTER_PORT="9",
                  GPUS_PER_NODE="1", JOIN_TIMEOUT_S="1", OMP_NUM_THREADS="1")
    errors = [line for line in done.stderr.splitlines() if line.startswith("hdpo: error: ")]
    assert done.returncode == 2 and len(errors) == 1 and message in errors[0], done.stderr
    assert "Traceback" not in done.stderr


def test_a_node_that_never_comes_is_one_line_within_a_bounded_time() -> None:
    done = script(METIS, PYTHON=sys.executable, MODEL_PATH="/m", NNODES="2", NODE_RANK="0", MASTER_ADDR="127.0.0.1",
                  MASTER_PORT=str(free_port()), GPUS_PER_NODE="1", JOIN_TIMEOUT_S="1", OMP_NUM_THREADS="1",
                  ACCELERATE_CONFIG="launch/accelerate/cpu2.yaml")
    assert done.returncode == 2 and "not all of 2 nodes came to 127.0.0.1" in done.stderr.splitlines()[-1]
    assert "Traceback" not in done.stderr


def test_the_interface_towards_node_0_is_the_one_that_routes_there() -> None:
    assert interface_towards("127.0.0.1") == "lo"
    assert interface_towards("no-such-host.invalid") == ""


def restarting(script: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run a script on two ranks, with three restarts."""
    return subprocess.run(command(script, arguments, 2, "--max_restarts", "3"), cwd=ROOT, text=True, timeout=120,
                          env=os.environ | cpu_environment(2), capture_output=True)


def errors_of(done: subprocess.CompletedProcess[str]) -> list[str]:
    assert "Traceback" not in done.stderr and "FAILED" not in done.stderr, done.stderr
    return [line for line in done.stderr.splitlines() if "error: " in line]


def test_a_user_error_on_every_rank_is_printed_once_and_a_restart_is_not_tried() -> None:
    done = restarting("launch/train_sft.py", "--config", "launch/configs/demo_sft.yaml", "--set", "model.path=/nowhere")
    (line,) = errors_of(done)
    assert done.returncode == 2 and line.endswith("error: model.path: no such folder: /nowhere")
    assert done.stderr.splitlines()[-1] == line


def test_a_user_error_of_one_rank_alone_is_printed_by_it_and_ends_all_without_a_restart(tmp_path: Path) -> None:
    done = restarting("tests/support/ranks/fail_first.py", "user", str(tmp_path / "notes"))
    assert errors_of(done) == ["hdpo (rank 1): error: rows.parquet: no such file, on this rank alone"]
    assert done.returncode == 2 and (tmp_path / "notes").read_text() == "life\n"


def test_a_killed_rank_is_named_by_the_launcher_and_all_start_again(tmp_path: Path) -> None:
    done = restarting("tests/support/ranks/fail_first.py", "kill", str(tmp_path / "notes"))
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("hdpo: ")]
    assert line.startswith("hdpo: rank 1 on ") and "was ended by SIGKILL; all ranks start again (restart 1 of 3)" in line
    assert done.returncode == 0 and (tmp_path / "notes").read_text() == "life\n" * 2


# -- two nodes ---------------------------------------------------------------------------------------------------------


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("", 0))
        return int(probe.getsockname()[1])


class Nodes:
    """Two machines as far as a trainer can tell: network namespaces joined by a cable, HOME and TMPDIR of their own.

    Without the right to make namespaces: two launchers with their own rendezvous on one network.
    """

    def __init__(self, folder: Path) -> None:
        self.folder, self.tag = folder, f"hdpo{os.getpid() % 100000}"
        self.namespaces = self._join()
        self.address = "10.213.7.1" if self.namespaces else "127.0.0.1"
        for node in (0, 1):
            for name in ("home", "tmp"):
                (folder / f"node{node}" / name).mkdir(parents=True)

    def _join(self) -> bool:
        a, b = (f"{self.tag}{i}" for i in (0, 1))
        steps = [f"netns add {a}", f"netns add {b}", f"link add {a} netns {a} type veth peer name {b} netns {b}"]
        for i, name in enumerate((a, b)):
            steps += [f"-n {name} address add 10.213.7.{i + 1}/24 dev {name}", f"-n {name} link set {name} up",
                      f"-n {name} link set lo up"]
        if os.geteuid() or not shutil.which("ip"):
            return False
        for step in steps:
            if subprocess.run(["ip", *step.split()], capture_output=True).returncode:
                self.close()
                return False
        return True

    def start(self, node: int, arguments: list[str], port: int, **environment: str) -> Running:
        """`arguments` are launched on a node with the reference's variables set."""
        own = self.folder / f"node{node}"
        inside = ["ip", "netns", "exec", f"{self.tag}{node}"] if self.namespaces else []
        variables = {"NNODES": "2", "NODE_RANK": str(node), "MASTER_ADDR": self.address, "MASTER_PORT": str(port),
                     "GPUS_PER_NODE": "1", "HOME": str(own / "home"), "TMPDIR": str(own / "tmp"), "PYTHON": sys.executable,
                     "ACCELERATE_CONFIG": str(ROOT / "launch/accelerate/cpu2.yaml"),
                     "TORCH_EXTENSIONS_DIR": str(COMPILED),    # compiled once for this machine, not for each HOME
                     "CONFIG": str(ROOT / "launch/configs/demo_rl.yaml")}
        return Running([*inside, *arguments], own / f"log{port}", variables | environment, ranks=2)

    def run(self, arguments: list[list[str]], meanwhile: Callable[[list[Running]], None] = lambda running: None,
            **environment: str) -> tuple[list[int], list[Running]]:
        """Exit statuses and outputs of both nodes, the second one started first."""
        port = free_port()
        running = [self.start(node, [part.replace("{port}", str(port)) for part in arguments[node]], port, **environment)
                   for node in (1, 0)][::-1]
        try:
            meanwhile(running)
            return [node.end(300) for node in running], running
        finally:
            for node in running:
                node.kill()

    def close(self) -> None:
        for i in (0, 1):
            subprocess.run(["ip", "netns", "delete", f"{self.tag}{i}"], capture_output=True)


@pytest.fixture(scope="module")
def nodes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Nodes]:
    nodes = Nodes(tmp_path_factory.mktemp("nodes"))
    yield nodes
    nodes.close()


def sft_arguments(world: World, folder: Path) -> list[str]:
    return ["--config", "launch/configs/demo_sft.yaml", *settings(
        run__folder=folder, run__name="sft", model__path=BASE, data__train=f"[{world.demos}]", optim__steps=1,
        optim__rows_per_step=8)]


@pytest.fixture(scope="module")
def two_nodes_sft(nodes: Nodes, toy_world: World) -> Path:
    """One SFT step on two nodes, started by plain torchrun; the run's folder."""
    shared = nodes.folder / "shared"
    statuses, running = nodes.run([
        [sys.executable, "-m", "torch.distributed.run", "--nnodes", "2", "--node-rank", str(node), "--nproc-per-node", "1",
         "--master-addr", nodes.address, "--master-port", "{port}", "launch/train_sft.py", *sft_arguments(toy_world, shared)]
        for node in (0, 1)])
    assert statuses == [0, 0], [node.text()[-2000:] for node in running]
    return shared / "sft"


@pytest.mark.engine
@pytest.mark.slow
def test_two_nodes_take_the_same_sft_step_as_two_ranks_of_one(two_nodes_sft: Path, toy_world: World, tmp_path: Path) -> None:
    done = accelerate("launch/train_sft.py", sft_arguments(toy_world, tmp_path))
    assert done.returncode == 0, done.stderr[-3000:]
    weights = [(step_folders(run)[-1] / "model.safetensors").read_bytes() for run in (two_nodes_sft, tmp_path / "sft")]
    assert weights[0] == weights[1]


@pytest.mark.engine
@pytest.mark.slow
@pytest.mark.long
def test_train_metis_trains_on_two_nodes_with_a_tool_server_on_each_and_starts_both_again_when_a_rank_is_killed(
        nodes: Nodes, two_nodes_sft: Path, toy_world: World) -> None:
    folder = two_nodes_sft.parent
    run = folder / "rl"

    def kill_a_rank(running: list[Running]) -> None:
        running[1].until(lambda: step_folders(run))
        running[1].rank(1).kill()

    statuses, running = nodes.run([[METIS, "0.15", *settings(
        rollout__engine="hf", rollout__prompts_per_step=4, rollout__group_size=2, optim__mini_batch_prompts=4, optim__steps=3,
        checkpoint__every_steps=1, eval__before="false", eval__after="false", tools__text_index=toy_world.text_index,
        tools__image_index=toy_world.image_index)]] * 2, kill_a_rank, MAX_RESTARTS="1",
        MODEL_PATH=str(step_folders(two_nodes_sft)[-1]), TRAIN_DATA=f"[{toy_world.train}]", RUN_FOLDER=str(folder), RUN_NAME="rl")
    assert statuses == [0, 0], [node.text()[-2000:] for node in running]
    for number, node in enumerate(running):
        (line,) = [line for line in node.lines("hdpo: ") if "all ranks start again (restart 1 of 1)" in line]
        assert f"hdpo: rank {number} on " in line
    assert "died, in " in running[0].lines("hdpo (rank 0)")[0]       # the other node's rank is named here
    assert len(read_rollouts(run / "rollouts" / "step_000001.parquet")) == 4 * 2     # of both nodes
    assert {file.name for file in run.glob("tool_server_*.log")} == {"tool_server_0.log", "tool_server_1.log"}
    rows = [row for row in read_metrics(run / "metrics.jsonl") if "actor/grad_norm" in row]
    assert [row["step"] for row in rows] == [1, 2, 3]
    assert all(row["mismatch/ratio_max"] < 1 + 1e-3 for row in rows)    # the largest of both nodes: the trainer's weights
    assert {"config.json", "model.safetensors", "trainer"} <= {file.name for file in step_folders(run)[-1].iterdir()}


@pytest.mark.engine
@pytest.mark.slow
@pytest.mark.long
def test_a_run_folder_that_nodes_do_not_share_is_refused_in_one_line(nodes: Nodes, toy_world: World) -> None:
    statuses, running = nodes.run([
        command("launch/train_sft.py", sft_arguments(toy_world, nodes.folder / f"node{node}"), 2, "--num_machines", "2",
                "--machine_rank", str(node), "--main_process_ip", nodes.address, "--main_process_port", "{port}")
        for node in (0, 1)])
    assert statuses == [2, 2]
    for node in running:
        assert "is not the folder that node 0 writes; set run.folder to one that all nodes share" in node.lines("hdpo")[-1]


# -- Ctrl-C ------------------------------------------------------------------------------------------------------------


@pytest.mark.engine
@pytest.mark.slow
def test_ctrl_c_in_the_demos_rl_phase_finishes_the_step_saves_and_leaves_no_process(tmp_path: Path) -> None:
    small = ["rollout.prompts_per_step=2", "rollout.group_size=2", "optim.mini_batch_prompts=2", "rollout.engine=hf",
             "eval.before=false", "eval.after=false", "checkpoint.every_steps=100"]
    arguments = [sys.executable, "-m", "hdpo", "demo", "--run", str(tmp_path / "demo"), "--set-sft", "optim.steps=1",
                 "--set-sft", "optim.rows_per_step=8", *(part for item in small for part in ("--set-rl", item))]
    running = Running(arguments, tmp_path / "log", {})
    metrics = tmp_path / "demo" / "metrics.jsonl"
    try:
        running.until(lambda: metrics.is_file() and metrics.read_text().count("\n") >= 1, 600)
        processes = psutil.Process(running.process.pid).children(recursive=True)
        os.killpg(running.process.pid, signal.SIGINT)      # as a terminal does; ranks are in sessions of their own
        assert running.end() == 130
        assert psutil.wait_procs(processes, timeout=20)[1] == []
    finally:
        running.kill()
    (checkpoint,) = step_folders(tmp_path / "demo")
    done = int(checkpoint.name.removeprefix("step_"))
    assert len(metrics.read_text().splitlines()) == done >= 1
    assert running.lines("stopped after step") == [f"stopped after step {done}; the same command goes on from there"]
    said = running.lines("hdpo")
    assert "stopping" in said[0] and "interrupted" in said[-1]
    assert all("ended by SIGTERM outside of training; what is saved is kept" in line for line in said[1:-1])   # by the launcher
    assert "Traceback" not in running.text()
