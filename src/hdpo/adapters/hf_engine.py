"""A generation engine on plain transformers: no vLLM needed, slower, with a copy of the model of its own.

Requests waiting at a `step` are prefilled together as one cohort (left-padded); each step then samples one token for
every row of every cohort, and finished rows leave at once. Every row draws from a generator of its own, so its tokens
depend on its seed and not on its batch mates (up to rounding in the forward pass).
"""
from __future__ import annotations

import os
import random
import types
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from hdpo.adapters.torchvision_shim import activate
from hdpo.agent.spelled import SpelledTag
from hdpo.checksums import Checksum, Comparison, compare
from hdpo.config import RolloutConfig
from hdpo.errors import ModelError, RequestRefused
from hdpo.protocols import GenerateRequest
from hdpo.ranks.world import local_device
from hdpo.types import Completion, StopReason

_MAX_COHORTS = 4   # more would make every step a series of small forward passes


@dataclass
class _Row:
    """One request while it waits or runs."""

    id: str
    request: GenerateRequest
    prompt: list[int]              # expanded
    pixel_values: Tensor | None    # [patches, patch_dim]
    grid_thw: Tensor | None        # [images, 3]
    generator: random.Random
    spelled: int = 0               # characters of the closing tag that its text ends with
    token_ids: list[int] = field(default_factory=list)
    log_probs: list[float] = field(default_factory=list)


@dataclass
class _Cohort:
    rows: list[_Row]
    cache: Any
    attention_mask: Tensor   # [B, T] over everything in the cache
    positions: Tensor        # [B] position of the next token, the same on all three axes after the prompt
    logits: Tensor           # [B, V] of the next token


class HfEngine:
    """`protocols.Engine` on a transformers model; the arguments are those of `VllmEngine`.

    Log-probs: float32, of the sampled ids at the sampling temperature (at temperature 0: of the greedy id at
    temperature 1), banned ids removed. Of `config` only max_num_seqs and max_batched_tokens (prompt tokens of one
    cohort) are used. Raises ModelError for a folder without a model.
    """

    def __init__(self, model_path: str, *, config: RolloutConfig, max_model_len: int, stop_token_ids: Sequence[int],
                 tool_call_end_id: int, banned_token_ids: Sequence[int] = (), spelled_end: SpelledTag | None = None,
                 image_limit: int = 1, min_pixels: int, max_pixels: int, dtype: str = "auto", seed: int = 0) -> None:
        if not os.path.isfile(os.path.join(model_path, "config.json")):
            raise ModelError(f"model.path: {model_path} has no config.json")
        self.max_model_len = max_model_len
        self._config = config
        self._stop_token_ids = frozenset(stop_token_ids)
        self._tool_call_end_id = tool_call_end_id
        self._spelled_end = spelled_end
        self._image_limit = image_limit
        self._size = {"shortest_edge": min_pixels, "longest_edge": max_pixels}
        self._device = local_device()
        self._model, self._image_processor = _load(model_path, dtype, self._device)
        self._image_id = getattr(self._model.config, "image_token_id", None)   # None: a text-only model
        self._vocabulary = self._model.get_input_embeddings().num_embeddings
        self._banned = torch.tensor(list(banned_token_ids), dtype=torch.long, device=self._device)
        self._waiting: deque[_Row] = deque()
        self._cohorts: list[_Cohort] = []
        self._version = 0

    # --- generation ---------------------------------------------------------------------------------------------

    def add_request(self, request_id: str, request: GenerateRequest) -> None:
        """Queue one generation. Raises RequestRefused where the prompt leaves no room in `max_model_len` or can't be read."""
        try:
            prompt, pixel_values, grid_thw = self._expand(request)
        except (ValueError, TypeError) as exc:    # also how image processors refuse a picture
            raise RequestRefused(exc, request_id) from exc
        if len(prompt) >= self.max_model_len:
            raise RequestRefused(
                f"prompt of {len(prompt)} tokens leaves no room in max_model_len {self.max_model_len}", request_id)
        if not all(0 <= token < self._vocabulary for token in request.token_ids):
            raise RequestRefused(f"a token is outside the vocabulary of {self._vocabulary}", request_id)
        row = _Row(request_id, request, prompt, pixel_values, grid_thw, random.Random(request.seed))
        if self._spelled_end is not None:
            row.spelled = self._spelled_end.within(request.token_ids[len(request.token_ids) - request.begun:])
        self._waiting.append(row)

    def _expand(self, request: GenerateRequest) -> tuple[list[int], Tensor | None, Tensor | None]:
        """Compact -> expanded ids, with the image processor's tensors."""
        count = request.token_ids.count(self._image_id) if self._image_id is not None else 0
        if count != len(request.images) or count > self._image_limit:
            raise ValueError(f"{count} image placeholders, {len(request.images)} images, limit {self._image_limit}")
        if not count:
            return list(request.token_ids), None, None
        vision = self._image_processor(images=list(request.images), size=self._size, return_tensors="pt")
        runs = iter((vision["image_grid_thw"].prod(-1) // self._image_processor.merge_size ** 2).tolist())
        prompt: list[int] = []
        for token in request.token_ids:
            prompt += [token] * (next(runs) if token == self._image_id else 1)
        return prompt, vision["pixel_values"], vision["image_grid_thw"]

    @torch.inference_mode()
    def step(self) -> list[tuple[str, Completion]]:
        """Sample one token for every running request, having started those that wait; return those that finished."""
        if self._waiting and len(self._cohorts) < _MAX_COHORTS:
            rows = self._admit()
            if rows:
                self._cohorts.append(self._prefill(rows))
        finished: list[tuple[str, Completion]] = []
        for cohort in self._cohorts:
            self._sample(cohort)
            done = [(row.id, stop) for row in cohort.rows if (stop := self._stop_reason(row)) is not None]
            by_id = {row.id: row for row in cohort.rows}
            finished += [(id, Completion(by_id[id].token_ids, by_id[id].log_probs, stop, self._version))
                         for id, stop in done]
            _drop(cohort, {id for id, _ in done})
            if cohort.rows:
                self._decode(cohort)
        self._cohorts = [cohort for cohort in self._cohorts if cohort.rows]
        return finished

    def _admit(self) -> list[_Row]:
        """Waiting rows that fit: within max_num_seqs, and as many padded tokens as max_batched_tokens (at least a row)."""
        room = self._config.max_num_seqs - sum(len(cohort.rows) for cohort in self._cohorts)
        rows: list[_Row] = []
        longest = 0
        while self._waiting and len(rows) < room:
            longest = max(longest, len(self._waiting[0].prompt))
            if rows and longest * (len(rows) + 1) > self._config.max_batched_tokens:
                break
            rows.append(self._waiting.popleft())
        return rows

    def _prefill(self, rows: list[_Row]) -> _Cohort:
        from transformers import DynamicCache

        length = max(len(row.prompt) for row in rows)
        input_ids = torch.tensor([[0] * (length - len(row.prompt)) + row.prompt for row in rows], device=self._device)
        attention_mask = torch.tensor(
            [[0] * (length - len(row.prompt)) + [1] * len(row.prompt) for row in rows], device=self._device)
        positions, vision = self._see(rows, input_ids, attention_mask)
        cache = DynamicCache(config=self._model.config.get_text_config())
        output = self._model(input_ids=input_ids, attention_mask=attention_mask, position_ids=positions,
                             past_key_values=cache, use_cache=True, logits_to_keep=1, **vision)
        last = positions.amax(-1) if self._image_id is None else positions.amax((0, 2))
        return _Cohort(rows, cache, attention_mask, last + 1, output.logits[:, -1])

    def _see(self, rows: list[_Row], input_ids: Tensor, attention_mask: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """(positions [3, B, T], or [B, T] for a text-only model; arguments that carry the images)."""
        if self._image_id is None:
            return (attention_mask.cumsum(-1) - 1).clamp(min=0), {}
        token_types = ((input_ids == self._image_id) & attention_mask.bool()).int()
        pixels = [row.pixel_values for row in rows if row.pixel_values is not None]
        grids = [row.grid_thw for row in rows if row.grid_thw is not None]
        vision = {"pixel_values": torch.cat(pixels).to(self._device, self._model.dtype),
                  "image_grid_thw": torch.cat(grids).to(self._device)} if pixels else {}
        positions, _ = self._model.model.get_rope_index(
            input_ids, token_types, image_grid_thw=vision.get("image_grid_thw"), attention_mask=attention_mask)
        return positions, vision | {"mm_token_type_ids": token_types}

    def _decode(self, cohort: _Cohort) -> None:
        last = torch.tensor([[row.token_ids[-1]] for row in cohort.rows], device=self._device)
        cohort.attention_mask = torch.cat([cohort.attention_mask, torch.ones_like(last)], 1)
        positions = cohort.positions[:, None]
        output = self._model(input_ids=last, attention_mask=cohort.attention_mask, past_key_values=cohort.cache,
                             position_ids=positions if self._image_id is None else positions.expand(3, -1, -1), use_cache=True)
        cohort.positions = cohort.positions + 1
        cohort.logits = output.logits[:, -1]

    def _sample(self, cohort: _Cohort) -> None:
        temperature = torch.tensor([row.request.temperature or 1.0 for row in cohort.rows], device=self._device)
        logits = (cohort.logits.float() / temperature[:, None]).index_fill(1, self._banned, float("-inf"))
        log_probs = logits - logits.logsumexp(-1, keepdim=True)   # [B, V]; log_softmax is off by 1e-4 over 150,000 on CPU
        # Inverse of the distribution function: one uniform number a row, robust against rounding of the logits.
        cumulative = log_probs.double().exp().cumsum(-1)
        uniform = torch.tensor([[row.generator.random()] for row in cohort.rows], dtype=torch.float64, device=self._device)
        sampled = torch.searchsorted(cumulative, uniform * cumulative[:, -1:], right=True)[:, 0]
        greedy = torch.tensor([row.request.temperature == 0 for row in cohort.rows], device=self._device)
        token_ids = torch.where(greedy, log_probs.argmax(-1), sampled)
        chosen = log_probs.gather(1, token_ids[:, None])[:, 0]
        for row, token, log_prob in zip(cohort.rows, token_ids.tolist(), chosen.tolist(), strict=True):
            row.token_ids.append(token)
            if self._spelled_end is not None:
                row.spelled = self._spelled_end.after(row.spelled, token)
            row.log_probs.append(log_prob)
            if row.request.watch is not None:
                row.request.watch(row.token_ids)

    def _stop_reason(self, row: _Row) -> StopReason | None:
        last = row.token_ids[-1]
        if last == self._tool_call_end_id or self._spelled_end is not None and self._spelled_end.complete(row.spelled):
            return StopReason.TOOL_CALL
        if last in self._stop_token_ids:
            return StopReason.END_OF_TURN
        budget = min(row.request.max_tokens, self.max_model_len - len(row.prompt))
        return StopReason.LENGTH if len(row.token_ids) >= budget else None

    def so_far(self, request_id: str) -> Completion:
        """What a request has sampled until now, ABORTED; nothing for one that is unknown."""
        rows = (row for cohort in self._cohorts for row in cohort.rows if row.id == request_id)
        row = next(rows, None)
        return Completion(row.token_ids if row else [], row.log_probs if row else [], StopReason.ABORTED, self._version)

    def num_unfinished(self) -> int:
        return len(self._waiting) + sum(len(cohort.rows) for cohort in self._cohorts)

    def abort(self, request_ids: Sequence[str]) -> None:
        """Drop requests; an aborted request is never returned by `step`. Unknown ids are ignored."""
        gone = set(request_ids)
        self._waiting = deque(row for row in self._waiting if row.id not in gone)
        for cohort in self._cohorts:
            _drop(cohort, gone)
        self._cohorts = [cohort for cohort in self._cohorts if cohort.rows]

    # --- weights ------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def load_weights(self, weights: Iterable[tuple[str, Tensor]], version: int) -> None:
        """Replace all weights with (Hugging Face name, tensor) pairs; a tied lm_head may be named or left out.

        Raises RuntimeError with requests in flight, ModelError for a name that is missing or unknown or a wrong shape.
        """
        if self.num_unfinished():
            raise RuntimeError("load_weights while requests are running")
        parameters = dict(self._model.named_parameters(remove_duplicate=False))
        loaded: set[int] = set()
        for name, tensor in weights:
            if name not in parameters:
                raise ModelError(f"weights for the engine: unknown name {name}")
            parameter = parameters[name]
            if parameter.shape != tensor.shape:
                raise ModelError(
                    f"weights for the engine: {name} has shape {list(tensor.shape)}, not {list(parameter.shape)}")
            parameter.copy_(tensor)
            loaded.add(id(parameter))
        missing = [name for name, parameter in parameters.items() if id(parameter) not in loaded]
        if missing:
            raise ModelError(f"weights for the engine: {len(missing)} missing, the first is {missing[0]}")
        self._version = version

    def compare_weights(self, sent: Mapping[str, Checksum]) -> Comparison:
        """Every parameter by its own name."""
        return compare(sent, self._model.named_parameters(remove_duplicate=False))

    def sleep(self) -> None:
        """CUDA: running requests are dropped and the model moves to host memory. CPU: nothing to do."""
        if self._device.type == "cuda":
            self._waiting.clear()
            self._cohorts.clear()
            self._model.to("cpu")
            torch.cuda.empty_cache()

    def wake(self) -> None:
        self._model.to(self._device)

    def close(self) -> None:
        self._waiting.clear()
        self._cohorts.clear()
        self._model = None


def _load(model_path: str, dtype: str, device: torch.device) -> tuple[Any, Any]:
    activate()
    from transformers import AutoConfig, AutoImageProcessor, AutoModelForCausalLM, AutoModelForImageTextToText
    from transformers.integrations import deepspeed
    from transformers.utils import logging

    kind = dtype if dtype != "auto" else "bfloat16" if device.type == "cuda" else "float32"
    sees = hasattr(AutoConfig.from_pretrained(model_path), "vision_config")
    auto = AutoModelForImageTextToText if sees else AutoModelForCausalLM
    shown, sharding = logging.is_progress_bar_enabled(), deepspeed._hf_deepspeed_config_weak_ref
    logging.disable_progress_bar()
    deepspeed.unset_hf_deepspeed_config()   # the trainer's ZeRO-3 setting is global: it would shard this copy too
    try:
        model = auto.from_pretrained(model_path, dtype=getattr(torch, kind))
    finally:
        deepspeed._hf_deepspeed_config_weak_ref = sharding
        if shown:
            logging.enable_progress_bar()
    processor = AutoImageProcessor.from_pretrained(model_path) if sees else None
    model.to(device)   # type: ignore[arg-type]   # transformers' wrapper loses the signature
    torch.backends.cuda.enable_cudnn_sdp(False)   # as in policy_model: it would plan every new length
    if device.type == "cuda" and model.dtype == torch.bfloat16:
        model.lm_head.forward = types.MethodType(_fp32_logits, model.lm_head)
    return model.eval().requires_grad_(False), processor


def _fp32_logits(self: torch.nn.Linear, hidden: Tensor) -> Tensor:
    """The trainer's head keeps fp32 too: logits rounded to bf16 would put their rounding into every log-prob."""
    flat = hidden.reshape(-1, hidden.shape[-1])
    return torch.mm(flat, self.weight.t(), out_dtype=torch.float32).view(*hidden.shape[:-1], -1)


def _drop(cohort: _Cohort, ids: set[str]) -> None:
    keep = [i for i, row in enumerate(cohort.rows) if row.id not in ids]
    if not keep or len(keep) == len(cohort.rows):
        cohort.rows = [cohort.rows[i] for i in keep]
        return
    index = torch.tensor(keep, device=cohort.logits.device)
    cohort.rows = [cohort.rows[i] for i in keep]
    cohort.cache.batch_select_indices(index)
    cohort.attention_mask, cohort.positions = cohort.attention_mask[index], cohort.positions[index]
    cohort.logits = cohort.logits[index]
