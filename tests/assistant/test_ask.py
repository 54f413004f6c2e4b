"""`hdpo ask` and `hdpo chat`: what is shown on the terminal, whoever wrote it."""
from __future__ import annotations

import argparse
import io
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st
from launching import BASE
from PIL import Image
from tool_server import png

from hdpo.assistant.speech import Piece, Reply, Seen, Splitter, TurnEnded, outside_reasoning
from hdpo.assistant.terminal import Terminal, inline
from hdpo.config import Config
from hdpo.errors import DataError
from hdpo.types import EndReason, ToolCall

HOSTILE = "\x1b[2J\x1b]0;owned\x07\x9b31m\r\x08\u202eevil\ud800"
TOY = ["--model", str(BASE), "--config", "demo_rl", "--set", "rollout.engine=hf", "--set", "data.max_prompt_tokens=1024",
       "--set", "tools.allowed=[python]"]


def hdpo(*arguments: str, typed: str = "") -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "hdpo", *arguments], input=typed, capture_output=True, timeout=300,
                          encoding="utf-8", errors="surrogateescape", env={**os.environ, "PYTHONIOENCODING": "utf-8"})


def test_ask_shows_what_is_said_and_a_summary_line(tmp_path: Path) -> None:
    picture = tmp_path / "a.png"
    picture.write_bytes(png("white", (256, 256)))
    done = hdpo("ask", *TOY, "--image", str(picture), f"Which digit is at the top left?{chr(27)}[2J")
    assert done.returncode in (0, 1), done.stderr
    assert " | " in done.stdout and re.search(r"\d+ calls?, \d+ tokens read, \d+ written, [\d.]+ s", done.stdout)
    assert "\x1b" not in done.stdout


@pytest.mark.parametrize(("arguments", "problem"), [
    (["--model", "nowhere", "q"], "--model nowhere: no config.json there, so it is no model folder"),
    ([*TOY, "--image", "nowhere.png", "q"], "nowhere.png: No such file or directory"),
    ([*TOY, "--image", __file__, "q"], "not a readable image"),
    ([*TOY, " "], "there is no question"),
    ([*TOY, "--system", "nowhere.txt", "q"], "--system nowhere.txt: no such file"),
    ([*TOY, "--temperature", "3", "q"], "--temperature 3.0: from 0 to 2"),
])
def test_what_a_user_can_mend_is_one_line(arguments: list[str], problem: str, capsys: pytest.CaptureFixture[str]) -> None:
    from hdpo.cli import main
    assert main(["ask", *arguments]) == 2
    said = capsys.readouterr().err
    assert problem in said and said.count("\n") == 1


@given(st.lists(st.sampled_from(["<reason>", "</reason>", "<answer>", "</answer>", "<tool_call>", "</tool_call>", "<", "a", " b",
                                 "</", "reason>", "<answer"])), st.integers(1, 7))
def test_any_cut_of_a_turn_is_split_alike(parts: list[str], size: int) -> None:
    def joined(cuts: list[str]) -> list[tuple[str, str]]:
        splitter, found = Splitter(), list[tuple[str, str]]()
        for number, cut in enumerate(cuts):
            for piece in splitter.feed(cut, last=number == len(cuts) - 1):
                if found and found[-1][0] == piece.kind:
                    found[-1] = (piece.kind, found[-1][1] + piece.text)
                else:
                    found.append((piece.kind, piece.text))
        return found
    text = "".join(parts)
    cuts = [text[at:at + size] for at in range(0, len(text), size)] or [""]
    assert joined(cuts) == joined([text])


def test_a_turn_without_tags_is_what_it_says() -> None:
    assert outside_reasoning("<reason>because</reason> it is 4.") == "it is 4."
    assert outside_reasoning("four") == "four"
    assert outside_reasoning("<reason>never ends") == "<reason>never ends"


def test_nobodys_words_steer_the_terminal(tmp_path: Path) -> None:
    out = io.StringIO()
    terminal = Terminal(out, tmp_path)
    call = ToolCall("python", {"code": HOSTILE}, ok=True, observation=HOSTILE)
    for event in (Piece("reason", HOSTILE), Piece("answer", HOSTILE), Piece("text", HOSTILE),
                  TurnEnded(HOSTILE, True, "python", {"code": HOSTILE}), TurnEnded(HOSTILE, True),
                  TurnEnded(HOSTILE, True, "image_search", {"image": 1, "box": HOSTILE}), Seen(call, ())):
        terminal.hear(event)
    terminal.ended(Reply("", False, EndReason.INFRASTRUCTURE, (call,), 1, 1, 0.1, HOSTILE))
    shown = out.getvalue()
    assert shown.count("evil") >= 7
    assert not re.search("[\x00-\x09\x0b-\x1f\x7f-\x9f\u202e\ud800]", shown)


def test_pictures_are_saved_and_named(tmp_path: Path) -> None:
    out = io.StringIO()
    terminal = Terminal(out, tmp_path / "pictures")
    terminal.hear(Seen(ToolCall("python", {}, ok=True, observation="1 image", num_images=1), (Image.new("RGB", (32, 16)),)))
    path = tmp_path / "pictures" / "picture_1.png"
    assert f"{path} (32 x 16)" in out.getvalue()
    with Image.open(path) as saved:
        assert saved.size == (32, 16)


def test_terminals_that_can_show_pictures_are_sent_them() -> None:
    assert inline(b"png", {"TERM_PROGRAM": "iTerm.app"}).startswith("\x1b]1337;File=inline=1")
    assert inline(b"png", {"KITTY_WINDOW_ID": "1"}).endswith("\x1b\\")
    assert not inline(b"png", {"TERM": "xterm"})


def asked_of(model: Path, *options: str) -> Any:
    from hdpo.compose.asked import add_model_options, read_model
    parser = argparse.ArgumentParser()
    add_model_options(parser)
    return read_model(parser.parse_args(["--model", str(model), *options]), model.parent)


@pytest.mark.parametrize("absolute", [False, True])
def test_a_run_that_was_moved_is_asked_with_the_files_that_lie_with_it(
        absolute: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Another run of the same name below the folder one stands in is not its."""
    from hdpo.config.file import dump_config
    before, now = tmp_path / "before/runs/mine", tmp_path / "now/elsewhere"
    root = f"{tmp_path / 'before'}/" if absolute else ""
    text = dump_config(Config.model_validate({
        "run": {"name": "mine", "folder": f"{root}runs"}, "data": {"train": [f"{root}runs/mine/world/train.parquet"]},
        "tools": {"text_index": f"{root}runs/mine/world/facts.sqlite", "image_index": f"{root}runs/mine/world/badges"}}))
    for folder, system in ((before, "another run's"), (now, "as trained")):
        (folder / "world").mkdir(parents=True)
        (folder / "config.yaml").write_text(text)
        (folder / "world/facts.sqlite").touch()
        pq.write_table(pa.table({"prompt": [[{"role": "system", "content": system}]]}), folder / "world/train.parquet")
    shutil.copytree(BASE, now / "checkpoints/step_000001")
    if absolute:
        shutil.rmtree(before)
    else:
        monkeypatch.chdir(tmp_path / "before")
    asked = asked_of(now / "checkpoints/step_000001")
    assert asked.config.tools.text_index == str(now / "world/facts.sqlite") and asked.config.tools.image_index == ""
    assert asked.system == [{"role": "system", "content": "as trained"}]
    said = capsys.readouterr().err
    assert "tools.image_index: no such file or folder any more: " in said and "not offered: image_search" in said
    mine = asked_of(now / "checkpoints/step_000001", "--set", "tools.text_index=runs/mine/world/facts.sqlite")
    assert mine.config.tools.text_index == "runs/mine/world/facts.sqlite"


def test_where_nobody_reads_the_answer_any_more_nothing_is_said() -> None:
    process = subprocess.Popen([sys.executable, "-m", "hdpo", "ask", *TOY, "What is 1+1?"], stdout=subprocess.PIPE,
                               stderr=subprocess.PIPE, text=True)
    process.stdout.close()
    said = process.stderr.read()
    assert process.wait(timeout=60) == 141 and "Traceback" not in said, said


def test_the_log_that_an_error_names_is_there(tmp_path: Path) -> None:
    done = hdpo("ask", *TOY, "--set", "tools.mcp={gone: {command: [/bin/false]}}", "q")
    assert done.returncode == 3 and Path(done.stderr.strip().rpartition("see ")[2]).is_file(), done.stderr


def test_chat_goes_on_after_a_bad_picture_and_remembers_what_was_said() -> None:
    done = hdpo("chat", *TOY, typed="/image nowhere.png\n/image\n/imgae a.png\nWhat is 1+1, in \udcff\udcfe?\n/new\n/quit\n")
    assert done.returncode == 0, done.stderr
    assert "nowhere.png: No such file or directory" in done.stderr and "/imgae is no command" in done.stderr
    assert done.stdout.count("tokens read") == 1


def test_a_picture_that_is_none_is_a_data_error() -> None:
    from hdpo.compose.ask import read_image
    with pytest.raises(DataError, match="test_ask.py"):
        read_image(Path(__file__))
