"""What the toy tokenizer hides: 151,643 real tokens, spelled control words, Unicode's forms, a padded head."""
from __future__ import annotations

import unicodedata
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from real_vocabulary import HEAD, PLAIN, SPECIAL, VOCABULARY

from hdpo.agent.chat import ChatFormat, load_chat_format
from hdpo.config import ModelConfig
from hdpo.errors import DataError
from hdpo.fused_loss import default_chunk_tokens

ODD = ["Hello world", "cafe\u0301 \u00e9 \u1e9b\u0323", "\u1100\u1161\u11a8 각 한국어", "👩‍👩‍👧‍👦🏽 🇨🇳 ☺️",
       "0123456789 3.14159e-10 １２３ ²",
       "富士山的高度是3776米。\u3000",
       "def f(x):\n\treturn {'a': [x[0]]}  # \r\n\r\n\n   \n", "नमस्ते दुनिया",
       "a" * 500, "\x00\x01\x7f\u200b\ufeff", "I'll WE'VE don'T",
       "<tool_call>{}</tool_call> <think>x</think> <tool_response>", "<|fim_prefix|><|repo_name|>",
       "< |im_end|> <|im_end", "}}</tool_call",
       "\ud7ff\ue000\U0010ffff", "  lead\n\n\ntrail  ", ""]


@pytest.fixture(scope="module")
def real(real_vocabulary_folder: Path) -> ChatFormat:
    model = ModelConfig()
    return load_chat_format(str(real_vocabulary_folder), model.min_pixels, model.max_pixels, model.max_tool_pixels)


@pytest.fixture(scope="module")
def processor(real_vocabulary_folder: Path) -> Any:
    from transformers import AutoProcessor
    return AutoProcessor.from_pretrained(real_vocabulary_folder, local_files_only=True)


def test_the_folder_has_the_published_numbers(real: ChatFormat) -> None:
    assert real.encode_turn("Hello world") == [9707, 1879] and real.stop_ids == (151658, 151645)
    assert (real.image_token_id, real.factor, real.min_pixels) == (151655, 32, 65536)
    padded = set(range(VOCABULARY + len(SPECIAL + PLAIN), HEAD))
    assert set(real.banned_ids) == padded | set(range(VOCABULARY, VOCABULARY + len(SPECIAL))) - {151645}


@pytest.mark.parametrize("text", ODD, ids=range(len(ODD)))
def test_a_prompt_is_token_for_token_what_the_processor_of_transformers_makes(
        real: ChatFormat, processor: Any, text: str) -> None:
    image = real.bound(Image.effect_noise((300, 500), 60).convert("RGB"))
    ours = real.prompt([{"role": "system", "content": text}, {"role": "user", "content": f"<image>{text}"}], [image])
    theirs = processor.apply_chat_template(
        [{"role": "system", "content": text},
         {"role": "user", "content": [{"type": "image", "image": image}, {"type": "text", "text": text}]}],
        tokenize=True, add_generation_prompt=True, return_dict=True, return_tensors="pt")
    assert ours.expanded_ids == theirs["input_ids"][0].tolist()


@pytest.mark.parametrize("text", ODD, ids=range(len(ODD)))
def test_turns_and_observations_hold_the_text_and_no_control_token(real: ChatFormat, text: str) -> None:
    assert real.decode(real.encode_turn(text)) == unicodedata.normalize("NFC", text)
    observed = real.observation(text, [], 8192).compact_ids[len(real._open):-len(real._close)]
    assert all(id < VOCABULARY for id in observed) and not set(observed) & set(real.banned_ids)
    assert real.decode(observed) == unicodedata.normalize("NFC", text)


@pytest.mark.parametrize("word", SPECIAL)
def test_a_control_word_in_a_prompt_is_refused_and_in_a_tools_answer_is_text(real: ChatFormat, word: str) -> None:
    with pytest.raises(DataError, match="control token"):
        real.prompt([{"role": "user", "content": f"a {word} b"}], [])
    segment = real.observation(f"a {word} b", [], 100)
    assert all(id < VOCABULARY for id in segment.compact_ids[len(real._open):-len(real._close)])


def test_half_a_surrogate_pair_is_refused_before_it_becomes_tokens(real: ChatFormat) -> None:
    for text in ("a \ud83d b", "\udc00"):
        with pytest.raises((DataError, UnicodeEncodeError, TypeError)):
            real.prompt([{"role": "user", "content": text}], [])


def test_4k_and_8k_prompts_have_the_references_tokens(real: ChatFormat) -> None:
    """As the reference's own run gave: 12,288 and 16,320."""
    user = [{"role": "user", "content": "<image>"}]
    around = len(real.prompt_ids(user, [(256, 256)])) - 1
    for size, tokens in (((4096, 3072), 12_288), ((7680, 4320), 16_320)):
        assert real.prompt_length(user, [size]) - around == real.image_tokens(size) == tokens


def test_a_chunk_of_logits_of_the_real_head_stays_within_its_memory() -> None:
    for itemsize, cuda, most in ((4, False, 256 << 20), (4, True, 1 << 30)):
        tokens = default_chunk_tokens(HEAD, itemsize, cuda)
        assert tokens >= 128 and tokens * HEAD * itemsize <= most
