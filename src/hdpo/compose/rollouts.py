"""The engine and the loop that rolls trajectories out with it."""
from __future__ import annotations

from contextlib import ExitStack

from hdpo.agent.chat import ChatFormat
from hdpo.agent.rollout import Rollouts
from hdpo.background import BackgroundLoop
from hdpo.config import Config
from hdpo.protocols import Engine, ToolBackend


def open_engine(config: Config, chat: ChatFormat, closing: ExitStack) -> Engine:
    """On all ranks together: an engine may span several."""
    from hdpo.adapters.engines import make_engine

    engine = make_engine(
        config.rollout.engine, config.model.path, config=config.rollout, max_model_len=config.max_model_len,
        stop_token_ids=chat.stop_ids, tool_call_end_id=chat.tool_call_end_id, banned_token_ids=chat.banned_ids,
        spelled_end=chat.spelled_end, image_limit=config.rollout.max_images, min_pixels=chat.min_pixels,
        max_pixels=chat.max_pixels, dtype=config.model.dtype, seed=config.run.seed)
    closing.callback(engine.close)
    return engine


def open_rollouts(config: Config, chat: ChatFormat, engine: Engine, backend: ToolBackend, background: BackgroundLoop,
                  closing: ExitStack) -> Rollouts:
    rollouts = Rollouts(
        engine, chat, backend, background, config.rollout, config.tools, max_model_len=config.max_model_len,
        seed=config.run.seed, deterministic=config.run.deterministic)
    closing.callback(rollouts.close)
    return rollouts
