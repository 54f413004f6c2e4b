"""What many tests share: the torchvision shim, a tiny Qwen3-VL, an embedded world, judges, a background loop."""
from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from hypothesis import settings

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

from hdpo.adapters import torchvision_shim  # noqa: E402
from hdpo.background import BackgroundLoop  # noqa: E402

torchvision_shim.activate()
settings.register_profile("hdpo", deadline=None, max_examples=50, derandomize=True)   # one slow import is no failure
settings.load_profile("hdpo")

if TYPE_CHECKING:
    from judge_server import Judges

    from hdpo.agent.chat import ChatFormat
    from hdpo.toyworld.world import World


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests marked docker need an engine with the sandbox image, those marked gpu a CUDA device; elsewhere they are skipped.

    HDPO_REQUIRE_DOCKER=1, as CI sets it, makes a missing engine an error.
    """
    if any(item.get_closest_marker("docker") for item in items) and (missing := _docker_missing()):
        if os.environ.get("HDPO_REQUIRE_DOCKER"):
            pytest.exit(f"container tests can't run: {missing}", returncode=1)
        for item in items:
            if item.get_closest_marker("docker"):
                item.add_marker(pytest.mark.skip(reason=missing))


def _docker_missing() -> str:
    if not shutil.which("docker"):
        return "no docker client"
    if subprocess.run(["docker", "info"], capture_output=True).returncode:
        return "no Docker engine answers"
    image = os.environ.get("HDPO_SANDBOX_IMAGE", "hdpo-sandbox")
    if subprocess.run(["docker", "image", "inspect", image], capture_output=True).returncode:
        return f"no image {image}; `make sandbox` builds it"
    return ""


@pytest.fixture
def background() -> Iterator[BackgroundLoop]:
    loop = BackgroundLoop()
    yield loop
    loop.close()


@pytest.fixture
def judges() -> Iterator[Judges]:
    from judge_server import Judges
    them = Judges()
    yield them
    them.close()


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Qwen3-VL whose tokenizer has one token a byte and whose image processor has patches of 8, merged by 2."""
    from tiny_models import save_tiny_qwen3_vl
    return save_tiny_qwen3_vl(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="session")
def chat(tiny_folder: Path) -> ChatFormat:
    """Images of 32 x 32 to 64 x 64 pixels: 4 to 16 tokens each."""
    from hdpo.agent.chat import load_chat_format
    return load_chat_format(str(tiny_folder), min_pixels=1024, max_pixels=4096)


@pytest.fixture(scope="session")
def real_vocabulary_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Qwen3-VL with the published vocabulary, where the package that ships it is installed (the dev extra has it)."""
    from real_vocabulary import save_real_vocabulary, vocabulary_file
    file = vocabulary_file()
    if file is None:
        pytest.skip("Qwen's vocabulary is not here: pip install dashscope")
    return save_real_vocabulary(tmp_path_factory.mktemp("real"), file)


@pytest.fixture(scope="session")
def toy_world(tmp_path_factory: pytest.TempPathFactory) -> World:
    """A small embedded world."""
    from hdpo.toyworld.world import make_world
    return make_world(tmp_path_factory.mktemp("world"), seed=5, train_rows=60, val_rows=20, demos=600)


@pytest.fixture(scope="session")
def sft_run(tmp_path_factory: pytest.TempPathFactory, toy_world: World) -> Path:
    """Enough SFT on two ranks for well-formed tool calls; the run's folder. It takes a minute: tests share it."""
    from launching import BASE, accelerate, settings
    folder = tmp_path_factory.mktemp("runs")
    done = accelerate("launch/train_sft.py", ["--config", "launch/configs/demo_sft.yaml", *settings(
        run__folder=folder, run__name="sft", model__path=BASE, data__train=f"[{toy_world.demos}]", optim__steps=24,
        optim__rows_per_step=48, optim__lr=1e-3)])
    assert done.returncode == 0, done.stderr[-3000:]
    return folder / "sft"
