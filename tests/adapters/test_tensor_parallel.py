"""One vLLM engine on two ranks: the same tokens as an engine of one's own, whatever each rank asks of it."""
from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from launching import accelerate, rl_settings
from tiny_models import save_tiny_qwen3_vl

from hdpo.checksums import Watch, compare
from hdpo.config import Config
from hdpo.doctor.memory_plan import check_tensor_parallel
from hdpo.errors import ConfigError
from hdpo.toyworld.world import World
from hdpo.train.jsonl import read_metrics


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_qwen3_vl(tmp_path_factory.mktemp("tiny"))


@pytest.mark.engine
@pytest.mark.slow
def test_two_ranks_with_unequal_work_get_from_one_engine_the_tokens_of_an_engine_each(folder: Path) -> None:
    done = accelerate("tests/support/ranks/shared_engine.py", [str(folder)])
    assert done.returncode == 0, done.stderr[-3000:]
    ranks = json.loads(next(line for line in done.stdout.splitlines() if "RESULT " in line).split("RESULT ", 1)[1])
    names = [[str(i) for i in range(8)], ["0", "1"]]
    for rank, found in enumerate(ranks):
        for case, expected in (("all", names[rank]), ("aborted", names[rank][1:] if rank == 0 else names[1]),
                               ("rank 0 only", names[0] if rank == 0 else []), ("beside refused", names[rank])):
            assert found[case]["names"] == expected and found[case]["other"] == [], (rank, case)
            assert found[case]["log_probs"] < 1e-4, (rank, case)
        assert found["refused"] == ["long", "too long"] * rank      # rank 1's
        pump = found["pump"]
        assert pump["same diary"] and pump["same tokens"] and pump["unstopped the same"] and pump["left"] == 0, pump
        assert pump["diary"] == ranks[0]["pump"]["diary"] and pump["stopped"] == rank
        assert found["weights"]["wrong"] == [] and found["weights"]["damaged"] == 1 and found["version"] == 7
        assert "no longer generate the same" in found["diverged"]


@pytest.mark.engine
@pytest.mark.slow
@pytest.mark.long
def test_rl_with_one_engine_on_two_ranks_samples_what_the_trainer_computes_after_every_sync(
        sft_run: Path, toy_world: World) -> None:
    done = accelerate("launch/train_rl.py", rl_settings(
        sft_run, toy_world, "shared", rollout__tensor_parallel=2, run__deterministic="false", rollout__prompts_per_step=4,
        eval__after="true", eval__rows=6))
    assert done.returncode == 0, done.stderr[-3000:]
    assert "parity before the first step" in done.stdout + done.stderr
    rows = [row for row in read_metrics(sft_run.parent / "shared" / "metrics.jsonl") if "actor/grad_norm" in row]
    assert [row["step"] for row in rows] == [1, 2]
    for row in rows:
        assert row["mismatch/ratio_max"] < 1 + 1e-3 and row["mismatch/k3"] < 1e-8
        assert row["end/infrastructure"] == row["end/aborted"] == 0.0
    assert json.loads((sft_run.parent / "shared" / "summary.json").read_text())["rl"]["rows"] == 6


@pytest.mark.parametrize(("ways", "ranks", "of_node", "engine", "message"), [
    (2, 1, 1, "auto", r"must divide the 1 rank of a node"), (2, 6, 3, "vllm", "must divide the 3 ranks of a node"),
    (4, 4, 4, "auto", "2 attention heads, 1 KV heads and MLPs of 128"), (2, 2, 2, "hf", "needs vLLM")])
def test_an_engine_that_the_ranks_or_the_model_do_not_allow_is_refused_in_one_line(
        folder: Path, monkeypatch: pytest.MonkeyPatch, ways: int, ranks: int, of_node: int, engine: str, message: str) -> None:
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(of_node))
    config = Config.model_validate({"model": {"path": str(folder)}, "rollout": {"tensor_parallel": ways, "engine": engine}})
    with pytest.raises(ConfigError, match=message) as refused:
        check_tensor_parallel(config, ranks)
    assert "rollout.tensor_parallel" in str(refused.value) and "\n" not in str(refused.value)


def test_a_model_with_one_kv_head_is_split_because_each_rank_may_hold_a_copy(
        folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")     # accelerate leaves 1 behind in this process
    check_tensor_parallel(Config.model_validate({"model": {"path": str(folder)}, "rollout": {"tensor_parallel": 2}}), 2)


def test_parts_of_a_tensor_on_several_ranks_are_compared_by_their_sum() -> None:
    whole, norm = torch.randn(6, 4), torch.randn(4)
    watch = Watch()
    list(watch.passing([("w", whole), ("norm", norm)]))

    def compared(first: torch.Tensor, second: torch.Tensor) -> Any:
        def gather(sums: Any) -> list[Any]:
            other = Watch()
            list(other.passing([("w", second), ("norm", norm)]))
            return [sums, other.sums()]
        return compare(watch.sums(), [("w", first), ("norm", norm)], gather=gather)

    assert compared(whole[:3], whole[3:]) == ([], 1.0)
    assert compared(whole[:3], whole[3:] + 1e-3) == (["w"], 1.0)
    assert compared(whole[:4], whole[2:]) == ([], 4 / 28)     # a copied part: not comparable
