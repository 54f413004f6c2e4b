"""Random models of a few thousand parameters, one of each family, saved as ordinary Hugging Face folders that load everywhere.

All share a byte-level tokenizer with Qwen's control tokens; those that see share an image processor.
"""
from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from hdpo.adapters.torchvision_shim import activate
from hdpo.agent.families import FAMILIES

SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>",
           "<|video_pad|>")
ADDED = ("<tool_call>", "</tool_call>")
PATCH, MERGE = 8, 2   # images are multiples of 16 pixels; one token is 16x16 pixels
MIN_PIXELS, MAX_PIXELS = 32 * 32, 128 * 128
CHAT_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.content is string %}{{ m.content }}{% else %}{% for c in m.content %}"
    "{% if c.type == 'image' %}<|vision_start|><|image_pad|><|vision_end|>{% else %}{{ c.text }}{% endif %}"
    "{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}")
TEXT = dict(hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1,
            vocab_size=272, max_position_embeddings=4096, bos_token_id=None, eos_token_id=258)
VISION = dict(depth=2, hidden_size=64, intermediate_size=128, num_heads=2, patch_size=PATCH, spatial_merge_size=MERGE,
              temporal_patch_size=2, out_hidden_size=64)


def save_tiny(model_type: str, folder: str | Path, *, tied: bool = True, seed: int = 0) -> Path:
    """Write weights, config, tokenizer and processors of one family (a key of `TINY`); returns the folder."""
    activate()
    import torch

    folder = Path(folder)
    tokenizer = _byte_level_tokenizer()
    torch.manual_seed(seed)
    model, processor = TINY[model_type](tokenizer, tied)
    with torch.no_grad():
        for name, parameter in model.float().named_parameters():
            if parameter.dim() > 1:   # spread out, so that next-token distributions are far from uniform
                parameter.normal_(0.0, 0.15 if "embed_tokens" in name or "lm_head" in name else 0.08)
    stored = {name: FAMILIES[model_type].as_stored(name, tensor) for name, tensor in model.state_dict().items()}
    model.save_pretrained(folder, state_dict=stored, save_original_format=False)   # as published
    (processor or tokenizer).save_pretrained(folder)
    return folder


def save_tiny_qwen3_vl(folder: str | Path, *, tied: bool = True, seed: int = 0) -> Path:
    return save_tiny("qwen3_vl", folder, tied=tied, seed=seed)


def _byte_level_tokenizer() -> Any:
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE(vocab={symbol: i for i, symbol in enumerate(alphabet)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in SPECIAL])
    backend.add_tokens([AddedToken(text, special=False, normalized=False) for text in ADDED])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|im_end|>", pad_token="<|endoftext|>",
                                        model_max_length=4096)
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def _image_processor() -> Any:
    from transformers.models.qwen2_vl.image_processing_qwen2_vl import Qwen2VLImageProcessor

    return Qwen2VLImageProcessor(patch_size=PATCH, merge_size=MERGE, temporal_patch_size=2,
                                 size={"shortest_edge": MIN_PIXELS, "longest_edge": MAX_PIXELS})


def _token_ids(tokenizer: Any) -> dict[str, int]:
    ids = {text: tokenizer.convert_tokens_to_ids(text) for text in SPECIAL}
    return dict(image_token_id=ids["<|image_pad|>"], video_token_id=ids["<|video_pad|>"],
                vision_start_token_id=ids["<|vision_start|>"], vision_end_token_id=ids["<|vision_end|>"])


def _mrope(interleaved: bool) -> dict[str, Any]:
    rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [6, 5, 5]}
    return rope | {"mrope_interleaved": True} if interleaved else rope


def _qwen3_vl(tokenizer: Any, tied: bool) -> tuple[Any, Any]:
    from transformers import Qwen3VLConfig, Qwen3VLForConditionalGeneration

    config = Qwen3VLConfig(
        text_config=TEXT | dict(head_dim=32, tie_word_embeddings=tied, rope_parameters=_mrope(True)),
        vision_config=VISION | dict(num_position_embeddings=256, deepstack_visual_indexes=[0]),
        tie_word_embeddings=tied, dtype="float32", **_token_ids(tokenizer))
    return Qwen3VLForConditionalGeneration(config), _qwen3_vl_processor(tokenizer)


def _qwen3_vl_processor(tokenizer: Any) -> Any:
    from transformers import Qwen3VLProcessor
    from transformers.models.qwen3_vl.video_processing_qwen3_vl import Qwen3VLVideoProcessor

    video = Qwen3VLVideoProcessor(patch_size=PATCH, merge_size=MERGE, temporal_patch_size=2,
                                  size={"shortest_edge": MIN_PIXELS, "longest_edge": MAX_PIXELS})
    return Qwen3VLProcessor(image_processor=_image_processor(), tokenizer=tokenizer, video_processor=video,
                            chat_template=CHAT_TEMPLATE)


def _qwen3_vl_moe(tokenizer: Any, tied: bool) -> tuple[Any, Any]:
    """Expert matrices must not be square: transformers then could not tell whether a folder holds them transposed."""
    from transformers import Qwen3VLMoeConfig, Qwen3VLMoeForConditionalGeneration

    config = Qwen3VLMoeConfig(
        text_config=TEXT | dict(head_dim=32, tie_word_embeddings=tied, rope_parameters=_mrope(True), num_experts=4,
                                num_experts_per_tok=2, moe_intermediate_size=96, norm_topk_prob=True),
        vision_config=VISION | dict(num_position_embeddings=256, deepstack_visual_indexes=[0]),
        tie_word_embeddings=tied, dtype="float32", **_token_ids(tokenizer))
    return Qwen3VLMoeForConditionalGeneration(config), _qwen3_vl_processor(tokenizer)


def _qwen2_5_vl(tokenizer: Any, tied: bool) -> tuple[Any, Any]:
    """The first block of the vision tower attends within windows of 2 x 2 tokens, the second to the whole image."""
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration, Qwen2_5_VLProcessor, Qwen2VLVideoProcessor

    config = Qwen2_5_VLConfig(
        text_config=TEXT | dict(tie_word_embeddings=tied, rope_parameters=_mrope(False)),
        vision_config=VISION | dict(window_size=4 * PATCH, fullatt_block_indexes=[1], tokens_per_second=2),
        tie_word_embeddings=tied, dtype="float32", **_token_ids(tokenizer))
    processor = Qwen2_5_VLProcessor(
        image_processor=_image_processor(), tokenizer=tokenizer, chat_template=CHAT_TEMPLATE,
        video_processor=Qwen2VLVideoProcessor(patch_size=PATCH, merge_size=MERGE, temporal_patch_size=2))
    return Qwen2_5_VLForConditionalGeneration(config), processor


def _qwen3(tokenizer: Any, tied: bool) -> tuple[Any, None]:
    from transformers import Qwen3Config, Qwen3ForCausalLM

    config = Qwen3Config(**TEXT, head_dim=32, tie_word_embeddings=tied, dtype="float32",
                         rope_parameters={"rope_type": "default", "rope_theta": 10000.0})
    return Qwen3ForCausalLM(config), None


TINY: dict[str, Callable[[Any, bool], tuple[Any, Any]]] = {
    "qwen2_5_vl": _qwen2_5_vl, "qwen3_vl": _qwen3_vl, "qwen3_vl_moe": _qwen3_vl_moe, "qwen3": _qwen3}
