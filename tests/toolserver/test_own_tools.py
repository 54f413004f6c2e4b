"""Tools that a user brings along: functions, endpoints and MCP servers, through the same gate as the shipped ones."""
from __future__ import annotations

import asyncio
import json
import os
import re
import sys
import threading
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web
from scripted import ScriptedTools
from tool_server import png

from hdpo import keys, oddities
from hdpo.agent.own_calls import example_arguments, tools_block
from hdpo.agent.tools import AgentTools, ToolOutcome
from hdpo.compose.own_tools import with_mcp_tools, with_own_tools
from hdpo.config import Config
from hdpo.config.file import dump_config, load_config
from hdpo.doctor.own_code import check_own
from hdpo.errors import ConfigError, ToolServerError
from hdpo.evaluation.prompts import system_prompt
from hdpo.own import BadArguments, OwnCode, ToolContext, load_function
from hdpo.protocols import ToolResult
from hdpo.toolserver.own import MAX_IMAGES, Own, OwnTools, bounded, compiled
from hdpo.types import Task

ROOT = Path(__file__).resolve().parents[2]
TASK = Task("t", "toy", [{"role": "user", "content": "<image>How many?"}], (png("red", (64, 64)),), "secret truth")
SCHEMA = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"], "additionalProperties": False}


def call(name: str, **arguments: Any) -> str:
    return f'<tool_call>{json.dumps({"name": name, "arguments": arguments})}</tool_call>'


async def outcomes(config: Config, *turns: str) -> list[ToolOutcome]:
    backend = with_own_tools(config, ScriptedTools())
    try:
        tools = AgentTools(backend, config.tools)
        return [await tools.run("one", turn, TASK) for turn in turns]
    finally:
        await backend.close()


def configured(**tools: Any) -> Config:
    return Config.model_validate({"tools": {"allowed": ["python"], **tools}})


def with_function(function: Callable[..., Any], *turns: str, timeout_s: float = 30.0) -> list[ToolOutcome]:
    """Calls of a function named population, as any other."""
    config = configured(own={"population": {"parameters": SCHEMA, "function": "x:y"}})
    code = OwnCode()

    class Function:
        async def __call__(self, arguments: dict[str, Any], context: ToolContext) -> Any:
            return await code.run(function, arguments, context, timeout_s=timeout_s)

        async def close(self) -> None:
            code.close()

    async def work() -> list[ToolOutcome]:
        own = Own(Function(), compiled(SCHEMA, "x"), "EXAMPLE", timeout_s)
        backend = OwnTools(ScriptedTools(), {"population": own})
        tools = AgentTools(backend, config.tools)
        found = [await tools.run("one", turn, TASK) for turn in turns]
        await backend.close()
        return found
    return asyncio.run(work())


def readme(kind: str, words: str) -> str:
    section = (ROOT / "README.md").read_text().partition("## Your own tools and rewards")[2]
    return next(block for block in re.findall(rf"```{kind}\n(.*?)```", section, re.DOTALL) if words in block)


def test_the_readme_s_tool_and_reward_work_as_they_stand(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from hdpo.background import BackgroundLoop
    from hdpo.reward.scoring import Scorer
    from hdpo.types import EndReason, Trajectory, Verdict
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(sys.modules, "mine", raising=False)
    Path("own.yaml").write_text(readme("yaml", "population"))
    Path("mine.py").write_text(readme("python", "population"))
    assert max(readme(kind, "population").rstrip().count("\n") + 1 for kind in ("yaml", "python")) <= 15
    config = load_config("own.yaml")
    assert len(check_own(config)) == 2 and load_config(_written(dump_config(config))) == config
    good, bad, python = asyncio.run(outcomes(config, call("population", city="Oslo"), call("population", city="Atlantis"),
                                             call("python", code="1")))
    assert good.call.ok and good.call.observation == "717000"
    assert not bad.call.ok and "there is no city Atlantis" in bad.call.observation and not bad.call.infrastructure
    assert python.call.observation == "Code execution result:\n7"      # the tool server's
    loop = BackgroundLoop()
    scorer = Scorer(config.reward, None, loop)
    turns = ("<reason>r</reason><answer>717000</answer>",)
    right, unknown = (Trajectory(Task("t", "s", TASK.messages, (), truth), 0, [1], [1], [0.0], 0, (), (good.call, python.call),
                                 EndReason.ANSWERED, turns) for truth in ("717000", ""))
    (group,) = scorer.score([(right, unknown)])
    assert [j.verdict for j in group.judgements] == [Verdict.CORRECT, Verdict.UNSCORED] and group.judgements[0].by == "own"
    assert group.rewards[0].tool == pytest.approx(1 / 2.5)      # 0.5 and 1
    scorer.close()
    loop.close()


def _written(text: str) -> Path:
    path = Path("again.yaml")
    path.write_text(text)
    return path


def test_the_model_is_shown_its_own_tools_and_told_what_is_wrong_with_a_call() -> None:
    config = configured(own={"look_up": {"description": "look_up finds\nthings", "function": "m:f", "parameters": {
        "type": "object", "properties": {"word": {"type": "string", "description": "what"}, "most": {"type": "integer"}},
        "required": ["word"]}}})
    prompt = system_prompt(config.tools)
    line = ('- look_up: look_up finds things (arguments: word: what; most (optional)): <tool_call>{"name": "look_up", '
            '"arguments": {"word": "..."}}</tool_call>')
    assert line in prompt and "- python runs code" in prompt
    assert tools_block(config.tools.none) == "" and "tool" not in system_prompt(config.tools.none)

    def never(arguments: dict[str, Any], context: ToolContext) -> str:
        raise AssertionError("not called")
    deep = '{"a":' * 900 + "1" + "}" * 900
    for turn, problem in ((call("population"), "'city' is a required property"),
                          (call("population", city=1), "city: 1 is not of"), (call("other"), "python, population"),
                          (call("population", city="x", more=1), "'more' was unexpected"),
                          ('<tool_call>{"name": "population", "arguments": {"city": NaN}}</tool_call>', "not plain JSON"),
                          ('<tool_call>{"name": "population", "arguments": [1]}</tool_call>', "must be a JSON object"),
                          (f'<tool_call>{{"name": "population", "arguments": {deep}}}</tool_call>', "")):
        (outcome,) = with_function(never, turn)
        assert not outcome.call.ok and not outcome.call.infrastructure and problem in outcome.call.observation
        assert "A correct call looks like this" in outcome.call.observation


def test_a_failing_tool_is_ours_and_a_bad_call_the_policy_s() -> None:
    async def broken(arguments: dict[str, Any], context: ToolContext) -> str:
        raise {"Oslo": RuntimeError("no\nroute"), "Rome": BadArguments("no \ud83d city"), "Bern": ToolServerError("down"),
               "Nice": SystemError("odd")}[arguments["city"]]

    async def hanging(arguments: dict[str, Any], context: ToolContext) -> str:
        await asyncio.Event().wait()
        return ""

    def blocked(arguments: dict[str, Any], context: ToolContext) -> str:
        threading.Event().wait(60)
        return ""
    cities = ("Oslo", "Rome", "Bern", "Nice")
    ours, policys, down, odd = with_function(broken, *(call("population", city=city) for city in cities))
    assert ours.call.infrastructure and ours.error == "population: RuntimeError: no route"
    assert not policys.call.infrastructure and "no \ufffd city" in policys.call.observation
    assert down.error == "population: down" and odd.call.infrastructure
    for function in (hanging, blocked, lambda arguments, context: {1}, lambda arguments, context: ToolResult(3)):
        (outcome,) = with_function(function, call("population", city="Oslo"), timeout_s=0.2)
        assert outcome.call.infrastructure and outcome.error.startswith("population: ")


@pytest.mark.parametrize("kind", [SystemExit, KeyboardInterrupt, asyncio.CancelledError])
@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning",
                            "ignore::pytest.PytestUnraisableExceptionWarning")
def test_code_of_the_user_s_that_exits_fails_its_own_call_alone(kind: type[BaseException]) -> None:
    async def leaving(arguments: dict[str, Any], context: ToolContext) -> str:
        if arguments["city"] == "Oslo":
            raise kind
        return "here"

    def leaving_plain(arguments: dict[str, Any], context: ToolContext) -> str:
        if arguments["city"] == "Oslo":
            raise kind
        return "here"
    for function in (leaving, leaving_plain):
        gone, after = with_function(function, call("population", city="Oslo"), call("population", city="Rome"), timeout_s=20)
        assert gone.call.infrastructure and kind.__name__ in gone.error
        assert after.call.ok and after.call.observation == "here"


def test_a_module_that_exits_when_it_is_imported_is_named(tmp_path: Path) -> None:
    (tmp_path / "leaves.py").write_text("import sys\nsys.exit('no arguments')\n")
    with pytest.raises(ConfigError, match="leaves.py can't be imported: SystemExit: no arguments"):
        load_function(f"{tmp_path / 'leaves.py'}:f", "reward.function")


def test_a_function_gets_the_task_without_its_truth_and_may_answer_with_pictures_or_data() -> None:
    seen = list[ToolContext]()

    def pictures(arguments: dict[str, Any], context: ToolContext) -> ToolResult:
        seen.append(context)
        return ToolResult("a crop", context.images)
    picture, data = (with_function(function, call("population", city="Oslo"))[0] for function in (
        pictures, lambda arguments, context: {"people": [1, "\u00e9"]}))
    assert picture.images == TASK.images and picture.call.num_images == 1
    assert data.call.observation == '{"people": [1, "\u00e9"]}'
    assert (seen[0].trajectory, seen[0].question) == ("one", "How many?") and "secret" not in repr(seen[0])


def test_what_an_own_tool_answers_is_bounded() -> None:
    oddities.take()
    found = bounded("x", ToolResult("a" * 200_000 + "\ud800", (b"x",) * (MAX_IMAGES + 2)))
    assert len(found.text) < 71_000 and "characters cut" in found.text
    assert found.text.endswith(f"2 of {MAX_IMAGES + 2} images are not shown: they exceed the limit]")
    assert len(found.images) == MAX_IMAGES and oddities.take()["odd/tool/own_cut"] == 2


def test_an_async_function_that_blocks_delays_no_other_rollout() -> None:
    release = threading.Event()

    async def blocking(arguments: dict[str, Any], context: ToolContext) -> str:
        release.wait(60)
        return "done"

    async def work() -> str:
        code = OwnCode()
        waiting = asyncio.create_task(code.run(blocking, {}, None, timeout_s=60.0))
        for _ in range(20):            # this loop goes on while the function holds its own
            await asyncio.sleep(0.005)
        assert not waiting.done()
        release.set()
        found = await waiting
        code.close()
        return found
    assert asyncio.run(work()) == "done"


@pytest.mark.parametrize(("name", "problem"), [
    ("nothing", "not of the form"), ("no_such_module_x:f", "can't be imported: ModuleNotFoundError"), (":f", "not of the form"),
    ("nowhere.py:f", "can't be imported"), ("json:__doc__", "no function"), ("json:nope", "no function nope"),
    ("broken.py:f", "ZeroDivision")])
def test_a_function_that_is_not_there_is_named_in_one_line(name: str, problem: str, tmp_path: Path,
                                                           monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("broken.py").write_text("1 / 0\n")
    with pytest.raises(ConfigError, match=problem) as failed:
        load_function(name, "tools.own.x.function")
    assert str(failed.value).startswith("tools.own.x.function: ") and "\n" not in str(failed.value)


@pytest.mark.parametrize(("tools", "problem"), [
    ({"own": {"python": {"function": "m:f"}}}, "none of python"), ({"own": {"a b": {"function": "m:f"}}}, "name has 1 to 64"),
    ({"own": {"x": {}}}, "one of function, url and mcp"),
    ({"own": {"x": {"function": "m:f", "url": "http://x"}}}, "one of function"),
    ({"own": {"x": {"mcp": "files"}}}, "files is not in tools.mcp"), ({"mcp": {"files": {}}}, "one of command and url"),
    ({"own": {"x": {"function": "m:f", "funtion": 1}}}, "Extra inputs"),
    ({"own": {"x": {"url": "http://x", "key": "sk-123"}}}, "name of an environment variable")])
def test_contradictory_settings_are_refused(tools: dict[str, Any], problem: str, tmp_path: Path) -> None:
    file = tmp_path / "c.yaml"
    file.write_text(json.dumps({"tools": tools}))
    with pytest.raises(ConfigError, match=problem):
        load_config(file)


def test_costs_name_tools_that_exist_and_schemas_are_schemas(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="there is no tool weather"):
        load_config(None, ["reward.tool_cost={weather: 2}"])
    assert load_config(None, ["reward.tool_cost={python: 2, '*': 0.5}"]).reward.tool_cost == {"python": 2, "*": 0.5}
    with pytest.raises(ConfigError, match="tools.own.x.parameters: no JSON Schema"):
        check_own(configured(own={"x": {"function": "json:loads", "parameters": {"properties": {"a": {"type": "strin"}}}}}))
    with pytest.raises(ConfigError, match="variable NO_SUCH_KEY is not set"):
        check_own(configured(own={"x": {"url": "http://x", "key": "NO_SUCH_KEY"}}))


def test_examples_are_made_of_the_schema() -> None:
    properties = {"a": {"enum": ["x"]}, "b": {"type": "integer", "minimum": 3}, "c": {"type": ["number", "null"]},
                  "d": {"default": 9}, "h": True, "i": {},
                  "e": {"type": "object", "properties": {"f": {"examples": ["g"]}}, "required": ["f"]}}
    assert example_arguments({"properties": properties, "required": list(properties)}) == {
        "a": "x", "b": 3, "c": 1.5, "d": 9, "e": {"f": "g"}, "h": "...", "i": "..."}


# --- HTTP ---------------------------------------------------------------------------------------------------------------

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


def against(handler: Handler, *turns: str, **tool: Any) -> list[ToolOutcome]:
    async def work() -> list[ToolOutcome]:
        app = web.Application()
        app.router.add_post("/tool", handler)
        runner = web.AppRunner(app)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        port = site._server.sockets[0].getsockname()[1]      # type: ignore[union-attr]
        try:
            return await outcomes(configured(own={"population": {
                "parameters": SCHEMA, "url": f"http://127.0.0.1:{port}/tool", "timeout_s": 30, **tool}}), *turns)
        finally:
            await runner.cleanup()
    return asyncio.run(work())


def test_an_endpoint_gets_the_call_and_its_key_and_no_truth(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("POPULATION_KEY", "swordfish")
    monkeypatch.setattr(keys, "_held", {})
    seen = list[tuple[str, Any]]()

    async def handler(request: web.Request) -> web.Response:
        seen.append((request.headers["Authorization"], await request.json()))
        return web.json_response({"text": "many", "images": seen[-1][1]["images"]})
    config = configured(own={"population": {"url": "http://x", "key": "POPULATION_KEY"}})
    keys.withdraw(config.tools.key_names)
    assert "POPULATION_KEY" not in os.environ and "POPULATION_KEY" not in keys.environment_with_keys()
    (outcome,) = against(handler, call("population", city="Oslo"), key="POPULATION_KEY", send_images=True)
    assert outcome.call.ok and outcome.call.observation == "many" and outcome.images == TASK.images
    (header, body), = seen
    assert header == "Bearer swordfish" and body["arguments"] == {"city": "Oslo"} and "secret" not in json.dumps(body)
    assert "swordfish" not in dump_config(config)


def test_an_endpoint_says_whose_fault_a_failure_is() -> None:
    answers = iter([web.json_response({"error": "no such city"}, status=422), web.Response(status=503), web.Response(status=500),
                    web.json_response({"text": "third time"}), web.Response(status=302, headers={"Location": "http://x/"}),
                    web.json_response({"words": 1}), web.Response(text="<html>"), web.Response(status=403, text="who are you")])

    async def handler(request: web.Request) -> web.StreamResponse:
        return next(answers, web.Response(status=403, text="who are you"))
    bad, retried, moved, shape, page, refused = against(handler, *[call("population", city="Oslo")] * 6)
    assert not bad.call.infrastructure and "population: no such city" in bad.call.observation
    assert retried.call.ok and retried.call.observation == "third time"
    for outcome in (moved, shape, page, refused):
        assert outcome.call.infrastructure and outcome.error.startswith("population: ") and "\n" not in outcome.error


# --- MCP ----------------------------------------------------------------------------------------------------------------

SERVER = '''
import os, sys
from mcp.server.mcpserver import Image, MCPServer
server = MCPServer("test")

@server.tool()
def add(a: int, b: int) -> str:
    """adds two numbers"""
    return f"{a + b} {os.environ.get('MCP_TEST_KEY')} {os.environ.get('OTHER_KEY')}"

@server.tool()
def picture() -> Image:
    """draws"""
    return Image(data=bytes.fromhex(sys.argv[1]), format="png")

@server.tool()
def fail() -> str:
    """never works"""
    raise ValueError("upstream is away")

@server.tool()
def die() -> str:
    """ends the server"""
    os._exit(3)

server.run()
'''


@pytest.fixture(scope="module")
def mcp_config(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Config]:
    folder = tmp_path_factory.mktemp("mcp")
    (folder / "server.py").write_text(SERVER)

    def make(**server: Any) -> Config:
        given = {"command": [sys.executable, str(folder / "server.py"), png("red", (8, 8)).hex()], **server}
        return Config.model_validate({"run": {"folder": str(folder)}, "tools": {"allowed": [], "mcp": {"test": given}}})
    return make


def test_an_mcp_server_s_tools_are_offered_called_and_outlive_their_server(
        mcp_config: Callable[..., Config], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MCP_TEST_KEY", "given")
    monkeypatch.setenv("OTHER_KEY", "withheld")
    monkeypatch.setattr(keys, "_held", {})
    config = mcp_config(env=["MCP_TEST_KEY"])
    keys.withdraw(config.tools.key_names)
    config = with_mcp_tools(config)
    assert config.tools.offered == ("add", "die", "fail", "picture")
    assert with_mcp_tools(config) is config and "- add: adds two numbers (arguments: a; b)" in system_prompt(config.tools)
    add, bad, picture, shown, died, again = asyncio.run(outcomes(config, call("add", a=1, b=2), call("add", a="x", b=2), call(
        "picture"), call("fail"), call("die"), call("add", a=3, b=4)))
    assert add.call.ok and add.call.observation == "3 given None"
    assert not bad.call.infrastructure and "a: 'x' is not of type 'integer'" in bad.call.observation
    assert picture.images == (png("red", (8, 8)),)
    assert not shown.call.ok and not shown.call.infrastructure and "Error executing tool fail" in shown.call.observation
    assert died.call.infrastructure and died.error.startswith("die: MCP server test")
    assert again.call.observation == "7 given None"


def test_an_mcp_server_can_be_cut_down_to_some_tools_and_its_errors_can_be_ours(mcp_config: Callable[..., Config]) -> None:
    config = with_mcp_tools(mcp_config(tools=["fail"], errors="ours"))
    assert config.tools.offered == ("fail",)
    (outcome,) = asyncio.run(outcomes(config, call("fail")))
    assert outcome.call.infrastructure and "Error executing tool fail" in outcome.error
    with pytest.raises(ConfigError, match="the server has no fly; it has add, die, fail, picture"):
        with_mcp_tools(mcp_config(tools=["fly"]))
    with pytest.raises(ConfigError, match="there is no program no-such-program"):
        with_mcp_tools(mcp_config(command=["no-such-program"]))
    with pytest.raises(ToolServerError, match="MCP server test can't be used"):
        with_mcp_tools(mcp_config(command=[sys.executable, "-c", "raise SystemExit(1)"]))
