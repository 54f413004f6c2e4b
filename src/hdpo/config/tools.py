"""Settings of tools: the shipped ones, and those a user brings along: functions, HTTP endpoints, what MCP servers offer."""
from __future__ import annotations

import re
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, PositiveFloat, field_validator, model_validator

from hdpo.config.types import Address, Count, Name, Number, Section

_TOOL_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_.-]{0,63}")
_VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
SHIPPED = ("python", "text_search", "image_search")
_TAKEN = (*SHIPPED, "search")      # an alias of text_search


def _tool_name(name: str) -> str:
    if not _TOOL_NAME.fullmatch(name) or name in _TAKEN:
        raise ValueError(f"a tool's name has 1 to 64 letters, digits, _, - and ., and is none of {', '.join(_TAKEN)}")
    return name


def _variable(name: str) -> str:
    if name and not _VARIABLE.fullmatch(name):
        raise ValueError("must be the name of an environment variable, never the secret itself")
    return name


ToolName = Annotated[str, AfterValidator(_tool_name)]
Variable = Annotated[str, AfterValidator(_variable)]


class OwnTool(Section):
    """One of `function`, `url` and `mcp` says where a call goes."""

    description: str = Field("", description="What the tool is for, in a sentence for the model.")
    parameters: dict[str, Any] = Field(
        default_factory=lambda: {"type": "object", "properties": {}}, description="JSON Schema of the arguments, an object's.")
    example: dict[str, Any] | None = Field(None, description="Arguments of the call that the model is shown; made of the schema.")
    function: str = Field("", description="module:name or file.py:name of the function that is called in the trainer's process.")
    url: Address = Field("", description="Endpoint that calls are sent to by POST.")
    mcp: str = Field("", description="Entry of tools.mcp whose tool it is.")
    key: Variable = Field("", description="Environment variable whose value is sent to url as bearer token.")
    send_images: bool = Field(False, description="Send the task's pictures to url with every call.")
    timeout_s: PositiveFloat = Field(60.0, description="Wall clock of one call, seconds.")

    @field_validator("description", mode="before")
    @classmethod
    def _one_line(cls, text: Any) -> Any:
        return " ".join(text.split()) if isinstance(text, str) else text

    @model_validator(mode="after")
    def _goes_somewhere(self) -> OwnTool:
        if sum(map(bool, (self.function, self.url, self.mcp))) != 1:
            raise ValueError("set one of function, url and mcp")
        if self.parameters.get("type", "object") != "object":
            raise ValueError("parameters must be the JSON Schema of an object")
        return self


class McpServer(Section):
    """A server that is started (`command`), or reached (`url`)."""

    command: list[str] = Field(default_factory=list, description="Program and arguments; spoken to by its input and output.")
    url: Address = Field("", description="Streamable HTTP endpoint.")
    tools: list[ToolName] = Field(default_factory=list, description="Its tools that are offered; empty is all.")
    env: list[Variable] = Field(default_factory=list, description="Environment variables that the started program gets too.")
    key: Variable = Field("", description="Environment variable whose value is sent to url as bearer token.")
    errors: Literal["shown", "ours"] = Field(
        "shown", description="A result that says isError: shown to the model, as the protocol means it, or a failure of ours.")
    timeout_s: PositiveFloat = Field(60.0, description="Wall clock of one call, seconds.")

    @model_validator(mode="after")
    def _is_somewhere(self) -> McpServer:
        if bool(self.command) == bool(self.url):
            raise ValueError("set one of command and url")
        return self


class ToolsConfig(Section):
    url: Address = Field("", description="Tool server to use (REMOTE_TOOL_SERVER_URL); empty starts one for the run.")
    allowed: list[Literal["python", "text_search", "image_search"]] = Field(
        ["python", "text_search", "image_search"], description="Shipped tools the agent may call, beside those of own and mcp.")
    own: dict[ToolName, OwnTool] = Field(
        default_factory=dict, description="The user's own tools by name: {description, parameters, function or url} (hdpo.own).")
    mcp: dict[Name, McpServer] = Field(
        default_factory=dict, description="MCP servers by name, {command} or {url}, whose tools are offered too.")
    sandbox: Literal["process", "docker", "docker-strict"] = Field(
        "process", description="Where the run's own tool server executes Python; process is no security boundary, "
        "docker-strict gives each session a container of its own.")
    i_trust_the_model: bool = Field(False, description="Run the process sandbox even where the machine forbids user namespaces: "
                                    "the model's code then has this user's files and processes in reach.")
    container_memory_mib: Number = Field(
        0, description="Memory of one container, MiB, at least 256; 0 is 8192, and 2048 with docker-strict.")
    sessions_per_container: Count = Field(
        64, description="Python sessions that share a container at most; those with large pictures take up more of it.")
    server_processes: Number = Field(
        0, description="Processes of the run's own tool server on a node, among which trajectories are shared out; 0 is one for "
        "256 live trajectories, 8 at most.")
    picture_store_mib: Number = Field(
        1024, description="Uploaded pictures that the run's own tool server keeps on the disk (TMPDIR) beside those of live "
        "trajectories, MiB.")
    call_timeout_s: PositiveFloat = Field(400.0, description="Deadline of one tool call as the trainer sees it, seconds.")
    python_timeout_s: PositiveFloat = Field(20.0, description="Wall clock of one Python cell, seconds.")
    retries: Number = Field(
        2, description="Further attempts at a call that broke off; an unreachable server is waited for until call_timeout_s.")
    layout: Literal["reference", "compact"] = Field(
        "reference", description="Layout of what a tool's answer says: the reference's, with which its data and checkpoints were "
        "made, or a compact one for small models (the demo's); demonstrations must have the same.")
    max_image_searches: Number = Field(1, description="Image searches per trajectory; later ones get a fixed reply.")
    search_provider: Literal["auto", "serper", "serpapi", "brightdata", "embedded"] = Field(
        "auto", description="serper, serpapi, brightdata or embedded (SEARCH_PROVIDER); auto: by key.")
    text_index: str = Field("", description="SQLite FTS5 file of the embedded text search.")
    image_index: str = Field("", description="Folder of labelled images of the embedded image search.")
    image_cache: str = Field("", description="JSON file of recorded image searches by row index; asked before the index.")
    search_results: Count = Field(10, description="Results of one text search.")

    @property
    def offered(self) -> tuple[str, ...]:
        """Names of all tools, once those of MCP servers are known."""
        return (*self.allowed, *self.own)

    @property
    def none(self) -> ToolsConfig:
        """The same without any tool."""
        return self.model_copy(update={"allowed": [], "own": {}, "mcp": {}})

    @property
    def key_names(self) -> list[str]:
        """Environment variables that hold secrets of own tools."""
        servers = [name for server in self.mcp.values() for name in (server.key, *server.env)]
        return [name for name in (*(tool.key for tool in self.own.values()), *servers) if name]
