"""One collection of scripted rollouts, for tests of what becomes of trajectories."""
from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from scripted import Script, ScriptedEngine, ScriptedTools

from hdpo.agent.chat import ChatFormat
from hdpo.agent.queue import PromptQueue
from hdpo.agent.rollout import Rollouts
from hdpo.background import BackgroundLoop
from hdpo.config import RolloutConfig, ToolsConfig
from hdpo.types import Task, Trajectory


@pytest.fixture
def collect(chat: ChatFormat, background: BackgroundLoop) -> Callable[..., list[tuple[Trajectory, ...]]]:
    """Run one collection; returns its groups and leaves `.engine` and `.rollouts` for a closer look."""
    from test_rollout import task

    def run(script: Script, tools: ScriptedTools | None = None, tasks: list[Task] | None = None, *, group_size: int = 1,
            max_model_len: int = 4096, deterministic: bool = False, tools_config: dict[str, Any] | None = None,
            prepare: Callable[[Rollouts, ScriptedEngine], None] = lambda r, e: None, on_finished: Any = None,
            queue: PromptQueue | None = None, known: Any = None, first_index: int = 0, **config: Any,
            ) -> list[tuple[Trajectory, ...]]:
        run.engine = ScriptedEngine(chat, script)
        run.rollouts = Rollouts(run.engine, chat, tools or ScriptedTools(), background, RolloutConfig(**config),
                                ToolsConfig(**(tools_config or {})), max_model_len, seed=3, deterministic=deterministic)
        prepare(run.rollouts, run.engine)
        groups = run.rollouts.collect(tasks or [task()], group_size=group_size, temperature=1.0, step=5, weight_version=0,
                                      on_finished=on_finished, queue=queue, known=known, first_index=first_index)
        run.rollouts.close()
        assert run.engine.num_unfinished() == 0
        return groups
    return run
