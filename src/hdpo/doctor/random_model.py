"""A model folder of any size without a download: random weights behind the toy base's tokenizer and processor."""
from __future__ import annotations

import gc
import shutil
from pathlib import Path
from typing import Any

import torch

import hdpo
from hdpo.adapters import torchvision_shim

TOY = Path(hdpo.__file__).parent / "toyworld" / "assets" / "toy-base"


def random_model(folder: Path, text: dict[str, Any], vision: dict[str, Any], dtype: torch.dtype, device: torch.device) -> Path:
    """Write a Qwen3-VL whose configuration is the toy base's but for `text` and `vision`; returns the folder."""
    torchvision_shim.activate()
    from transformers import AutoConfig, Qwen3VLForConditionalGeneration

    shutil.copytree(TOY, folder, ignore=shutil.ignore_patterns("*.safetensors"), dirs_exist_ok=True)
    config = AutoConfig.from_pretrained(TOY)
    for part, values in ((config.text_config, text), (config.vision_config, vision)):
        for name, value in values.items():
            setattr(part, name, value)
    half = config.text_config.head_dim // 2
    section = [half - 2 * (half // 3), half // 3, half // 3]
    config.text_config.rope_parameters = {**config.text_config.rope_parameters, "mrope_section": section}
    config.text_config.tie_word_embeddings = config.tie_word_embeddings = False
    config.text_config.layer_types = None
    torch.manual_seed(0)
    with device:
        model: Any = Qwen3VLForConditionalGeneration(config)
    model = model.to(dtype)
    model.save_pretrained(folder)
    del model
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
    return folder
