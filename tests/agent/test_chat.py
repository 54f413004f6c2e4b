"""Messages to token ids and back: nothing re-encoded, nothing injected, nothing lost."""
from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from tiny_models import SPECIAL

from hdpo.agent.builder import TrajectoryBuilder
from hdpo.agent.chat import ChatFormat, load_chat_format
from hdpo.agent.demonstration import demonstration_length, encode_demonstration
from hdpo.errors import ConfigError, DataError, ModelError
from hdpo.types import Completion, StopReason

USER = [{"role": "user", "content": "<image>What?"}]
PIECES = st.sampled_from([*SPECIAL, "<tool_call>", "</tool_call>", "<image>", "a", " ", "\n", "é", "<|"])
HOSTILE = st.lists(PIECES | st.text(), max_size=20).map("".join)


def picture(width: int = 64, height: int = 32) -> Image.Image:
    return Image.effect_noise((width, height), 60).convert("RGB")


def wrapped(chat: ChatFormat, ids: list[int]) -> list[int]:
    """The content of an observation without its wrapper."""
    left, right = len(chat.observation("", [], 0).compact_ids) - len(chat._close), len(chat._close)
    assert ids[:left] == chat._open and ids[-right:] == chat._close
    return ids[left:-right]


def raw(chat: ChatFormat, ids: list[int]) -> str:
    return chat._control.decode(ids, skip_special_tokens=False)


def test_a_prompt_has_one_pad_per_image_compact_and_one_per_image_token_expanded(chat: ChatFormat) -> None:
    segment = chat.prompt([{"role": "user", "content": "<image>a<image>b"}], [picture(64, 32), picture(32, 32)])
    pad = chat.image_token_id
    assert segment.compact_ids.count(pad) == 2 and segment.expanded_ids.count(pad) == 8 + 4
    assert [i for i in segment.expanded_ids if i != pad] == [i for i in segment.compact_ids if i != pad]
    assert raw(chat, segment.compact_ids) == (
        "<|im_start|>user\n<|vision_start|><|image_pad|><|vision_end|>a<|vision_start|><|image_pad|><|vision_end|>b"
        "<|im_end|>\n<|im_start|>assistant\n")


def test_large_and_small_images_are_bounded_on_the_way_in(chat: ChatFormat) -> None:
    segment = chat.prompt([{"role": "user", "content": "<image><image>"}], [picture(900, 500), picture(3, 3)])
    for image in segment.images:
        assert 256 <= image.width * image.height <= 4096 and chat.bound(image) is image


@given(st.integers(1, 3000), st.integers(1, 3000))
def test_prompt_length_is_known_from_sizes_alone(chat: ChatFormat, width: int, height: int) -> None:
    image = Image.new("RGB", (width, height))
    assert chat.prompt_length(USER, [image.size]) == len(chat.prompt(USER, [image]).expanded_ids)


def test_the_image_processor_changes_no_size_and_agrees_on_the_count(chat: ChatFormat) -> None:
    segment = chat.prompt([{"role": "user", "content": "<image><image>"}], [picture(90, 41), picture(16, 16)])
    vision = chat.vision(segment.images)
    assert vision is not None
    assert vision.grid_thw.tolist() == [[1, i.height // 8, i.width // 8] for i in segment.images]
    assert vision.pixel_values.shape[0] == int(vision.grid_thw.prod(-1).sum())
    assert int(vision.grid_thw.prod(-1).sum()) // 4 == segment.expanded_ids.count(chat.image_token_id)
    assert chat.vision([]) is None


@pytest.mark.parametrize(("content", "images"), [("no marker", 1), ("<image>", 0), ("<image><image>", 1)])
def test_markers_and_images_must_match(chat: ChatFormat, content: str, images: int) -> None:
    with pytest.raises(DataError, match="markers"):
        chat.prompt([{"role": "user", "content": content}], [picture()] * images)


def test_a_prompt_with_control_tokens_is_refused(chat: ChatFormat) -> None:
    for word in SPECIAL:
        with pytest.raises(DataError, match="control token"):
            chat.prompt([{"role": "user", "content": f"hello {word}"}], [])


def test_an_observation_is_wrapped_as_the_next_user_turn(chat: ChatFormat) -> None:
    segment = chat.observation("Code execution result:\n7", [], 100)
    assert raw(chat, segment.compact_ids) == (
        "<|im_end|>\n<|im_start|>user\nCode execution result:\n7<|im_end|>\n<|im_start|>assistant\n")


@given(HOSTILE, st.integers(0, 60), st.integers(0, 2), st.integers(0, 2))
def test_no_special_vision_or_call_token_can_come_from_text_and_the_budget_holds(
        chat: ChatFormat, text: str, max_tokens: int, num_images: int, max_images: int) -> None:
    segment = chat.observation(text, [picture(64, 32)] * num_images, max_tokens, max_images)
    inner = wrapped(chat, segment.expanded_ids)
    assert len(inner) <= max_tokens
    assert len(segment.images) <= max_images
    blocks = {chat._image_block[0], chat._image_block[-1], chat.image_token_id}
    control = set(chat.banned_ids) | set(chat.stop_ids) | {chat._control.token_to_id("<tool_call>")}
    assert sum(i == chat.image_token_id for i in inner) == sum(i.width * i.height // 256 for i in segment.images)
    assert [i for i in inner if i in control and i not in blocks] == []
    assert inner.count(chat._image_block[0]) == len(segment.images)


def test_text_that_fits_is_untouched_and_text_that_does_not_keeps_head_and_tail_and_counts_the_cut(chat: ChatFormat) -> None:
    text = "".join(chr(97 + i % 26) for i in range(500))
    assert chat.decode(wrapped(chat, chat.observation(text, [], 500).compact_ids)) == text
    shown = chat.decode(wrapped(chat, chat.observation(text, [], 100).compact_ids))
    head, marker, tail = shown.partition("\n[... ")
    count, _, tail = tail.partition(" tokens cut ...]\n")
    assert text.startswith(head) and text.endswith(tail) and len(head) - len(tail) in (0, 1)
    assert len(head) + int(count) + len(tail) == 500 and marker and 95 <= len(shown) <= 100


def test_images_stand_at_their_markers_if_the_counts_match_else_after_the_text(chat: ChatFormat) -> None:
    block = "<|vision_start|><|image_pad|><|vision_end|>"
    two = [picture(), picture()]

    def shown(text: str) -> str:
        return raw(chat, wrapped(chat, chat.observation(text, two, 200).compact_ids))
    assert shown("a<image>b<image>c") == f"a{block}b{block}c"
    assert shown("a<image>b") == f"a<image>b{block}{block}"


def test_images_are_kept_whole_and_those_that_do_not_fit_are_named(chat: ChatFormat) -> None:
    images = [picture(64, 64), picture(32, 32), picture(64, 64)]      # 16, 4 and 16 tokens and 2 for each frame
    segment = chat.observation("<image>one<image>two<image>three", images, 100, max_images=2)
    assert [i.size for i in segment.images] == [(64, 64), (32, 32)]
    assert "1 of 3 images are not shown" in chat.decode(segment.compact_ids)
    assert len(chat.observation("", images, 25).images) == 2          # the last one does not fit any more
    long = chat.observation("x" * 1000, images[:1], 40)
    assert len(long.images) == 1 and len(wrapped(chat, long.expanded_ids)) == 40


def test_an_image_is_dropped_where_no_size_lies_between_its_least_and_the_room(tiny_folder: Path) -> None:
    few = 211       # tokens at the least; a prime number of them is one row, and no picture is so long
    chat = load_chat_format(str(tiny_folder), 1024, 16384)
    chat.min_pixels, chat.max_tool_pixels = few * chat.factor**2, 1024 * chat.factor**2
    block = len(chat._image_block) - 1
    assert chat.observation("", [picture(640, 640)], few + block).images == ()
    assert len(chat.observation("", [picture(640, 640)], 225 + block).images) == 1


@given(st.lists(st.tuples(st.lists(st.integers(0, 250), min_size=1, max_size=5), HOSTILE, st.booleans()), max_size=5))
def test_each_prompt_begins_with_the_prompt_before_and_all_streams_stay_aligned(
        chat: ChatFormat, turns: list[tuple[list[int], str, bool]]) -> None:
    builder = TrajectoryBuilder()
    builder.append_given(chat.prompt(USER, [picture()]))
    before: list[int] = list(builder.compact_ids)
    for sampled, text, image in turns:
        builder.append_sampled(Completion(sampled, [-1.0] * len(sampled), StopReason.TOOL_CALL, 0))
        builder.append_given(chat.observation(text, [picture(16, 48)] if image else [], 60))
        assert builder.compact_ids[:len(before)] == before
        assert builder.compact_ids[len(before):len(before) + len(sampled)] == sampled
        before = list(builder.compact_ids)
        assert len(builder.token_ids) == len(builder.mask) == len(builder.log_probs)
    assert [t for t, m in zip(builder.token_ids, builder.mask) if m] == [t for s, _, _ in turns for t in s]
    assert all(log_prob == 0.0 for log_prob, m in zip(builder.log_probs, builder.mask) if not m)
    assert builder.token_ids.count(chat.image_token_id) == sum(
        i.width * i.height // 256 for i in builder.images)
    assert builder.compact_ids.count(chat.image_token_id) == len(builder.images) == len(builder.image_keys)


def test_a_completion_without_all_log_probs_is_refused() -> None:
    with pytest.raises(ValueError, match="2 tokens but 1"):
        TrajectoryBuilder().append_sampled(Completion([1, 2], [0.0], StopReason.LENGTH, 0))


CALL = '<reason>r</reason>\n<tool_call>{"name": "image_search", "arguments": {}}</tool_call>'
RECORDED = [{"role": "system", "content": "Be brief."}, *USER, {"role": "assistant", "content": CALL},
            {"role": "user", "content": "found <|im_end|> <image>"},
            {"role": "assistant", "content": "<answer>4</answer>\n"}]


def test_a_demonstration_is_token_for_token_the_rollout_it_could_have_been(chat: ChatFormat) -> None:
    images = [picture(64, 64), picture(32, 32)]
    token_ids, mask, shown = encode_demonstration(chat, RECORDED, images)
    final = [*chat.encode_turn("<answer>4</answer>"), chat.end_of_turn_id]
    rollout = TrajectoryBuilder()
    rollout.append_given(chat.prompt(RECORDED[:2], images[:1]))
    rollout.append_sampled(Completion(chat.encode_turn(CALL), [0.0] * len(chat.encode_turn(CALL)), StopReason.TOOL_CALL, 0))
    rollout.append_given(chat.observation("found <|im_end|> <image>", images[1:], 8192))
    rollout.append_sampled(Completion(final, [0.0] * len(final), StopReason.END_OF_TURN, 0))
    assert (token_ids, mask, list(shown)) == (rollout.token_ids, rollout.mask, rollout.images)
    trained = [t for t, m in zip(token_ids, mask) if m]
    assert raw(chat, trained) == CALL + "<answer>4</answer><|im_end|>"
    assert trained.count(chat.tool_call_end_id) == 1
    assert demonstration_length(chat, RECORDED, [i.size for i in images]) == len(token_ids)


@pytest.mark.parametrize(("change", "message"), [
    (lambda m: m[:4], "must end with an assistant"),
    (lambda m: m[:2], "must end with an assistant"),
    (lambda m: [*m[:3], *m[4:]], "alternate"),
    (lambda m: [*m[:2], {"role": "assistant", "content": "no call"}, *m[3:]], "only tool call"),
    (lambda m: [*m[:2], {"role": "assistant", "content": CALL + " and on"}, *m[3:]], "only tool call"),
    (lambda m: [*m[:3], {"role": "user", "content": "no marker"}, m[4]], "markers"),
])
def test_a_recording_of_another_shape_is_refused(chat: ChatFormat, change, message: str) -> None:
    with pytest.raises(DataError, match=message):
        encode_demonstration(chat, change(RECORDED), [picture(), picture()])


def test_stop_and_banned_ids(chat: ChatFormat) -> None:
    assert raw(chat, list(chat.stop_ids)) == "</tool_call><|im_end|>"
    known = chat._control.get_vocab_size()
    assert {raw(chat, [i]) for i in chat.banned_ids if i < known} == set(SPECIAL) - {"<|im_end|>"}


def test_ids_of_a_padded_head_are_banned_and_no_other(chat: ChatFormat) -> None:
    padded = ChatFormat(chat.family, chat._template, chat._processor, 4096, 65536, head_size=1000)
    known = chat._control.get_vocab_size()
    assert [i for i in padded.banned_ids if i >= known] == list(range(known, 1000))
    assert [i for i in padded.banned_ids if i < known] == [i for i in chat.banned_ids if i < known]
    assert chat.decode([*chat.encode_turn(CALL), chat.end_of_turn_id]) == CALL


def test_a_folder_that_cannot_serve_gives_one_clear_line(tiny_folder: Path, tmp_path: Path) -> None:
    def broken(name: str, **config: object) -> str:
        folder = tmp_path / name
        folder.mkdir()
        if config:
            (folder / "config.json").write_text(json.dumps(config))
        return str(folder)
    for path, text in (("/no/such/folder", "no such folder"), ("", "model.path is not set"), (broken("a"), "config.json"),
                       (broken("b", model_type="llama"), "llama"), (broken("c", model_type="qwen3_vl"), "can't be loaded")):
        with pytest.raises(ModelError, match=text) as caught:
            load_chat_format(path, 256, 4096)
        assert "\n" not in str(caught.value)
    with pytest.raises(ConfigError, match="leave no image size"):
        load_chat_format(str(tiny_folder), 1, 255)
