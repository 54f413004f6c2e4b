"""Settings of a tool server and its command line."""
from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from hdpo.errors import ConfigError
from hdpo.toolserver.token import LOOPBACK, VARIABLE

TOOLS = ("python", "text_search", "image_search")
SANDBOXES = ("process", "docker", "docker-strict")
LAYOUTS = ("reference", "compact")
LEAST_CONTAINER_MIB = 256
"""The template alone takes a quarter of it."""
LENS_URL = "https://google.serper.dev/lens"
EXAMPLES = f"""\
examples:
  hdpo tool-server                                      python sessions only, on a free port of this machine
  hdpo tool-server --text-index wiki.db --image-index photos/     all three tools, nothing leaves the machine
  SEARCH_PROVIDER=serper SERPER_API_KEY=... hdpo tool-server --port 30080
  {VARIABLE}=... hdpo tool-server --host 0.0.0.0 --port 30080   for other machines; clients send the token
  hdpo tool-server --port 30080 --no-token              for clients that send none, such as the reference's trainer

The line http://HOST:PORT on standard output says that the server is ready; everything else goes to standard error.
Every call needs a token. Given none, the server makes one, and clients of the same user on this machine find it.
Search keys (SERPER_API_KEY, SERPAPI_API_KEY, BRIGHTDATA_API_TOKEN with BRIGHTDATA_ZONE) are read from the environment
of this process and never reach the model's code.
"""


@dataclass(frozen=True, slots=True)
class Settings:
    """Everything a server can be told. Seconds, and counts per server unless said otherwise."""

    host: str = "127.0.0.1"
    port: int = 0                      # 0: any free one
    tools: tuple[str, ...] = ()        # empty: all that can be served
    sandbox: str = "process"
    sandbox_image: str = "hdpo-sandbox:latest"
    container_memory_mib: int = 0      # 0: 8192, or 2048 where each session has a container of its own
    container_cpus: float = 0.0        # 0: all cores
    sessions_per_container: int = 64   # at most, where many share one
    python_timeout_s: float = 20.0     # wall clock of one cell
    call_timeout_s: float = 120.0      # one call with everything it waits for, queueing excluded
    workers: int = 0                   # cells that run at the same time; 0: two per core
    trajectories: int = 0              # expected to be live at once, for checks at the start
    picture_store_mib: int = 1024      # pictures on the disk that no live trajectory has
    max_queue: int = 4096              # calls accepted but not answered; beyond it 429
    idle_limit_s: float = 3600.0       # a trajectory nobody asks about is closed
    layout: str = "reference"          # of what the model reads
    search_provider: str = "auto"
    search_results: int = 10
    search_cache: str = "on"           # on, off, replay
    search_cache_file: str = ""        # empty: no cache
    search_rate: float = 50.0          # requests per second to a hosted provider
    text_index: str = ""
    image_index: str = ""
    image_cache: str = ""
    public_url: str = ""               # where a hosted image search can fetch query images from this server
    lens_key: str = ""
    lens_url: str = LENS_URL
    max_image_searches: int = 1        # per trajectory
    drain_s: float = 30.0              # time for running calls after SIGTERM
    parent_pid: int = 0                # end when that process ends
    processes: int = 1                 # that share the trajectories, behind a front
    given: tuple[str, ...] = ()        # the command line, for these processes
    behind: str = ""                   # name of a process behind a front
    pictures: str = ""                 # folder of pictures that servers share; empty: one of its own
    token: str = ""                    # bearer token; empty: the server makes one
    no_token: bool = False             # ask for none; on loopback only
    allowed_hosts: tuple[str, ...] = ()   # further names of this server
    i_trust_the_model: bool = False    # process sandbox without user namespaces

    def __post_init__(self) -> None:
        if self.search_cache == "replay" and not self.search_cache_file:
            raise ConfigError("--search-cache replay: name the file with --search-cache-file")
        if self.public_url and self.search_cache == "replay":
            raise ConfigError("--public-url is for a hosted image search, and --search-cache replay never touches the network")
        if self.public_url and not self.lens_key:
            raise ConfigError("--public-url is for a hosted image search: set SERPER_API_KEY")
        for tool in self.tools:
            if tool not in TOOLS:
                raise ConfigError(f"--tools: unknown tool {tool}; known are {', '.join(TOOLS)}")
        if self.sessions_per_container < 1:
            raise ConfigError("--sessions-per-container: at least 1")
        if self.processes < 1:
            raise ConfigError("--processes: at least 1")
        if 0 < self.container_memory_mib < LEAST_CONTAINER_MIB:
            raise ConfigError(f"--container-memory: at least {LEAST_CONTAINER_MIB}, or 0")
        if self.no_token and self.token:
            raise ConfigError(f"--no-token contradicts {VARIABLE}")
        outside = f"--host {self.host}" if self.host not in LOOPBACK else "--public-url" if self.public_url else ""
        if outside and not self.token:
            raise ConfigError(f"{outside} is reachable from other machines: set {VARIABLE}")

    @property
    def search_deadline_s(self) -> float:
        """How long a hosted provider may keep one call waiting, retries included: the answer still has to be made."""
        return 0.9 * self.call_timeout_s

    @property
    def running_cells(self) -> int:
        return self.workers or 2 * (os.cpu_count() or 1)


def parse_arguments(argv: Sequence[str] | None, environment: Mapping[str, str] = os.environ) -> Settings:
    """Command line -> Settings. Raises ConfigError for values that contradict each other."""
    default = Settings()
    parser = argparse.ArgumentParser(
        prog="hdpo tool-server", formatter_class=argparse.RawDescriptionHelpFormatter, epilog=EXAMPLES,
        description="Serves the agent's tools (Python sessions, text search, image search) in the reference's HTTP format.")
    add = parser.add_argument
    add("--host", default=default.host, help="address to listen on (%(default)s)")
    add("--port", type=int, default=default.port, help="port; 0 takes a free one (%(default)s)")
    add("--tools", default="", help="comma-separated: python, text_search, image_search (all that can be served)")
    add("--sandbox", choices=SANDBOXES, default=default.sandbox,
        help="where Python runs; process is no security boundary; docker has many sessions in a container, docker-strict "
        "one (%(default)s)")
    add("--sandbox-image", default=environment.get("HDPO_SANDBOX_IMAGE") or default.sandbox_image,
        help="image of `make sandbox` (HDPO_SANDBOX_IMAGE or hdpo-sandbox:latest)")
    add("--container-memory", type=int, default=default.container_memory_mib, metavar="MIB",
        help="memory of one container; 0 is 8192, strict 2048 (%(default)s)")
    add("--sessions-per-container", type=int, default=default.sessions_per_container, metavar="N",
        help="sessions that share a container at most; those with large pictures take up more of it (%(default)s)")
    add("--container-cpus", type=float, default=default.container_cpus, help="cores of one container; 0 is all (%(default)s)")
    add("--python-timeout", type=float, default=default.python_timeout_s, help="seconds of one cell (%(default)s)")
    add("--call-timeout", type=float, default=default.call_timeout_s, help="seconds of one call (%(default)s)")
    add("--workers", type=int, default=default.workers, help="cells running at once; 0 is two per core (%(default)s)")
    add("--processes", type=int, default=default.processes, metavar="N",
        help="server processes behind this address; each trajectory has its calls in one of them (%(default)s)")
    for hidden, value in (("--behind", ""), ("--pictures", ""), ("--lens-url", default.lens_url)):
        add(hidden, default=value, help=argparse.SUPPRESS)
    add("--trajectories", type=int, default=0, metavar="N", help="live trajectories for which files must be allowed enough")
    add("--picture-store", type=int, default=default.picture_store_mib, metavar="MIB",
        help="uploaded pictures to keep on the disk (TMPDIR) beside those of live trajectories (%(default)s)")
    add("--max-queue", type=int, default=default.max_queue, help="open calls before the server answers 429 (%(default)s)")
    add("--idle-limit", type=float, default=default.idle_limit_s, help="seconds before a silent trajectory is closed "
        "(%(default)s)")
    add("--layout", choices=LAYOUTS, default=default.layout, help="layout of what the model reads: the reference's, with which "
        "its data was made, or a compact one (%(default)s)")
    add("--search-provider", default=environment.get("SEARCH_PROVIDER") or default.search_provider,
        help="serper, serpapi, brightdata or embedded; auto takes the first with a key (SEARCH_PROVIDER or auto)")
    add("--search-results", type=int, default=default.search_results, help="results of a text search (%(default)s)")
    add("--search-cache-file", default="", help="SQLite file that keeps the answers of a hosted provider")
    add("--search-cache", choices=("on", "off", "replay"), default=default.search_cache,
        help="replay answers from the file only and never touches the network (%(default)s)")
    add("--search-rate", type=float, default=default.search_rate, help="requests per second to a provider (%(default)s)")
    add("--text-index", default="", help="SQLite FTS5 file with a table pages(title, link, snippet)")
    add("--image-index", default="", help="folder of images with labels.json {file name: title}")
    add("--image-cache", default="", help="JSON file of recorded image searches in the reference's format; asked first")
    add("--public-url", default="", help="address at which the outside reaches this server's /query-image/; turns on hosted "
        "image search (Serper's Lens, SERPER_API_KEY), which fetches the query there. Without it no image leaves the server")
    add("--max-image-searches", type=int, default=default.max_image_searches,
        help="image searches per trajectory; later ones get a fixed reply (%(default)s)")
    add("--drain", type=float, default=default.drain_s, help="seconds for running calls after SIGTERM (%(default)s)")
    add("--no-token", action="store_true", help="ask for no token: any process of this machine can run code here then")
    add("--allow-host", action="append", default=[], metavar="NAME", help="further name under which clients call this server")
    add("--i-trust-the-model", action="store_true", help="run the process sandbox even where the machine forbids user "
        "namespaces, which leaves the model's code with your files and processes in reach")
    add("--parent-pid", type=int, default=0, help="end when this process ends")
    args = parser.parse_args(argv)
    return Settings(
        host=args.host, port=args.port, tools=tuple(name.strip() for name in args.tools.split(",") if name.strip()),
        sandbox=args.sandbox, sandbox_image=args.sandbox_image, container_memory_mib=args.container_memory,
        container_cpus=args.container_cpus, sessions_per_container=args.sessions_per_container,
        image_cache=args.image_cache, public_url=args.public_url, lens_url=args.lens_url, python_timeout_s=args.python_timeout,
        lens_key=environment.get("SERPER_API_KEY", ""), call_timeout_s=args.call_timeout, drain_s=args.drain,
        workers=args.workers, trajectories=args.trajectories, layout=args.layout, picture_store_mib=args.picture_store,
        max_queue=args.max_queue, idle_limit_s=args.idle_limit, search_provider=args.search_provider,
        search_results=args.search_results, text_index=args.text_index, image_index=args.image_index,
        search_cache=args.search_cache, search_cache_file=args.search_cache_file, search_rate=args.search_rate,
        max_image_searches=args.max_image_searches, parent_pid=args.parent_pid, token=environment.get(VARIABLE, ""),
        no_token=args.no_token and not args.behind, given=tuple(sys.argv[1:] if argv is None else argv),
        processes=args.processes, behind=args.behind, pictures=args.pictures, allowed_hosts=tuple(args.allow_host),
        i_trust_the_model=args.i_trust_the_model)
