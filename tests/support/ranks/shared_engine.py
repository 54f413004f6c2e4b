"""Run under a launcher: the ranks share one vLLM engine, each with requests of its own. Rank 0 prints what each rank found.

Usage: shared_engine.py FOLDER
"""
import asyncio
import json
import sys
import threading
from typing import Any

import torch.distributed as dist

from hdpo.adapters import lockstep
from hdpo.adapters.engines import make_engine
from hdpo.agent.chat import ChatFormat, load_chat_format
from hdpo.agent.pump import EnginePump
from hdpo.agent.trajectory import Key
from hdpo.background import BackgroundLoop
from hdpo.checksums import Watch
from hdpo.config import RolloutConfig
from hdpo.errors import RequestRefused
from hdpo.protocols import Engine, GenerateRequest
from hdpo.train.canary import canary_prompts
from hdpo.types import Completion


def requests(chat: ChatFormat, rank: int) -> dict[str, GenerateRequest]:
    """Eight on rank 0, two on rank 1; both show the same pictures."""
    prompts = [chat.prompt(messages, images) for messages, images in canary_prompts(chat)]
    chosen = prompts + prompts if rank == 0 else prompts[2:]
    return {str(i): GenerateRequest(list(prompt.compact_ids), prompt.images, 24, 1.0, 100 * rank + i, prompt.image_keys)
            for i, prompt in enumerate(chosen)}


def generate(engine: Engine, asked: dict[str, GenerateRequest], aborted: str = "") -> dict[str, Completion]:
    for name, request in asked.items():
        engine.add_request(name, request)
    done: dict[str, Completion] = {}
    for _ in range(3):
        done.update(engine.step())
    engine.abort([aborted] if aborted else [])
    while engine.num_unfinished():
        done.update(engine.step())
    return done


def differences(found: dict[str, Completion], alone: dict[str, Completion]) -> dict[str, Any]:
    """Names with other tokens than those of an engine of one's own, and the largest difference of log-probs."""
    return {"names": sorted(found), "other": [name for name in found if found[name].token_ids != alone[name].token_ids],
            "log_probs": max((abs(a - b) for name in found
                              for a, b in zip(found[name].log_probs, alone[name].log_probs)), default=0.0)}


class Diary:
    """An engine's part that writes down what it is told to do."""

    def __init__(self, part: Any) -> None:
        self.part, self.lines = part, []

    def __getattr__(self, name: str) -> Any:
        return getattr(self.part, name)

    def add_request(self, name: str, request: GenerateRequest) -> None:
        self.lines.append(request.seed)
        self.part.add_request(name, request)

    def step(self) -> list[tuple[str, Completion]]:
        self.lines.append("step")
        return self.part.step()


def play(engine: Any, chat: ChatFormat, background: BackgroundLoop, rank: int, delay: float, *, deterministic: bool,
         stop: threading.Event | None = None) -> tuple[list[list[int]], list[Any]]:
    """Three trajectories of two turns with a tool call of `delay` s between; rank 1 has one. Their tokens, the diary."""
    pump = EnginePump(engine, background.loop, deterministic=deterministic)
    keys = [Key(rank, sample) for sample in range(3 if rank == 0 else 1)]
    prompt = chat.prompt(*canary_prompts(chat)[2])
    engine._part.lines = []

    async def trajectory(key: Key) -> list[int]:
        sampled: list[int] = []
        try:
            for turn in range(2):
                request = GenerateRequest(list(prompt.compact_ids), prompt.images, 6 + 3 * key.sample, 1.0,
                                          100 * rank + 10 * key.sample + turn, prompt.image_keys)
                sampled += (await pump.generate(key, request)).token_ids
                await asyncio.sleep(delay * (1 + key.sample))
        finally:
            pump.ended(key)
        return sampled

    async def all_of_them() -> list[Any]:
        return await asyncio.gather(*tasks, return_exceptions=True)

    for key in keys:
        pump.started(key)
    tasks = [background.submit(trajectory(key)) for key in keys]
    tasks = [asyncio.wrap_future(task, loop=background.loop) for task in tasks]
    outcome = background.submit(all_of_them())
    outcome.add_done_callback(lambda _: pump.close())
    pump.run(stop, lambda: background.loop.call_soon_threadsafe(lambda: [task.cancel() for task in tasks]))
    return [found for found in outcome.result() if isinstance(found, list)], engine._part.lines


def together(engine: Any, chat: ChatFormat, rank: int, alone: dict[str, Completion]) -> dict[str, Any]:
    """Everything that two ranks do with one engine."""
    asked, found = requests(chat, rank), {}
    found["all"] = differences(generate(engine, asked), alone)
    found["aborted"] = differences(generate(engine, asked, aborted="0" if rank == 0 else ""), alone)

    done: dict[str, Completion] = {}
    for name, request in asked.items() if rank == 0 else ():
        engine.add_request(name, request)
    while len(done) < len(asked) and rank == 0:
        done.update(engine.step())
    engine.finish()
    found["rank 0 only"] = differences(done, alone)

    refused = []
    for name in ("long", "too long") if rank == 1 else ():
        engine.add_request(name, GenerateRequest([10] * 2000, (), 4, 1.0, 0))
    for name, request in asked.items():
        engine.add_request(name, request)
    done = {}
    while engine.num_unfinished():
        try:
            done.update(engine.step())
        except RequestRefused as exc:
            refused.append(exc.request_id)
    found["refused"], found["beside refused"] = refused, differences(done, alone)
    return found


def pumped(engine: Any, chat: ChatFormat, rank: int) -> dict[str, Any]:
    """Two ranks' collections over one engine."""
    engine._part = Diary(engine._part)
    background, stop = BackgroundLoop(), threading.Event()
    quick, diary = play(engine, chat, background, rank, 0.002, deterministic=True)
    slow, other_diary = play(engine, chat, background, rank, 0.05 * (1 + rank), deterministic=True)
    free, _ = play(engine, chat, background, rank, 0.02, deterministic=False)
    if rank == 0:
        stop.set()
    stopped, _ = play(engine, chat, background, rank, 0.02, deterministic=False, stop=stop)
    background.close()
    return {"diary": diary, "same diary": diary == other_diary, "same tokens": quick == slow == free,
            "stopped": len(stopped), "unstopped the same": rank == 0 or stopped == free, "left": engine.num_unfinished()}


def weights(engine: Any, folder: str) -> dict[str, Any]:
    """New weights in, and what can be verified of them."""
    from transformers import AutoModelForImageTextToText

    watch = Watch()
    model = AutoModelForImageTextToText.from_pretrained(folder)
    engine.load_weights(watch.passing((name, value * 1.5) for name, value in model.named_parameters()), 7)
    sent = watch.sums()
    norm = next(name for name in sent if name.endswith("layers.0.input_layernorm.weight"))
    found = engine.compare_weights(sent)
    damaged = engine.compare_weights(sent | {norm: sent[norm]._replace(total=1)})
    return {"wrong": found.wrong, "share": found.share, "damaged": len(damaged.wrong)}


def main() -> None:
    folder = sys.argv[1]
    lockstep.PICTURE_BYTES = 60_000   # some of the pictures are known to all ranks, others must be sent again
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    chat = load_chat_format(folder, 32 * 32, 128 * 128)

    def build(ranks: int) -> Any:
        return make_engine(
            "vllm", folder, config=RolloutConfig(max_num_seqs=8, kv_cache_gib=0.25, tensor_parallel=ranks), max_model_len=1024,
            stop_token_ids=chat.stop_ids, tool_call_end_id=chat.tool_call_end_id, banned_token_ids=chat.banned_ids,
            image_limit=4, min_pixels=chat.min_pixels, max_pixels=chat.max_pixels, dtype="float32")

    engine = build(1)
    alone = generate(engine, requests(chat, rank))
    engine.close()
    engine = build(2)
    found = together(engine, chat, rank, alone) | {"pump": pumped(engine, chat, rank), "weights": weights(engine, folder)}
    found["version"] = generate(engine, requests(chat, rank))["0"].weight_version
    engine._history += rank
    try:
        engine.step()
    except RuntimeError as exc:
        found["diverged"] = str(exc)
    engine.close()
    ranks: list[Any] = [None, None]
    dist.all_gather_object(ranks, found)
    if rank == 0:
        print("RESULT " + json.dumps(ranks), flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
