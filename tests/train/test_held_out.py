"""The held-out SFT loss is the loss computed directly, for any split over ranks and micro-batches, and trains nothing."""
from __future__ import annotations

import json
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from launching import accelerate
from local_policy import LocalPolicy
from PIL import Image

from hdpo.agent.chat import ChatFormat
from hdpo.agent.images import encode_png
from hdpo.compose.policy import build_packing
from hdpo.config import Config, DataConfig
from hdpo.config.file import load_config
from hdpo.data.tasks import Demonstration, read_demonstrations
from hdpo.ranks.world import World
from hdpo.train.held_out import HeldOut
from hdpo.train.sft import encode

ROWS = 7


@pytest.fixture(scope="module")
def policy(tiny_folder: Path, chat: ChatFormat) -> LocalPolicy:
    return LocalPolicy(tiny_folder, chat.image_token_id)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("held_out")


@pytest.fixture(scope="module")
def rows(chat: ChatFormat, folder: Path) -> Sequence[Demonstration]:
    """Of many lengths, every other one with a picture, one that is too long, and one more than is asked for."""
    table = []
    for number in range(ROWS + 2):
        seen = number % 2 == 0
        answer = "<answer>" + "four " * (number * number if number != 3 else 400) + "</answer>"
        table.append({"messages": [{"role": "user", "content": "<image>" * seen + f"q{number}"},
                                   {"role": "assistant", "content": answer}],
                      "images": [{"bytes": encode_png(Image.effect_noise((40, 30), 50))}] * seen})
    pq.write_table(pa.Table.from_pylist(table), folder / "val.parquet")
    found = read_demonstrations([str(folder / "val.parquet")], chat, DataConfig(cache=str(folder)), ROWS, max_tokens=600)
    assert len(found) == ROWS and "val.parquet row 3" not in [row.id for row in found]
    return found


@pytest.fixture(scope="module")
def direct(policy: LocalPolicy, chat: ChatFormat, rows: Sequence[Demonstration]) -> float:
    """By transformers' own forward, one row at a time."""
    total, tokens = 0.0, 0
    for row in rows:
        sample = encode(chat, row)
        ids = torch.tensor([sample.token_ids])
        seen: dict[str, Any] = {}
        if sample.vision is not None:
            seen = {"pixel_values": sample.vision.expand(torch.device("cpu"), torch.float32),
                    "image_grid_thw": sample.vision.grid_thw, "mm_token_type_ids": (ids == chat.image_token_id).int()}
        with torch.no_grad():
            log_probs = policy.module.model(input_ids=ids, **seen).logits[0, :-1].log_softmax(-1)
        picked = log_probs.gather(1, ids[0, 1:, None])[:, 0]
        mask = torch.tensor(sample.mask[1:], dtype=torch.bool)
        total, tokens = total - float(picked[mask].double().sum()), tokens + int(mask.sum())
    return total / tokens


def configured(tiny_folder: Path, budget: int, at_once: int) -> Config:
    return load_config(None, [f"model.path={tiny_folder}", "optim.steps=10", "eval.every_steps=4", "data.val=[val.parquet]",
                              f"batch.tokens_per_micro_batch={budget}", f"optim.rows_per_step={at_once}"], environment={})


class Ranks(World):
    """One of several ranks that are threads of this process and share a policy."""

    def __init__(self, rank: int, size: int, barrier: threading.Barrier, box: list[Any]) -> None:
        super().__init__()
        self.rank, self.size, self._barrier, self._box = rank, size, barrier, box

    def gather(self, value: Any) -> list[Any]:
        self._box[self.rank] = value
        self._barrier.wait()
        values = list(self._box)
        self._barrier.wait()
        return values

    def sum(self, values: list[float]) -> list[float]:
        return [sum(parts) for parts in zip(*self.gather(values), strict=True)]

    def exchange(self, outgoing: Any) -> Any:
        return [sent[self.rank] for sent in self.gather(outgoing)]


class OfRank:
    """A rank's view of the shared policy: one forward at a time, as many on every rank."""

    def __init__(self, policy: LocalPolicy, world: World, lock: threading.Lock) -> None:
        self._policy, self.world, self._lock, self.runs = policy, world, lock, 0

    def run(self, micro: Any, job: Any) -> Any:
        self.runs += 1
        with self._lock, torch.no_grad():     # no_grad is a thread's own
            return self._policy.run(micro, job)


@pytest.mark.parametrize("ranks", [1, 2, 3])
@pytest.mark.parametrize("budget, at_once", [(4096, 256), (600, 256), (600, 2)])
def test_the_loss_is_the_one_computed_directly_for_any_split_over_ranks_and_micro_batches(
        policy: LocalPolicy, chat: ChatFormat, rows: Sequence[Demonstration], direct: float, tiny_folder: Path,
        ranks: int, budget: int, at_once: int) -> None:
    config = configured(tiny_folder, budget, at_once)
    spec = build_packing(config, chat)
    lock, barrier, box = threading.Lock(), threading.Barrier(ranks, timeout=60), [None] * ranks
    parts: list[Any] = [OfRank(policy, Ranks(rank, ranks, barrier, box), lock) for rank in range(ranks)]

    def one(part: Any) -> float:
        with ThreadPoolExecutor(2) as threads:
            return HeldOut(config, part, rows, partial(encode, chat), spec, threads).loss()

    with ThreadPoolExecutor(ranks) as pool:
        found = list(pool.map(one, parts))
    assert found == [found[0]] * ranks and found[0] == pytest.approx(direct, rel=1e-5)
    assert len({part.runs for part in parts}) == 1 and (parts[0].runs > 1 or budget > 600 or ranks > 1)
    assert all(parameter.grad is None for parameter in policy.module.parameters())


@pytest.mark.engine
def test_two_zero3_ranks_get_the_loss_of_one_though_their_rows_have_unequal_numbers_of_tokens(
        tiny_folder: Path, folder: Path, rows: Sequence[Demonstration], direct: float) -> None:
    settings = [f"model.path={tiny_folder}", "model.min_pixels=1024", "model.max_pixels=4096", "model.dtype=float32",
                f"data.val=[{folder}/val.parquet]", f"data.cache={folder}", f"eval.rows={ROWS}", "optim.rows_per_step=4",
                "batch.tokens_per_micro_batch=600"]
    found = {}
    for ranks in (1, 2):
        done = accelerate("tests/support/ranks/held_out_loss.py", settings, ranks)
        assert done.returncode == 0, done.stderr[-3000:]
        line = next(line for line in done.stdout.splitlines() if "RESULT " in line)
        found[ranks] = json.loads(line.split("RESULT ", 1)[1])
        assert found[ranks]["rows"] == ROWS and found[ranks]["losses"] == [found[ranks]["losses"][0]] * ranks
    assert found[2]["losses"][0] == pytest.approx(found[1]["losses"][0], rel=1e-6)
    assert found[2]["losses"][0] == pytest.approx(direct, rel=1e-5)


def test_it_is_logged_at_start_when_due_and_at_the_end_and_never_without_rows(
        policy: LocalPolicy, chat: ChatFormat, rows: Sequence[Demonstration], tiny_folder: Path) -> None:
    config = configured(tiny_folder, 4096, 256)
    with ThreadPoolExecutor(1) as threads:
        held_out, none = (HeldOut(config, policy, some, partial(encode, chat), build_packing(config, chat), threads)
                          for some in (rows[:1], rows[:0]))
        assert [step for step in range(11) if held_out(step)] == [0, 4, 8, 10]
        assert not any(none(step) for step in range(11))
