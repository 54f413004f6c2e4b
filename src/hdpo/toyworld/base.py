"""Pretrains the toy base: `hdpo toy-base --out DIR --seed S --steps N`.

A plain single-process loop over `toy_primitives`. Batch k of seed s is drawn from (s, k) alone, so a resumed run sees the
batches an uninterrupted one would have seen. Writes DIR (an ordinary Hugging Face folder) and DIR/state.pt while running.
"""
from __future__ import annotations

import argparse
import math
import os
import time
import types
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from hdpo.progress import progress
from hdpo.toyworld.glyphs import load_glyphs
from hdpo.toyworld.primitives import Teacher
from hdpo.toyworld.tensors import LessonBatch, collate
from hdpo.toyworld.tokenizer import PATCH, VIEW, make_config, make_tokenizer, save_base

BATCH, PEAK_LR, WARMUP, WEIGHT_DECAY = 32, 1.5e-3, 200, 0.05
SAVE_EVERY, REPORT_EVERY = 250, 250
PATCHES = (VIEW // PATCH) ** 2


def _attend_all_at_once(model: Any) -> None:
    """All pictures have one size here, so the vision attention is one batched call instead of a loop over pictures."""
    from transformers.models.qwen3_vl.modeling_qwen3_vl import apply_rotary_pos_emb_vision

    def forward(self: Any, hidden_states: torch.Tensor, cu_seqlens: torch.Tensor,
                position_embeddings: tuple[torch.Tensor, torch.Tensor], **_: Any) -> torch.Tensor:
        flat = len(hidden_states)
        query, key, value = self.qkv(hidden_states).reshape(flat, 3, self.num_heads, -1).unbind(1)
        query, key = apply_rotary_pos_emb_vision(query, key, *position_embeddings)
        query, key, value = (x.reshape(-1, PATCHES, self.num_heads, self.head_dim).transpose(1, 2)
                             for x in (query, key, value))
        out = F.scaled_dot_product_attention(query, key, value)
        return self.proj(out.transpose(1, 2).reshape(flat, -1))

    for block in model.model.visual.blocks:
        block.attn.forward = types.MethodType(forward, block.attn)


def _logits(model: Any, batch: LessonBatch) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits [N, V] and targets [N] of the trained tokens."""
    vision = {}
    if batch.num_images:
        side = VIEW // PATCH
        vision = {"pixel_values": batch.pixel_values, "image_grid_thw": torch.tensor([[1, side, side]] * batch.num_images)}
    hidden = model.model(input_ids=batch.input_ids, position_ids=batch.position_ids, use_cache=False,
                         **vision).last_hidden_state
    keep = batch.labels[:, 1:] != -100
    return model.lm_head(hidden[:, :-1][keep]), batch.labels[:, 1:][keep]


@torch.no_grad()
def accuracy(model: Any, tokenizer: Any, lessons: int = 256, split: str = "held_out", seed: int = 0) -> dict[str, float]:
    """Share of turns whose every token is the most likely one given the turns before, per kind of lesson."""
    model.eval()
    teacher = Teacher(seed, split, reasons=1.0)   # a coin decides in training; its toss is no skill
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    right: dict[str, list[bool]] = {}
    for _ in range(0, lessons, BATCH):
        rows = teacher.batch(BATCH)
        logits, targets = _logits(model, collate(rows, tokenizer, teacher.glyphs))
        hits, closes = (logits.argmax(-1) == targets).tolist(), (targets == end).tolist()
        kinds = iter([lesson.kind for lesson in rows for _ in lesson.turns])
        turn = True
        for hit, closed in zip(hits, closes, strict=True):
            turn &= hit
            if closed:
                right.setdefault(next(kinds), []).append(turn)
                turn = True
    model.train()
    return {kind: sum(r) / len(r) for kind, r in sorted(right.items())}


def _learning_rate(step: int, progress: float) -> float:
    return PEAK_LR * min(1.0, (step + 1) / WARMUP) * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * min(1.0, progress))))


def _save(folder: Path, model: Any, optimizer: Any, tokenizer: Any, step: int, seconds: float) -> None:
    save_base(folder, model, tokenizer)
    part = folder / "state.pt.part"
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": step, "seconds": seconds}, part)
    os.replace(part, folder / "state.pt")


def _warm_start(model: Any, tokenizer: Any, folder: Path) -> None:
    """Weights of an earlier base; embeddings are matched by the token's text, new tokens keep their fresh ones."""
    from safetensors.torch import load_file
    from transformers import AutoTokenizer

    weights = load_file(folder / "model.safetensors")
    old = AutoTokenizer.from_pretrained(folder).get_vocab()
    name = "model.language_model.embed_tokens.weight"
    embeddings = model.state_dict()[name].clone()
    for token, row in tokenizer.get_vocab().items():
        if token in old:
            embeddings[row] = weights[name][old[token]]
    model.load_state_dict({**weights, name: embeddings, "lm_head.weight": embeddings})


def pretrain(out: Path, seed: int = 1, steps: int = 4000, minutes: float = math.inf,
             init: Path | None = None) -> tuple[Any, Any]:
    """Trains until `steps` or `minutes`, whichever ends first; the learning rate follows the nearer end.

    Continues from out/state.pt when it exists. Returns (model, tokenizer).
    """
    from transformers import Qwen3VLForConditionalGeneration

    torch.manual_seed(seed)
    tokenizer = make_tokenizer()
    model = Qwen3VLForConditionalGeneration(make_config(tokenizer))
    if init is not None:
        _warm_start(model, tokenizer, init)
    _attend_all_at_once(model)
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.98), weight_decay=WEIGHT_DECAY, fused=True)
    step, before = 0, 0.0
    if (out / "state.pt").exists():
        state = torch.load(out / "state.pt")
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        step, before = state["step"], state["seconds"]
    started = time.monotonic() - before
    glyphs = load_glyphs("train")
    bar = progress("toy base", "step", total=steps, initial=step)
    while True:
        seconds = time.monotonic() - started
        done = max(step / steps, seconds / 60 / minutes)
        if done >= 1:
            break
        teacher = Teacher(seed * 10_000_000 + step)
        logits, targets = _logits(model, collate(teacher.batch(BATCH), tokenizer, glyphs))
        loss = F.cross_entropy(logits, targets)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for group in optimizer.param_groups:
            group["lr"] = _learning_rate(step, done)
        optimizer.step()
        optimizer.zero_grad()
        step += 1
        bar.update()
        if step % 25 == 0:
            bar.set_postfix(loss=f"{loss.item():.3f}", lr=f"{group['lr']:.1e}")
        if step % REPORT_EVERY == 0:
            bar.write(f"{step} {seconds:.0f}s " + " ".join(
                f"{k} {v:.3f}" for k, v in accuracy(model, tokenizer).items()))
        if step % SAVE_EVERY == 0:
            _save(out, model, optimizer, tokenizer, step, time.monotonic() - started)
    bar.close()
    _save(out, model, optimizer, tokenizer, step, time.monotonic() - started)
    return model, tokenizer


def main(argv: Sequence[str]) -> int:
    """`hdpo toy-base`."""
    parser = argparse.ArgumentParser(
        prog="hdpo toy-base", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder to write")
    parser.add_argument("--seed", type=int, default=1, help="seed of weights and data (%(default)s)")
    parser.add_argument("--steps", type=int, default=4000, help="optimizer steps (%(default)s)")
    parser.add_argument("--minutes", type=float, default=math.inf, help="wall clock that ends the run early")
    parser.add_argument("--init", type=Path, help="folder of an earlier base to start from")
    args = parser.parse_args(argv)
    result = accuracy(*pretrain(args.out, args.seed, args.steps, args.minutes, args.init), lessons=1024)
    print("held-out accuracy: " + ", ".join(f"{kind} {value:.3f}" for kind, value in result.items()))
    return 0
