"""A random Qwen3-VL of a few thousand parameters, saved as an ordinary Hugging Face folder that loads everywhere."""
from __future__ import annotations

from pathlib import Path

from hdpo.adapters.torchvision_shim import activate

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


def save_tiny_qwen3_vl(folder: str | Path, *, tied: bool = True, seed: int = 0) -> Path:
    """Write weights, config, byte-level tokenizer and processors; returns the folder."""
    activate()
    import torch
    from transformers import Qwen3VLForConditionalGeneration, Qwen3VLProcessor
    from transformers.models.qwen2_vl.image_processing_qwen2_vl import Qwen2VLImageProcessor
    from transformers.models.qwen3_vl.video_processing_qwen3_vl import Qwen3VLVideoProcessor

    folder = Path(folder)
    tokenizer = _byte_level_tokenizer()
    torch.manual_seed(seed)
    model = Qwen3VLForConditionalGeneration(_config(tokenizer, tied)).float()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1:   # spread out, so that next-token distributions are far from uniform
                parameter.normal_(0.0, 0.15 if "embed_tokens" in name or "lm_head" in name else 0.08)
    model.save_pretrained(folder)
    pixels = {"shortest_edge": MIN_PIXELS, "longest_edge": MAX_PIXELS}
    shape = {"patch_size": PATCH, "merge_size": MERGE, "temporal_patch_size": 2, "size": pixels}
    Qwen3VLProcessor(image_processor=Qwen2VLImageProcessor(**shape), tokenizer=tokenizer,
                     video_processor=Qwen3VLVideoProcessor(**shape), chat_template=CHAT_TEMPLATE).save_pretrained(folder)
    return folder


def _byte_level_tokenizer():   # type: ignore[no-untyped-def]
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE(vocab={symbol: i for i, symbol in enumerate(alphabet)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in SPECIAL])
    backend.add_tokens([AddedToken(text, special=False, normalized=False) for text in ADDED])
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|im_end|>", pad_token="<|endoftext|>",
                                   model_max_length=4096)


def _config(tokenizer, tied: bool):   # type: ignore[no-untyped-def]
    from transformers import Qwen3VLConfig

    ids = {text: tokenizer.convert_tokens_to_ids(text) for text in SPECIAL}
    text = dict(hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1,
                head_dim=32, vocab_size=272, max_position_embeddings=4096, tie_word_embeddings=tied,
                rope_parameters={"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [6, 5, 5],
                                 "mrope_interleaved": True})
    vision = dict(depth=2, hidden_size=64, intermediate_size=128, num_heads=2, patch_size=PATCH, spatial_merge_size=MERGE,
                  temporal_patch_size=2, out_hidden_size=64, num_position_embeddings=256, deepstack_visual_indexes=[0])
    return Qwen3VLConfig(
        text_config=text, vision_config=vision, tie_word_embeddings=tied, image_token_id=ids["<|image_pad|>"],
        video_token_id=ids["<|video_pad|>"], vision_start_token_id=ids["<|vision_start|>"],
        vision_end_token_id=ids["<|vision_end|>"], eos_token_id=ids["<|im_end|>"], dtype="float32")
