"""Chooses the generation engine."""
from __future__ import annotations

import importlib.util
from typing import Any, Literal

from hdpo.config import RolloutConfig
from hdpo.errors import ConfigError
from hdpo.protocols import Engine


def make_engine(kind: Literal["auto", "vllm", "hf"], model_path: str, *, config: RolloutConfig, **arguments: Any) -> Engine:
    """A `VllmEngine` or `HfEngine` with the same `arguments`; auto is vLLM where it is installed.

    With `config.tensor_parallel` it is a `protocols.SharedEngine`; the process group exists then, and all ranks call this.
    Raises ConfigError when vLLM is needed and not installed.
    """
    arguments["config"] = config
    installed = importlib.util.find_spec("vllm") is not None
    if kind == "vllm" and not installed:
        raise ConfigError("rollout.engine: vllm is not installed; use `pip install hdpo[gpu]`, hdpo[cpu], or engine hf")
    if kind != "hf" and installed:
        from hdpo.adapters.vllm_engine import VllmEngine

        if config.tensor_parallel == 1:
            return VllmEngine(model_path, **arguments)
        from hdpo.adapters.lockstep import LockstepEngine, neighbours

        group = neighbours(config.tensor_parallel)
        return LockstepEngine(VllmEngine(model_path, **arguments), group)
    if config.tensor_parallel > 1:
        raise ConfigError(f"rollout.tensor_parallel ({config.tensor_parallel}) needs vLLM; set it to 1")
    from hdpo.adapters.hf_engine import HfEngine

    return HfEngine(model_path, **arguments)
