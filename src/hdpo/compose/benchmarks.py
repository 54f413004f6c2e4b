"""`hdpo eval --benchmarks`: a model folder -> the paper's table, through the trainer's own rollouts, on any number of ranks."""
from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from hdpo.config import Config
from hdpo.config.file import add_config_options, dump_config, load_config
from hdpo.errors import UserError
from hdpo.evaluation.benchmarks import BENCHMARKS, open_benchmarks
from hdpo.evaluation.items import Benchmark, Item
from hdpo.evaluation.marking import check_judge
from hdpo.evaluation.predictions import NO_TOOLS, TOOLS
from hdpo.evaluation.score import place_of, read_items

ABOUT = f"""Roll benchmarks out with a model folder (--set model.path=...) and score them by their official rules. FOLDER/NAME/
holds the published files of benchmark NAME. Everything is written into RUN/benchmarks; the same command goes on after a stop.
Benchmarks: {', '.join(BENCHMARKS)}."""

REFERENCE = {"model.max_pixels": 16384 * 32 * 32, "rollout.max_turns": 10}


def main(argv: Sequence[str]) -> int:
    options = _options(argv)
    overrides = [*(f"{key}={value}" for key, value in REFERENCE.items() if options.preset == "reference"), *options.overrides]
    config = load_config(options.config, overrides)
    if options.print_config:
        print(dump_config(config), end="")
        return 0
    benchmarks = open_benchmarks(options.benchmarks)
    plan = _plan(options, config)
    check_judge(benchmarks, bool(config.judge.base_url) and config.reward.judge, rules_only=options.rules_only)
    for benchmark in benchmarks:
        next(iter(benchmark.items(place_of(benchmark, options.data))),
             None)    # a wrong folder is named before anything is loaded
    if options.against is not None and not options.against.is_file():
        raise UserError(f"--against {options.against}: no such file of predictions")
    from hdpo.train.lifecycle import follow_launcher
    follow_launcher()
    return _run(config, plan, benchmarks, options)


def _options(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="hdpo eval", description=ABOUT)
    parser.add_argument("--benchmarks", required=True, metavar="A,B", help='names with commas between them, or "all"')
    parser.add_argument("--data", required=True, type=Path, metavar="FOLDER",
                        help="folder with a folder per benchmark; for one benchmark also a dataset's name, owner/name[:split]")
    parser.add_argument("--limit", type=int, default=0, metavar="N",
                        help="about N questions of each, whole problems, spread over it; figures are of these alone")
    parser.add_argument("--samples", type=int, default=1, metavar="K", help="answers per question and arm (%(default)s: greedy)")
    parser.add_argument("--arms", default=TOOLS, help=f"{TOOLS}, {NO_TOOLS} or both with a comma (%(default)s)")
    parser.add_argument("--no-tools-form", choices=("absent", "refused"), default="absent",
                        help="the arm without tools: no tools in the prompt, or the same prompt with calls refused (%(default)s)")
    parser.add_argument("--preset", choices=("reference",),
                        help="the setting of published tables: prompt images up to 16.8 MP, greedy, 11 turns")
    parser.add_argument("--system", type=Path, metavar="FILE", help="system prompt of the arm with tools, instead of hdpo's own")
    parser.add_argument("--system-plain", type=Path, metavar="FILE", help="system prompt of the arm without tools")
    parser.add_argument("--bare", action="store_true", help="ask the question and its options alone: the system prompt says how "
                        "to answer")
    parser.add_argument("--paper", action="store_true", help="show the paper's Qwen3-VL-8B beside")
    parser.add_argument("--against", type=Path, metavar="OTHER", help="another run's predictions.jsonl, compared row by row")
    parser.add_argument("--json", type=Path, metavar="OUT", help="write the figures here too")
    parser.add_argument("--rules-only", action="store_true",
                        help="without a judge: score the parts of a benchmark that rules decide, and leave out the rest")
    add_config_options(parser)
    parser.add_argument("--steal-lock", action="store_true",
                        help="take the folder over from a process that is known to be gone")
    parser.add_argument("--print-config", action="store_true", help="print the resulting configuration as YAML and end")
    return parser.parse_args(argv)


def _plan(options: argparse.Namespace, config: Config) -> Any:
    from hdpo.evaluation.runner import Plan
    arms = tuple(dict.fromkeys(arm.strip() for arm in options.arms.split(",")))
    for arm in arms:
        if arm not in (TOOLS, NO_TOOLS):
            raise UserError(f"--arms: unknown arm {arm}; there are {TOOLS} and {NO_TOOLS}")
    if options.samples < 1 or options.limit < 0:
        raise UserError("--samples must be at least 1 and --limit at least 0")
    if options.preset == "reference" and options.samples > 1:
        raise UserError("--preset reference is greedy: --samples must be 1")
    texts = {}
    for name in ("system", "system_plain"):
        file = getattr(options, name)
        if file is not None and not file.is_file():
            raise UserError(f"--{name.replace('_', '-')} {file}: no such file")
        texts[name] = file.read_text(encoding="utf-8").strip() if file is not None else ""
    return Plan(arms, options.samples, options.limit, options.no_tools_form,
                0.0 if options.samples == 1 else config.rollout.temperature, bare=options.bare, **texts)


def _run(config: Config, plan: Any, benchmarks: Sequence[Benchmark], options: argparse.Namespace) -> int:
    from hdpo.compose.stage import Stage
    from hdpo.evaluation.kept import Kept, check_settings
    from hdpo.evaluation.runner import Runner, selected, settings_of
    with Stage(config, options.steal_lock) as stage:
        parts = stage.benchmarks()
        config = stage.config
        world, folder = stage.world, config.run.path / "benchmarks"
        settings = settings_of(config, plan, stage.chat, benchmarks)
        if world.is_main:
            check_settings(folder, settings)
        items: Mapping[str, Mapping[str, Item]] = world.broadcast(
            {benchmark.name: read_items(benchmark, options.data) for benchmark in benchmarks} if world.is_main else None)
        kept = Kept(folder)
        stage.callback(kept.close)
        parts.open()
        done = Runner(config, plan, world, parts.rollouts, kept).run(benchmarks, items, options.data)
        kept.close()
        world.barrier()
        if not done:
            if world.is_main:
                print("stopped; every answer is kept, and the same command goes on")
            return 0
        if world.is_main:
            records = selected(benchmarks, items, plan, kept.known())
            _finish(config, folder, kept, benchmarks, items, records, settings, options, parts)
        world.barrier()
    return 0


def _finish(config: Config, folder: Path, kept: Any, benchmarks: Sequence[Benchmark], items: Mapping[str, Mapping[str, Item]],
            records: Sequence[Mapping[str, Any]], settings: Mapping[str, Any], options: argparse.Namespace, parts: Any) -> None:
    from hdpo.compose.score import show
    from hdpo.compose.scoring import build_judge
    from hdpo.evaluation.finish import finish
    from hdpo.evaluation.results import write_json
    from hdpo.evaluation.runner import comparable
    from hdpo.report.page import write_report
    judge = build_judge(config)
    try:
        found = finish(folder, kept, benchmarks, items, options.data, records, settings, judge=judge,
                       background=parts.background, against=options.against, rules_only=options.rules_only)
    finally:
        if judge is not None:
            parts.background.run(judge.close())
    titles = {benchmark.name: benchmark.title for benchmark in benchmarks}
    print()
    show(found, titles, paper=options.paper, against=options.against, json=[folder / "results.json", options.json],
         markdown=folder / "table.md")
    write_json(folder / "overall.json", found.overall)
    print(f"\n{comparable(settings)}\n{folder / 'results.json'}, {folder / 'questions.parquet'}, {write_report(folder)}")
