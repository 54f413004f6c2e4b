"""What a rank's step and a Python session hold on the host, planned and measured, and the plan of a node of the paper's run.

Used by bench_scale.py.
"""
from __future__ import annotations

import asyncio
from pathlib import Path

import corpus
from bench_data import own_memory
from bench_sandbox import descendants, make_sandbox, memory, settled, template_pid
from common import Figure

from hdpo.agent.chat import ChatFormat
from hdpo.config import ModelConfig
from hdpo.config.file import load_config
from hdpo.doctor.host_plan import PIXEL_BYTES, SESSION, TOKEN_BYTES
from hdpo.doctor.memory_plan import plan
from hdpo.doctor.shapes import shapes_of
from hdpo.train.samples import BYTES_PER_PIXEL

GIB = 2**30
CROP = "w, h = image_1.size\nimage_1.crop((w // 4, h // 4, w // 2, h // 2))"


def node() -> dict[str, Figure]:
    """Qwen3-VL-8B with the shipped settings, 8 H100 a node."""
    from transformers import Qwen3VLConfig

    text = dict(hidden_size=4096, intermediate_size=12288, num_hidden_layers=36, num_attention_heads=32, head_dim=128,
                num_key_value_heads=8, vocab_size=151936, max_position_embeddings=262144)
    vision = dict(depth=27, hidden_size=1152, intermediate_size=4304, num_heads=16, patch_size=16, spatial_merge_size=2,
                  temporal_patch_size=2, out_hidden_size=4096, num_position_embeddings=2304, deepstack_visual_indexes=[8, 16, 24])
    shapes = shapes_of(Qwen3VLConfig(text_config=text, vision_config=vision, tie_word_embeddings=False), ModelConfig())
    config = load_config(Path(__file__).parents[1] / "launch/configs/metis_8b_rl.yaml", [], environment={})
    made = plan(config, shapes, 8, int(79.1 * GIB), 2)
    return {"S9 host memory of a node of the paper's run, planned": Figure(
        max(map(made.host_total, made.host)) / GIB, "GiB", "lower", 256, 0.05)}


def rank(chat: ChatFormat, made: list, before: int) -> dict[str, Figure]:
    """`made`: a rank's groups with nothing shared between rollouts but the prompt; `before`: what was held without them."""
    images = {key: image for group in made for one in group.trajectories for key, image in zip(one.image_keys, one.images)}
    patches = [chat.vision([image]) for image in images.values()]
    held, rollouts = own_memory() - before, [one for group in made for one in group.trajectories]
    pixels = sum(image.width * image.height for image in images.values())
    planned = (PIXEL_BYTES + BYTES_PER_PIXEL) * pixels + TOKEN_BYTES * sum(len(one.token_ids) for one in rollouts)
    del patches
    return {"S9 a rank's pictures and trajectories, planned": Figure(planned / GIB, "GiB", "lower", None, 0.5),
            "S9 the same, measured / planned": Figure(held / planned, "x", "lower", 1.05, 0.3)}


def sessions(count: int) -> dict[str, Figure]:
    """`count` live ones, each with a picture of the corpus, two to a group, and the crop of its middle that a cell showed."""
    async def held() -> float:
        sandbox = make_sandbox("process")
        await sandbox.start()
        try:
            template = template_pid(sandbox)
            before = await settled(template)
            for number in range(count):
                await sandbox.open(f"s{number}", [corpus.row(number // 2)["images"][0]["bytes"]])
                shown = await sandbox.run(f"s{number}", CROP, 60.0)
                assert shown.ok, shown
            return memory([pid for pid in descendants(template) if pid not in before]) * 2**20
        finally:
            await sandbox.shutdown()
    return {"S9 a session with a picture and a crop, measured / planned": Figure(
        asyncio.run(held()) / count / SESSION, "x", "lower", 1.05, 0.3)}
