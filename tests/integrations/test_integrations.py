"""The algorithm inside other trainers: TRL's own trainer where it is installed, others by their real signatures."""
from __future__ import annotations

import sys
import types
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.multiprocessing as mp
from tiny_models import save_tiny

from hdpo import hdpo_advantages, hdpo_loss
from hdpo.integrations.ddp import ddp_hdpo_loss, global_norms
from hdpo.integrations.one_stream import one_stream


def batch(seed: int, rows: int = 16, tokens: int = 7) -> dict[str, Any]:
    g = torch.Generator().manual_seed(seed)
    correct = torch.rand(rows, generator=g) < 0.6
    tool = correct / (torch.randint(0, 3, (rows,), generator=g) + 1)
    mask = (torch.rand(rows, tokens, generator=g) < 0.8).double()
    mask[:, 0] = 1
    return {"correct": correct, "accuracy": correct.double() * 0.9 + 0.1, "tool": tool.double(), "mask": mask,
            "group": torch.arange(rows) // 8, "log_probs": -torch.rand(rows, tokens, generator=g, dtype=torch.float64)}


# -- one stream ------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("seed", range(4))
def test_one_stream_has_the_gradient_of_both_channels_while_ratios_are_one(seed: int) -> None:
    b = batch(seed)
    channels = hdpo_advantages(b["accuracy"], b["tool"], b["correct"], b["group"])
    stream = one_stream(channels, b["mask"].sum(1))

    def gradient(advantages: torch.Tensor, **options: Any) -> torch.Tensor:
        x = b["log_probs"].clone().requires_grad_()
        loss, _ = hdpo_loss(x, b["log_probs"], advantages, b["mask"], **options)
        return torch.autograd.grad(loss, x)[0]

    torch.testing.assert_close(gradient(stream), gradient(channels.values, member=channels.member))


# -- DistributedDataParallel -----------------------------------------------------------------------------------------------

def _rank(rank: int, address: str, out: str) -> None:
    torch.distributed.init_process_group("gloo", init_method=address, rank=rank, world_size=2)
    b = batch(1)
    channels = hdpo_advantages(b["accuracy"], b["tool"], b["correct"], b["group"])
    weight = torch.nn.Linear(1, 1, bias=False).double()
    torch.nn.init.constant_(weight.weight, 0.3)
    model = torch.nn.parallel.DistributedDataParallel(weight)
    rows = torch.arange(16)[:5] if rank == 0 else torch.arange(16)[5:]      # unequal shares
    norms = global_norms([b["mask"][rows]], [channels.member[:, rows]])
    scale = model(torch.ones(1, 1, dtype=torch.float64))
    loss, _ = ddp_hdpo_loss(b["log_probs"][rows] * scale, b["log_probs"][rows] * 0.3, channels.values[:, rows], b["mask"][rows],
                            member=channels.member[:, rows], norms=norms)
    loss.backward()
    torch.save(weight.weight.grad, f"{out}/{rank}.pt")
    torch.distributed.destroy_process_group()


def test_two_ranks_under_ddp_with_unequal_shares_get_the_gradient_of_one(tmp_path: Path) -> None:
    mp.spawn(_rank, (f"file://{tmp_path}/meet", str(tmp_path)), nprocs=2)
    b = batch(1)
    channels = hdpo_advantages(b["accuracy"], b["tool"], b["correct"], b["group"])
    scale = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)
    hdpo_loss(b["log_probs"] * scale, b["log_probs"] * 0.3, channels.values, b["mask"], member=channels.member)[0].backward()
    for rank in range(2):
        torch.testing.assert_close(torch.load(tmp_path / f"{rank}.pt").reshape(()), scale.grad)


# -- TRL -------------------------------------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny("qwen3", tmp_path_factory.mktemp("qwen3"))


def trainer(tiny: Path, folder: Path, functions: list[Any], **options: Any) -> Any:
    pytest.importorskip("trl")
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import GRPOConfig

    from hdpo.integrations.trl import HDPOTrainer
    tokenizer = AutoTokenizer.from_pretrained(tiny)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    arguments = GRPOConfig(**{
        "output_dir": str(folder), "per_device_train_batch_size": 4, "num_generations": 4, "max_completion_length": 6,
        "gradient_accumulation_steps": 2, "steps_per_generation": 4, "learning_rate": 1e-3, "max_steps": 5, "report_to": [],
        "use_cpu": True, "bf16": False, "logging_steps": 1, "save_strategy": "no", "seed": 3, "delta": 3.0, **options})
    return HDPOTrainer(AutoModelForCausalLM.from_pretrained(tiny), reward_funcs=functions, args=arguments,
                       train_dataset=Dataset.from_dict({"prompt": [f"Say {n}" for n in range(16)]}), processing_class=tokenizer)


def accuracy(completions: list[str], **_: Any) -> list[float | None]:
    return [None if len(text) % 7 == 3 else float(len(text) % 2) for text in completions]


def tool_economy(completions: list[str], **_: Any) -> list[float]:
    return [1.0 / (1 + len(text) % 3) for text in completions]


def correct(completions: list[str], **_: Any) -> list[float]:
    return [float(len(text) % 2) for text in completions]


@pytest.mark.slow
def test_trl_trains_with_two_channels_unscored_rows_and_two_steps_a_batch(tiny: Path, tmp_path: Path) -> None:
    run = trainer(tiny, tmp_path, [accuracy, tool_economy, correct])
    before = [p.detach().clone() for p in run.model.parameters()]
    run.train()
    assert run.state.global_step == 5
    assert any(not torch.equal(a, b) for a, b in zip(before, run.model.parameters()))
    assert all(np.isfinite(entry["loss"]) for entry in run.state.log_history if "loss" in entry)
    assert any("clip_ratio/channel_1" in entry for entry in run.state.log_history)


@pytest.mark.slow
@pytest.mark.parametrize("loss_type", ["dapo", "bnpo", "grpo", "dr_grpo"])
def test_one_channel_is_trls_own_loss_and_gradient_off_policy_too(tiny: Path, tmp_path: Path, loss_type: str) -> None:
    compared: list[tuple[float, float, float]] = []
    run = trainer(tiny, tmp_path, [tool_economy], loss_type=loss_type, beta=0.05, max_steps=4,
                  use_bias_correction_kl=False)
    ours = run._compute_loss

    def both(model: Any, inputs: dict[str, Any]) -> torch.Tensor:
        theirs_in = {**inputs, "advantages": inputs["advantages"][:, 0]}
        mine, theirs = ours(model, inputs), super(type(run), run)._compute_loss(model, theirs_in)
        parameters = [p for p in model.parameters() if p.requires_grad]
        a, b = (torch.cat([g.flatten() for g in torch.autograd.grad(loss, parameters, retain_graph=True)])
                for loss in (mine, theirs))
        compared.append((mine.item(), theirs.item(), float((a - b).norm() / b.norm())))
        return mine

    run._compute_loss = both
    run.train()
    assert len(compared) == 8
    assert all(abs(a - b) < 4e-8 + 1e-6 * abs(b) and gradient < 1e-5 for a, b, gradient in compared), compared


def test_trl_refuses_what_has_no_meaning(tiny: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="reward_funcs must be"):
        trainer(tiny, tmp_path, [accuracy, tool_economy])
    with pytest.raises(ValueError, match="loss_type must be one of dapo"):
        trainer(tiny, tmp_path, [accuracy], loss_type="cispo")


# -- verl ------------------------------------------------------------------------------------------------------------------

@dataclass
class ActorConfig:      # the fields of verl's that its policy losses read
    clip_ratio: float = 0.2
    clip_ratio_low: float | None = None
    clip_ratio_high: float | None = None
    clip_ratio_c: float = 3.0
    global_batch_info: dict[str, Any] | None = None


def verl_loss(old: torch.Tensor, new: torch.Tensor, advantages: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """PPO with the dual clip, per token, as verl's vanilla loss states it."""
    ratio = (new - old).exp()
    clipped = torch.maximum(-advantages * ratio, -advantages * ratio.clamp(0.8, 1.2))
    return torch.where(advantages < 0, torch.minimum(-advantages * 3.0, clipped), clipped) * mask


@pytest.mark.parametrize("mode", ["token-mean", "seq-mean-token-mean", "seq-mean-token-sum"])
def test_verls_policy_loss_hook_averages_as_verl_does_with_global_counts(mode: str) -> None:
    from hdpo.integrations.verl import policy_loss
    b = batch(2)
    old, mask = b["log_probs"] + 0.5 * torch.randn(16, 7, dtype=torch.float64), b["mask"]
    advantages = torch.randn(16, 1, dtype=torch.float64) * mask
    config = ActorConfig(global_batch_info={"dp_size": 4, "batch_num_tokens": 500.0, "global_batch_size": 64})
    loss, stats = policy_loss(old, b["log_probs"], advantages, mask, mode, config)
    values = verl_loss(old, b["log_probs"], advantages, mask)
    rows = {"token-mean": values.sum() / 500, "seq-mean-token-sum": values.sum() / 64,
            "seq-mean-token-mean": (values.sum(1) / mask.sum(1)).sum() / 64}
    torch.testing.assert_close(loss.double(), rows[mode] * 4, rtol=1e-5, atol=1e-7)
    assert 0 < stats["actor/pg_clipfrac"] < 1
    with pytest.raises(ValueError, match="use token-mean"):
        policy_loss(old, b["log_probs"], advantages, mask, "median", config)


def test_verls_estimator_reads_rewards_by_name_and_groups_by_uid_strings() -> None:
    from hdpo.integrations.verl import advantage_estimator
    b = batch(3)
    uid = np.array([f"prompt-{g}" for g in b["group"].tolist()], dtype=object)
    rewards = {"accuracy_reward": b["accuracy"].numpy(), "tool_reward": b["tool"].numpy(), "correct": b["correct"].numpy()}
    advantages, returns = advantage_estimator(torch.zeros(16, 7), b["mask"], uid, None, rewards, ignored=1)
    expected = one_stream(hdpo_advantages(b["accuracy"], b["tool"], b["correct"], b["group"]), b["mask"].sum(1))
    torch.testing.assert_close(advantages, expected.float().unsqueeze(1) * b["mask"], check_dtype=False)
    assert returns is advantages
    with pytest.raises(ValueError, match="must return tool_reward, correct beside score"):
        advantage_estimator(torch.zeros(16, 7), b["mask"], uid, None, {"accuracy_reward": rewards["accuracy_reward"]})


def test_registering_fills_verls_registries(monkeypatch: pytest.MonkeyPatch) -> None:
    core = types.ModuleType("verl.trainer.ppo.core_algos")      # a stand-in with verl's two registries
    losses: dict[str, Any] = {}
    core.ADV_ESTIMATOR_REGISTRY = {}                            # type: ignore[attr-defined]
    core.register_policy_loss = lambda name: lambda fn: losses.setdefault(name, fn)   # type: ignore[attr-defined]
    for name in ("verl", "verl.trainer", "verl.trainer.ppo"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    monkeypatch.setitem(sys.modules, core.__name__, core)
    from hdpo.integrations import verl
    verl.register()
    assert core.ADV_ESTIMATOR_REGISTRY["gdpo"] is verl.advantage_estimator and losses["hdpo"] is verl.policy_loss


# -- prime-rl --------------------------------------------------------------------------------------------------------------

def test_prime_rls_loss_is_the_sum_over_member_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    @dataclass
    class LossOutputs:
        loss: torch.Tensor
        metrics: dict[str, torch.Tensor]

    host = types.ModuleType("prime_rl.trainer.rl.loss")         # a stand-in with prime-rl's two dataclasses
    host.LossOutputs = LossOutputs                              # type: ignore[attr-defined]
    for name in ("prime_rl", "prime_rl.trainer", "prime_rl.trainer.rl"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    monkeypatch.setitem(sys.modules, host.__name__, host)
    from hdpo.integrations.prime_rl import loss
    b = batch(4)
    new, mask = b["log_probs"].flatten(), b["mask"].flatten()
    old = new + 0.3 * torch.randn(112, dtype=torch.float64)
    advantages = torch.randn(112, dtype=torch.float64)
    result = loss(types.SimpleNamespace(trainer_logprobs=new, inference_logprobs=old, advantages=advantages,
                                        loss_mask=mask.bool(), loss_weights=None, ref_logprobs=None))
    torch.testing.assert_close(result.loss, verl_loss(old, new, advantages, mask).sum())
