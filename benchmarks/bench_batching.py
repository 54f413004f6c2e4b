"""Is a step cut into balanced micro-batches within their budgets, quickly, and is nothing processed or sent twice? (B1-B3)

    python benchmarks/bench_batching.py [--short] [--json FILE]

128 prompts x 16 rollouts of a multimodal agent of up to ten turns on 8 simulated ranks that share the prompts, 40,960 tokens a
micro-batch. Beside ours: four rows at a time in order of arrival, padded; and Karmarkar-Karp as verl uses it (equal counts of
rows over ranks, then micro-batches of each rank, both by work). "Sync efficiency" is ideal
over actual time when every micro-step waits for the slowest rank, as ZeRO-3's gathers make it.
"""
from __future__ import annotations

import heapq
import json
import os
import random
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from itertools import chain
from operator import itemgetter
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from common import Figure, arguments, paired, report
from PIL import Image

from hdpo.adapters import torchvision_shim
from hdpo.agent.chat import ChatFormat, load_chat_format
from hdpo.background import freeze_heap
from hdpo.packing.costs import Budget, PromptCost, RowCost, WorkModel
from hdpo.packing.exchange import BYTES_PER_TOKEN, exchange_rows
from hdpo.packing.planning import Plan, plan
from hdpo.ranks.world import World
from hdpo.train.samples import PixelPool
from hdpo.types import EndReason, Sample, Task, Trajectory, Vision

EXCHANGE_RANKS = 4
WORK = WorkModel(47_104, 12)            # Qwen3-VL-8B
RANKS, GROUP, BUDGET = 8, 16, Budget(40_960, 163_840, 70)
PATCH_BYTES = 3 * 2 * 16 * 16 * 4      # Qwen3-VL, float32


# -- rows of a step ------------------------------------------------------------------------------------------------------

def agent_rows(prompts: int, seed: int, share: bool = False) -> list[RowCost]:
    """Mean about 5.3k tokens, 99th percentile about 16k, 69 % of them prompt; whole groups on a rank, as ranks took them."""
    coin = random.Random(seed)
    rows = []
    for number in range(prompts):
        owner = coin.randrange(RANKS)
        image = coin.choice((1024, 2048, 4096))
        prompt = image + 600 + int(coin.lognormvariate(6, 1))
        shared = PromptCost(number, prompt, 4 * image, WORK(prompt, 4 * image)) if share else None
        for _ in range(GROUP):
            tokens, image_tokens = prompt, image
            for _ in range(min(10, 1 + int(coin.paretovariate(1.1) - 1))):
                crop = coin.choice((0, 0, 256, 1024))
                tokens += int(coin.lognormvariate(6, 0.8)) + crop
                image_tokens += crop
            tokens = min(tokens, BUDGET.max_tokens - BUDGET.filler_tokens)
            rows.append(RowCost(tokens, 4 * image_tokens, WORK(tokens, 4 * image_tokens),
                                4 * image_tokens * PATCH_BYTES + BYTES_PER_TOKEN * tokens, owner, shared))
    return rows


def as_2b(row: RowCost) -> float:
    """Work in Qwen3-VL-2B, where attention and images weigh two to three times as much."""
    return row.tokens * (1 + row.tokens / 25_000) + row.patches / 4


def efficiency(work: Sequence[float], made: Plan) -> tuple[float, float]:
    """(sync efficiency, largest rank's work / mean)."""
    loads = [[sum(work[i] for i in bin_) for bin_ in bins] for bins in made]
    ideal = sum(map(sum, loads)) / RANKS
    return ideal / sum(map(max, zip(*loads))), max(map(sum, loads)) / ideal


# -- what others do ------------------------------------------------------------------------------------------------------

class Set:
    """As verl has it: a sum and a list of items."""

    def __init__(self) -> None:
        self.sum, self.items = 0, []   # type: ignore[var-annotated]

    def add(self, item: int, value: int) -> None:
        self.items.append((item, value))
        self.sum += value

    def merge(self, other: Set) -> None:
        for item, value in other.items:
            self.add(item, value)

    def __lt__(self, other: Set) -> bool:
        return (self.sum, len(self.items), self.items) < (other.sum, len(other.items), other.items)


class State:
    """As verl has it: `parts` sets by falling sum; the one with the widest spread is merged first."""

    def __init__(self, items: list[tuple[int, int]], parts: int) -> None:
        self.sets = [Set() for _ in range(parts)]
        for some, (item, value) in zip(self.sets, items):
            some.add(item, value)
        self.sets.sort(reverse=True)

    @property
    def spread(self) -> int:
        return self.sets[0].sum - self.sets[-1].sum

    def merge(self, other: State) -> None:
        for mine, its in zip(self.sets, reversed(other.sets)):
            mine.merge(its)
        self.sets.sort(reverse=True)

    def __lt__(self, other: State) -> bool:
        return self.sets[0] > other.sets[0] if self.spread == other.spread else self.spread > other.spread


def kk_objects(work: Sequence[int], parts: int, equal_size: bool) -> list[list[int]]:
    order = sorted((w, i) for i, w in enumerate(work))
    size = parts if equal_size else 1
    states = [State([(i, w) for w, i in order[k:k + size]], parts) for k in range(0, len(order), size)]
    heapq.heapify(states)
    while len(states) > 1:
        widest = heapq.heappop(states)
        widest.merge(heapq.heappop(states))
        heapq.heappush(states, widest)
    return [[item for item, _ in some.items] for some in states[0].sets]


def kk_tuples(work: Sequence[int], parts: int, equal_size: bool) -> list[list[int]]:
    """The same as fast as it gets here: sets are (sum, linked items), so that nothing is copied."""
    order = sorted(range(len(work)), key=work.__getitem__)
    size = parts if equal_size else 1
    states: list[tuple[int, int, list[tuple[int, Any]]]] = []
    for number, first in enumerate(range(0, len(order), size)):
        sets: list[tuple[int, Any]] = [(work[i], i) for i in reversed(order[first:first + size])]
        sets += [(0, ())] * (parts - len(sets))
        states.append((sets[-1][0] - sets[0][0], number, sets))
    heapq.heapify(states)
    number = len(states)
    while len(states) > 1:
        one, other = heapq.heappop(states)[2], heapq.heappop(states)[2]
        merged = [(a[0] + b[0], (a[1], b[1])) for a, b in zip(one, reversed(other))]
        merged.sort(key=itemgetter(0), reverse=True)
        heapq.heappush(states, (merged[-1][0] - merged[0][0], number, merged))
        number += 1
    return [_items(items) for _, items in states[0][2]]


def _items(linked: Any) -> list[int]:
    found, stack = [], [linked]
    while stack:
        item = stack.pop()
        if isinstance(item, int):
            found.append(item)
        else:
            stack.extend(item)
    return found


def as_verl(rows: Sequence[RowCost], partition: Callable[..., list[list[int]]] = kk_objects) -> Plan:
    work = [row.work for row in rows]
    ranks = partition(work, RANKS, equal_size=True)
    count = max(-(-sum(rows[i].tokens for i in mine) // BUDGET.max_tokens) for mine in ranks)
    dealt = [[[mine[k] for k in part] for part in partition([work[i] for i in mine], count, False)] for mine in ranks]
    return [sorted(bins, key=lambda bin_: -sum(work[i] for i in bin_)) for bins in dealt]


def as_they_come(rows: Sequence[RowCost], at_a_time: int = 4) -> Plan:
    order = sorted(range(len(rows)), key=lambda i: rows[i].owner)
    share = len(rows) // RANKS
    return [[order[first:first + at_a_time] for first in range(rank * share, (rank + 1) * share, at_a_time)]
            for rank in range(RANKS)]


# -- figures -------------------------------------------------------------------------------------------------------------

def planning(short: bool) -> tuple[dict[str, Figure], dict[str, Any]]:
    seeds = range(2 if short else 5)
    steps = [agent_rows(128, seed) for seed in seeds]
    found: dict[str, list[dict[str, float]]] = {}
    for rows in steps:
        work = [row.work for row in rows]
        for name, scheme in (("in order of arrival", as_they_come), ("Karmarkar-Karp", as_verl),
                             ("ours", lambda rows: plan(rows, RANKS, BUDGET))):
            made = scheme(rows)
            bins = list(chain(*made))
            tokens = [sum(rows[i].tokens for i in bin_) for bin_ in bins]
            padded = sum(tokens) if name != "in order of arrival" else sum(
                len(bin_) * max(rows[i].tokens for i in bin_) for bin_ in bins)
            eff, balance = efficiency(work, made)
            found.setdefault(name, []).append({
                "efficiency": eff, "balance": balance, "as 2B": efficiency([as_2b(row) for row in rows], made)[0],
                "micro-steps": len(made[0]), "over": statistics.mean(t > BUDGET.max_tokens for t in tokens),
                "padding": padded / sum(tokens), "largest": max(tokens),
                "moved": sum(rows[i].nbytes for rank, some in enumerate(made) for i in chain(*some) if rows[i].owner != rank)
                / sum(row.nbytes for row in rows)})
    freeze_heap()     # or Python's collector would go through the imported modules, again and again
    times = paired({"ours": lambda: plan(steps[0], RANKS, BUDGET), "kk": lambda: as_verl(steps[0]),
                    "lean kk": lambda: as_verl(steps[0], kk_tuples)}, "ours", 5 if short else 15)
    ours, kk, plain = found["ours"], found["Karmarkar-Karp"], found["in order of arrival"]

    def mean(some: list[dict[str, float]], what: str) -> float:
        return statistics.mean(part[what] for part in some)
    figures = {
        "B1 micro-batches over the token budget": Figure(max(part["over"] for part in ours), "share", "lower", 0.0),
        "B1 the same, Karmarkar-Karp": Figure(mean(kk, "over"), "share", "lower", None, 0.5),
        "B2 largest rank's work / mean": Figure(max(part["balance"] for part in ours), "x", "lower", 1.02, 0.02),
        "B2 sync efficiency": Figure(min(part["efficiency"] for part in ours), "", "higher", 0.98, 0.02),
        "B2 the same, Karmarkar-Karp": Figure(mean(kk, "efficiency"), "", "higher", None, 0.02),
        "B2 the same, four rows in order of arrival": Figure(mean(plain, "efficiency"), "", "higher", None, 0.2),
        "B2 ours, planned for 8B, trained on 2B": Figure(mean(ours, "as 2B"), "", "higher", None, 0.02),
        "B3 planning, Karmarkar-Karp / ours": Figure(times["kk"]["ratio"], "x", "higher", 8, 0.3),
        "B3 the same, with linked lists": Figure(times["lean kk"]["ratio"], "x", "higher", None, 0.3),
        "B3 planning 2,048 rows": Figure(times["ours"]["seconds"] * 1e3, "CPU ms", "lower", 100, 1.0),
        "tokens computed / tokens, padded in order of arrival": Figure(mean(plain, "padding"), "x", "lower", None, 0.2),
        "bytes moved between ranks, share of all": Figure(mean(ours, "moved"), "", "lower", 0.2, 0.3),
        "the same, Karmarkar-Karp": Figure(mean(kk, "moved"), "", "lower", None, 0.2),
    }
    tokens = sorted(row.tokens for rows in steps for row in rows)
    rows_are = {"mean": statistics.mean(tokens), "p99": tokens[len(tokens) * 99 // 100], "largest": tokens[-1]}
    return figures, {"rows": rows_are, "schemes": found, "times": times}


def qwen_format(folder: Path) -> ChatFormat:
    """A chat format that sees as Qwen3-VL does: patches of 16, images up to a megapixel."""
    import hdpo
    torchvision_shim.activate()
    shutil.copytree(Path(hdpo.__file__).parent / "toyworld" / "assets" / "toy-base", folder, dirs_exist_ok=True)
    file = folder / "processor_config.json"
    config = json.loads(file.read_text())
    config["image_processor"] |= {"patch_size": 16, "size": {"shortest_edge": 1 << 16, "longest_edge": 1 << 20}}
    file.write_text(json.dumps(config))
    return load_chat_format(str(folder), 1 << 16, 1 << 20)


def groups_with_images(chat: ChatFormat, groups: int) -> list[Trajectory]:
    """A megapixel per prompt; every other rollout has zoomed in on one of two places."""
    found = []
    for g in range(groups):
        prompt = chat.bound(Image.effect_noise((1024, 1024), 50).convert("RGB"))
        crops = [chat.bound(prompt.crop((k, k, k + 384, k + 320))) for k in (64, 512)]
        task = Task(f"{g}", "bench", [], (), "")
        for sample in range(GROUP):
            which = sample // 2 % 2
            images, keys = [(prompt, f"{g}")], [(crops[which], f"{g}.{which}")] if sample % 2 else []
            shown = images + keys
            found.append(Trajectory(task, sample, [], [], [], 0, tuple(image for image, _ in shown), (), EndReason.ANSWERED, (),
                                    image_keys=tuple(key for _, key in shown)))
    return found


def pixels(short: bool) -> tuple[dict[str, Figure], dict[str, Any]]:
    with tempfile.TemporaryDirectory() as folder:
        chat = qwen_format(Path(folder))
    trajectories = groups_with_images(chat, 1 if short else 4)
    pool = PixelPool(chat)

    def row_by_row() -> list[Vision | None]:
        return [chat.vision(trajectory.images) for trajectory in trajectories]

    def pooled() -> list[Vision | None]:
        made = [pool.vision(trajectory) for trajectory in trajectories]
        pool.clear()
        return made

    times = paired({"row by row": row_by_row, "pool": pooled}, "pool", 3 if short else 5)
    held = [sum({id(p): p.nbytes for v in make() if v is not None for p in v.pixels}.values()) for make in (row_by_row, pooled)]
    submitted, waits = [], []
    for _ in range(3):     # as in a step: submitted as they end, needed when all are scored
        for trajectory in trajectories:
            start = time.perf_counter()
            pool.submit(trajectory)
            submitted.append(time.perf_counter() - start)
        for trajectory in trajectories:
            pool.vision(trajectory)
        start = time.perf_counter()
        pooled()
        waits.append(time.perf_counter() - start)
    pool.close()
    return {
        "pixel time, row by row / each image once": Figure(times["row by row"]["ratio"], "x", "higher", 5, 0.3),
        "pixel memory, row by row / each image once": Figure(held[0] / held[1], "x", "higher", 5, 0.1),
        "pixels ready before packing: wait per row / row by row": Figure(
            statistics.median(waits) / times["row by row"]["seconds"], "x", "lower", 0.02, 1.0),
        "submitting a trajectory, on the event loop": Figure(statistics.median(submitted) * 1e3, "ms", "lower", 1.0, 2.0),
    }, {"times": times, "rows": len(trajectories)}


def attention(short: bool) -> tuple[dict[str, Figure], dict[str, Any]]:
    """Forward and backward of one layer's attention over a pack of eight rows."""
    from hdpo.adapters import packed_attention
    from hdpo.types import Span

    lengths = [256, 128, 512, 64, 128, 384, 320, 256] if short else [1024, 512, 2048, 256, 512, 1536, 1280, 1024]
    tokens, heads, module = sum(lengths), 8, torch.nn.Module()
    query, key, value = (torch.randn(1, heads, tokens, 64, requires_grad=True) for _ in range(3))
    row = torch.repeat_interleave(torch.tensor(lengths))
    layout = packed_attention.PackLayout([Span(length) for length in lengths], torch.device("cpu"))
    mask = ((row[:, None] == row) & torch.ones(tokens, tokens, dtype=torch.bool).tril())[None, None]

    def masked() -> None:
        packed_attention.attend(module, query, key, value, mask)[0].sum().backward()

    def by_row() -> None:
        packed_attention.attend(module, query, key, value, layout=layout)[0].sum().backward()
    times = paired({"masked": masked, "by row": by_row}, "by row", 3 if short else 7)
    return {"attention of a pack, with a mask / row by row": Figure(times["masked"]["ratio"], "x", "higher", 2, 0.4)}, times


# -- rows between real ranks ---------------------------------------------------------------------------------------------

def exchange_rank(rank: int, folder: str, ranks: int, rounds: int) -> None:
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(ranks))
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=ranks)
    world = World().connect()
    length, grid = 4000, torch.tensor([[1, 32, 32]])

    def row() -> Sample:
        image = torch.randn(1024, PATCH_BYTES // 4)
        return Sample([1] * length, [1] * length, [-0.5] * length, (1.0, 0.5), (True, True), Vision((image,), grid))
    outgoing = [[row(), row()] if target != rank else [] for target in range(ranks)]
    times = paired({"exchange": lambda: exchange_rows(outgoing, world), "gather": lambda: world.gather(outgoing)},
                   "exchange", rounds)
    if rank == 0:
        Path(folder, "times.json").write_text(json.dumps(times))
    dist.barrier()
    dist.destroy_process_group()


def exchange(short: bool) -> tuple[dict[str, Figure], dict[str, Any]]:
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.spawn(exchange_rank, (folder, EXCHANGE_RANKS, 3 if short else 7), nprocs=EXCHANGE_RANKS)
        times = json.loads(Path(folder, "times.json").read_text())
    return {"rows over ranks, gathered as objects / rank to rank": Figure(times["gather"]["ratio"], "x", "higher", 2, 0.5)}, times


def main() -> int:
    args = arguments(__doc__).parse_args()
    figures, details = {}, {}
    for part in (planning, pixels, attention, exchange):
        some, detail = part(args.short)
        figures |= some
        details[part.__name__] = detail
    rows: Any = details["planning"]["rows"]
    print(f"rows: mean {rows['mean']:,.0f} tokens, 99 % {rows['p99']:,}, largest {rows['largest']:,}")
    for name, some in details["planning"]["schemes"].items():
        print(f"  {name:<20}" + "  ".join(f"{key} {statistics.mean(part[key] for part in some):.4g}" for key in some[0]))
    return not report("batching", figures, details, args.json, args.short)


if __name__ == "__main__":
    sys.exit(main())
