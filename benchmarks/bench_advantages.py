"""How fast are advantages at scale, against the usual loops over groups, and are equal groups exactly zero? (A1, A2)

    python benchmarks/bench_advantages.py [--short] [--json FILE]
"""
from __future__ import annotations

import sys
from collections import defaultdict

import torch
from common import Figure, arguments, paired, report

from hdpo import hdpo_advantages

EPS = 1e-6


def loops(accuracy: torch.Tensor, tool: torch.Tensor, correct: torch.Tensor, group: torch.Tensor) -> torch.Tensor:
    """GRPO's usual shape: dictionaries of 0-dim tensors, a mean and a std per group, then one row at a time."""
    out = torch.zeros(2, len(group))
    for channel, (reward, compared) in enumerate(((accuracy, torch.ones_like(correct)), (tool, correct))):
        members = defaultdict(list)
        for i in range(len(group)):
            if compared[i]:
                members[int(group[i])].append(reward[i])
        mean = {g: torch.stack(r).mean() for g, r in members.items()}
        std = {g: torch.stack(r).std() for g, r in members.items() if len(r) > 1}
        for i in range(len(group)):
            g = int(group[i])
            if compared[i] and g in std:
                out[channel, i] = (reward[i] - mean[g]) / (std[g] + EPS)
    return out


def rollouts(rows: int) -> tuple[torch.Tensor, ...]:
    g = torch.Generator().manual_seed(0)
    correct = torch.rand(rows, generator=g) < 0.5
    calls = torch.randint(0, 4, (rows,), generator=g)
    accuracy = 0.9 * correct + 0.1 * (torch.rand(rows, generator=g) < 0.9)
    return accuracy, correct / (calls + 1), correct, torch.arange(rows) // 16 * 7919


def main() -> int:
    args = arguments(__doc__).parse_args()
    rows = 16_384 if args.short else 65_536
    data, million = rollouts(rows), rollouts(1_000_000)
    times = paired({"loops": lambda: loops(*data), "vectorised": lambda: hdpo_advantages(*data)}, "vectorised", 3)
    scale = paired({"million": lambda: hdpo_advantages(*million)}, "million", 3)["million"]["seconds"]
    got, expected = hdpo_advantages(*data).values, loops(*data)
    # where a group's rewards are equal the loops' float32 std is not zero; leave those out of the comparison
    different = got != 0
    error = ((got - expected).abs() * different).max().item()
    equal = torch.tensor([0.1, 0.2, 1 / 3, 0.9, 1.0]).repeat_interleave(16)
    ids, yes = torch.arange(80) // 16, torch.ones(80, dtype=torch.bool)
    figures = {
        f"A1 loops / vectorised, {rows} rows": Figure(times["loops"]["ratio"], "x", "higher", 100, 0.4),
        "A1 a million rows": Figure(scale, "CPU s", "lower", 1.0, 1.0),
        "A2 largest advantage of groups of equal rewards": Figure(
            hdpo_advantages(equal, equal, yes, ids).values.abs().max().item(), "", "lower", 0.0),
        "A2 the same with the loops": Figure(loops(equal, equal, yes, ids).abs().max().item(), "", "lower"),
        "largest difference from the loops": Figure(error, "", "lower", 1e-4, 1.0),
    }
    return not report("advantages", figures, {"times": times}, args.json, args.short)


if __name__ == "__main__":
    sys.exit(main())
