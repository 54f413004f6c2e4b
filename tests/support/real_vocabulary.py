"""A tiny random Qwen3-VL with the vocabulary that Qwen published: 151,643 tokens, 26 added ones, a head of 151,936 rows.

The vocabulary travels with a package of the dev extra (`dashscope`); nothing of it is imported. The chat template is our own and
has the published one's structure for text and images; tools, thinking and videos are left out.
"""
from __future__ import annotations

import base64
import importlib.metadata
import json
from pathlib import Path
from typing import Any

from tiny_models import TEXT, VISION

from hdpo.adapters.torchvision_shim import activate

VOCABULARY, HEAD = 151_643, 151_936
MIN_PIXELS, MAX_PIXELS = 256 * 256, 4096 * 4096
SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|object_ref_start|>", "<|object_ref_end|>", "<|box_start|>",
           "<|box_end|>", "<|quad_start|>", "<|quad_end|>", "<|vision_start|>", "<|vision_end|>", "<|vision_pad|>",
           "<|image_pad|>", "<|video_pad|>")
PLAIN = ("<tool_call>", "</tool_call>", "<|fim_prefix|>", "<|fim_middle|>", "<|fim_suffix|>", "<|fim_pad|>", "<|repo_name|>",
         "<|file_sep|>", "<tool_response>", "</tool_response>", "<think>", "</think>")
WORDS = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+")
TEMPLATE = (
    "{%- for m in messages %}{{ '<|im_start|>' + m.role + '\\n' }}{%- if m.content is string %}{{ m.content }}{%- else %}"
    "{%- for c in m.content %}{%- if c.type == 'image' %}{{ '<|vision_start|><|image_pad|><|vision_end|>' }}"
    "{%- elif 'text' in c %}{{ c.text }}{%- endif %}{%- endfor %}{%- endif %}{{ '<|im_end|>\\n' }}{%- endfor %}"
    "{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{%- endif %}")


def vocabulary_file() -> Path | None:
    """The published ranks of tokens, where the package that has them is installed."""
    try:
        files = importlib.metadata.files("dashscope") or []
    except importlib.metadata.PackageNotFoundError:
        return None
    return next((Path(str(file.locate())) for file in files if file.name == "qwen.tiktoken"), None)


def ranks(file: Path) -> dict[bytes, int]:
    lines = (line.split() for line in file.read_bytes().splitlines() if line)
    return {base64.b64decode(token): int(rank) for token, rank in lines}


def save_real_vocabulary(folder: Path, file: Path) -> Path:
    """Write weights, tokenizer, processors and config; returns the folder."""
    activate()
    import torch
    from transformers import Qwen3VLConfig, Qwen3VLForConditionalGeneration, Qwen3VLProcessor
    from transformers.models.qwen2_vl.image_processing_qwen2_vl import Qwen2VLImageProcessor
    from transformers.models.qwen3_vl.video_processing_qwen3_vl import Qwen3VLVideoProcessor

    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tokenizer.json").write_text(json.dumps(_tokenizer(ranks(file)), ensure_ascii=False))
    tokenizer = _fast(folder)
    sizes = dict(patch_size=16, merge_size=2, temporal_patch_size=2, image_mean=[0.5] * 3, image_std=[0.5] * 3,
                 size={"shortest_edge": MIN_PIXELS, "longest_edge": MAX_PIXELS})
    Qwen3VLProcessor(image_processor=Qwen2VLImageProcessor(**sizes), tokenizer=tokenizer,
                     video_processor=Qwen3VLVideoProcessor(**sizes), chat_template=TEMPLATE).save_pretrained(folder)
    ids = {name: tokenizer.convert_tokens_to_ids(f"<|{word}|>") for name, word in (
        ("image_token_id", "image_pad"), ("video_token_id", "video_pad"), ("vision_start_token_id", "vision_start"),
        ("vision_end_token_id", "vision_end"))}
    rope = {"rope_type": "default", "rope_theta": 5e6, "mrope_section": [6, 5, 5], "mrope_interleaved": True}
    config = Qwen3VLConfig(
        text_config=TEXT | dict(head_dim=32, vocab_size=HEAD, tie_word_embeddings=False, rope_parameters=rope,
                                max_position_embeddings=32768, eos_token_id=151645),
        vision_config=VISION | dict(patch_size=16, num_position_embeddings=2304, deepstack_visual_indexes=[0]),
        tie_word_embeddings=False, dtype="float32", **ids)
    torch.manual_seed(0)
    model = Qwen3VLForConditionalGeneration(config).float()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1:
                parameter.normal_(0.0, 0.1 if "embed_tokens" in name or "lm_head" in name else 0.08)
    model.save_pretrained(folder)
    return folder


def _fast(folder: Path) -> Any:
    from transformers import PreTrainedTokenizerFast
    tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(folder / "tokenizer.json"), eos_token="<|im_end|>",
                                        pad_token="<|endoftext|>", model_max_length=262144, clean_up_tokenization_spaces=False)
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def _tokenizer(known: dict[bytes, int]) -> dict[str, Any]:
    """A tokenizer.json of byte-pair merges: a token's merge is of the two parts that lower ranks leave of it."""
    letters = _letters()

    def spelled(token: bytes) -> str:
        return "".join(letters[byte] for byte in token)
    merges = []
    for token, rank in sorted(known.items(), key=lambda item: item[1]):
        if len(token) > 1:
            left, right = _parts(known, token, rank)
            merges.append(f"{spelled(left)} {spelled(right)}")
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False}
    split = {"type": "Split", "pattern": {"Regex": WORDS}, "behavior": "Isolated", "invert": False}
    added = [{"id": VOCABULARY + place, "content": word, "single_word": False, "lstrip": False, "rstrip": False,
              "normalized": False, "special": word in SPECIAL} for place, word in enumerate(SPECIAL + PLAIN)]
    return {"version": "1.0", "truncation": None, "padding": None, "added_tokens": added, "normalizer": {"type": "NFC"},
            "pre_tokenizer": {"type": "Sequence", "pretokenizers": [split, level]}, "post_processor": level, "decoder": level,
            "model": {"type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": "",
                      "end_of_word_suffix": "", "fuse_unk": False, "byte_fallback": False, "ignore_merges": False,
                      "vocab": {spelled(token): rank for token, rank in known.items()}, "merges": merges}}


def _parts(known: dict[bytes, int], token: bytes, limit: int) -> list[bytes]:
    parts = [bytes([byte]) for byte in token]
    while len(parts) > 2:
        pairs = [(known.get(left + right, limit), place) for place, (left, right) in enumerate(zip(parts, parts[1:]))]
        rank, place = min(pairs)
        assert rank < limit, token
        parts[place:place + 2] = [parts[place] + parts[place + 1]]
    return parts


def _letters() -> dict[int, str]:
    """The character that stands for each byte in a byte-level vocabulary, as GPT-2 has them."""
    shown = [*range(33, 127), *range(161, 173), *range(174, 256)]
    hidden = [byte for byte in range(256) if byte not in shown]
    return {byte: chr(byte) for byte in shown} | {byte: chr(256 + place) for place, byte in enumerate(hidden)}
