"""The parts of the memory plan that forward and backward passes of the trainer need, bytes per rank."""
from __future__ import annotations

import importlib.util
import math

from hdpo.config import Config
from hdpo.doctor.shapes import Shapes


def update_parts(config: Config, shapes: Shapes, ranks: int, size: int, sft: bool) -> dict[str, int]:
    """Of an update, without the weights and what the optimizer keeps."""
    from hdpo.adapters.zero3 import MAX_LIVE_PARAMETERS, REDUCE_BUCKET, SUB_GROUP
    from hdpo.fused_loss import default_chunk_tokens

    trained = math.ceil(shapes.trained / ranks)
    tokens = max(config.batch.tokens_per_micro_batch, 0 if sft else config.max_model_len)   # a row is never cut
    activations = _activations(config, shapes, size, tokens, shared=config.batch.share_prompts and not sft)
    head = 4 * shapes.vocabulary * shapes.hidden if shapes.head_trained else 0
    chunk = config.batch.head_chunk_tokens or default_chunk_tokens(shapes.vocabulary, 4, True)
    loss = min(chunk, tokens) * shapes.vocabulary * (4 + size) + size * tokens * shapes.hidden + head
    reduced = 4 if config.optim.reduce_dtype == "float32" else size
    # The head's gradient is above a bucket and is reduced by itself: cast into the room of dW, and laid out anew where the
    # ranks don't divide it.
    copies = REDUCE_BUCKET * reduced + (head * reduced // 4 if shapes.vocabulary * shapes.hidden % ranks else 0)
    gradients = 0 if config.optim.offload else 4 * trained + 4 * min(trained, SUB_GROUP)   # the sum, and its copy in the step
    return {"gradients, shard": gradients, "gradient bucket": REDUCE_BUCKET * reduced, "gradients being reduced": copies,
            "gathered layers": min(shapes.parameters, MAX_LIVE_PARAMETERS) * size, "activations": activations,
            "loss chunk, dW": loss}


def _activations(config: Config, shapes: Shapes, size: int, tokens: int, shared: bool, graph: bool = True) -> int:
    """Of a forward over a full micro-batch and, with `graph`, of what backward needs of it."""
    patches = config.batch.patches_per_micro_batch
    text = size * tokens * shapes.hidden
    text_layer = size * tokens * (8 * shapes.hidden + 4 * (shapes.heads + 2 * shapes.kv_heads) * shapes.head_dim + 6 * shapes.mlp)
    seen = size * patches * shapes.vision_hidden
    vision_layer = size * patches * (20 * shapes.vision_hidden + 4 * shapes.vision_mlp)
    if not graph:
        activations = text + seen + max(text_layer, vision_layer)
    elif config.model.gradient_checkpointing:   # the input of each layer, and one layer that is computed again
        activations = shapes.layers * text + shapes.vision_layers * seen + max(text_layer, vision_layer)
    else:
        activations = shapes.layers * text_layer + shapes.vision_layers * vision_layer
    attention = config.model.attention
    if attention == "auto":
        attention = "flash_attention_2" if importlib.util.find_spec("flash_attn") else "sdpa"
    if attention == "sdpa" and not shapes.row_by_row or attention == "eager":   # the mask of packed rows, or the scores
        activations += tokens**2 * (1 if attention == "sdpa" else 3 * size * shapes.heads)
    if shared:   # keys and values of a prompt, and their gradients, once more for each rollout
        heads = shapes.kv_heads if attention == "flash_attention_2" else shapes.heads
        longest = min(tokens, config.data.max_prompt_tokens)
        activations += (4 if graph else 2) * size * (config.rollout.group_size - 1) * longest * heads * shapes.head_dim
    return activations


def reference_parts(config: Config, shapes: Shapes, ranks: int, size: int) -> dict[str, int]:
    """A forward of the starting policy, while what an update needs is away."""
    from hdpo.adapters.zero3 import MAX_LIVE_PARAMETERS
    from hdpo.fused_loss import default_chunk_tokens

    tokens = max(config.batch.tokens_per_micro_batch, config.max_model_len)
    chunk = config.batch.head_chunk_tokens or default_chunk_tokens(shapes.vocabulary, 4, True)
    return {"reference, shard": math.ceil(shapes.parameters / ranks) * size,
            "gathered layers": min(shapes.parameters, MAX_LIVE_PARAMETERS) * size,
            "activations": _activations(config, shapes, size, tokens, config.batch.share_prompts, graph=False),
            "loss chunk, dW": min(chunk, tokens) * shapes.vocabulary * (4 + size) + size * tokens * shapes.hidden}
