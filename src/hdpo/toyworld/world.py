"""The embedded task world: rows in the Metis-RL schema, demonstrations and search indices, made on the spot from a seed.

    from hdpo.toyworld.world import make_world
    make_world("runs/world", seed=1)

Every row's need for a tool is known (`extra_info.tool_needed`); it is for evaluation only. The model is meant to see
pictures bounded to 64 x 64 pixels (model.min_pixels = model.max_pixels = 4096), tools get the originals. The families
are described in `toy_families`. The same arguments give the same files, byte for byte.
"""
from __future__ import annotations

import json
import os
import random
import shutil
import sqlite3
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hdpo.errors import DataError
from hdpo.progress import progress
from hdpo.toyworld import mixed, words
from hdpo.toyworld.families import CYCLE, PLAIN_CYCLE, Puzzle, Source
from hdpo.toyworld.glyphs import load_glyphs

BLIND_CALLS = 0.82    # share of demonstrations that call a tool although the question does not need one
DIFFICULTIES = ("clear", "mixed")
"""clear: what can be seen or found is certain, and SFT ends with every answer right. mixed: see `hdpo.toyworld.mixed`."""

CYCLES = {"clear": (CYCLE, PLAIN_CYCLE), "mixed": (mixed.CYCLE, mixed.PLAIN_CYCLE)}
NEEDED_CALLS = {"clear": 1.0, "mixed": 0.9}
"""Share of demonstrations that call a tool where one is needed; the others know the answer without saying whence."""
NAMES = tuple(f"{stem} {kind}" for stem in words.STEMS for kind in words.KINDS)


@dataclass(frozen=True)
class World:
    """Paths of a made world."""

    train: Path           # RL rows
    val: Path             # held-out rows: other glyphs, names, products and badges
    demos: Path           # demonstrations for SFT; other draws than `train`
    text_index: Path      # SQLite FTS5: pages(title, link, snippet)
    image_index: Path     # folder of PNG files and labels.json {file name: title}


def _sources(seed: int) -> tuple[Source, Source]:
    """(train, held-out). Which names are held out never changes; the gate codes belong to the seed."""
    rng = random.Random(f"toy codes {seed}")
    codes = {name: str(rng.randrange(1000, 10000)) for name in NAMES}
    doubts = random.Random(f"toy rumours {seed}")
    rumours = {name: str(doubts.randrange(1000, 10000)) for name in NAMES}
    held_out = tuple(random.Random("toy names").sample(NAMES, len(NAMES) // 4))
    train = tuple(name for name in NAMES if name not in set(held_out))
    return (Source(load_glyphs("train"), codes, rumours, train, held_out=False),
            Source(load_glyphs("held_out"), codes, rumours, held_out, held_out=True))


def draw_puzzles(seed: int, split: str, rows: int, difficulty: str = "clear") -> list[Puzzle]:
    """`rows` puzzles of "train", "val", "demos" or "plain", families and variants balanced, in an order of the seed's own.

    The first n of a longer draw are not the draw of n: the order is shuffled over all rows.
    """
    source = _sources(seed)[split == "val"]
    bar = progress(f"toy world, {split}", "row", range(rows))
    cycle = CYCLES[difficulty][split == "plain"]
    puzzles = [cycle[k % len(cycle)](random.Random(f"toy {seed} {split} {k}"), source) for k in bar]
    random.Random(f"toy order {seed} {split}").shuffle(puzzles)
    return puzzles


def _row(puzzle: Puzzle, split: str, number: int) -> dict[str, Any]:
    question = puzzle.question.replace("<image>", "")
    return {
        "data_source": f"toy/{puzzle.family}",
        "prompt": [{"role": "system", "content": words.SYSTEM}, {"role": "user", "content": puzzle.question}],
        "images": [{"bytes": image} for image in puzzle.images],
        "ability": puzzle.family,
        "reward_model": {"ground_truth": puzzle.answer, "style": "rule"},
        "extra_info": {"index": f"toy_{split}_{number}", "question": question, "answer": puzzle.answer, "pass8": 0,
                       "tool_needed": puzzle.tool_needed, "family": puzzle.family},
    }


def demonstrate(puzzle: Puzzle, calls: bool, system: str = words.SYSTEM) -> tuple[list[dict[str, str]], list[bytes]]:
    """Messages and images of a demonstration that calls the tool, or of one that answers at once."""
    messages = [("system", system), ("user", puzzle.question)]
    images = list(puzzle.images)
    if calls:
        messages.append(("assistant", f"<reason>{puzzle.tool_reason}</reason>\n{puzzle.call}"))
        messages.append(("user", puzzle.observation + "<image>" * len(puzzle.observation_images)))
        images += puzzle.observation_images
    reason = words.FOUND if calls else puzzle.direct_reason
    messages.append(("assistant", f"<reason>{reason}</reason>\n<answer>{puzzle.answer}</answer>"))
    return [{"role": role, "content": content} for role, content in messages], images


def _demonstration(puzzle: Puzzle, number: int, seed: int, needed_calls: float, plain: bool = False) -> dict[str, Any]:
    """A demonstration with tools; a `plain` one offers none and answers, as general data in an SFT mix does."""
    calls = random.Random(f"toy habit {seed} {number}").random() < (needed_calls if puzzle.tool_needed else BLIND_CALLS)
    messages, images = demonstrate(puzzle, calls and not plain, words.PLAIN_SYSTEM if plain else words.SYSTEM)
    row = _row(puzzle, "plain" if plain else "demos", number)
    return {"data_source": row["data_source"], "messages": messages, "images": [{"bytes": image} for image in images],
            "reward_model": row["reward_model"], "extra_info": row["extra_info"]}


def _schema(demonstrations: bool) -> Any:
    import pyarrow as pa

    message = pa.struct([("role", pa.string()), ("content", pa.string())])
    info = pa.struct([("index", pa.string()), ("question", pa.string()), ("answer", pa.string()), ("pass8", pa.int64()),
                      ("tool_needed", pa.bool_()), ("family", pa.string())])
    images = ("images", pa.list_(pa.struct([("bytes", pa.binary())])))
    reward = ("reward_model", pa.struct([("ground_truth", pa.string()), ("style", pa.string())]))
    if demonstrations:
        return pa.schema([("data_source", pa.string()), ("messages", pa.list_(message)), images, reward,
                          ("extra_info", info)])
    return pa.schema([("data_source", pa.string()), ("prompt", pa.list_(message)), images, ("ability", pa.string()), reward,
                      ("extra_info", info)])


def _write_parquet(path: Path, rows: list[dict[str, Any]], demonstrations: bool = False) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    table = pa.Table.from_pylist(rows, schema=_schema(demonstrations))
    part = path.with_suffix(".part")
    pq.write_table(table, part, row_group_size=256)
    os.replace(part, path)


def _write_text_index(path: Path, facts: dict[str, str]) -> None:
    part = path.with_suffix(".part")
    part.unlink(missing_ok=True)
    database = sqlite3.connect(part)
    with database:
        database.execute("CREATE VIRTUAL TABLE pages USING fts5(title, link UNINDEXED, snippet)")
        database.executemany("INSERT INTO pages VALUES (?, ?, ?)", [
            (name, words.LINK, fact) for name, fact in sorted(facts.items())])
    database.close()
    os.replace(part, path)


def _write_image_index(folder: Path, puzzles: Iterable[Puzzle]) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    labels: dict[str, str] = {}
    for puzzle in puzzles:
        if puzzle.family == "identity":
            name = f"badge_{len(labels):05d}.png"
            (folder / name).write_bytes(puzzle.images[0])
            labels[name] = words.BADGE_TITLE.format(puzzle.answer)
    (folder / "labels.json").write_text(json.dumps(labels, indent=0))


def make_world(folder: str | os.PathLike[str], seed: int = 1, train_rows: int = 2560, val_rows: int = 480,
               demos: int = 6000, difficulty: str = "clear") -> World:
    """Writes train.parquet, val.parquet, demos.parquet, facts.sqlite and badges/ into `folder` (about 10 s).

    `demos` counts demonstrations with tools; a fifth as many plain ones, without tools, come on top.
    `difficulty` is one of DIFFICULTIES. Raises DataError when a count is negative, there is no such difficulty or
    scikit-learn is missing.
    """
    if difficulty not in DIFFICULTIES:
        raise DataError(f"toy world: there is no difficulty {difficulty}; there are {', '.join(DIFFICULTIES)}")
    if min(train_rows, val_rows, demos) < 0:
        raise DataError(f"toy world: rows can't be negative (train {train_rows}, val {val_rows}, demos {demos})")
    root = Path(folder)
    root.mkdir(parents=True, exist_ok=True)
    world = World(*(root / name for name in ("train.parquet", "val.parquet", "demos.parquet", "facts.sqlite", "badges")))
    drawn = {split: draw_puzzles(seed, split, rows, difficulty)
             for split, rows in (("train", train_rows), ("val", val_rows), ("demos", demos), ("plain", demos // 5))}
    for split, path in (("train", world.train), ("val", world.val)):
        _write_parquet(path, [_row(puzzle, split, k) for k, puzzle in enumerate(drawn[split])])
    _write_parquet(world.demos, [
        _demonstration(p, k, seed, NEEDED_CALLS[difficulty], split == "plain")
        for split in ("demos", "plain") for k, p in enumerate(drawn[split])], demonstrations=True)
    source = _sources(seed)[0]
    _write_text_index(world.text_index, {name: (mixed.snippet(source, name) if difficulty == "mixed" else
                                                words.FACT.format(name, code)) for name, code in source.codes.items()})
    _write_image_index(world.image_index, [puzzle for puzzles in drawn.values() for puzzle in puzzles])
    return world


def write_plain(val: Path, path: Path) -> None:
    """The held-out rows asked without offering a tool, as `data_source` plain/...: what can be answered from sight alone."""
    import pyarrow.parquet as pq

    rows = pq.read_table(val).to_pylist()
    for row in rows:
        row["prompt"][0]["content"] = words.PLAIN_SYSTEM
        row["data_source"] = f"plain/{row['data_source']}"
    _write_parquet(path, rows)
