"""Rows of files in every layout through one memory-mapped copy a node."""
from __future__ import annotations

import base64
import ctypes
import errno
import fcntl
import gzip
import json
import multiprocessing
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from hdpo.data.index import Checked, index_rows
from hdpo.data.pages import WORTHWHILE, large_values
from hdpo.data.pictures import encoded_images
from hdpo.data.store import RowStore, open_rows
from hdpo.errors import DataError

PICTURE = bytes(range(256)) * 4


def rows(first: int, count: int) -> list[dict[str, Any]]:
    return [{"question": f"q{i}", "images": [{"bytes": PICTURE, "path": None}], "nested": {"truth": [str(i)]}}
            for i in range(first, first + count)]


def as_json(some: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [row | {"images": [{"bytes": base64.b64encode(PICTURE).decode()}]} for row in some]


def write(file: Path, some: list[dict[str, Any]]) -> None:
    table, lines = pa.Table.from_pylist(some), "".join(json.dumps(row) + "\n" for row in as_json(some))
    match file.name.partition(".")[2]:
        case "parquet":
            pq.write_table(table, file, row_group_size=3)
        case "arrow":
            with pa.ipc.new_file(str(file), table.schema) as writer:
                writer.write_table(table)
        case "stream.arrow":
            with pa.ipc.new_stream(str(file), table.schema) as writer:
                writer.write_table(table)
        case "jsonl":
            file.write_text(lines)
        case "jsonl.gz":
            file.write_bytes(gzip.compress(lines.encode()))
        case "json":
            file.write_text(json.dumps({"data": as_json(some)}))


@pytest.fixture
def cache(tmp_path: Path) -> str:
    return str(tmp_path / "cache")


@pytest.mark.parametrize("suffix", ["parquet", "arrow", "stream.arrow", "jsonl", "jsonl.gz", "json"])
def test_a_row_is_the_same_whatever_the_file_is_written_in(tmp_path: Path, cache: str, suffix: str) -> None:
    write(tmp_path / f"x.{suffix}", rows(0, 8))
    store = open_rows([str(tmp_path / f"x.{suffix}")], cache=cache)
    assert len(store) == 8 and store.columns == ("question", "images", "nested")
    for index in (7, 0, 3):
        row = store[index]
        assert (row["question"], row["nested"]) == (f"q{index}", {"truth": [str(index)]})
        assert encoded_images(row["images"]) == (PICTURE,) and store.name(index) == f"x.{suffix} row {index}"
    assert store.row(2, ["nested", "absent"]) == {"nested": {"truth": ["2"]}}


def test_tables_of_text_keep_their_fields(tmp_path: Path, cache: str) -> None:
    (tmp_path / "t.tsv").write_text('index\tquestion\n7\t"two\nlines"\n')
    assert open_rows([str(tmp_path / "t.tsv")], cache=cache)[0] == {"index": "7", "question": "two\nlines"}


def test_sources_follow_one_another_and_are_files_patterns_or_folders(tmp_path: Path, cache: str) -> None:
    (tmp_path / "f").mkdir()
    write(tmp_path / "f" / "train-00000-of-00002.parquet", rows(0, 2))
    write(tmp_path / "f" / "train-00001-of-00002.parquet", rows(2, 3))
    write(tmp_path / "one.jsonl", rows(5, 1))
    store = open_rows([str(tmp_path / "f"), str(tmp_path / "*.jsonl")], cache=cache)
    assert [row["question"] for row in store] == [f"q{i}" for i in range(6)]
    assert store.source_sizes() == [5, 1] and store.source_row(4) == (str(tmp_path / "f/train-00001-of-00002.parquet"), 2)
    write(tmp_path / "f" / "test-00000-of-00001.parquet", rows(0, 2))
    with pytest.raises(DataError, match=r"several splits \(test, train\); name one"):
        open_rows([str(tmp_path / "f")], cache=cache)


def test_a_folder_that_datasets_saved_is_read(tmp_path: Path, cache: str) -> None:
    datasets.Dataset.from_list(rows(0, 4)).save_to_disk(str(tmp_path / "saved"))
    assert open_rows([str(tmp_path / "saved")], cache=cache)[3]["question"] == "q3"


def test_a_broken_json_row_harms_itself_alone_and_types_may_differ_between_rows(tmp_path: Path, cache: str) -> None:
    (tmp_path / "x.jsonl").write_text('{"truth": "a"}\n\n{"truth": ["a", "b"]}\n{"truth": \n[1]\n{"truth": {"target": ["c"]}}\n')
    store = open_rows([str(tmp_path / "x.jsonl")], cache=cache)
    assert [store[i]["truth"] for i in (0, 1, 4)] == ["a", ["a", "b"], {"target": ["c"]}]
    for index, problem in ((2, "not valid JSON"), (3, "not a JSON object")):
        with pytest.raises(DataError, match=problem):
            store.row(index)


@pytest.mark.parametrize("kind", [pa.string_view(), pa.large_string(), pa.dictionary(pa.int32(), pa.string())])
def test_text_is_read_in_all_its_arrow_types(tmp_path: Path, cache: str, kind: pa.DataType) -> None:
    with pa.ipc.new_file(str(tmp_path / "x.arrow"), pa.schema([("q", kind)])) as writer:
        writer.write_table(pa.table({"q": pa.array(["a", None, "a"], pa.string()).cast(kind)}))
    assert [row["q"] for row in open_rows([str(tmp_path / "x.arrow")], cache=cache)] == ["a", None, "a"]


def test_a_copy_is_made_once_and_again_when_the_file_changes_but_not_when_it_moves(tmp_path: Path, cache: str) -> None:
    file = tmp_path / "x.parquet"
    write(file, rows(0, 4))
    first = open_rows([str(file)], cache=cache).fingerprint
    made = {path: path.stat().st_ino for path in Path(cache).rglob("rows.arrow")}
    (tmp_path / "elsewhere").mkdir()
    moved = file.rename(tmp_path / "elsewhere" / "x.parquet")
    assert open_rows([str(moved)], cache=cache).fingerprint == first
    assert {path: path.stat().st_ino for path in Path(cache).rglob("rows.arrow")} == made
    write(moved, rows(10, 4))
    assert open_rows([str(moved)], cache=cache)[0]["question"] == "q10"


def _open(file: str, cache: str, start: float) -> list[str]:
    time.sleep(max(0.0, start - time.time()))
    return [row["question"] for row in open_rows([file], cache=cache)]


def _open_without_locks(file: str, cache: str, start: float) -> list[str]:
    def no_locks(*_: Any) -> None:
        raise OSError(errno.ENOSYS, "Function not implemented")
    fcntl.flock = no_locks      # of this process alone
    return _open(file, cache, start)


@pytest.mark.parametrize("opened", [_open, _open_without_locks])
def test_processes_that_open_together_all_get_their_rows_and_leave_one_copy(
        tmp_path: Path, cache: str, opened: Callable[[str, str, float], list[str]]) -> None:
    write(tmp_path / "x.parquet", rows(0, 50))
    with multiprocessing.get_context("spawn").Pool(2) as pool:
        start = time.time() + 2.0
        seen = pool.starmap(opened, [(str(tmp_path / "x.parquet"), cache, start)] * 2)
    assert seen == [[f"q{i}" for i in range(50)]] * 2
    assert [file.name for file in Path(cache).rglob("rows.arrow*")] == ["rows.arrow"]


def test_a_torn_copy_is_made_again(tmp_path: Path, cache: str) -> None:
    write(tmp_path / "x.parquet", rows(0, 4))
    open_rows([str(tmp_path / "x.parquet")], cache=cache)
    (torn,) = Path(cache).rglob("rows.arrow")
    os.truncate(torn, 100)
    assert len(list(open_rows([str(tmp_path / "x.parquet")], cache=cache))) == 4


def test_a_damaged_copy_is_made_again(tmp_path: Path, cache: str) -> None:
    write(tmp_path / "x.parquet", rows(0, 4))
    for damage in (lambda copy: (copy / "rows.arrow").write_bytes(bytes((copy / "rows.arrow").stat().st_size)),
                   lambda copy: (copy / "copy.json").write_text("[]"),
                   lambda copy: (copy / "copy.json").write_text(
                       json.dumps({"bytes": (copy / "rows.arrow").stat().st_size}))):
        open_rows([str(tmp_path / "x.parquet")], cache=cache)
        damage(next(Path(cache).glob("*/rows.arrow")).parent)
        assert [row["question"] for row in open_rows([str(tmp_path / "x.parquet")], cache=cache)] == ["q0", "q1", "q2", "q3"]


def test_a_full_cache_is_one_line_that_names_the_setting_whatever_could_not_be_written(
        tmp_path: Path, cache: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(self: Path, *_: Any, **__: Any) -> int:
        raise OSError(errno.ENOSPC, "No space left on device", str(self))
    write(tmp_path / "x.parquet", rows(0, 4))
    store = open_rows([str(tmp_path / "x.parquet")], cache=cache)
    for wanted, act in (("write_text", lambda: open_rows([str(tmp_path / "x.parquet")], cache=cache + "2")),
                        ("write_text", lambda: index_rows(store, lambda row: Checked(1), {}, cache=cache)),
                        ("open", lambda: index_rows(store, lambda row: Checked(1), {}, cache=cache))):
        with monkeypatch.context() as patched, pytest.raises(DataError, match=r"No space left.*data\.cache"):
            patched.setattr(Path, wanted, full)
            act()


def test_what_a_killed_copy_left_is_removed_and_what_is_being_written_is_not(tmp_path: Path, cache: str) -> None:
    left, going = (Path(cache) / name / "rows.arrow.node.7.tmp" for name in ("a" * 32, "b" * 32))
    for file in (left, going):
        file.parent.mkdir(parents=True)
        file.write_bytes(b"half")
    os.utime(left, (0, 0))
    write(tmp_path / "x.parquet", rows(0, 4))
    open_rows([str(tmp_path / "x.parquet")], cache=cache)
    assert (left.exists(), going.exists()) == (False, True)


@pytest.mark.parametrize("column", [
    pa.RunEndEncodedArray.from_arrays(pa.array([3, 4], pa.int32()), pa.array(["a", "b"])),
    pa.ExtensionArray.from_storage(pa.json_(), pa.array(["a", "a", "a", "b"])),
    pa.array(["a", "a", "a", "b"]).dictionary_encode(),
], ids=["run ends", "extension", "dictionary"])
def test_columns_of_encoded_types_are_read_as_what_they_hold(tmp_path: Path, cache: str, column: pa.Array) -> None:
    table = pa.table({"x": column})
    with pa.ipc.new_file(str(tmp_path / "x.arrow"), table.schema) as writer:
        writer.write_table(table)
    assert [row["x"] for row in open_rows([str(tmp_path / "x.arrow")], cache=cache)] == ["a", "a", "a", "b"]


def test_columns_that_cannot_be_mapped_are_named_with_their_file(tmp_path: Path, cache: str) -> None:
    tables = {"two columns named a": pa.table([pa.array([1]), pa.array([2])], names=["a", "a"]),
              "column a has a type that can't be read": pa.table({"a": pa.array([(1, 2, 3)], pa.month_day_nano_interval())})}
    for problem, table in tables.items():
        with pa.ipc.new_file(str(tmp_path / "x.arrow"), table.schema) as writer:
            writer.write_table(table)
        with pytest.raises(DataError, match=f"x.arrow: .*{problem}"):
            open_rows([str(tmp_path / "x.arrow")], cache=cache)


def test_a_folder_of_saved_splits_asks_for_one_of_them(tmp_path: Path, cache: str) -> None:
    split = datasets.Dataset.from_dict({"a": [1]})
    datasets.DatasetDict({"train": split, "test": split}).save_to_disk(str(tmp_path / "both"))
    with pytest.raises(DataError, match=r"several splits \(test, train\); name one, as in .*both/test"):
        open_rows([str(tmp_path / "both")], cache=cache)
    assert len(open_rows([str(tmp_path / "both" / "train")], cache=cache)) == 1


def test_a_source_that_cannot_be_read_is_one_line_that_names_it(tmp_path: Path, cache: str) -> None:
    (tmp_path / "x.parquet").write_bytes(b"no parquet")
    (tmp_path / "x.arrow").write_bytes(b"no arrow")
    (tmp_path / "x.json").write_text("[1, ")
    (tmp_path / "x.bin").write_bytes(b"??")
    (tmp_path / "e.jsonl").write_text("")
    (tmp_path / "empty").mkdir()
    pq.write_table(pa.table({"a": pa.array([], pa.int64())}), tmp_path / "e.parquet")
    for name, problem in (("x.parquet", "not a readable Parquet"), ("x.arrow", "not a readable Arrow"), ("x.bin", "known are"),
                          ("x.json", "not a readable JSON"), ("e.jsonl", "no rows"), ("e.parquet", "no rows"),
                          ("empty", "no data files in this folder"), ("gone.parquet", "no such data file"),
                          ("*.csv", "no data file matches")):
        with pytest.raises(DataError, match=problem) as caught:
            open_rows([str(tmp_path / name)], cache=cache)
        assert name in str(caught.value) and "\n" not in str(caught.value)
    with pytest.raises(DataError, match="no data files are given"):
        open_rows([], cache=cache)
    with pytest.raises(DataError, match="owner/none:test: no such data file, and no dataset that can be loaded") as caught:
        open_rows(["owner/none:test"], cache=cache)
    assert "\n" not in str(caught.value)


def test_pictures_are_found_in_all_the_ways_a_row_holds_them(tmp_path: Path) -> None:
    (tmp_path / "p").mkdir()
    (tmp_path / "p" / "a.png").write_bytes(PICTURE)
    text, folders = base64.b64encode(PICTURE).decode(), [tmp_path / "none", tmp_path / "p"]
    for cell in (PICTURE, {"bytes": PICTURE, "path": "gone.png"}, {"bytes": None, "path": "a.png"}, "a.png",
                 str(tmp_path / "p" / "a.png"), text, f"data:image/png;base64,{text}", {"bytes": text}, "file://" + str(
                     tmp_path / "p" / "a.png")):
        assert encoded_images([cell, cell], folders) == (PICTURE, PICTURE)
        assert encoded_images(cell, folders) == (PICTURE,)
    assert encoded_images('["a.png"]', folders) == (PICTURE,) and encoded_images(None) == encoded_images([]) == ()
    for cell, problem in (({"bytes": None}, "image 0 has no bytes"), ("b.png", "no such file: b.png"), ("", "no bytes"),
                          (7, "no bytes"),
                          ("https://x/y.png", "is an address"), ("x" * 5000 + "?", "no base64"), ("a\0b", "no such file")):
        with pytest.raises(DataError, match=problem):
            encoded_images([cell], folders)


def test_a_store_crosses_processes_as_the_names_of_its_files(tmp_path: Path, cache: str) -> None:
    import pickle
    write(tmp_path / "x.parquet", rows(0, 400))
    store = open_rows([str(tmp_path / "x.parquet")], cache=cache)
    sent = pickle.dumps(store)
    again: RowStore = pickle.loads(sent)
    assert len(sent) < 20_000 and again[399] == store[399]


@pytest.mark.parametrize("kind", [pa.binary(), pa.large_binary()])
def test_the_places_of_a_rows_large_values_are_known_exactly(kind: pa.DataType) -> None:
    """Of a slice of nested rows the addresses are those of its own large values, and small ones are left alone."""
    pictures = [bytes([65 + k]) * (WORTHWHILE + k) for k in range(4)]
    table = pa.table({"images": pa.array([[{"bytes": pictures[0]}], [], [{"bytes": pictures[1]}, {"bytes": pictures[2]}],
                                          [{"bytes": pictures[3]}]], pa.list_(pa.struct([("bytes", kind)]))),
                      "text": ["a", "b", "c", "d"]})
    (chunk,) = table.slice(2, 1)["images"].chunks
    ((first, last),) = large_values(chunk)
    assert ctypes.string_at(first, last - first) == pictures[1] + pictures[2]
    assert not list(large_values(table["text"].chunk(0))) and not list(large_values(table.slice(1, 1)["images"].chunk(0)))


@pytest.mark.parametrize("text", [pa.string(), pa.large_string()])
@pytest.mark.parametrize("suffix", ["parquet", "arrow"])
def test_large_values_are_read_from_the_file_beside_small_and_missing_ones(
        tmp_path: Path, cache: str, text: pa.DataType, suffix: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """In slices of several batches, nested, null and empty; and the same out of the map where the file is another by then."""
    rows, large = [], 3 * WORTHWHILE
    for number in range(40):
        sizes = (large + number, 7, 0)[:number % 4]
        images = [{"bytes": bytes([number]) * size if size else None, "path": None} for size in sizes]
        rows.append({"images": images if number % 5 else None, "story": "é" * (large if number % 3 == 0 else number),
                     "one": {"inside": [b"x" * large] if number % 7 == 0 else []} if number % 2 else None})
    table = pa.Table.from_pylist(rows, pa.schema([
        ("images", pa.list_(pa.struct([("bytes", pa.binary()), ("path", pa.string())]))), ("story", text),
        ("one", pa.struct([("inside", pa.large_list(pa.large_binary()))]))]))
    file = tmp_path / f"rows.{suffix}"
    if suffix == "parquet":
        pq.write_table(table, file, row_group_size=9)
    else:
        with pa.OSFile(str(file), "wb") as sink, pa.ipc.new_file(sink, table.schema) as writer:
            writer.write_table(table, max_chunksize=9)
    reads: list[int] = []
    inner = os.pread
    monkeypatch.setattr(os, "pread", lambda handle, size, place: (reads.append(size), inner(handle, size, place))[1])
    store = open_rows([str(file)], cache=cache)
    assert list(store) == table.to_pylist() and store.row(33, ["story"]) == {"story": rows[33]["story"]}
    assert (sys.platform != "linux" or len(reads) > 20) and min(reads, default=WORTHWHILE) >= WORTHWHILE
    assert store.touch(range(40)) > 0
    (copy,) = Path(cache).glob("*/rows.arrow")
    size = copy.stat().st_size
    copy.unlink()
    copy.write_bytes(bytes(size))
    reads.clear()
    assert list(RowStore(store._parts)) == table.to_pylist() and not reads


def test_rows_of_a_dataset_are_read_by_name_from_an_offline_cache(tmp_path: Path) -> None:
    """`owner/name:split` out of `datasets` own cache (HF_DATASETS_CACHE), without network; another name is one line."""
    code = """
import json, sys
import datasets
from hdpo.data.store import open_rows
from hdpo.errors import DataError
rows = open_rows(["someone/signs:test"])
print(json.dumps([len(rows), rows.name(1), rows.row(1)["question"], len(rows.row(1)["images"][0]["bytes"])]))
try:
    open_rows(["someone/others:test"])
except DataError as exc:
    print(str(exc))
"""
    cache = tmp_path / "cache"
    made = datasets.Dataset.from_list(rows(0, 3))
    # what load_dataset("someone/signs") leaves behind: owner___name/config/version/hash
    folder = cache / "someone___signs" / "default" / "0.0.0" / ("0" * 40)
    folder.mkdir(parents=True)
    made.info.splits = datasets.SplitDict({"test": datasets.SplitInfo("test", num_examples=3, dataset_name="signs")})
    made.info.dataset_name, made.info.config_name, made.info.version = "signs", "default", datasets.Version("0.0.0")
    made.info.builder_name = "parquet"
    made.info.write_to_directory(str(folder))
    with datasets.arrow_writer.ArrowWriter(path=str(folder / "signs-test.arrow"), features=made.features) as writer:
        for one in made:
            writer.write(one)
        writer.finalize()
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300, env={
        **os.environ, "HF_DATASETS_CACHE": str(cache), "HF_DATASETS_OFFLINE": "1", "HF_HUB_OFFLINE": "1"})
    assert done.returncode == 0, done.stderr
    found, missing = done.stdout.strip().splitlines()
    assert json.loads(found) == [3, "signs:test row 1", "q1", len(PICTURE)]
    assert missing.startswith("someone/others:test: no such data file, and no dataset that can be loaded")
