"""What a run consists of, in the order in which its parts must be opened.

The policy opens the process group, the engine is built on all ranks together beside it, and what waits (tools, judge) lives
on one background loop per rank. `Stage` closes everything in reverse, also after an error.
"""
from __future__ import annotations

import contextlib
import errno
import signal
from collections.abc import Sequence
from typing import Any

from hdpo.adapters.chat_format import open_chat
from hdpo.agent.rollout import Rollouts
from hdpo.assistant.session import Assistant
from hdpo.background import BackgroundLoop, freeze_heap
from hdpo.compose.checks import check_devices, check_launcher, check_rl
from hdpo.compose.folder import begin_run
from hdpo.compose.logs import open_log, open_run_folder
from hdpo.compose.own_tools import with_mcp_tools
from hdpo.compose.policy import build_packing, build_reference, open_policy, plan_memory
from hdpo.compose.rollouts import open_engine, open_rollouts
from hdpo.compose.scoring import open_scorer
from hdpo.compose.tools import NoTools, open_tools
from hdpo.config import Config
from hdpo.data.tasks import DemonstrationStream, TaskStream, read_demonstrations, read_tasks
from hdpo.doctor.doctor import check_tools
from hdpo.doctor.memory_plan import check_tensor_parallel
from hdpo.doctor.own_code import check_own
from hdpo.errors import ConfigError, DataError
from hdpo.evaluation.evaluate import Evaluator
from hdpo.evaluation.runner import bounded_sequences
from hdpo.protocols import Engine
from hdpo.ranks.nodes import choose_interface
from hdpo.ranks.watchdog import Limits
from hdpo.ranks.world import World
from hdpo.reward.scoring import Scorer
from hdpo.state.spool import Spool
from hdpo.train.rl import RlParts
from hdpo.train.sampled import Sampled
from hdpo.train.samples import PixelPool
from hdpo.train.sft import SftParts
from hdpo.train.sync import WeightSync
from hdpo.types import Task

SFT_SHOWN = [("loss", "sft/loss"), ("held out", "eval/sft_loss"), ("acc", "eval/accuracy"), ("grad", "actor/grad_norm")]
RL_SHOWN = [("acc", "reward/accuracy/mean"), ("tools", "tool/rate"), ("needed", "tool/rate_needed"),
            ("blind", "tool/rate_not_needed"), ("|Q|", "hdpo/q_size_mean"), ("k3", "mismatch/k3"), ("s", "time/step")]


class Stage(contextlib.ExitStack):
    """Everything one command holds open. Parts register how they are closed as they are opened."""

    def __init__(self, config: Config, steal_lock: bool = False) -> None:
        super().__init__()
        self.config, self._steal_lock = config, steal_lock
        self.world = World(limits=Limits(config.run.hang_timeout_s, config.run.stuck_timeout_s))
        self.callback(self.world.close)
        check_devices()
        self.chat = open_chat(config.model)

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
        config, chat = self.config, self.chat
        check_launcher()
        lock = begin_run(config, "sft", self._steal_lock, self)
        max_tokens = min(config.max_model_len, config.batch.tokens_per_micro_batch)
        demonstrations = DemonstrationStream(config.data.train, chat, config.data, seed=config.run.seed, max_tokens=max_tokens,
                                             rows_per_step=config.optim.rows_per_step)
        self.callback(demonstrations.close)
        held_out = (read_demonstrations(config.data.val, chat, config.data, config.eval.rows, max_tokens)
                    if config.eval.every_steps and config.data.val else [])
        tasks = self.held_out(config.eval.tasks)
        if tasks:
            config = self.config = with_mcp_tools(config)
            check_tensor_parallel(config, self.world.size)
        plan_memory(config, sft=True)
        policy, checkpoints = open_policy(config, chat, self.world, lock, self)
        if tasks:
            policy.park()
        sampling = self._sampling(policy.world) if tasks else None
        log = open_log(config, policy.world, SFT_SHOWN, checkpoints.start_step, self)
        spec, sampled = build_packing(config, chat), None
        if sampling is not None:
            engine, rollouts, scorer = sampling
            sampled = Sampled(config, engine, rollouts, Evaluator(config, rollouts, scorer, tasks, policy.world),
                              WeightSync(policy, engine, chat, spec, config, log))
        return SftParts(policy, chat, spec, demonstrations, held_out, log, checkpoints, sampled)

    def rl(self) -> RlParts:
        config, chat = self.config, self.chat
        check_launcher()
        lock = begin_run(config, "rl", self._steal_lock, self)
        config = self.config = with_mcp_tools(config)
        tasks = TaskStream(config.data.train, chat, config.data, seed=config.run.seed, max_images=config.rollout.max_images)
        self.callback(tasks.close)
        held_out = self.held_out(config.data.val)
        check_rl(config, chat)
        check_tensor_parallel(config, self.world.size)
        plan_memory(config)
        policy, checkpoints = open_policy(config, chat, self.world, lock, self)
        world = policy.world
        policy.park()      # the engine measures what device memory is left
        reference = build_reference(config, policy)
        engine, rollouts, scorer = self._sampling(world)
        log = open_log(config, world, RL_SHOWN, checkpoints.start_step, self)
        evaluator = Evaluator(config, rollouts, scorer, held_out, world)
        pixels = PixelPool(chat)
        self.callback(pixels.close)
        freeze_heap()
        spec = build_packing(config, chat)
        sync = WeightSync(policy, engine, chat, spec, config, log)
        return RlParts(policy, engine, chat, rollouts, scorer, tasks, evaluator, spec, sync, pixels, log, checkpoints,
                       self.enter_context(Spool(config, world, checkpoints.content)), reference)

    def _sampling(self, world: World) -> tuple[Engine, Rollouts, Scorer]:
        """What rolls out beside a policy, which is parked, and says what is right."""
        config = self.config
        background, backend = open_tools(config, world, self)
        engine = open_engine(config, self.chat, self)
        rollouts = open_rollouts(config, self.chat, engine, backend, background, self)
        rollouts.progress = world.progress
        return engine, rollouts, open_scorer(config, background, world, self)

    def evaluation(self) -> Evaluator:
        """Engine, tools and scorer without a policy, for `hdpo eval`."""
        begin_run(self.config, "eval", self._steal_lock, self)
        config, chat = with_mcp_tools(self.config), self.chat
        check_tensor_parallel(config, self.world.size)
        choose_interface()
        world = self.world.connect()
        held_out = self.held_out(config.data.val)
        if not held_out:
            raise ConfigError("data.val is empty: name files of held-out rows (VAL_DATA)")
        world.phase("evaluation", 0)
        open_run_folder(config, world, {})
        background, backend = open_tools(config, world, self)
        engine = open_engine(config, chat, self)
        rollouts = open_rollouts(config, chat, engine, backend, background, self)
        rollouts.progress = world.progress
        return Evaluator(config, rollouts, open_scorer(config, background, world, self), held_out, world)

    def benchmarks(self) -> BenchmarkParts:
        """The ranks are connected; engine and tools are opened by `open`, when there is something to roll out."""
        begin_run(self.config, "eval", self._steal_lock, self)
        self.config = with_mcp_tools(self.config)
        check_tensor_parallel(self.config, self.world.size)
        choose_interface()
        world = self.world.connect()
        open_run_folder(self.config, world, {})
        return BenchmarkParts(self)

    def sampling(self) -> tuple[Rollouts, Scorer]:
        """Engine and scorer alone, for rollouts without tools. Each rank's engine works by itself."""
        config, chat = self.config, self.chat
        world = self.world.connect()
        background = BackgroundLoop()
        self.callback(background.close)
        rollouts = open_rollouts(config, chat, open_engine(config, chat, self), NoTools(), background, self)
        return rollouts, open_scorer(config, background, world, self)

    def assistant(self) -> Assistant:
        """Engine and tools of this process alone, for people's questions."""
        config, chat = self.config, self.chat
        check_own(config)
        check_tools(config)
        check_tensor_parallel(config, 1)
        background, backend = open_tools(config, None, self)
        assistant = Assistant(open_engine(config, chat, self), chat, backend, background, config)
        self.callback(assistant.close)
        return assistant

    def held_out(self, files: Sequence[str]) -> Sequence[Task]:
        config = self.config
        return read_tasks(files, self.chat, config.data, config.eval.rows, config.rollout.max_images) if files else []


class BenchmarkParts:
    """What `hdpo eval --benchmarks` rolls out with: one engine, tools, and rollouts whose calls run or are refused."""

    def __init__(self, stage: Stage) -> None:
        self._stage = stage

    def open(self) -> None:
        """Load the model. Collective."""
        stage = self._stage
        self.background, self._backend = open_tools(stage.config, stage.world, stage)
        self._engine = open_engine(stage.config, stage.chat, stage)

    def rollouts(self, refuse: bool) -> Rollouts:
        config = bounded_sequences(self._stage.config, self._stage.chat.max_pixels)
        if refuse:
            config = config.model_copy(update={"tools": config.tools.none})
        return open_rollouts(config, self._stage.chat, self._engine, self._backend, self.background, self._stage)
