"""Rollouts: do trajectories wait for anything they need not wait for?

R1  makespan of the real rollout code, with an engine and tools that only take time (rollout_world.py), against the lower
    bound of the plan (the longest trajectory by itself, or all tokens at full batches), and against a turn barrier: the
    loop that generates for all, then calls all tools, then generates again.
R2  lag of the event loop with 256 live multimodal trajectories: their pictures decoded, bounded and named, sent to a tool
    server in another process over HTTP and returned, observations tokenised.
    CPU time of our loop per turn, with an engine and tools that take none.
R4  tokens trained per second with rollout.carry_over against the synchronous loop, simulated on 8 and 64 ranks by the rule of
    hdpo.agent.carry itself (rollout_carry.py), beside the bound of engines that are always full and one-step-off sampling.
Q   prompts split over simulated ranks beforehand against a shared queue (rollout_queue.py).
"""
from __future__ import annotations

import asyncio
import dataclasses
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence

from common import Figure, arguments, report
from rollout_carry import Run, bound, one_step_off, simulate
from rollout_queue import Setting, compare
from rollout_world import (
    SEED,
    STEP,
    Plan,
    TimedEngine,
    TimedTools,
    heavy_tailed,
    photo,
    photo_tasks,
    text_tasks,
    toy_chat,
)

from hdpo.agent.queue import sampling_seed
from hdpo.agent.rollout import FIRST_SHARE, Rollouts
from hdpo.background import BackgroundLoop
from hdpo.config import RolloutConfig, ToolsConfig
from hdpo.protocols import GenerateRequest, ToolBackend
from hdpo.toolserver.client import ToolClient
from hdpo.toolserver.wire import Reply, response_body
from hdpo.types import EndReason, Task


def roll_out(plan: Plan, engine: TimedEngine, tools: ToolBackend, tasks: Sequence[Task], group_size: int, background:
             BackgroundLoop, max_pixels: int = 4096) -> dict[str, float]:
    """Collect once with the real code; its metrics, and `cpu`: seconds of all threads."""
    config = RolloutConfig(max_num_seqs=engine.max_num_seqs, max_response_tokens=1 << 19, max_turn_tokens=1 << 19)
    rollouts = Rollouts(engine, toy_chat(max_pixels), tools, background, config, ToolsConfig(), engine.max_model_len, seed=SEED)
    cpu = time.process_time()
    groups = rollouts.collect(tasks, group_size=group_size, temperature=1.0, step=STEP, weight_version=0)
    cpu = time.process_time() - cpu
    rollouts.close()
    assert all(t.end is EndReason.ANSWERED for group in groups for t in group)
    assert sum(len(t.turns) for group in groups for t in group) == plan.num_turns
    return rollouts.metrics | {"cpu": cpu}


def turn_barrier(plan: Plan, engine: TimedEngine) -> float:
    """Seconds of the loop that waits for every generation of a turn, and then for every tool, as trainers without
    asynchronous rollouts do. It does nothing else, so that its time is a bound from below for such a loop."""
    started = time.monotonic()
    active, number = list(plan.turns), 0
    while active:
        for prompt, sample in active:
            seed = sampling_seed(SEED, STEP, prompt, sample, number)
            engine.add_request(f"{prompt}-{sample}", GenerateRequest([], (), 0, 1.0, seed))
        while engine.num_unfinished():
            engine.step()
        latencies = [plan.turns[key][number].tool_s for key in active]
        active = [key for key, latency in zip(active, latencies, strict=True) if latency is not None]
        time.sleep(max((latency for latency in latencies if latency is not None), default=0.0))
        number += 1
    return time.monotonic() - started


def makespan(short: bool) -> tuple[dict[str, Figure], dict]:
    figures, details, chat = {}, {}, toy_chat()
    cases = {"one wave": (16, 16, 256, True), "three waves": (24, 16, 128, False)}
    for label, (prompts, group_size, max_num_seqs, barrier) in cases.items():
        plan = heavy_tailed(prompts, group_size, seed=3)
        engine = TimedEngine(chat, plan, max_num_seqs=max_num_seqs)
        background = BackgroundLoop()
        found = roll_out(plan, engine, TimedTools(plan), text_tasks(prompts), group_size, background)
        background.close()
        seconds = found["rollout/seconds"]
        bound = engine.lower_bound(found["rollout/engine_seconds"] / found["rollout/engine_steps"])
        figures[f"R1 makespan / lower bound, {label}"] = Figure(seconds / bound, "x", "lower", 1.10)
        details[label] = {"bound_s": bound, "metrics": found, "trajectories": prompts * group_size}
        if barrier:
            waited = turn_barrier(plan, engine)
            figures["R1 turn barrier / ours"] = Figure(waited / seconds, "x", "higher", 1.8)
            details[label]["barrier_s"] = waited
    return figures, details


def lag(short: bool) -> tuple[dict[str, Figure], dict]:
    """256 live trajectories of 16 prompts, each with a photograph of 1280 x 960; every call returns one of 800 x 600.

    The lowest of three runs counts: whatever else the machine does delays the loop too, and is not ours. So does the second
    figure: CPU time of the loop's own thread between two wake-ups of a sleeper, but no more than it was late.
    """
    plan = heavy_tailed(16, 16, seed=5, calls=2.0, most_calls=4)
    engine = TimedEngine(toy_chat(), plan, max_num_seqs=256)
    server = subprocess.Popen([sys.executable, os.path.abspath(__file__), "--serve"], stdout=subprocess.PIPE, text=True)
    assert server.stdout is not None
    client = ToolClient(server.stdout.readline().strip())
    background = BackgroundLoop()
    try:
        own: list[float] = []
        background.submit(own_work(own))
        tasks = photo_tasks(16, 1280, 960)
        runs = [roll_out(plan, engine, client, tasks, 16, background, max_pixels=1 << 20) for _ in range(3)]
    finally:
        background.run(client.close())
        background.close()
        server.terminate()
        server.wait()
    lowest = min(run["rollout/loop_lag_p99_seconds"] for run in runs)
    figure = Figure(1000 * lowest, "ms", "lower", 50.0, tolerance=1.0)
    return {"R2 event-loop lag p99, 256 live, pictures both ways": figure,
            "R2 of it, the loop's own work, p99": Figure(1000 * sorted(own)[int(0.99 * len(own)) - 1], "ms", "lower", 50.0,
                                                         tolerance=1.0)}, {"runs": runs}


async def own_work(found: list[float]) -> None:
    """Every 20 ms: how much of the delay of this coroutine the loop's thread can have caused by computing, seconds."""
    while True:
        due, cpu = time.monotonic() + 0.02, time.thread_time()
        await asyncio.sleep(0.02)
        found.append(min(max(0.0, time.monotonic() - due), time.thread_time() - cpu))


def serve() -> None:
    """A tool server in the wire's format that answers every call with a picture, after 50 to 500 ms."""
    import random

    from aiohttp import web

    coin, picture = random.Random(1), photo(99, 800, 600)

    async def answer(request: web.Request) -> web.Response:
        body = await request.json()
        if body["finish"][0]:
            return web.Response(body=response_body([Reply("")], 0.0, 0.0), content_type="application/json")
        await asyncio.sleep(min(0.5, 0.05 * coin.lognormvariate(0, 1.0)))
        reply = Reply("Code execution result:\n<image>", (picture,))
        return web.Response(body=response_body([reply], 0.0, 0.0), content_type="application/json")

    async def main() -> None:
        app = web.Application(client_max_size=1 << 28)
        app.add_routes([web.post("/get_observation", answer)])
        runner = web.AppRunner(app)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        print(f"http://127.0.0.1:{runner.addresses[0][1]}", flush=True)
        await asyncio.Event().wait()
    asyncio.run(main())


def cost_per_turn(short: bool) -> tuple[dict[str, Figure], dict]:
    plan = heavy_tailed(16 if short else 64, 16, seed=7, tool_s=0.0, tokens=60.0)
    engine = TimedEngine(toy_chat(), plan, max_num_seqs=256, step_s=0.0, tokens_per_step=1 << 20)
    background = BackgroundLoop()
    found = roll_out(plan, engine, TimedTools(plan), text_tasks(16 if short else 64), 16, background)
    background.close()
    figure = Figure(1e6 * found["cpu"] / plan.num_turns, "us", "lower", tolerance=0.5)
    return {"CPU time of our loop per turn": figure}, {"turns": plan.num_turns}


def queues(short: bool) -> tuple[dict[str, Figure], dict]:
    """Ratios of makespans over seeds: above 1, the shared queue ends sooner."""
    base = Setting()
    cases = {"128 prompts x 16 on 8 ranks": base,
             "the same, prompts of unequal length": dataclasses.replace(base, group_spread=0.9),
             "the same, a rank half as fast": dataclasses.replace(base, slow_rank=2.0),
             "256 prompts": dataclasses.replace(base, prompts=256),
             "evaluation, 2,048 rows": dataclasses.replace(base, prompts=2048, group_size=1)}
    found = {label: compare(setting, FIRST_SHARE, range(4 if short else 16)) for label, setting in cases.items()}
    return {f"Q static / shared, {label}": Figure(some["static_over_shared"], "x", "higher", tolerance=0.05)
            for label, some in found.items()}, found


def carried(short: bool) -> tuple[dict[str, Figure], dict]:
    """Ratios of tokens trained per second to those of the synchronous loop on the same rollouts; medians over seeds. How much
    shorter the trained are than all that were started falls with the steps of a run: what waits is the same few groups."""
    seeds, figures, details = range(1 if short else 3), {}, {}
    for ranks in (8, 64):
        base = Run(ranks=ranks)
        sync = {seed: simulate(base, seed)["tokens_per_s"] for seed in seeds}
        for share, versions in ((0.25, 2), (0.5, 2), (0.5, 3), (1.0, 3)):
            run = dataclasses.replace(base, carry_over=share, max_versions=versions)
            found = {seed: simulate(run, seed) for seed in seeds}
            label = f"{ranks} ranks, carry_over {share}, {versions} versions"
            shown = (ranks, share, versions) == (8, 1.0, 3)
            ratio = statistics.median(found[seed]["tokens_per_s"] / sync[seed] for seed in seeds)
            bias = statistics.median(found[seed]["bias"] for seed in seeds)
            figures[f"R4 {label} / synchronous"] = Figure(ratio, "x", "higher", 1.3 if shown else None, tolerance=0.05)
            figures[f"R4 {label}, length bias before the end"] = Figure(
                100 * abs(bias), "%", "lower", 2.0 if shown else None, tolerance=1.0)
            details[label] = found
        run = dataclasses.replace(base, carry_over=0.5)
        for label, other in (("bound", bound(run, 0)), ("one-step-off", one_step_off(base, 0))):
            figures[f"R4 {ranks} ranks, {label} / synchronous"] = Figure(other / sync[0], "x", "higher", tolerance=0.05)
    return figures, details


def main() -> int:
    if "--serve" in sys.argv:
        serve()
        return 0
    args = arguments(__doc__).parse_args()
    figures: dict[str, Figure] = {}
    details = {}
    for part in (makespan, lag, cost_per_turn, carried, queues):
        some, details[part.__name__] = part(args.short)
        figures |= some
    return 0 if report("rollout", figures, details, args.json, args.short) else 1


if __name__ == "__main__":
    sys.exit(main())
