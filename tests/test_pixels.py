"""Patches of one uint8 frame make the very tensors of the image processor, wherever they are expanded."""
from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image

from hdpo.agent.chat import ChatFormat, load_chat_format
from hdpo.packing.batching import pack
from hdpo.pixels import CHUNK_PATCHES, PixelScale, expand
from hdpo.types import Vision, join


def processed(chat: ChatFormat, images: list[Image.Image]) -> Vision:
    """As the image processor makes it."""
    vision = chat._processed(images)
    assert vision is not None
    return vision


def pictures(chat: ChatFormat, *sizes: tuple[int, int]) -> list[Image.Image]:
    return [chat.bound(Image.effect_noise(size, 80 + 20 * i).convert("RGB").rotate(90 * i)) for i, size in enumerate(sizes)]


def test_frames_expand_to_the_processors_tensor_bit_for_bit_in_an_eighth_of_its_bytes(chat: ChatFormat) -> None:
    images = pictures(chat, (64, 48), (33, 70), (200, 9), (16, 16))
    frames, whole = chat.vision(images), processed(chat, images)
    assert frames is not None and frames.scale is not None
    assert torch.equal(frames.pixel_values, whole.pixel_values) and torch.equal(frames.grid_thw, whole.grid_thw)
    assert torch.equal(frames.expand(dtype=torch.bfloat16), whole.pixel_values.to(torch.bfloat16))
    assert 8 * sum(p.nbytes for p in frames.pixels) == whole.pixel_values.nbytes


@pytest.mark.parametrize(("mean", "std"), [
    ([0.5, 0.5, 0.5], [0.5, 0.5, 0.5]), ([0.48, 0.4578275, 0.40821073], [0.26862954, 0.2, 0.27])])
def test_every_value_of_a_pixel_is_scaled_as_the_processor_does(tiny_folder: Path, mean: list[float], std: list[float]) -> None:
    from transformers import AutoImageProcessor
    chat = load_chat_format(str(tiny_folder), min_pixels=1024, max_pixels=4096)
    chat._processor = AutoImageProcessor.from_pretrained(tiny_folder, image_mean=mean, image_std=std)
    chat.scale = chat._frame_scale()
    ramp = Image.frombytes("RGB", (64, 64), bytes((i + i // 256) % 256 for i in range(64 * 64 * 3)))
    frames = chat.vision([ramp])
    assert frames is not None and frames.scale is not None
    assert torch.equal(frames.pixel_values, processed(chat, [ramp]).pixel_values)


def test_a_processor_that_does_more_than_scale_keeps_its_own_tensors(tiny_folder: Path) -> None:
    from transformers import AutoImageProcessor
    chat = load_chat_format(str(tiny_folder), min_pixels=1024, max_pixels=4096)
    chat._processor = AutoImageProcessor.from_pretrained(tiny_folder, do_normalize=False)
    chat.scale = chat._frame_scale()
    (image,) = pictures(chat, (48, 48))
    vision = chat.vision([image])
    assert vision is not None and vision.scale is None and torch.equal(vision.pixel_values, processed(chat, [image]).pixel_values)


def test_expanding_in_chunks_changes_nothing() -> None:
    scale = PixelScale((100.5, 127.5, 3.0), (60.0, 127.5, 99.0), 2)
    frames = torch.randint(0, 256, (CHUNK_PATCHES + 77, 3 * 4), dtype=torch.uint8)
    apart = torch.cat([expand(part, scale) for part in frames.split(1000)])
    assert torch.equal(expand(frames, scale), apart) and apart.shape == (len(frames), 3 * 2 * 4)


def test_micro_batches_of_frames_are_those_of_the_processors_tensors(chat: ChatFormat, tiny_folder: Path) -> None:
    """What reaches the model is bit for bit the same, shared prompt or not."""
    from hdpo.adapters.policy_model import model_inputs
    from hdpo.compose.policy import build_packing
    from hdpo.config import Config
    from hdpo.types import Sample
    spec = build_packing(Config.model_validate({"model": {"path": str(tiny_folder)}}), chat)
    prompt = chat.prompt([{"role": "user", "content": "<image>a<image>"}], pictures(chat, (64, 48), (40, 90)))
    crop = chat.observation("seen", pictures(chat, (50, 50)), 1 << 20)

    def rows(make: object) -> list[Sample]:
        shown = make(list(prompt.images))       # type: ignore[operator]
        some = []
        for number in range(4):
            ids, images = list(prompt.expanded_ids) + [7, 8 + number], [shown]
            if number % 2:
                ids += crop.expanded_ids + [9]
                images.append(make(list(crop.images)))       # type: ignore[operator]
            some.append(Sample(ids, [0] * (len(ids) - 1) + [1], [0.0] * len(ids), (1.0,), (True,), join(images),
                               len(prompt.expanded_ids), 0))
        return some
    for share in (False, True):
        one, other = (pack(rows(make), replace(spec, share_prompts=share), channels=1)
                      for make in (chat.vision, lambda images: processed(chat, images)))
        inputs = [model_inputs(micro, chat.image_token_id, torch.device("cpu"), torch.bfloat16)["vision"]
                  for micro in (one, other)]
        assert one.vision is not None and one.vision.scale is not None and other.vision is not None and other.vision.scale is None
        assert inputs[0].keys() == inputs[1].keys() and all(torch.equal(inputs[0][key], inputs[1][key]) for key in inputs[0])
        assert one.spans == other.spans and torch.equal(one.input_ids, other.input_ids)


@pytest.mark.gpu
def test_a_device_scales_as_the_processor_does(chat: ChatFormat) -> None:
    images = pictures(chat, (64, 48), (33, 70))
    frames = chat.vision(images)
    assert frames is not None
    for dtype in (torch.float32, torch.bfloat16):
        found = frames.expand(torch.device("cuda"), dtype).cpu()
        assert torch.equal(found, processed(chat, images).pixel_values.to(dtype))
