"""What is trained: everything, everything but frozen parameters, or low-rank adapters beside a frozen model.

Engines and exported folders get `W + alpha / rank * B @ A` under W's own name (`merged_parameters`), so that nobody needs to
know that adapters exist. A folder's adapter/ holds them apart as well, as peft does (`write_adapter`): beside the weights,
transformers would add them a second time.
"""
from __future__ import annotations

import fnmatch
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from hdpo.config import ModelConfig
from hdpo.errors import ConfigError

_ADAPTER = "default"
ADAPTER_FOLDER = "adapter"


def choose_trainable(model: nn.Module, config: ModelConfig) -> None:
    """Freeze what `model.freeze` names; with `model.lora_rank`, freeze the rest too and put adapters beside it.

    Patterns are those of a shell, over parameter names (freeze) and names of linear layers (lora_targets). A module whose
    weight is frozen gets no adapter, nor does the head, whose weight the loss reads directly. Raises ConfigError for a
    pattern without a match and when nothing would be trained.
    """
    parameters = dict(model.named_parameters(remove_duplicate=False))   # a tied one is frozen under any of its names
    for name in _matching(list(parameters), config.freeze, "model.freeze"):
        parameters[name].requires_grad_(False)
    if config.lora_rank:
        _add_adapters(model, config)
    if not any(p.requires_grad for p in model.parameters()):
        raise ConfigError("model.freeze leaves nothing to train")


def _add_adapters(model: nn.Module, config: ModelConfig) -> None:
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError as exc:
        raise ConfigError(f"model.lora_rank needs peft: pip install 'hdpo[lora]' ({exc})") from exc

    linear = {name: module for name, module in model.named_modules()
              if isinstance(module, nn.Linear) and module is not model.get_output_embeddings()}   # type: ignore[operator]
    targets = [name for name in _matching(list(linear), config.lora_targets, "model.lora_targets")
               if linear[name].weight.requires_grad]
    model.requires_grad_(False)
    if targets:
        settings = LoraConfig(r=config.lora_rank, lora_alpha=config.lora_alpha, target_modules=targets)
        dtype = next(model.parameters()).dtype
        inject_adapter_in_model(settings, model, _ADAPTER)
        for name, parameter in model.named_parameters():
            if is_adapter(name):
                parameter.data = parameter.data.to(dtype)   # peft makes them float32; ZeRO wants one precision


def _matching(names: Sequence[str], patterns: Sequence[str], field: str) -> list[str]:
    found: set[str] = set()
    for pattern in patterns:
        matches = fnmatch.filter(names, pattern)
        if not matches:
            raise ConfigError(f"{field}: {pattern} matches nothing; names are like {names[0]} and {names[-1]}")
        found.update(matches)
    return [name for name in names if name in found]


@contextmanager
def adapters_off(model: nn.Module) -> Iterator[None]:
    """The model without its adapters. They are scaled by 0 rather than left out: ZeRO-3 fetches weights in the order in which
    modules ran before."""
    layers: list[Any] = [module for module in model.modules() if hasattr(module, "lora_A")]
    scales = [layer.scaling[_ADAPTER] for layer in layers]
    try:
        for layer in layers:
            layer.scaling[_ADAPTER] = 0.0
        yield
    finally:
        for layer, scale in zip(layers, scales, strict=True):
            layer.scaling[_ADAPTER] = scale


def is_adapter(name: str) -> bool:
    return ".lora_A." in name or ".lora_B." in name


@dataclass(frozen=True, slots=True)
class Merged:
    """A parameter as the world outside sees it: its Hugging Face name, and what must be gathered to compute it."""

    name: str
    weight: nn.Parameter                # [out, in] where there is an adapter
    down: nn.Parameter | None = None    # A [rank, in]
    up: nn.Parameter | None = None      # B [out, rank]
    scale: float = 0.0

    @property
    def parameters(self) -> list[nn.Parameter]:
        return [p for p in (self.weight, self.down, self.up) if p is not None]

    def value(self) -> Tensor:
        """The weight itself, or a new tensor with the adapter added in float32. Gathered parameters only."""
        if self.down is None or self.up is None:
            return self.weight.data
        base, up, down = (p.data.float() for p in (self.weight, self.up, self.down))
        return torch.addmm(base, up, down, alpha=self.scale).to(self.weight.dtype)


def merged_parameters(model: nn.Module) -> Iterator[Merged]:
    """Every parameter of the model without adapters, in the model's order, tied ones under each of their names."""
    adapters = {f"{name}.base_layer.weight": module for name, module in model.named_modules() if hasattr(module, "lora_A")}
    for name, weight in model.named_parameters(remove_duplicate=False):
        if is_adapter(name):
            continue
        plain = name.replace(".base_layer.", ".")
        if module := adapters.get(name):
            yield Merged(plain, weight, module.lora_A[_ADAPTER].weight, module.lora_B[_ADAPTER].weight,
                         module.scaling[_ADAPTER])
        else:
            yield Merged(plain, weight)


def adapter_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """The adapters' own parameters by the names that peft gives them in a file; empty without adapters."""
    return {f"base_model.model.{name.replace(f'.{_ADAPTER}.', '.')}": parameter
            for name, parameter in model.named_parameters() if is_adapter(name)}


def write_adapter(folder: Path, model: nn.Module, values: Mapping[str, Tensor], base: str) -> list[Path]:
    """Write `values` (see `adapter_parameters`, on the host) as `PeftModel.from_pretrained` reads them; returns the files.

    `base` is the folder of the model that they were trained beside.
    """
    from peft import LoraConfig
    from safetensors.torch import save_file
    found: Any = model.peft_config[_ADAPTER]     # type: ignore[index]
    config = LoraConfig(r=found.r, lora_alpha=found.lora_alpha, target_modules=sorted(found.target_modules),
                        base_model_name_or_path=base, inference_mode=True)
    folder.mkdir(exist_ok=True)
    config.save_pretrained(str(folder))
    save_file(dict(values), folder / "adapter_model.safetensors", metadata={"format": "pt"})
    return [folder / "adapter_config.json", folder / "adapter_model.safetensors"]
