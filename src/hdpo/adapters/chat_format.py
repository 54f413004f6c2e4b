"""The chat format of a model folder. transformers' image processors can't be imported before torchvision is made to load."""
from __future__ import annotations

from hdpo.adapters import torchvision_shim
from hdpo.agent.chat import ChatFormat, load_chat_format
from hdpo.config import ModelConfig


def open_chat(model: ModelConfig) -> ChatFormat:
    """Raises ModelError, see `load_chat_format`."""
    torchvision_shim.activate()
    from hdpo.adapters.model_folder import check_files
    check_files(model.path)
    return load_chat_format(model.path, model.min_pixels, model.max_pixels, model.max_tool_pixels, model.tell_sizes)
