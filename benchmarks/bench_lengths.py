"""What do steps of rows of like lengths (data.group_by_length) change for SFT? (L1 to L3)

    python benchmarks/bench_lengths.py [--short] [--json FILE]

Demonstrations with lengths as tool trajectories have them (lognormal, mean about 5k tokens, up to 40k), on 8 simulated ranks with
micro-batches of 40,960 tokens, planned as in training. Rows are packed, so that nothing is padded either way. What length
grouping can change is how evenly the ranks are loaded: "sync efficiency" is ideal over actual time when every micro-step waits
for the slowest rank, and micro-steps, of which each gathers all weights once. Beside it what a padded collator of four rows
would waste.
"""
from __future__ import annotations

import random
import statistics
import sys

from common import Figure, arguments, report

from hdpo.data.grouping import by_length
from hdpo.packing.costs import Budget, RowCost, WorkModel
from hdpo.packing.planning import plan

RANKS, BUDGET, WORK = 8, Budget(40_960, 163_840, 70), WorkModel(47_104, 12)      # Qwen3-VL-8B
WINDOWS = (0, 8, 32)


def main() -> int:
    args = arguments(__doc__).parse_args()
    steps = 16 if args.short else 96
    coin = random.Random(1)
    longest = BUDGET.max_tokens - BUDGET.filler_tokens
    lengths = [min(longest, 300 + int(coin.lognormvariate(8.0, 1.0))) for _ in range(128 * steps)]
    figures: dict[str, Figure] = {}
    for rows in (16, 128):
        order = random.Random(2).sample(range(len(lengths)), rows * steps)
        for window in WINDOWS:
            some = by_length(order, lengths, rows, window, 0, random.Random(3)) if window else order
            taken = [[lengths[i] for i in some[at:at + rows]] for at in range(0, len(some), rows)]
            efficiency, micro_steps, padded = measure(taken)
            name = f"{rows} rows a step, " + (f"sorted over {window} steps" if window else "as they come")
            figures[f"L1 {name}: sync efficiency"] = Figure(efficiency, "x", "higher", None, 0.05)
            figures[f"L2 {name}: micro-steps a step"] = Figure(micro_steps, "", "lower", None, 0.1)
            figures[f"L3 {name}: a padded collator's waste"] = Figure(padded, "x", "lower", None, 0.1)
    return not report("lengths", figures, {"mean tokens": statistics.mean(lengths)}, args.json, args.short)


def measure(steps: list[list[int]]) -> tuple[float, float, float]:
    """(sync efficiency, micro-steps a step, share of a padded collator's tokens that are padding)."""
    ideal = actual = padding = tokens = 0.0
    counts = []
    for step in steps:
        rows = [RowCost(length, 0, WORK(length, 0), 13 * length, number % RANKS) for number, length in enumerate(step)]
        made = plan(rows, RANKS, BUDGET)
        loads = [[sum(rows[i].work for i in bin_) for bin_ in bins] for bins in made]
        ideal += sum(map(sum, loads)) / RANKS
        actual += sum(map(max, zip(*loads, strict=True)))
        counts.append(len(loads[0]))
        for at in range(0, len(step), 4):
            longest = max(step[at:at + 4]) * len(step[at:at + 4])
            tokens += longest
            padding += longest - sum(step[at:at + 4])
    return ideal / actual, statistics.mean(counts), padding / tokens


if __name__ == "__main__":
    sys.exit(main())
