"""Curation: planted faults are found and nothing else, and the result has the same bytes however often it was killed."""
from __future__ import annotations

import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from judge_server import Judges, say

from hdpo.agent.chat import ChatFormat
from hdpo.agent.demonstration import encode_demonstration
from hdpo.agent.images import decode_image
from hdpo.cli import main
from hdpo.config import Config
from hdpo.toyworld.recordings import EXPECTED, SOURCES, Recording, write_recordings

ROWS = 21       # every planted fault once a source


@pytest.fixture(scope="module")
def recordings(tmp_path_factory: pytest.TempPathFactory) -> list[Recording]:
    folder = tmp_path_factory.mktemp("recordings")
    return [write_recordings(folder / source, 1, ROWS, [source])[0] for source in SOURCES]


def arguments(recordings: list[Recording], out: Path, stages: str = "1", **settings: Any) -> list[str]:
    given = [f"{r.source}={r.file}" for r in recordings]
    sets: dict[str, Any] = {"tools.sandbox": "process", "curation.chunk_rows": 5, "data.cache": out.parent / "cache", **settings}
    return ["curate", "--stages", stages, "--out", str(out), *[x for s in given for x in ("--source", s)],
            *[x for key, value in sets.items() for x in ("--set", f"{key.replace('__', '.')}={value}")]]


@pytest.fixture(scope="module")
def curated(recordings: list[Recording], tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("curated") / "out"
    assert main(arguments(recordings, out)) == 0
    return out


def rows_of(out: Path, name: str) -> dict[str, dict[int, dict[str, Any]]]:
    found: dict[str, dict[int, dict[str, Any]]] = {}
    for row in pq.read_table(out / f"{name}.parquet").to_pylist():
        found.setdefault(row["source"], {})[row["source_row"]] = row
    return found


@pytest.mark.parametrize("source", SOURCES)
def test_reading_and_execution_find_every_planted_fault_and_nothing_else(
        source: str, recordings: list[Recording], curated: Path) -> None:
    recording = next(r for r in recordings if r.source == source)
    kept, dropped = (rows_of(curated, name).get(source, {}) for name in ("kept", "dropped"))
    for row, fault in enumerate(recording.faults):
        if fault in EXPECTED:
            assert dropped[row]["reason"] in EXPECTED[fault], (fault, dropped[row])
        else:
            assert row in kept, (fault, dropped.get(row))
    counts = json.loads((curated / "manifest.json").read_text())[source]["1"]
    assert counts["in"] == ROWS == counts["kept"] + sum(counts["dropped"].values()) + sum(counts["unreadable"].values())


def test_what_is_kept_trains_on_exactly_the_assistants_own_text(curated: Path, chat: ChatFormat) -> None:
    for rows in rows_of(curated, "kept").values():
        for row in rows.values():
            images = [decode_image(image["bytes"], "row") for image in row["images"]]
            ids, mask, _ = encode_demonstration(chat, row["messages"], images)
            turns: list[str] = []
            current: list[int] = []
            for token, trained in [*zip(ids, mask), (0, 0)]:
                if trained:
                    current.append(token)
                elif current:
                    turns.append(chat.decode(current))
                    current = []
            said = [m["content"] for m in row["messages"] if m["role"] == "assistant"]
            assert [turn.removesuffix("<|im_end|>") for turn in turns] == said
            assert all(text.endswith(("</tool_call>", "</answer>")) for text in said)


def test_two_ranks_a_kill_and_one_rank_leave_the_same_bytes(recordings: list[Recording], curated: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    command = [sys.executable, "-m", "hdpo", *arguments(recordings, out)]
    killed = subprocess.Popen(command, env={**os.environ, "RANK": "1", "WORLD_SIZE": "2"}, stderr=subprocess.DEVNULL,
                              start_new_session=True)
    deadline = time.monotonic() + 60
    while not list(out.glob("work/stage_1/*/*.parquet")) and time.monotonic() < deadline and killed.poll() is None:
        time.sleep(0.02)
    os.killpg(killed.pid, signal.SIGKILL)
    killed.wait()
    assert list(out.glob("work/stage_1/*/*.parquet")) and not (out / "kept.parquet").exists()
    assert main(arguments(recordings, out)) == 0        # one rank goes on from there
    for name in ("kept.parquet", "dropped.parquet"):
        digests = [hashlib.sha256((folder / name).read_bytes()).hexdigest() for folder in (curated, out)]
        assert digests[0] == digests[1], name


def test_kills_at_random_moments_and_resumes_on_other_numbers_of_ranks_leave_the_same_bytes(
        recordings: list[Recording], curated: Path, tmp_path: Path) -> None:
    """Three ranks, then two, killed whole wherever they are; then one that finishes. Moments are counted in finished chunks."""
    out, coin = tmp_path / "out", random.Random(7)

    def chunks() -> list[Path]:
        return list(out.glob("work/stage_1/*/*.parquet"))
    for ranks in (3, 2):
        enough = len(chunks()) + coin.randint(1, 4)
        running = [subprocess.Popen([sys.executable, "-m", "hdpo", *arguments(recordings, out)], stderr=subprocess.DEVNULL,
                                    stdout=subprocess.DEVNULL, start_new_session=True,
                                    env={**os.environ, "RANK": str(rank), "WORLD_SIZE": str(ranks)}) for rank in range(ranks)]
        deadline = time.monotonic() + 120
        while len(chunks()) < enough and time.monotonic() < deadline and any(one.poll() is None for one in running):
            time.sleep(0.01)
        time.sleep(0.2 * coin.random())
        for one in running:
            if one.poll() is None:
                os.killpg(one.pid, signal.SIGKILL)
            one.wait()
        assert len(chunks()) >= enough
    assert main(arguments(recordings, out)) == 0
    for name in ("kept.parquet", "dropped.parquet", "manifest.json"):
        digests = [hashlib.sha256((folder / name).read_bytes()).hexdigest() for folder in (curated, out)]
        assert digests[0] == digests[1], name


def test_a_folder_of_another_job_unknown_sources_and_missing_files_are_one_line(
        recordings: list[Recording], curated: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for bad, said in (
            (arguments(recordings[:1], curated), "holds a job with other sources"),
            (arguments(recordings, curated, curation__execution__mismatch="rewrite"), "holds a job with other settings"),
            (["curate", "--source", "thym=x", "--out", str(tmp_path / "a")], "NAME one of deepeyes"),
            (["curate", "--source", "thyme=/no.parquet", "--out", str(tmp_path / "a")], "/no.parquet: no such data file"),
            (["curate", "--source", f"thyme={recordings[1].file}"], "give --out DIR"),
            (["curate", "--out", str(tmp_path / "a")], "nothing to curate"),
            (["curate", "--stages", "5"], "stages are 1, 2, 3, 4"),
            (arguments(recordings[:1], tmp_path / "b", "1,3"), "stage 3 needs a judge"),
            (arguments(recordings[:1], tmp_path / "c", "2"), "stage 2 needs the base model")):
        assert main(bad) == 2
        error = capsys.readouterr().err.strip().splitlines()[-1]
        assert said in error, error


def test_the_page_shows_the_funnel_and_dropped_rows_with_their_pictures_and_nothing_else_can_run_in_it(curated: Path) -> None:
    page = (curated / "report.html").read_text()
    kept = sum(map(len, rows_of(curated, "kept").values()))
    assert f"{kept} of {ROWS * len(SOURCES)} rows kept" in page and "execution failed" in page and "data:image/png" in page
    assert page.count("<script") == 2, "its own and its data"
    assert "script-src 'sha256-" in page and "connect-src 'none'" in page
    assert "http" not in page.replace("http-equiv", "").replace("http://www.w3.org/2000/svg", "") and "undefined_name" in page
    assert "&lt;tool_call&gt;" in page and "<tool_call>" not in page


def test_a_mismatch_is_rewritten_by_setting_and_counted(recordings: list[Recording], tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert main(arguments(recordings[:1], out, curation__execution__mismatch="rewrite")) == 0
    row = rows_of(out, "kept")["deepeyes"][recordings[0].faults.index("wrong_output")]
    assert json.loads(row["extra_info"])["rewritten_observations"] == 1
    assert "4711" not in row["messages"][-2]["content"]


def test_the_judge_drops_low_scores_and_an_unreadable_reply_lets_the_row_wait_until_it_can_be_read(
        judges: Judges, recordings: list[Recording], tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
        capsys: pytest.CaptureFixture[str]) -> None:
    sulking = {"on": True}

    def grade(body: dict[str, Any], before: int) -> Any:
        text = json.dumps(body["messages"][1]["content"])
        if sulking["on"] and "ABSURD" not in text:
            return say("I would rather not.")
        low = "ABSURD" in text
        scores = {"visual_relevance": 1 if low else 5, "reasoning_coherence": 2 if low else 4, "tool_rationale": 4}
        return say(json.dumps(scores))

    monkeypatch.setenv("JUDGE_API_KEY", "k")
    server = judges.serve(grade, models=["grader"])
    out, recording = tmp_path / "out", recordings[4]
    command = arguments([recording], out, "1,3", judge__base_url=server.url, judge__model="grader",
                        curation__judgement__send_images="false")
    assert main(command) == 1
    waiting = json.loads((out / "manifest.json").read_text())["coldstart"]["3"]["waiting"]
    assert waiting and "rows wait" in capsys.readouterr().err
    sulking["on"] = False
    assert main(command) == 0
    dropped, kept = rows_of(out, "dropped")["coldstart"], rows_of(out, "kept")["coldstart"]
    absurd = {row for row, fault in enumerate(recording.faults) if fault == "absurd"}
    assert {row for row, found in dropped.items() if found["reason"] == "visual_relevance_low"} == absurd
    assert all(json.loads(row["extra_info"])["scores"]["visual_relevance"] == 5 for row in kept.values())


def test_curation_as_part_of_another_command_names_no_command_that_comes_next(monkeypatch: pytest.MonkeyPatch) -> None:
    from hdpo.compose.commands import PART_OF
    from hdpo.compose.curate import _what_next
    manifest = {"about": {"stages": ["1"]}, "mine": {"1": {"kept": 3}}}
    assert [line.split()[:3] for line in _what_next(manifest, Config())] == [["next", "make", "sft"]]
    monkeypatch.setenv(PART_OF, "make demo")
    assert _what_next(manifest, Config()) == []
