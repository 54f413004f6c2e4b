"""vLLM inside the trainer's process: one engine per rank, stepped by the rollout loop.

Continuous batching over unequal trajectories, no server and no per-turn barrier. A rank has a whole engine, or with
`rollout.tensor_parallel` a part of one, whose ranks must then be given the same requests in the same order and be stepped
together: lockstep.py sees to that. Written against vLLM 0.32, CUDA and CPU builds alike.

Memory on CUDA: `sleep()` drops the KV cache and the parameters, because the next `load_weights` brings them anew, and
copies whatever else the engine holds to the host (see vllm_worker.forget_weights). With `rollout.sleep` copy it is vLLM's
level 1: parameters are copied too, 1 to 1.5 s a step each way and 23 GiB of pinned memory a rank for an 8B.
"""
from __future__ import annotations

import gc
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

from hdpo.adapters.torchvision_shim import activate
from hdpo.adapters.vllm_process import keeping_pictures, quiet, start_engine, undisturbed_process
from hdpo.adapters.vllm_sampling import exact_log_probs, forbid, stop_at
from hdpo.adapters.vllm_worker import compare_sums, forget_weights, reload
from hdpo.agent.families import FAMILIES, Family
from hdpo.agent.spelled import SpelledTag
from hdpo.checksums import Checksum, Comparison
from hdpo.config import RolloutConfig
from hdpo.errors import ModelError, RequestRefused
from hdpo.protocols import GenerateRequest
from hdpo.types import Completion, StopReason

_GIB = 1024 ** 3
_CPU_KV_CACHE_GIB = 1.0
_HEAD, _EMBEDDING = "lm_head.weight", "embed_tokens.weight"


class VllmEngine:
    """`protocols.Engine` on an in-process vLLM.

    `model_path` is a Hugging Face folder. Generation ends at any of `stop_token_ids` (kept in the completion);
    `tool_call_end_id` tells which of them closes a tool call; `spelled_end` closes one too, with the token that completes it.
    `banned_token_ids` are left out of the softmax. `min_pixels` and `max_pixels` must be those of the trainer's image processor.
    `dtype` is "auto" (bfloat16 on CUDA, float32 on CPU), "float32" or "bfloat16".

    Log-probs are those of the sampled ids at the sampling temperature (at temperature 0: of the greedy id at
    temperature 1), after the ban. Where ranks share a process group, create it before the engine and build the engine on
    every rank together: vLLM makes its own groups beside it. One engine may exist at a time in a process; after
    `close()` another can be built.

    Raises ModelError for a folder without a model.
    """

    def __init__(self, model_path: str, *, config: RolloutConfig, max_model_len: int, stop_token_ids: Sequence[int],
                 tool_call_end_id: int, banned_token_ids: Sequence[int] = (), spelled_end: SpelledTag | None = None,
                 image_limit: int = 1, min_pixels: int, max_pixels: int, dtype: str = "auto", seed: int = 0) -> None:
        if not os.path.isfile(os.path.join(model_path, "config.json")):
            raise ModelError(f"model.path: {model_path} has no config.json")
        activate()
        import torch

        self.max_model_len = max_model_len
        self._stop_token_ids = list(stop_token_ids)
        self._tool_call_end_id = tool_call_end_id
        self._spelled_end = spelled_end
        self._version = 0
        self._watched: dict[str, Callable[[list[int]], object]] = {}
        self._cuda = torch.cuda.is_available()
        self._kv_asleep = self._forgotten = False
        self._forgets = self._cuda and config.sleep == "drop"
        self._owns_process_group = not torch.distributed.is_initialized()
        arguments = dict(
            model=model_path, dtype=_dtype(dtype, self._cuda), seed=seed, max_model_len=max_model_len,
            max_num_seqs=config.max_num_seqs * config.tensor_parallel,   # the setting is per rank
            limit_mm_per_prompt={"image": image_limit, "video": 0},
            mm_processor_kwargs={"images_kwargs": {"size": {"shortest_edge": min_pixels, "longest_edge": max_pixels}}},
            mm_processor_cache_gb=config.image_cache_gib, use_tqdm_on_load=False,
            generation_config="vllm", logprobs_mode="processed_logprobs", enable_prefix_caching=True,
            disable_log_stats=True, **_execution(config, self._cuda), **_scheduling(config, self._cuda, max_model_len),
            **_placement(config, self._cuda, self._owns_process_group))
        with undisturbed_process(), quiet():
            self._engine = start_engine(arguments)
        if banned_token_ids:
            self._engine.collective_rpc(forbid, args=(tuple(banned_token_ids),))
        self._engine.collective_rpc(exact_log_probs)
        model = self._engine.model_config.hf_config
        self._image_id = getattr(model, "image_token_id", None)    # None: a text-only model
        self._vocabulary = self._engine.model_config.get_vocab_size()
        self._tied, self._family = bool(model.tie_word_embeddings), FAMILIES[model.model_type]

    # --- generation ---------------------------------------------------------------------------------------------

    def add_request(self, request_id: str, request: GenerateRequest) -> None:
        """Queue one generation. Raises RequestRefused for whatever vLLM refuses: a prompt that leaves no room in
        `max_model_len`, too many images, one that its processor can't take, a token out of range."""
        from vllm import SamplingParams, TokensPrompt
        from vllm.exceptions import VLLMClientError
        from vllm.sampling_params import RequestOutputKind

        if self._forgotten:
            raise RuntimeError("the engine has slept and has no weights: load_weights first")
        placeholders = request.token_ids.count(self._image_id) if self._image_id is not None else 0
        if placeholders != len(request.images):    # vLLM would look at fewer pictures, or at none
            raise RequestRefused(f"{placeholders} image placeholders for {len(request.images)} images", request_id)
        if not all(0 <= token < self._vocabulary for token in request.token_ids):
            raise RequestRefused(f"a token is outside the vocabulary of {self._vocabulary}", request_id)
        self._wake_kv_cache()
        prompt = TokensPrompt(prompt_token_ids=list(request.token_ids))
        if request.images:
            prompt["multi_modal_data"] = {"image": list(request.images)}
            if request.image_keys:
                prompt["multi_modal_uuids"] = {"image": list(request.image_keys)}
        # top_p 1 and top_k -1: truncated sampling would put the log of the kept mass into every importance ratio.
        # ignore_eos: what ends a turn is `stop_token_ids` and nothing the model folder adds to it.
        parameters = SamplingParams(
            temperature=request.temperature, top_p=1.0, top_k=-1, min_p=0.0, seed=request.seed,
            max_tokens=request.max_tokens, stop_token_ids=self._stop_token_ids, ignore_eos=True,
            logprobs=0, flat_logprobs=True, detokenize=False,
            output_kind=RequestOutputKind.FINAL_ONLY if request.watch is None else RequestOutputKind.CUMULATIVE)
        try:
            name = self._engine.add_request(request_id, prompt, parameters)
        except (VLLMClientError, ValueError, TypeError) as exc:   # its own checks, and how its processors refuse a picture
            self._engine.abort_request([request_id])     # it may have come half-way in
            raise RequestRefused(exc, request_id) from exc
        if request.watch is not None:
            self._watched[request_id] = request.watch
        if self._spelled_end is not None:
            stop_at(self._engine, name, self._spelled_end, request.token_ids[len(request.token_ids) - request.begun:])

    def step(self) -> list[tuple[str, Completion]]:
        """Advance every running request by at least one token; return those that finished."""
        if not self.num_unfinished():
            return []
        finished = []
        for result in self._engine.step():
            if watch := self._watched.get(result.request_id):
                watch(list(result.outputs[0].token_ids))
            if result.finished:
                self._watched.pop(result.request_id, None)
                finished.append((result.request_id, self._completion(result.outputs[0], result.num_cached_tokens or 0)))
        return finished

    def _completion(self, output: Any, num_cached: int) -> Completion:
        token_ids = list(output.token_ids)
        if output.finish_reason == "abort":
            stop = StopReason.ABORTED
        elif output.finish_reason == "length":
            stop = StopReason.LENGTH
        else:
            spelled = self._spelled_end is not None and output.stop_reason == self._spelled_end.tag
            called = spelled or token_ids[-1] == self._tool_call_end_id
            stop = StopReason.TOOL_CALL if called else StopReason.END_OF_TURN
        flat = output.logprobs   # the sampled id comes first in each position
        return Completion(token_ids, [flat.logprobs[i] for i in flat.start_indices], stop, self._version,
                          num_cached)

    def so_far(self, request_id: str) -> Completion:
        """What a request has sampled until now, ABORTED; nothing for one that is unknown."""
        from vllm.v1.engine import FinishReason

        processor = self._engine.output_processor
        for name in processor.external_req_ids.get(request_id, []):
            state = processor.request_states[name]
            output = state.make_request_output([], None, FinishReason.ABORT, None)
            return self._completion(output.outputs[0], state.num_cached_tokens or 0)
        return Completion([], [], StopReason.ABORTED, self._version)

    def num_unfinished(self) -> int:
        return self._engine.get_num_unfinished_requests()

    def abort(self, request_ids: Sequence[str]) -> None:
        """Drop requests; an aborted request is never returned by `step`. Unknown ids are ignored."""
        self._engine.abort_request(list(request_ids))
        for request_id in request_ids:
            self._watched.pop(request_id, None)

    # --- weights ------------------------------------------------------------------------------------------------

    def load_weights(self, weights: Iterable[tuple[str, Any]], version: int) -> None:
        """Replace all weights with (Hugging Face name, tensor) pairs; drops every cache made with the old ones,
        which processed pictures are not.

        Tensors may vanish as soon as the iterator advances: each is copied, and held until its layer is complete. A
        tied lm_head is filled from the embedding whether or not the iterator names it: vLLM would keep a stale copy.
        Raises RuntimeError with requests in flight, ModelError for a name that is missing or unknown; the engine has
        no usable weights then.
        """
        if self.num_unfinished():
            raise RuntimeError("load_weights while requests are running")
        copies = _copied(weights, self._family, self._tied)
        try:
            missing = self._engine.collective_rpc(reload, args=(copies,))[0]
        except (ValueError, KeyError, AttributeError) as exc:   # how vLLM's loaders report unknown names and wrong shapes
            raise ModelError(f"weights for the engine: {exc}") from exc
        if missing:
            raise ModelError(f"weights for the engine: {len(missing)} missing, the first is {missing[0]}")
        self._forgotten = False
        self._engine.reset_encoder_cache()
        self._wake_kv_cache()
        self._engine.reset_prefix_cache()
        self._version = version

    def compare_weights(self, sent: Mapping[str, Checksum]) -> Comparison:
        """By vLLM's own renaming and fusing; where ranks hold parts of a tensor, their sums are added: a collective of theirs.

        Not compared: the fused weights of attention where ranks outnumber KV heads, because they hold copies then; on CPU
        linear layers, because oneDNN packs and drops their weights.
        """
        return self._engine.collective_rpc(compare_sums, args=(dict(sent),))[0]

    def sleep(self) -> None:
        """CUDA: weights and KV cache leave the device, and with `rollout.sleep` drop are forgotten; running requests are
        aborted. CPU: nothing to do."""
        if self._cuda and not self._engine.is_sleeping():
            if self._forgets:
                self._engine.collective_rpc(forget_weights)
                self._forgotten = True
            with keeping_pictures(self._engine):
                self._engine.sleep(level=1)
            self._kv_asleep = True

    def wake(self) -> None:
        """CUDA: room for the weights only, so that they and a gathered layer fit; the KV cache follows with the next load or
        request. What slept under `rollout.sleep` drop has no weights until they are loaded."""
        if self._kv_asleep:
            self._engine.wake_up(tags=["weights"])

    def _wake_kv_cache(self) -> None:
        if self._kv_asleep:
            self._engine.wake_up()   # whatever still sleeps
            self._kv_asleep = False

    def close(self) -> None:
        """Free everything, so that another engine can start in this process. A group of the trainer's stays as it is."""
        if self._engine is None:
            return
        from vllm.distributed import parallel_state
        from vllm.v1.engine import core

        cleanup = core.cleanup_dist_env_and_memory   # it would destroy the trainer's process group along with vLLM's
        core.cleanup_dist_env_and_memory = lambda: None   # type: ignore
        try:
            self._engine.engine_core.shutdown()
        finally:
            core.cleanup_dist_env_and_memory = cleanup
        self._engine = None
        parallel_state.destroy_model_parallel()
        if self._owns_process_group:
            parallel_state.destroy_distributed_environment()
        elif parallel_state._WORLD is not None:   # destroy_distributed_environment would take the trainer's group along
            parallel_state._WORLD.destroy()
            parallel_state._WORLD = None
        gc.collect()
        if self._cuda:
            import torch

            torch.cuda.empty_cache()


def _execution(config: RolloutConfig, cuda: bool) -> dict[str, Any]:
    """How the model runs. CUDA graphs of pure decode steps for every batch size there can be, without torch.compile: the
    kernels stay those that the trainer is compared with. On CUDA the head's logits are fp32, as the trainer's are: rounded to
    bf16 they are up to 0.06 off where they stand at 16 to 32, and so are the log-probs.
    """
    if not cuda:
        return {"enforce_eager": True}
    options: dict[str, Any] = {"hf_overrides": {"head_dtype": "float32"}, "enforce_eager": config.enforce_eager}
    if not config.enforce_eager:
        options["compilation_config"] = {
            "mode": 0, "cudagraph_mode": "FULL_DECODE_ONLY",
            "cudagraph_capture_sizes": graph_sizes(config.max_num_seqs * config.tensor_parallel)}
    return options


def graph_sizes(most: int) -> list[int]:
    """Batch sizes that get a CUDA graph of their own; others are padded up to the next."""
    return sorted({size for size in (1, 2, 4, *range(8, 256, 8), *range(256, most, 16)) if size < most} | {most})


def _scheduling(config: RolloutConfig, cuda: bool, max_model_len: int) -> dict[str, Any]:
    """Tokens of one engine step. On CPU prompts are never prefilled in chunks: vLLM rewinds the random generator of a seeded
    request after each chunk, which CPU generators do not support, and the engine dies of it."""
    tokens = max(config.max_batched_tokens, config.max_num_seqs * config.tensor_parallel)
    if cuda:
        return {"max_num_batched_tokens": tokens}
    return {"max_num_batched_tokens": max(tokens, max_model_len),
            "enable_chunked_prefill": False}


def _placement(config: RolloutConfig, cuda: bool, alone: bool) -> dict[str, Any]:
    """Where the engine runs and how much memory it takes."""
    options: dict[str, Any] = {"enable_sleep_mode": cuda, "gpu_memory_utilization": config.gpu_memory}
    if not alone:   # ranks of a launcher: vLLM reads RANK, LOCAL_RANK and the group that exists
        options["distributed_executor_backend"] = "external_launcher"
    if config.tensor_parallel > 1:   # the vision tower whole on each rank, which takes its share of the images
        options |= {"tensor_parallel_size": config.tensor_parallel, "mm_encoder_tp_mode": "data"}
    gib = config.kv_cache_gib or (0.0 if cuda else _CPU_KV_CACHE_GIB)
    if gib:
        options["kv_cache_memory_bytes"] = int(gib * _GIB)
    return options


def _dtype(dtype: str, cuda: bool) -> str:
    return dtype if dtype != "auto" else "bfloat16" if cuda else "float32"


def _copied(weights: Iterable[tuple[str, Any]], family: Family, tied: bool) -> Iterator[tuple[str, Any]]:
    for name, tensor in weights:
        if tied and name == _HEAD:
            continue
        copy = family.as_stored(name, tensor.detach().clone())
        yield name, copy
        if tied and name.endswith(_EMBEDDING):
            yield _HEAD, copy
