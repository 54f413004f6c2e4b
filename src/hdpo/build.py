"""The composition root: configuration -> parts. The only file that knows every adapter.

Order matters. The policy opens the process group, the engine is built on all ranks together beside it, and what waits
(tools, judge) lives on one background loop per rank. `Stage` closes everything in reverse, also after an error.
"""
from __future__ import annotations

import contextlib
import errno
import json
import os
import signal
import socket
import time
import uuid
from pathlib import Path
from typing import Any

from PIL import Image

from hdpo.agent.chat import ChatFormat, load_chat_format
from hdpo.agent.rollout import Rollouts
from hdpo.background import BackgroundLoop, freeze_heap
from hdpo.config import Config
from hdpo.config_file import dump_config
from hdpo.data.tasks import DemonstrationStream, TaskStream, read_tasks
from hdpo.doctor.memory_plan import check_tensor_parallel, here
from hdpo.errors import ConfigError, DataError, boundary
from hdpo.evaluation.evaluate import Evaluator
from hdpo.packing.batching import PackingSpec
from hdpo.packing.costs import work_model
from hdpo.protocols import Engine, Judge, LogSink
from hdpo.ranks.nodes import choose_interface
from hdpo.ranks.watchdog import Limits
from hdpo.ranks.world import World
from hdpo.reward.audit import AuditLog
from hdpo.reward.scoring import Scorer
from hdpo.state.checkpoint import Checkpoints, step_folders
from hdpo.state.spool import Spool
from hdpo.toolserver.client import ToolClient, wait_until_healthy
from hdpo.toolserver.process import KeptToolServer
from hdpo.train.metrics import JsonlSink
from hdpo.train.rl import RlParts
from hdpo.train.runlog import RunLog
from hdpo.train.samples import PixelPool
from hdpo.train.sft import SftParts
from hdpo.train.sync import WeightSync
from hdpo.types import Sample, Task

NETWORK_FILE_S = 30.0   # how late a file of another node may appear on a network file system


class Stage(contextlib.ExitStack):
    """Everything one command holds open. Parts register how they are closed as they are built."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        self.world = World(limits=Limits(config.run.hang_timeout_s, config.run.stuck_timeout_s))
        self.callback(self.world.close)
        check_devices()
        self.chat = build_chat(config)

    def __exit__(self, kind: Any, exc: BaseException | None, trace: Any) -> bool | None:
        """Close all parts. A full disk becomes a UserError, and what another rank caused an error that names that rank."""
        known = exc
        if isinstance(exc, OSError) and exc.errno in (errno.ENOSPC, errno.EDQUOT):
            known = DataError(f"{exc.filename or self.config.run.path}: {exc.strerror}; checkpoints are intact, and the same "
                              "command goes on from the newest when there is space")
        if known is None:
            return super().__exit__(kind, exc, trace)
        # When one rank has failed the launcher ends all others at once; this one has to find out and say why first.
        told_to_end = signal.signal(signal.SIGTERM, signal.SIG_IGN)
        known = self.world.failed(known) or known
        try:
            return super().__exit__(kind, exc, trace)
        finally:
            signal.signal(signal.SIGTERM, told_to_end)
            if known is not exc:
                raise known from None

    def sft(self) -> SftParts:
        config = self.config
        demonstrations = DemonstrationStream(
            config.data.train, self.chat, config.data, seed=config.run.seed,
            max_tokens=min(config.max_model_len, config.batch.tokens_per_micro_batch))
        policy, checkpoints = self._policy()
        log = self._log(policy.world, [("loss", "sft/loss"), ("grad", "actor/grad_norm")])
        return SftParts(policy, self.chat, build_packing(config, self.chat), demonstrations, log,
                        checkpoints)

    def rl(self) -> RlParts:
        config = self.config
        tasks = TaskStream(config.data.train, self.chat, config.data, seed=config.run.seed)
        held_out = self.held_out()
        check_rl(config, self.chat)
        check_tensor_parallel(config, self.world.size)
        self._plan_memory()
        policy, checkpoints = self._policy()
        world = policy.world
        background, backend = self._tools(world)
        policy.park()      # the engine measures what device memory is left
        engine = self._engine()
        engine.sleep()     # until the first sync: a checkpoint may have to be loaded
        rollouts = self._rollouts(engine, backend, background)
        scorer = self._scorer(background, world)
        log = self._log(world, [("acc", "reward/accuracy/mean"), ("tools", "tool/rate"), ("needed", "tool/rate_needed"),
                                ("blind", "tool/rate_not_needed"), ("|Q|", "hdpo/q_size_mean"), ("k3", "mismatch/k3"),
                                ("s", "time/step")])
        evaluator = Evaluator(config, rollouts, scorer, held_out, world)
        pixels = PixelPool(self.chat)
        self.callback(pixels.close)
        freeze_heap()
        spec = build_packing(config, self.chat)
        sync = WeightSync(policy, engine, self.chat, spec, config, log)
        return RlParts(policy, engine, self.chat, rollouts, scorer, tasks, evaluator, spec, sync, pixels, log, checkpoints,
                       self.enter_context(Spool(config, world)))

    def evaluation(self) -> Evaluator:
        """Engine, tools and scorer without a policy, for `hdpo eval`."""
        check_tensor_parallel(self.config, self.world.size)
        choose_interface()
        world = self.world.connect()
        held_out = self.held_out()
        if not held_out:
            raise ConfigError("data.val is empty: name parquet files of held-out rows (VAL_DATA)")
        self._open_run_folder(world, {})
        background, backend = self._tools(world)
        rollouts = self._rollouts(self._engine(), backend, background)
        return Evaluator(self.config, rollouts, self._scorer(background, world), held_out, world)

    def held_out(self) -> list[Task]:
        config = self.config
        tasks = read_tasks(config.data.val, self.chat, config.data) if config.data.val else []
        return tasks[:config.eval.rows] if config.eval.rows else tasks

    # -- parts -----------------------------------------------------------------------------------------------------

    def _plan_memory(self) -> None:
        """On devices: refuse a run that can't fit, before anything is loaded, and show what will be held when."""
        import torch
        if torch.cuda.is_available():
            lines = here(self.config).lines()
            if World().is_main:
                print("\n".join(lines), flush=True)

    def _policy(self) -> tuple[Any, Checkpoints]:
        from hdpo.adapters.deepspeed_policy import DeepSpeedPolicy

        config = self.config
        choose_interface()
        policy = DeepSpeedPolicy(config.model, config.optim, self.chat.image_token_id, config.run.seed, self.world)
        self.callback(policy.close)
        self._open_run_folder(policy.world, {"config.yaml": dump_config(config)})
        check_shared_folder(config.run.path, policy.world)
        return policy, self.enter_context(Checkpoints(policy, config))   # before the log, which goes on from the newest

    def _open_run_folder(self, world: World, files: dict[str, str]) -> None:
        """Rank 0 makes it, with these files. Raises ConfigError."""
        if world.is_main:
            with boundary(ConfigError, "run.folder can't be written", OSError):
                self.config.run.path.mkdir(parents=True, exist_ok=True)
                for name, text in files.items():
                    (self.config.run.path / name).write_text(text)

    def _engine(self) -> Engine:
        from hdpo.adapters.engines import make_engine

        config, chat = self.config, self.chat
        engine = make_engine(
            config.rollout.engine, config.model.path, config=config.rollout, max_model_len=config.max_model_len,
            stop_token_ids=chat.stop_ids, tool_call_end_id=chat.tool_call_end_id, banned_token_ids=chat.banned_ids,
            image_limit=config.rollout.max_images, min_pixels=chat.min_pixels, max_pixels=chat.max_pixels,
            dtype=config.model.dtype, seed=config.run.seed)
        self.callback(engine.close)
        return engine

    def _tools(self, world: World) -> tuple[BackgroundLoop, ToolClient]:
        """The background loop and a client of the configured tool server, or of one started for this node."""
        config = self.config.tools
        background = BackgroundLoop()
        self.callback(background.close)
        url = config.url
        if not url:
            mine = self._start_tool_server(world) if world.local_rank == 0 else ""
            url = next(u for node, u in world.gather((world.node, mine)) if node == world.node and u)
        wait_until_healthy(url, timeout=30.0)
        client = ToolClient(url, timeout=config.call_timeout_s, retries=config.retries,
                            token=os.environ.get("HDPO_TOOL_SERVER_TOKEN"))
        self.callback(lambda: background.run(client.close(), timeout=10))
        return background, client

    def _start_tool_server(self, world: World) -> str:
        config = self.config.tools
        options = [
            "--tools", ",".join(config.allowed), "--sandbox", config.sandbox, "--python-timeout", str(config.python_timeout_s),
            "--call-timeout", str(config.call_timeout_s), "--search-provider", config.search_provider,
            "--search-results", str(config.search_results), "--max-image-searches", str(config.max_image_searches)]
        for flag, value in (("--text-index", config.text_index), ("--image-index", config.image_index),
                            ("--image-cache", config.image_cache)):
            options += [flag, value] if value else []
        self.config.run.path.mkdir(parents=True, exist_ok=True)
        server = KeptToolServer(options, self.config.run.path / f"tool_server_{world.node}.log")
        self.callback(server.stop)
        return server.url

    def _rollouts(self, engine: Engine, backend: ToolClient, background: BackgroundLoop) -> Rollouts:
        config = self.config
        rollouts = Rollouts(
            engine, self.chat, backend, background, config.rollout, config.tools, max_model_len=config.max_model_len,
            seed=config.run.seed, deterministic=config.run.deterministic)
        self.callback(rollouts.close)
        return rollouts

    def _scorer(self, background: BackgroundLoop, world: World) -> Scorer:
        scorer = Scorer(self.config.reward, build_judge(self.config, world.node), background,
                        AuditLog(self.config.run.path / "audit", world.rank))
        self.callback(scorer.close)
        return scorer

    def _log(self, world: World, shown: list[tuple[str, str]]) -> RunLog:
        config = self.config
        sinks: list[LogSink] = []
        if world.is_main:
            done = int(step_folders(config.run.path)[-1].name.removeprefix("step_")) if (
                config.run.resume and step_folders(config.run.path)) else 0
            sinks.append(JsonlSink(config.run.path / "metrics.jsonl", resume_step=done + 1))
            if config.log.tensorboard:
                from hdpo.adapters.tensorboard import TensorBoardSink
                sinks.append(TensorBoardSink(config.run.path / "tensorboard", resume_step=done + 1))
            if config.log.wandb:
                from hdpo.adapters.wandb import WandbSink
                sinks.append(WandbSink(config.run.name, config.run.path, config.model_dump(mode="json")))
        log = RunLog(config, world, sinks, shown)
        self.callback(log.close)
        return log


def check_devices() -> None:
    """Each rank needs a device of its own, unless all train on the CPU. Raises ConfigError."""
    import torch
    ranks, gpus = int(os.environ.get("LOCAL_WORLD_SIZE", 1)), torch.cuda.device_count()
    if 0 < gpus < ranks:
        nodes = int(os.environ.get("WORLD_SIZE", ranks)) // ranks
        raise ConfigError(f"{ranks} ranks were started on this machine, GPUs are {gpus}: launch with --num_processes "
                          f"{nodes * gpus}, or GPUS_PER_NODE={gpus} and launch/train_metis.sh")


def build_chat(config: Config) -> ChatFormat:
    from hdpo.adapters import torchvision_shim
    torchvision_shim.activate()
    return load_chat_format(config.model.path, config.model.min_pixels, config.model.max_pixels)


def build_judge(config: Config, node: int = 0) -> Judge | None:
    """The configured judge, or None: then what rules can't decide is unscored. Each node keeps verdicts in a file of its own:
    SQLite must not be shared over a network file system."""
    if not config.judge.base_url or not config.reward.judge:
        return None
    from hdpo.adapters.openai_judge import open_judges
    from hdpo.reward.panel import PanelJudge
    from hdpo.reward.verdict_cache import CachedJudge
    judges = open_judges(config.judge)
    cache = Path(config.judge.cache or config.run.path / "verdicts.sqlite")
    return CachedJudge(judges[0] if len(judges) == 1 else PanelJudge(judges),
                       cache.with_stem(f"{cache.stem}_node{node}") if node else cache)


def build_packing(config: Config, chat: ChatFormat) -> PackingSpec:
    """Budgets and the filler row: two tokens of text and, for a model that sees, one blank image of the smallest size."""
    from hdpo.adapters.policy_model import can_share_prompts
    blank = [chat.bound(Image.new("RGB", (chat.factor, chat.factor)))] if chat.sees else []
    segment = chat.observation("", blank, max_tokens=1 << 20)
    length = len(segment.expanded_ids)
    filler = Sample(list(segment.expanded_ids), [0] * length, [0.0] * length, (), (), chat.vision(segment.images))
    return PackingSpec(
        image_token_id=chat.image_token_id, merge_size=chat.merge_size, max_tokens=config.batch.tokens_per_micro_batch,
        max_patches=config.batch.patches_per_micro_batch, filler=filler, aggregation=config.hdpo.aggregation,
        response_budget=config.rollout.max_response_tokens, positions=chat.family.positions,
        work=work_model(json.loads((Path(config.model.path) / "config.json").read_text())),
        share_prompts=config.batch.share_prompts and can_share_prompts(config.model))


def check_rl(config: Config, chat: ChatFormat) -> None:
    """There must be prompts, and the largest rollout there can be must fit into a micro-batch, because it is trained whole."""
    if not config.data.train:
        raise DataError("data.train is empty: name parquet files of training rows (TRAIN_DATA)")
    image_tokens = config.rollout.max_images * chat.max_pixels // chat.factor**2 if chat.sees else 0
    patches = min(config.max_model_len, image_tokens) * chat.merge_size**2
    for name, budget, need in (
            ("batch.tokens_per_micro_batch", config.batch.tokens_per_micro_batch, config.max_model_len),
            ("batch.patches_per_micro_batch", config.batch.patches_per_micro_batch, patches)):
        if budget < need:
            raise ConfigError(f"{name} ({budget}) must be at least {need}: so large can one rollout be, by "
                              "data.max_prompt_tokens, rollout.max_response_tokens and rollout.max_images")


def check_shared_folder(run: Path, world: World) -> None:
    """All nodes write into one run folder: shards of a checkpoint, rollouts, logs. Collective. Raises ConfigError."""
    mark = world.broadcast(uuid.uuid4().hex)
    if world.is_main:
        (run / ".shared").write_text(mark)
    world.barrier()
    deadline = time.monotonic() + (NETWORK_FILE_S if world.node else 0)
    while not (seen := _reads(run / ".shared", mark)) and time.monotonic() < deadline:
        time.sleep(0.2)
    nodes = {node: (host, path) for node, host, path, ok in world.gather(
        (world.node, socket.gethostname(), str(run.resolve()), seen)) if not ok}
    for node, (host, path) in nodes.items():
        raise ConfigError(f"run.folder: {path} on node {node} ({host}) is not the folder that node 0 writes; "
                          "set run.folder to one that all nodes share")


def _reads(file: Path, text: str) -> bool:
    try:
        return file.read_text() == text
    except OSError:
        return False
