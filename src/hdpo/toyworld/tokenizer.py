"""The toy model's tokenizer, processor and configuration: an ordinary Qwen3-VL folder, a thousand times smaller.

Byte-level BPE trained on the spot with Qwen's own pre-tokenizer (single digits), Qwen's special tokens, ChatML.
"""
from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from hdpo.toolserver.layout import COMPACT as layout
from hdpo.toyworld import words

SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|vision_pad|>",
           "<|image_pad|>", "<|video_pad|>")
PATCH, MERGE, TEMPORAL = 8, 2, 2
VIEW = 64             # the model sees every picture as VIEW x VIEW pixels
IMAGE_TOKENS = (VIEW // PATCH // MERGE) ** 2
MERGES = 600

CHAT_TEMPLATE = (
    "{%- for message in messages %}{{- '<|im_start|>' + message.role + '\\n' }}"
    "{%- if message.content is string %}{{- message.content }}{%- else %}{%- for part in message.content %}"
    "{%- if part.type == 'image' or 'image' in part or 'image_url' in part %}"
    "{{- '<|vision_start|><|image_pad|><|vision_end|>' }}"
    "{%- elif part.type == 'video' or 'video' in part %}{{- '<|vision_start|><|video_pad|><|vision_end|>' }}"
    "{%- elif 'text' in part %}{{- part.text }}{%- endif %}{%- endfor %}{%- endif %}"
    "{{- '<|im_end|>\\n' }}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"
)


def _corpus() -> list[str]:
    """Text whose words deserve a token of their own but are no fixed phrase."""
    names = [f"{stem} {kind}" for stem in words.STEMS for kind in words.KINDS]
    facts = [words.FACT.format(name, 1) for name in names]
    observations = [layout.python_result("1", "", 0), layout.python_result("1", "error", 1), layout.python_result("", "", 1),
                    layout.python_result("", "", 0), layout.image_results([words.BADGE_TITLE.format(1)] * 2, [True] * 2)]
    observations += [layout.search_results(n, [(n, words.LINK, f)]) for n, f in zip(names, facts, strict=True)]
    fixed, found = observations[:5], observations[5:]
    often = [*fixed, "system\n", "user\n", "assistant\n", "\n\n", "1+2?", "3*4?"] * 50
    return names + facts + often + fixed + found


def make_tokenizer() -> Any:
    """A Qwen2 tokenizer; the same ids on every call."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import AddedToken, Qwen2Tokenizer
    from transformers.models.qwen2.tokenization_qwen2 import PRETOKENIZE_REGEX

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(PRETOKENIZE_REGEX), behavior="isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    bpe.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    bpe.train_from_iterator(_corpus(), trainers.BpeTrainer(
        vocab_size=len(alphabet) + MERGES, initial_alphabet=alphabet, show_progress=False))
    model = json.loads(bpe.to_str())["model"]
    merges: Any = [tuple(pair) for pair in model["merges"]]
    tokenizer = Qwen2Tokenizer(vocab=model["vocab"], merges=merges, eos_token="<|im_end|>", pad_token="<|endoftext|>")
    tokenizer.add_tokens([AddedToken(t, special=True, normalized=False) for t in SPECIAL], special_tokens=True)
    tokenizer.add_tokens([AddedToken(t, special=False, normalized=False) for t in (*words.TAGS, *words.PHRASES)])
    tokenizer.chat_template = CHAT_TEMPLATE
    tokenizer.model_max_length = 4096
    return tokenizer


def make_processor(tokenizer: Any) -> Any:
    from transformers import Qwen2VLImageProcessor, Qwen3VLProcessor, Qwen3VLVideoProcessor

    pixels = {"shortest_edge": VIEW * VIEW, "longest_edge": VIEW * VIEW}
    sizes = {"patch_size": PATCH, "merge_size": MERGE, "temporal_patch_size": TEMPORAL}
    normal = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3}
    return Qwen3VLProcessor(
        image_processor=Qwen2VLImageProcessor(size=pixels, **sizes, **normal), tokenizer=tokenizer,
        video_processor=Qwen3VLVideoProcessor(size=pixels, **sizes, **normal), chat_template=CHAT_TEMPLATE)


def make_config(tokenizer: Any, hidden: int = 128, layers: int = 4, vision_hidden: int = 96, vision_depth: int = 3) -> Any:
    """About 1.7 million parameters. Heads are 32 wide: the smallest size vLLM's CPU attention takes."""
    from transformers import Qwen3VLConfig

    ids = {t: tokenizer.convert_tokens_to_ids(t) for t in SPECIAL}
    text = dict(
        vocab_size=-(-len(tokenizer) // 32) * 32, hidden_size=hidden, intermediate_size=3 * hidden,
        num_hidden_layers=layers, num_attention_heads=hidden // 32, num_key_value_heads=hidden // 32, head_dim=32,
        max_position_embeddings=4096, initializer_range=0.02, tie_word_embeddings=True,
        bos_token_id=None, eos_token_id=ids["<|im_end|>"], pad_token_id=ids["<|endoftext|>"],
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [6, 5, 5],
                         "mrope_interleaved": True})
    vision = dict(
        depth=vision_depth, hidden_size=vision_hidden, intermediate_size=4 * vision_hidden, num_heads=vision_hidden // 32,
        patch_size=PATCH, spatial_merge_size=MERGE, temporal_patch_size=TEMPORAL, out_hidden_size=hidden,
        num_position_embeddings=(VIEW // PATCH) ** 2, deepstack_visual_indexes=[0])
    return Qwen3VLConfig(
        text_config=text, vision_config=vision, tie_word_embeddings=True, image_token_id=ids["<|image_pad|>"],
        video_token_id=ids["<|video_pad|>"], vision_start_token_id=ids["<|vision_start|>"],
        vision_end_token_id=ids["<|vision_end|>"], architectures=["Qwen3VLForConditionalGeneration"])


def save_base(folder: Path, model: Any, tokenizer: Any) -> None:
    """An ordinary Hugging Face folder that transformers and vLLM load."""
    folder.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(folder)
    make_processor(tokenizer).save_pretrained(folder)
