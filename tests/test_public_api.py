"""The names other trainers rely on, what importing them loads, and a whole use of them in a foreign training loop."""
from __future__ import annotations

import inspect
import subprocess
import sys
from pathlib import Path

import pytest

import hdpo


def modules_after(code):
    script = f"{code}\nimport sys; print('\\n'.join(sorted({{name.partition('.')[0] for name in sys.modules}})))"
    return set(subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, text=True).stdout.split())


def test_importing_hdpo_loads_no_torch():
    assert "torch" not in modules_after("import hdpo; dir(hdpo)")


@pytest.mark.parametrize("code", [
    "import hdpo.losses, hdpo.advantages, hdpo.fused_loss",
    "from hdpo import hdpo_advantages, hdpo_loss, fused_linear_hdpo_loss",
])
def test_the_algorithm_loads_torch_and_nothing_heavier(code):
    loaded = modules_after(code)
    heavy = {"transformers", "deepspeed", "vllm", "accelerate", "datasets", "pydantic", "aiohttp", "docker", "openai", "PIL"}
    assert "torch" in loaded and not loaded & heavy


def test_every_public_name_resolves_and_unknown_ones_say_so():
    for name in hdpo.__all__:
        assert callable(getattr(hdpo, name)) and name in dir(hdpo)
    with pytest.raises(AttributeError, match="hdpo_los"):
        hdpo.hdpo_los   # noqa: B018


@pytest.mark.parametrize("function, leading, keywords", [
    ("hdpo_advantages", ["accuracy_reward", "tool_reward", "correct", "group"],
     {"scored": None, "scale": "std", "eps": 1e-6, "min_std": 1e-5, "tool_estimator": "conditional"}),
    ("hdpo_loss", ["log_probs", "old_log_probs", "advantages", "mask"],
     {"member": None, "weights": (1.0, 0.15), "norms": None, "clip_low": 0.2, "clip_high": 0.2, "dual_clip": 3.0,
      "rollout_weights": None}),
    ("fused_linear_hdpo_loss", ["hidden", "weight", "targets", "old_log_probs", "advantages", "mask"],
     {"temperature": 1.0, "bias": None, "member": None, "weights": (1.0, 0.15), "norms": None, "clip_low": 0.2,
      "clip_high": 0.2, "dual_clip": 3.0, "rollout_weights": None, "chunk_tokens": None}),
])
def test_signatures_are_the_promised_ones(function, leading, keywords):
    parameters = inspect.signature(getattr(hdpo, function)).parameters
    assert [p.name for p in parameters.values() if p.kind is p.POSITIONAL_OR_KEYWORD] == leading
    given = {p.name: p.default for p in parameters.values() if p.kind is p.KEYWORD_ONLY}
    assert {name: given[name] for name in keywords} == keywords
    assert all(p.default is not p.empty for p in parameters.values() if p.kind is p.KEYWORD_ONLY)


README = Path(__file__).resolve().parents[1] / "README.md"
EXAMPLE = README.read_text().partition("## The loss alone")[2].split("```python\n", 1)[1].split("```", 1)[0]


def test_the_loss_works_alone_in_another_trainer():
    import torch

    torch.manual_seed(0)
    scope: dict = {}
    exec(EXAMPLE, scope)
    assert torch.isfinite(scope["loss"])
    gain = (scope["log_probs"] - scope["old"]).sum(1).detach()
    total = scope["values"][0] + 0.15 * scope["values"][1]
    assert (gain * total).sum() > 0, "rewarded rollouts should have become likelier"
