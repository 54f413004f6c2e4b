"""How vLLM is started inside a process that trains: its environment, its noise, and what it changes for all."""
from __future__ import annotations

import contextlib
import ctypes
import logging
import os
import random
import sys
import tempfile
import warnings
from collections.abc import Iterator
from typing import Any

from hdpo.errors import ConfigError
from hdpo.ranks.world import local_device

LIBRARIES = {"libnuma.so.1": "libnuma1"}
"""What the kernels of vLLM's CPU build are linked against and no package of Python brings, and Debian's package."""


def check_libraries() -> None:
    """Raises ConfigError where vLLM's CPU build could not load its kernels: it only warns, and fails in a name it lacks later."""
    for library, package in LIBRARIES.items():
        try:
            ctypes.CDLL(library)
        except OSError:
            raise ConfigError(f"vLLM's CPU build needs the system's {library}, which is not there: apt-get install {package}, or "
                              "rollout.engine=hf, which is slow") from None


def start_engine(arguments: dict[str, Any]) -> Any:
    """Import vLLM and build the engine. What it reads from the environment is settled before. Raises ConfigError."""
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    from vllm import EngineArgs, LLMEngine
    from vllm.distributed.device_communicators import cpu_communicator
    from vllm.platforms import current_platform
    from vllm.v1.sample import sampler

    if current_platform.is_cpu():
        check_libraries()
        # vLLM compiles this one line with torch.compile: seconds at the first token, and a C++ compiler at run time.
        sampler.batched_count_greater_than = lambda x, values: (x >= values).sum(-1)
        # Its collectives in shared memory take the segment's name from the launch method, which is the same for any two runs
        # on a machine, and wait by spinning. torch.distributed does the same work.
        cpu_communicator.CpuCommunicator._all_group_ranks_share_shm_group_name = lambda self: False   # type: ignore
    return LLMEngine.from_engine_args(EngineArgs(**arguments))


@contextlib.contextmanager
def keeping_pictures(engine: Any) -> Iterator[None]:
    """vLLM forgets processed pictures whenever it sleeps, though they depend on no weights. Its cache has two halves, which must
    hold the same: neither is emptied here."""
    halves = (engine.renderer, "clear_mm_cache"), (engine.engine_core.engine_core, "reset_mm_cache")
    for owner, name in halves:
        setattr(owner, name, lambda: None)
    try:
        yield
    finally:
        for owner, name in halves:
            delattr(owner, name)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keep the noise of vLLM's start, C++ included, off the terminal; it is shown if the start fails.

    HDPO_DEBUG=1 leaves everything as it is. vLLM's loggers stay at ERROR afterwards: on CPU one of them warns each step.
    """
    if os.environ.get("HDPO_DEBUG"):
        yield
        return
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    sys.stdout.flush()
    sys.stderr.flush()
    with tempfile.TemporaryFile() as noise, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        saved = os.dup(1), os.dup(2)
        os.dup2(noise.fileno(), 1)
        os.dup2(noise.fileno(), 2)
        try:
            yield
        except BaseException:
            noise.seek(0)
            os.write(saved[1], noise.read())
            raise
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            for number, copy in zip((1, 2), saved, strict=True):
                os.dup2(copy, number)
                os.close(copy)
    logging.getLogger("vllm").setLevel(logging.ERROR)


@contextlib.contextmanager
def undisturbed_process() -> Iterator[None]:
    """vLLM seeds the global generators and lowers torch's thread count while it starts; the trainer keeps its own."""
    import numpy as np
    import torch

    python_state, numpy_state = random.getstate(), np.random.get_state()
    threads, set_num_threads = torch.get_num_threads(), torch.set_num_threads
    with torch.random.fork_rng(devices=[local_device()] if torch.cuda.is_available() else []):
        yield
    random.setstate(python_state)
    np.random.set_state(numpy_state)
    set_num_threads(threads)
