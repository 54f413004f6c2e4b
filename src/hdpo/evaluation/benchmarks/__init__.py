"""The thirteen benchmarks of the paper, one file each. A new one is a file, a line here and a fixture."""
from __future__ import annotations

import difflib
from collections.abc import Callable
from functools import partial

from hdpo.errors import UserError
from hdpo.evaluation.benchmarks.charxiv import CharXivDescriptive, CharXivReasoning
from hdpo.evaluation.benchmarks.dynamath import DynaMath
from hdpo.evaluation.benchmarks.hrbench import HRBench
from hdpo.evaluation.benchmarks.logicvista import LogicVista
from hdpo.evaluation.benchmarks.mathverse import MathVerse
from hdpo.evaluation.benchmarks.mathvista import MathVista
from hdpo.evaluation.benchmarks.mmerealworld import MMERealWorld
from hdpo.evaluation.benchmarks.seed2plus import Seed2Plus
from hdpo.evaluation.benchmarks.treebench import TreeBench
from hdpo.evaluation.benchmarks.vstar import VStar
from hdpo.evaluation.benchmarks.wemath import WeMath
from hdpo.evaluation.items import Benchmark

BENCHMARKS: dict[str, Callable[[], Benchmark]] = {
    "vstar": VStar, "hrbench4k": partial(HRBench, "4k"), "hrbench8k": partial(HRBench, "8k"), "treebench": TreeBench,
    "mmerealworld": partial(MMERealWorld, ""), "mmerealworld-lite": partial(MMERealWorld, "lite"),
    "mmerealworld-cn": partial(MMERealWorld, "cn"), "seed2plus": Seed2Plus, "charxiv_dq": CharXivDescriptive,
    "charxiv_rq": CharXivReasoning, "mathvista": MathVista, "mathverse": MathVerse, "wemath": WeMath, "dynamath": DynaMath,
    "logicvista": LogicVista}
"""In the order of the paper's table."""


def open_benchmarks(names: str) -> list[Benchmark]:
    """The benchmarks of a comma-separated list; "all" is every one. Raises UserError for a name that is none of them."""
    wanted = list(BENCHMARKS) if names.strip() == "all" else [name.strip() for name in names.split(",") if name.strip()]
    known = {_key(name): name for name in BENCHMARKS}
    for name in wanted:
        if _key(name) not in known:
            close = difflib.get_close_matches(name, BENCHMARKS, n=1, cutoff=0.5)
            hint = f"did you mean {close[0]}?" if close else f"there are {', '.join(BENCHMARKS)}"
            raise UserError(f"--benchmarks: unknown benchmark {name}; {hint}")
    if not wanted:
        raise UserError(f"--benchmarks names none; there are {', '.join(BENCHMARKS)}")
    return [BENCHMARKS[known[_key(name)]]() for name in dict.fromkeys(wanted)]


def _key(name: str) -> str:
    return name.lower().replace("_", "").replace("-", "")
