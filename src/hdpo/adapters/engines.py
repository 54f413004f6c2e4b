"""Chooses the generation engine."""
from __future__ import annotations

import importlib.util
from typing import Any, Literal

from hdpo.errors import ConfigError
from hdpo.protocols import Engine


def make_engine(kind: Literal["auto", "vllm", "hf"], model_path: str, **arguments: Any) -> Engine:
    """A `VllmEngine` or `HfEngine` with the same `arguments`; auto is vLLM where it is installed.

    Raises ConfigError when vLLM is asked for and not installed.
    """
    installed = importlib.util.find_spec("vllm") is not None
    if kind == "vllm" and not installed:
        raise ConfigError("rollout.engine: vllm is not installed; use `pip install hdpo[gpu]`, hdpo[cpu], or engine hf")
    if kind != "hf" and installed:
        from hdpo.adapters.vllm_engine import VllmEngine

        return VllmEngine(model_path, **arguments)
    from hdpo.adapters.hf_engine import HfEngine

    return HfEngine(model_path, **arguments)
