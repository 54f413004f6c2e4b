"""`hdpo score`: published rows and a file of answers -> the benchmarks' official figures. No model is loaded."""
from __future__ import annotations

import argparse
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

from hdpo.config import Config
from hdpo.config.file import add_config_options, load_config
from hdpo.errors import UserError, boundary
from hdpo.evaluation import table
from hdpo.evaluation.benchmarks import BENCHMARKS, open_benchmarks
from hdpo.evaluation.marking import check_judge
from hdpo.evaluation.results import write_json
from hdpo.evaluation.score import Scoring, audit_lines, ids, score

ABOUT = f"""Score answers to benchmarks by their official rules. FOLDER/NAME/ holds the published files of benchmark NAME.
Benchmarks: {', '.join(BENCHMARKS)}."""


def main(argv: Sequence[str]) -> int:
    options = _options(argv)
    benchmarks = open_benchmarks(options.benchmarks)
    if options.ids:
        for name in ids(benchmarks, options.data):
            print(name)
        return 0
    if options.predictions is None:
        raise UserError("--predictions FILE.jsonl is missing: one {\"id\", \"answer\"} a line (--ids lists the ids)")
    config = load_config(options.config, options.overrides)
    has_judge = bool(config.judge.base_url) and config.reward.judge
    check_judge(benchmarks, has_judge, rules_only=options.rules_only, known=True)
    for file in filter(None, (options.predictions, options.against)):
        if not file.is_file():
            raise UserError(f"{file}: no such file of predictions")
    with ExitStack() as closing:
        judge = background = None
        if has_judge:
            from hdpo.background import BackgroundLoop
            from hdpo.compose.scoring import build_judge
            background = BackgroundLoop()
            closing.callback(background.close)
            judge = build_judge(_cached_beside(config, options.predictions))
            assert judge is not None
            closing.callback(lambda: background.run(judge.close()))
        found = score(benchmarks, options.data, options.predictions, judge=judge, background=background,
                      against=options.against, rules_only=options.rules_only)
    show(found, {benchmark.name: benchmark.title for benchmark in benchmarks}, paper=options.paper, against=options.against,
         json=[options.json], markdown=options.markdown)
    return 0


def _options(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="hdpo score", description=ABOUT)
    parser.add_argument("--benchmarks", required=True, metavar="A,B", help='names with commas between them, or "all"')
    parser.add_argument("--data", required=True, type=Path, metavar="FOLDER",
                        help="folder with a folder per benchmark; for one benchmark also a dataset's name, owner/name[:split]")
    parser.add_argument("--predictions", type=Path, metavar="FILE", help='JSON Lines: {"id", "answer", "calls", "arm", "sample"}')
    parser.add_argument("--ids", action="store_true", help="print the id of every row in the order of the files, and end")
    parser.add_argument("--json", type=Path, metavar="OUT", help="write the figures as JSON")
    parser.add_argument("--markdown", type=Path, metavar="OUT", help="write the table as Markdown")
    parser.add_argument("--against", type=Path, metavar="OTHER", help="another file of predictions, compared row by row")
    parser.add_argument("--paper", action="store_true", help="show the paper's Qwen3-VL-8B beside")
    parser.add_argument("--rules-only", action="store_true",
                        help="without a judge: score the parts of a benchmark that rules decide, and leave out the rest")
    add_config_options(parser)
    return parser.parse_args(argv)


def _cached_beside(config: Config, predictions: Path) -> Config:
    """Verdicts are kept beside the answers, unless judge.cache says where."""
    cache = config.judge.cache or str(predictions.with_suffix(".verdicts.sqlite"))
    return config.model_copy(update={"judge": config.judge.model_copy(update={"cache": cache})})


def show(found: Scoring, titles: dict[str, str], *, paper: bool, against: Path | None, json: Sequence[Path | None],
         markdown: Path | None) -> None:
    """Print the tables and write the files that are named."""
    cells = table.figures(found.records, titles, paper=paper)
    print(table.text(cells))
    for note in table.notes(found.records):
        print(f"  {note}")
    tools = table.tools(found.records, titles, found.overall)
    if tools:
        print("\n" + table.text(tools))
    for line in table.wisdom(found.records, titles, found.overall):
        print(line)
    if found.against:
        print(f"\nAgainst {against}:\n" + table.text(table.comparison(found.against, titles)))
    records = {name: {**record, **({"against": found.against[name]} if found.against else {})}
               for name, record in found.records.items()}
    with boundary(UserError, "the figures can't be written", OSError):
        for path in filter(None, json):
            write_json(path, records)
            if found.audit:
                path.with_suffix(".audit.jsonl").write_text(audit_lines(found.audit), encoding="utf-8")
        if markdown:
            markdown.write_text(table.markdown(cells) + ("\n" + table.markdown(tools) if tools else ""), encoding="utf-8")
