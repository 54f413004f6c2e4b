"""Random edits of the shipped configurations, through --print-config and --dry-run: one line or success, never a traceback.

HDPO_FUZZ says how many edits (60; `make fuzz` tries 2,000).
"""
from __future__ import annotations

import os
import random
import signal
from collections.abc import Callable
from pathlib import Path
from types import FrameType

import pytest
import yaml
from launching import BASE

from hdpo.cli import main
from hdpo.config.shipped import launch_folder
from hdpo.config.yaml import kinds
from hdpo.toyworld.world import World

EDITS = int(os.environ.get("HDPO_FUZZ", 60))
CHUNKS = 20
HANG_S = 20
FILES = sorted((launch_folder() / "configs").glob("*.yaml"))
VALUES = [
    -1, 0, 1, 2, 3, 7, 0.5, -0.5, 1e-9, 1e9, 2**31, 2**63, 10**40, float("inf"), float("nan"), True, False, None,
    "", " ", "x", "1e5", "-3", "yes", "null", "auto", "text", "judge", "python", "none", "ünïcode", "a\0b", "a\nb", "x" * 5000,
    "/", ".", "../..", "/nowhere/at/all", "http://127.0.0.1:9", "http://", "http://[", "file:///etc/passwd", "owner/name",
    "owner/name:train", [], [1], ["a", "b"], [None], [[]], [0.9, 0.95], [1, 1, 1], {}, {"a": 1}, {"*": "text"}, {"*": "txt"},
    {1: 2}, {"a": {"b": []}}]
PREFIXES = ["  ", "\t", "- ", "&a ", "*a ", "!!python/name:os.system ", "? ", "%YAML ", "--- "]
INSERTS = ["{", "}", "[", "]", ":", ": ", "\n", "#", "'", '"', "\0", "\ufeff", "é", ",", "<<: *x\n"]
SMALL = [1, 2, 3, 4, 8, 64]


def edit_a_value(tree: dict, dice: random.Random) -> None:
    *sections, leaf = dice.choice(list(kinds())).split(".")
    for section in sections[:-1]:
        tree = _section(tree, section)
    section = sections[-1]
    _section(tree, section)[leaf] = dice.choice(VALUES if dice.random() < 0.7 else SMALL)


def change_a_number(tree: dict, dice: random.Random) -> None:
    """Sign, size or kind of a number that the file holds."""
    numbers = [(section, leaf) for section, fields in tree.items() if isinstance(fields, dict)
               for leaf, value in fields.items() if isinstance(value, (int, float))]
    if numbers:
        section, leaf = dice.choice(numbers)
        value = tree[section][leaf]
        tree[section][leaf] = dice.choice(
            [-value, value * 1000, value / 1000, value + 1, str(value), [value], bool(value), f"{value}x"])


def rename(tree: dict, dice: random.Random) -> None:
    """A key misspelt, in another section, or called as elsewhere."""
    section = dice.choice([name for name in tree if isinstance(tree[name], dict)] or [""])
    fields = tree.get(section) or {}
    if fields:
        leaf = dice.choice(list(fields))
        at = dice.randrange(len(str(leaf)))
        misspelt = [leaf[:at] + leaf[at + 1:], leaf[:at] + "x" + leaf[at:], leaf.upper(), f"{section}.{leaf}"]
        target = _section(tree, dice.choice([section, dice.choice(list(tree))]))
        target[dice.choice([*misspelt, "n", "lr", "beta", 3])] = fields.pop(leaf)


def drop(tree: dict, dice: random.Random) -> None:
    section = dice.choice(list(tree))
    if dice.random() < 0.3 or not isinstance(tree[section], dict) or not tree[section]:
        tree[section] = dice.choice([None, [], "x", 3, {}])
    else:
        del tree[section][dice.choice(list(tree[section]))]


TREE_EDITS: list[Callable[[dict, random.Random], None]] = [
    edit_a_value, edit_a_value, edit_a_value, change_a_number, rename, drop]


def _section(tree: dict, name: str) -> dict:
    if not isinstance(tree.get(name), dict):
        tree[name] = {}
    return tree[name]


def edit_the_text(text: str, dice: random.Random) -> str:
    """Lines doubled, lost or swapped; characters lost or put in; the rest cut off."""
    lines = text.splitlines(keepends=True)
    at = dice.randrange(len(lines))
    kind = dice.randrange(6)
    if kind == 0:
        lines.insert(dice.randrange(len(lines) + 1), lines[at])
    elif kind == 1:
        del lines[at]
    elif kind == 2:
        lines[at] = dice.choice(PREFIXES) + lines[at]
    elif kind == 3:
        return text[:dice.randrange(len(text))]
    else:
        place = dice.randrange(len(text))
        return text[:place] + dice.choice(INSERTS) + text[place + dice.randrange(3):]
    return "".join(lines)


def edited(number: int) -> str:
    """The text of one edited configuration, the same on every machine."""
    dice = random.Random(number)
    text = dice.choice(FILES).read_text()
    if dice.random() < 0.3:
        return edit_the_text(text, dice)
    tree = yaml.safe_load(text)
    for _ in range(dice.choice([1, 1, 1, 2, 3])):
        dice.choice(TREE_EDITS)(tree, dice)
    text = yaml.safe_dump(tree, allow_unicode=True, sort_keys=False)
    return edit_the_text(text, dice) if dice.random() < 0.1 else text


def _too_long(number: int, frame: FrameType | None) -> None:
    raise AssertionError(f"no end within {HANG_S} s")


def try_it(number: int, arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    signal.alarm(HANG_S)
    try:
        status = main([*arguments, "--config", "run.yaml"])
    except BaseException as exc:   # noqa: B036
        raise AssertionError(f"edit {number}, {arguments}:\n{edited(number)}") from exc
    finally:
        signal.alarm(0)
    said = capsys.readouterr()
    problems = [line for line in (said.out + said.err).splitlines() if line.startswith(("hdpo: error: ", "MISSING "))]
    assert status in (0, 2) and bool(problems) == bool(status), (number, status, said)
    if "--print-config" in arguments and status:
        assert len(said.err.splitlines()) == 1, (number, said)


@pytest.mark.parametrize("chunk", range(CHUNKS))
def test_no_edit_of_a_configuration_is_a_traceback_or_a_hang(
        chunk: int, toy_world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
        capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    for variable, value in (("MODEL_PATH", BASE), ("TRAIN_DATA", toy_world.train), ("VAL_DATA", toy_world.val)):
        monkeypatch.setenv(variable, str(value))
    for variable in ("JUDGE_BASE_URL", "JUDGE_MODEL", "SEARCH_PROVIDER", "REMOTE_TOOL_SERVER_URL", "RANK", "WORLD_SIZE"):
        monkeypatch.delenv(variable, raising=False)
    previous = signal.signal(signal.SIGALRM, _too_long)
    try:
        for number in range(chunk, EDITS, CHUNKS):
            (tmp_path / "run.yaml").write_text(edited(number))
            for command, option in (("rl", "--print-config"), (["rl", "sft", "eval"][number % 3], "--dry-run")):
                monkeypatch.setattr("hdpo.errors._said", set())
                try_it(number, [command, option], capsys)
    finally:
        signal.signal(signal.SIGALRM, previous)
