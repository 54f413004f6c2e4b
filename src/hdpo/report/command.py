"""`hdpo report`: write the page of a run, or serve all of it."""
from __future__ import annotations

import argparse
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from hdpo.errors import UserError

ABOUT = """\
Write RUN/report.html: curves, tables and a browser of rollouts, one file that fetches nothing. It holds a sample of the rollouts;
--serve shows all of them, a page at a time, to this machine's browser. RUN is a training or evaluation run's folder, or what a
curation has written."""


def main(argv: Sequence[str]) -> int:
    """Raises UserError."""
    parser = argparse.ArgumentParser(prog="hdpo report", description=ABOUT)
    parser.add_argument("run", type=Path, help="the run's folder, for example runs/demo")
    parser.add_argument("other", type=Path, nargs="?", help="another run, to be compared with the first")
    parser.add_argument("--compare", type=Path, metavar="RUN", help="the same as naming a second run")
    parser.add_argument("--serve", action="store_true", help="serve the whole run until Ctrl-C instead of writing a file")
    parser.add_argument("--host", default="127.0.0.1", help="address to serve on (%(default)s)")
    parser.add_argument("--port", type=int, default=8008, help="port to serve on (%(default)s; 0 takes a free one)")
    options = parser.parse_args(argv)
    folders = [folder for folder in (options.run, options.other, options.compare) if folder is not None]
    if len(folders) > 2:
        raise UserError("name a second run or give --compare, not both")
    for folder in folders:
        if not folder.is_dir():
            raise UserError(f"no such run folder: {folder}")
    folders = [_result(folder) for folder in folders]
    from hdpo.report.page import page_of, write_report
    if not options.serve:
        print(write_report(*folders))
        return 0
    from hdpo.report.server import Server, Site
    from hdpo.report.shelf import Shelf
    page_of(folders, served=True)      # what is wrong with a folder is said here, not in the browser
    with Server(Site([Shelf(folder) for folder in folders], lambda: page_of(folders, served=True)), options.host,
                options.port) as server:
        with suppress(KeyboardInterrupt):
            print(server.url, flush=True)
            server.serve_forever()
    return 0


def _result(folder: Path) -> Path:
    """Where an evaluation on benchmarks has its answers; any other run's folder is its own."""
    inside = folder / "benchmarks"
    own = any((folder / name).exists() for name in ("metrics.jsonl", "summary.json", "manifest.json"))
    return inside if not own and (inside / "summary.json").exists() else folder
