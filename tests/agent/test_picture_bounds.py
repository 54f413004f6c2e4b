"""How large the model sees pictures: those of prompts and of tools have bounds of their own, and no picture of a tool is lost
only for being large."""
from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from hdpo.agent.chat import ChatFormat, load_chat_format
from hdpo.agent.demonstration import demonstration_length, encode_demonstration
from hdpo.agent.images import bounded_size, num_image_tokens
from hdpo.config import Config
from hdpo.config.file import load_config

CALL = '<tool_call>{"name": "image_search", "arguments": {}}</tool_call>'
FACTOR = 16
"""Of the tiny model: pixels of a token's side."""


@pytest.fixture(scope="module")
def two(tiny_folder: Path) -> ChatFormat:
    """Prompt pictures of up to 16 tokens, tool pictures of up to 8."""
    return load_chat_format(str(tiny_folder), 1024, 4096, max_tool_pixels=8 * FACTOR**2)


def picture(width: int, height: int) -> Image.Image:
    return Image.effect_noise((width, height), 60).convert("RGB")


def tokens(image: Image.Image) -> int:
    return num_image_tokens(image.size, FACTOR)


@pytest.mark.parametrize("name", ["metis_8b_rl", "metis_8b_sft"])
def test_4k_and_8k_prompts_have_the_references_tokens_and_tool_pictures_have_theirs(name: str) -> None:
    """4096 x 3072 pixels are 12,288 tokens, 7680 x 4320 are 16,320; a tool's picture has at most 5,120."""
    model = load_config(name, (), {}).model
    for size, prompt, tool in (((4096, 3072), 12_288, 5_002), ((7680, 4320), 16_320, 5_035), ((640, 480), 300, 300)):
        for most, expected in ((model.max_pixels, prompt), (model.max_tool_pixels, tool)):
            assert num_image_tokens(bounded_size(*size, 32, model.min_pixels, most), 32) == expected


def test_prompts_and_tools_have_bounds_of_their_own(two: ChatFormat) -> None:
    large = picture(300, 300)
    assert [tokens(image) for image in two.prompt([{"role": "user", "content": "<image>"}], [large]).images] == [16]
    assert [tokens(image) for image in two.observation("", [large], 100).images] == [4]
    narrow = load_chat_format(two._template.name_or_path, 1024, 1024)      # one bound that is smaller bounds tools too
    assert [tokens(image) for image in narrow.observation("", [large], 100).images] == [4]


@given(st.integers(8, 400), st.integers(8, 400), st.integers(0, 40), st.integers(7, 40))
def test_a_picture_that_alone_is_larger_than_an_observation_is_scaled_to_it(
        tiny_folder: Path, width: int, height: int, text: int, most: int) -> None:
    chat = _chat(str(tiny_folder))
    segment = chat.observation("a" * text, [picture(width, height)], most)
    room = most - min(text, most // 4) - 2      # beside the text and the picture's frame
    wrapper = len(chat.observation("", [], 0).expanded_ids)
    assert len(segment.expanded_ids) - wrapper <= most
    assert len(segment.images) == (room >= 4)      # the smallest picture has 4 tokens
    for image in segment.images:
        full = chat.image_tokens((width, height))
        assert tokens(image) == full if full <= room else tokens(image) <= room
        assert chat.bound(image) is image      # no image processor scales it again


_FORMATS: dict[str, ChatFormat] = {}


def _chat(folder: str) -> ChatFormat:
    if folder not in _FORMATS:
        _FORMATS[folder] = load_chat_format(folder, 1024, 4096)
    return _FORMATS[folder]


def test_a_recorded_conversation_has_the_bounds_of_the_rollout_it_could_have_been(two: ChatFormat) -> None:
    messages = [{"role": "user", "content": "<image>?"}, {"role": "assistant", "content": CALL},
                {"role": "user", "content": "1. <image>\n[a]"}, {"role": "assistant", "content": "<answer>4</answer>"}]
    images = [picture(300, 300), picture(300, 300)]
    ids, mask, shown = encode_demonstration(two, messages, images)
    assert [tokens(image) for image in shown] == [16, 4]
    assert demonstration_length(two, messages, [image.size for image in images]) == len(ids) == len(mask)


def test_the_size_in_which_tools_have_a_picture_is_told_where_that_is_set(two: ChatFormat) -> None:
    told = load_chat_format(two._template.name_or_path, 1024, 4096, tells_sizes=True)
    user = [{"role": "user", "content": "<image>a <image>b"}, {"role": "user", "content": "<image>c"}]
    images = [picture(300, 200), picture(40, 80), picture(700, 500)]
    prompt = told.prompt(user, images)
    text = told.decode(prompt.compact_ids)
    assert all(said in text for said in (" (image_1: 300 x 200 pixels)a", " (image_2: 40 x 80 pixels)b",
                                         " (image_3: 700 x 500 pixels)c"))
    assert told.prompt_length(user, [image.size for image in images]) == len(prompt.expanded_ids)
    seen = told.observation("1. <image>\n[a]", images[:1], 200)
    assert "1.  (300 x 200 pixels)\n[a]" in told.decode(seen.compact_ids) and len(seen.images) == 1
    assert "pixels" not in two.decode(two.prompt(user, images).compact_ids) and told.fingerprint != two.fingerprint


def test_settings_reach_the_format_of_the_model(tiny_folder: Path) -> None:
    from hdpo.adapters.chat_format import open_chat
    chat = open_chat(Config(model={"path": str(tiny_folder), "min_pixels": 1024, "max_pixels": 4096, "max_tool_pixels": 2048,
                                   "tell_sizes": True}).model)
    assert (chat.max_pixels, chat.max_tool_pixels, chat.tells_sizes) == (4096, 2048, True)
