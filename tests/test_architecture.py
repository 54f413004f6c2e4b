"""The rules of the house: which room may import which, where vendors live, how long things may be."""
from __future__ import annotations

import ast
import inspect
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

import hdpo

SRC = Path(__file__).resolve().parents[1] / "src" / "hdpo"
FILES = sorted(SRC.rglob("*.py"))

MAP = [line.split("   " if line.count("   ") else "  ")[0].split() for line in re.sub(r"\n    +", " ", (
    hdpo.__doc__ or "").partition("The map.")[2].split("\n\n")[1].strip()).splitlines()]
"""The rooms as hdpo's docstring lists them, lowest first: [[a module or room, ...], ...]."""
ROOMS = ["maths", "words", *(names[0] for names in MAP[2:])]
MATHS, WORDS = set(MAP[0]), set(MAP[1])
VENDORS = {"vllm", "deepspeed", "accelerate", "openai", "wandb", "tensorboard", "peft", "mcp"}


def module_name(file: Path) -> str:
    return ".".join(file.relative_to(SRC).with_suffix("").parts).removesuffix(".__init__")


def room(module: str) -> str:
    first = module.split(".")[0]
    return "maths" if first in MATHS else "words" if first in WORDS else "cli" if first in ("__init__", "__main__") else first


def imports(file: Path) -> list[tuple[str, bool]]:
    """(imported module, whether only for type checking) of every import statement in a file."""
    found: list[tuple[str, bool]] = []

    def visit(node: ast.AST, typing_only: bool) -> None:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.Import):
                found.extend((alias.name, typing_only) for alias in child.names)
            elif isinstance(child, ast.ImportFrom) and child.module:
                found.append((child.module, typing_only))
                found.extend((f"{child.module}.{alias.name}", typing_only) for alias in child.names
                             if child.module == "hdpo" or child.module.startswith("hdpo."))
            visit(child, typing_only or isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test))
    visit(ast.parse(file.read_text()), False)
    return found


def own_imports(file: Path, typing_too: bool = True) -> set[str]:
    """Modules of hdpo that a file imports, without the package's prefix."""
    modules = {module_name(f) for f in FILES}
    names = {name.removeprefix("hdpo.") for name, typing_only in imports(file)
             if name.startswith("hdpo.") and (typing_too or not typing_only)}
    return {name for name in names if name in modules}


@pytest.mark.parametrize("file", FILES, ids=module_name)
def test_arrows_point_one_way(file: Path) -> None:
    here = room(module_name(file))
    if file.name == "__init__.py" and file.parent == SRC:
        return                       # hands on the public names
    for imported in own_imports(file):
        there = room(imported)
        assert ROOMS.index(there) <= ROOMS.index(here), f"{here} imports {imported}"
        if here == "adapters" and there not in ADAPTERS_USE:
            assert imported in ADAPTER_EXTRAS, imported
        if here == "toolserver":     # it runs without torch, and what it needs of the agent is the calls' grammar
            assert there in ("words", "toolserver") or imported == "agent.parse", imported


def test_the_map_lists_every_room_and_nothing_else() -> None:
    here = {path.stem for path in SRC.iterdir() if path.suffix == ".py" or (path / "__init__.py").exists()}
    assert sorted(name for names in MAP for name in names) == sorted(here - {"__init__", "__main__"})


@pytest.mark.parametrize("room", [room for room in ROOMS[2:] if room != "cli"])
def test_each_room_says_what_it_holds_and_where_to_start(room: str) -> None:
    text = ast.get_docstring(ast.parse((SRC / room / "__init__.py").read_text())) or ""
    assert "Start with" in text
    named = re.findall(r"`([a-z_]+\.py)`", text)
    assert named and all((SRC / room / name).exists() or (SRC / name).exists() for name in named)


ADAPTERS_USE = {"maths", "words", "ranks", "packing", "state", "adapters"}
ADAPTER_EXTRAS = {
    "agent.chat",              # one adapter opens the chat format of a model folder
    "agent.spelled",           # where a generation ends
    "agent.images",            # a picture as a data: address
    "agent.families",          # what differs between model families: parameter names, positions
    "reward.verdict_cache",    # what a judge's verdict depends on, as a fingerprint
    "reward.judge_prompt",     # the words a judge is asked with
    "reward.judge_reply",      # how what comes back is read
    "reward.outage",           # when a judge counts as down
}
"""Rooms and, each with its reason, the few other modules that an adapter may know."""


@pytest.mark.parametrize("file", FILES, ids=module_name)
def test_a_vendor_is_imported_in_adapters_only(file: Path) -> None:
    names = {name.split(".")[0] for name, _ in imports(file)}
    where = module_name(file)
    assert room(where) == "adapters" or not names & VENDORS
    assert where.startswith("toolserver.backends") or "docker" not in names
    assert "aiohttp" not in names or room(where) == "toolserver" or where == "assistant.service"    # both are HTTP servers
    assert "datasets" not in names or room(where) == "data"
    assert not names & {"verl", "ray"}


@pytest.mark.parametrize("name", sorted(MATHS))
def test_the_maths_imports_torch_alone(name: str) -> None:
    allowed = {"torch", "hdpo", "__future__", "collections", "dataclasses", "typing", "math"}
    assert {n.split(".")[0] for n, _ in imports(SRC / f"{name}.py")} <= allowed


def test_no_two_test_files_share_a_name() -> None:
    """pytest imports them by their bare names: with two of one name none of either is collected."""
    names = Counter(file.name for file in Path(__file__).parent.rglob("test_*.py"))
    assert [name for name, count in names.items() if count > 1] == []


def test_there_are_no_import_cycles() -> None:
    graph = {module_name(f): own_imports(f, typing_too=False) for f in FILES}
    done: set[str] = set()

    def visit(module: str, path: list[str]) -> None:
        assert module not in path, " -> ".join([*path, module])
        if module not in done:
            for imported in graph.get(module, ()):
                visit(imported, [*path, module])
            done.add(module)

    for module in graph:
        visit(module, [])


@pytest.mark.parametrize(("statement", "absent"), [
    ("import hdpo.losses, hdpo.advantages; from hdpo import hdpo_loss",
     ["transformers", "deepspeed", "vllm", "accelerate", "pydantic"]),
    ("import hdpo.toolserver.app, hdpo.toolserver.backends.process_sandbox", ["torch", "transformers", "vllm"]),
    ("import hdpo.config, hdpo.cli", ["torch", "transformers", "vllm", "datasets", "pyarrow"]),
])
def test_a_fresh_import_stays_light(statement: str, absent: list[str]) -> None:
    program = f"import sys; {statement}; print([m for m in {absent!r} if m in sys.modules])"
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


@pytest.mark.parametrize("file", FILES, ids=module_name)
def test_files_and_functions_stay_readable(file: Path) -> None:
    text = file.read_text()
    assert len(text.splitlines()) <= 330
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            assert (node.end_lineno or 0) - node.lineno < 70, node.name


def test_the_body_of_the_rl_loop_is_one_page() -> None:
    from hdpo.train import rl

    loop = next(node for node in ast.walk(ast.parse(inspect.getsource(rl.train))) if isinstance(node, ast.For))
    assert (loop.end_lineno or 0) - loop.lineno < 45


@pytest.mark.parametrize("file", FILES, ids=module_name)
def test_broad_excepts_are_marked_as_boundaries(file: Path) -> None:
    lines = file.read_text().splitlines()
    for node in ast.walk(ast.parse("\n".join(lines))):
        broad = ("Exception", "BaseException")
        if isinstance(node, ast.ExceptHandler) and (node.type is None or ast.unparse(node.type) in broad):
            reraises = any(isinstance(n, ast.Raise) for n in ast.walk(node))
            assert reraises or "BLE001" in lines[node.lineno - 1], f"line {node.lineno}"
