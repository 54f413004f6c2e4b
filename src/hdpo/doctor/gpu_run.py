"""`run` of the GPU check: ZeRO-3 steps of a random model with images, and the engine beside it, as in the first step of a run."""
from __future__ import annotations

import gc
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from hdpo.adapters.chat_format import open_chat
from hdpo.adapters.deepspeed_policy import DeepSpeedPolicy
from hdpo.adapters.engines import make_engine
from hdpo.agent.chat import ChatFormat
from hdpo.checksums import Watch
from hdpo.config import Config
from hdpo.doctor.gpu_check import Lines
from hdpo.doctor.memory_plan import plan
from hdpo.doctor.random_model import TOY, random_model
from hdpo.doctor.shapes import read_shapes
from hdpo.packing.batching import PackingSpec, make_train_batch
from hdpo.protocols import Engine, GenerateRequest
from hdpo.train.canary import canary, measure
from hdpo.train.metrics import Metrics
from hdpo.train.objectives import HdpoObjective
from hdpo.train.sync import sync_weights
from hdpo.train.update import update
from hdpo.types import Sample

CUDA = torch.cuda.is_available()
GIB = 2**30
TEXT = dict(hidden_size=2048, intermediate_size=6144, num_hidden_layers=28, num_attention_heads=16, num_key_value_heads=8,
            head_dim=128)
VISION = dict(depth=24, hidden_size=1024, intermediate_size=4096, num_heads=16, out_hidden_size=2048,
              deepstack_visual_indexes=[5, 11, 17])
MARGIN = GIB      # of the plan's figures, which leave out what the allocator keeps between blocks


def settings(folder: Path, changes: Mapping[str, dict[str, Any]]) -> Config:
    tokens = 8192 if CUDA else 512
    shipped: dict[str, dict[str, Any]] = {
        "model": {"path": str(folder), "max_pixels": 1024 * 1024 if CUDA else 64 * 64, "min_pixels": 32 * 32},
        "data": {"max_prompt_tokens": tokens // 2},
        "rollout": {"max_response_tokens": tokens // 2, "max_num_seqs": 64 if CUDA else 8, "max_batched_tokens": tokens,
                    "max_images": 4, "gpu_memory": 0.3, "kv_cache_gib": 4.0 if CUDA else 0.25},
        "batch": {"tokens_per_micro_batch": tokens, "patches_per_micro_batch": 65536}, "optim": {"lr": 1e-5}}
    return Config.model_validate({name: shipped.get(name, {}) | changes.get(name, {}) for name in {**shipped, **changes}})


def held() -> float:
    """GiB in use on the device, by whomever."""
    if not CUDA:
        return 0.0
    torch.cuda.synchronize()
    free, total = torch.cuda.mem_get_info()
    return (total - free) / GIB


class Run:
    """The parts of a run, and the steps of the check in order."""

    def __init__(self, folder: Path, lines: Lines, changes: Mapping[str, dict[str, Any]] | None = None) -> None:
        """`changes`: section -> settings other than the check's."""
        self.lines, self.config = lines, settings(folder, changes or {})
        self.chat: ChatFormat = open_chat(self.config.model)
        self.shapes = read_shapes(self.config.model)      # before the policy: transformers shards what is made after it
        started = time.monotonic()
        self.policy = DeepSpeedPolicy(self.config.model, self.config.optim, self.chat.image_token_id, 1)
        lines.add("policy, seconds to load", time.monotonic() - started, "s")
        blank = self.chat.observation("", [self.chat.bound(Image.new("RGB", (64, 64)))], 1 << 20)
        given = len(blank.expanded_ids)
        self.spec = PackingSpec(
            image_token_id=self.chat.image_token_id, merge_size=self.chat.merge_size,
            max_tokens=self.config.batch.tokens_per_micro_batch, max_patches=self.config.batch.patches_per_micro_batch,
            filler=Sample(list(blank.expanded_ids), [0] * given, [0.0] * given, (), (), self.chat.vision(blank.images)),
            positions=self.chat.family.positions)
        self.version = 0

    def rows(self) -> list[Sample]:
        """The canary's prompts, images included, with answers of 32 arbitrary tokens."""
        asked, rows = canary(self.chat, self.config.max_model_len - 32, 4), []
        answer = asked[0][1].expanded_ids[-32:]
        for index, (_, prompt) in enumerate(asked):
            given = len(prompt.expanded_ids)
            mask = [0] * given + [1] * len(answer)
            rows.append(Sample(prompt.expanded_ids + answer, mask, [-5.0 * m for m in mask], ((-1.0) ** index, 0.5), (True, True),
                               self.chat.vision(prompt.images)))
        return rows

    def step(self) -> int:
        """Two optimizer steps: a finite norm, and no more memory than planned. Returns their micro-batches."""
        objective = HdpoObjective(self.config.hdpo, self.chat.banned_ids, 1.0, Metrics())
        taken, micro_batches = [], 0
        for _ in range(2):
            if CUDA:
                torch.cuda.reset_peak_memory_stats()
            started = time.monotonic()
            batch = make_train_batch([self.rows()], self.spec, self.policy.world, channels=2)
            micro_batches += len(batch.mini_batches[0].micro_batches)
            norm = update(self.policy, batch.mini_batches[0], objective, 1e-6)
            if CUDA:
                torch.cuda.synchronize()
            taken.append(time.monotonic() - started)
        self.lines.add("gradient norm is finite", float(torch.tensor(norm).isfinite()), "", 1, at_least=True)
        self.lines.add("optimizer step with images", taken[-1], "s", 30.0 if CUDA else None)
        if CUDA:
            planned = plan(self.config, self.shapes, 1, 1 << 60, 2).total("update") + MARGIN
            self.lines.add("memory of a step", torch.cuda.max_memory_allocated() / GIB, "GiB", planned / GIB)
        return micro_batches

    def park(self) -> None:
        before = held()
        self.policy.park()
        state = 16 * self.shapes.trained / GIB    # fp32 weights, moments and the sum of gradients
        if CUDA:
            self.lines.add("parked with a policy around it", before - held(), "GiB", 0.98 * state, at_least=True)

    def engine(self, **rollout: Any) -> Engine:
        config = self.config.rollout.model_copy(update=rollout)
        return make_engine(
            "auto", self.config.model.path, config=config, max_model_len=self.config.max_model_len,
            stop_token_ids=self.chat.stop_ids, tool_call_end_id=self.chat.tool_call_end_id, image_limit=4,
            spelled_end=self.chat.spelled_end, banned_token_ids=self.chat.banned_ids, min_pixels=self.chat.min_pixels,
            max_pixels=self.chat.max_pixels, dtype=self.config.model.dtype, seed=1)

    def parity(self, engine: Engine, stage: str) -> None:
        report = measure(self.policy, engine, self.chat, self.spec)
        worst = max(report.excess(self.policy.dtype).values())
        self.lines.add(f"log-probs {stage}, mean difference", report.mean, "nat")
        self.lines.add(f"log-probs {stage}, share of the limit", worst, "", 1.0)

    def cycle(self, engine: Engine) -> None:
        """Sleep, wake, weights: what a step of a run does to the engine, twice, with answers that must not change."""
        before, awake = greedy(engine, self.chat), held()
        for _ in range(2):
            started = time.monotonic()
            engine.sleep()
            slept, asleep = time.monotonic() - started, held()
            started, watch = time.monotonic(), Watch()
            self.version += 1
            sync_weights(self.policy, engine, self.version, 512, watch)
            synced = time.monotonic() - started
            found = engine.compare_weights(watch.sums())
        self.lines.add("weights that arrived changed", len(found.wrong), "", 0)
        self.lines.add("share of weights compared", found.share, "", 0.99 if CUDA else None, at_least=True)
        self.lines.add("greedy answers as before sleep", float(greedy(engine, self.chat) == before), "", 1, at_least=True)
        self.lines.add("engine, seconds to sleep", slept, "s", 5.0 if CUDA else None)
        self.lines.add("engine, seconds to wake and load", synced, "s", 30.0 if CUDA else None)
        if CUDA:
            kept = self.config.rollout.kv_cache_gib + 2 * self.shapes.parameters / GIB
            self.lines.add("engine, memory given back asleep", awake - asleep, "GiB", 0.95 * kept, at_least=True)
            self.lines.add("engine, memory lost over two sleeps", held() - awake, "GiB", 0.2)

    def graphs(self, engine: Engine) -> None:
        """Decode steps with CUDA graphs beside the same without. The engine is closed."""
        if not CUDA:
            engine.close()
            return self.lines.add("decode step with CUDA graphs (CUDA only)", None)
        with_graphs = decode_seconds(engine, self.chat)
        engine.close()
        eager = self.engine(enforce_eager=True)
        without = decode_seconds(eager, self.chat)
        eager.close()
        self.lines.add("decode step with CUDA graphs", 1e3 * with_graphs, "ms")
        self.lines.add("decode step with / without graphs", with_graphs / without, "x", 0.95)


def greedy(engine: Engine, chat: ChatFormat) -> list[list[int]]:
    asked = canary(chat, engine.max_model_len - 16, 4)
    for index, (_, prompt) in enumerate(asked):
        engine.add_request(str(index), GenerateRequest(
            list(prompt.compact_ids), tuple(prompt.images), 16, 0.0, 1, prompt.image_keys))
    done = _finish(engine)
    return [done[str(index)].token_ids for index in range(len(asked))]


def decode_seconds(engine: Engine, chat: ChatFormat, sequences: int = 32, tokens: int = 128) -> float:
    """Median seconds of a step that decodes one token of each sequence."""
    prompt = canary(chat, engine.max_model_len - tokens, 0)[0][1]
    for index in range(sequences):
        engine.add_request(str(index), GenerateRequest(list(prompt.compact_ids), (), tokens, 1.0, index))
    taken = []
    while engine.num_unfinished():
        started = time.monotonic()
        engine.step()
        taken.append(time.monotonic() - started)
    return sorted(taken)[len(taken) // 2]


def _finish(engine: Engine) -> dict[str, Any]:
    done: dict[str, Any] = {}
    while engine.num_unfinished():
        done.update(engine.step())
    return done


def main() -> None:
    lines = Lines()
    with tempfile.TemporaryDirectory() as folder:
        path = random_model(Path(folder), TEXT, VISION, torch.bfloat16, torch.device("cuda")) if CUDA else TOY
        run = Run(path, lines)
        steps: list[tuple[str, Callable[[], object]]] = [("optimizer step", run.step), ("parking", run.park)]
        for name, step in steps:
            with lines.step(name):
                step()
        with lines.step("engine"):
            engine = run.engine()
            run.version = 1
            sync_weights(run.policy, engine, run.version, 512)
            parts: list[tuple[str, Callable[[], None]]] = [
                ("log-probs after a sync", lambda: run.parity(engine, "after a sync")),
                ("sleep and wake", lambda: run.cycle(engine)),
                ("log-probs after sleep", lambda: run.parity(engine, "after sleep")),
                ("graphs", lambda: run.graphs(engine))]
            for name, part in parts:
                with lines.step(name):
                    part()
        gc.collect()
        run.policy.close()


if __name__ == "__main__":
    main()
