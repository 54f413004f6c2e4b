"""What hdpo needs of vLLM's sampling beyond its options: ids that can't be sampled, exact log-probs, a tag that may be spelled.

Written against vLLM 0.32, like the engine. The first two run in the worker, the third where outputs are processed.
"""
from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from hdpo.agent.spelled import SpelledTag


def forbid(worker: Any, token_ids: Sequence[int]) -> None:
    """Take `token_ids` out of every softmax. In the model and not as an option of each request: there would be hundreds of ids
    (a padded head's) times hundreds of requests to lay out again whenever one of them ends."""
    import torch

    model = worker.get_model()
    compute, banned = model.compute_logits, torch.tensor(sorted(token_ids), device=worker.device)

    def compute_logits(*args: Any, **kwargs: Any) -> Any:
        logits = compute(*args, **kwargs)
        return logits if logits is None else logits.index_fill_(-1, banned, float("-inf"))   # None: another rank has them

    model.compute_logits = compute_logits


def exact_log_probs(worker: Any) -> None:
    """On CPU torch's fp32 log_softmax over 150,000 entries is off by up to 1e-4 where one of them has most of the mass;
    subtracting the logsumexp is off by 2e-6."""
    if worker.device.type != "cpu":
        return
    sampler = worker.model_runner.sampler
    kept, sample = sampler.topk_topp_sampler, sampler.topk_topp_sampler.forward
    kept.logprobs_mode = "processed_logits"

    def forward(*args: Any, **kwargs: Any) -> tuple[Any, Any]:
        sampled, logits = sample(*args, **kwargs)
        return sampled, normalised(logits)

    kept.forward = forward
    sampler.compute_logprobs = normalised


def normalised(logits: Any) -> Any:
    logits = logits.float()
    return logits - logits.logsumexp(-1, keepdim=True)


def stop_at(engine: Any, request_id: str, tag: SpelledTag, begun: Sequence[int] = ()) -> None:
    """End the request `request_id` (vLLM's own name for it) with the token that completes `tag`, of which `begun`, the turn's
    tokens so far, may hold a part. Where vLLM would look for stop strings in detokenized text, it is looked for in tokens."""
    from vllm.v1.engine.detokenizer import IncrementalDetokenizer

    class Watch(IncrementalDetokenizer):
        matched = tag.within(begun)

        def update(self, new_token_ids: list[int], stop_terminated: bool) -> str | None:
            for token in new_token_ids:
                self.token_ids.append(token)
                self.matched = tag.after(self.matched, token)
                if tag.complete(self.matched):
                    return tag.tag
            return None

    engine.output_processor.request_states[request_id].detokenizer = Watch()
