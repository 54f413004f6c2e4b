"""`hdpo serve`: the agent for programs, until SIGTERM or Ctrl-C."""
from __future__ import annotations

import argparse
import asyncio
import socket
from collections.abc import Sequence
from typing import TYPE_CHECKING

from hdpo.compose.asked import Asked, add_model_options, read_model, scratch_folder
from hdpo.errors import UserError
from hdpo.keys import key, withdraw

if TYPE_CHECKING:
    from hdpo.assistant.session import Assistant

VARIABLE = "HDPO_SERVE_KEY"
ABOUT = f"""\
The agent with its tools behind an OpenAI-compatible /v1/chat/completions. Tools run here; images come as data: addresses. Clients
send the key that {VARIABLE} holds; without one only this machine is served."""


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="hdpo serve", description=ABOUT)
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (%(default)s)")
    parser.add_argument("--port", type=int, default=8000, help="port (%(default)s; 0 takes a free one)")
    parser.add_argument("--name", help="name of the model for clients (default: that of its folder)")
    parser.add_argument("--allow-host", action="append", default=[], metavar="NAME", help="further name in Host (repeatable)")
    add_model_options(parser)
    options = parser.parse_args(argv)
    with scratch_folder("hdpo-serve-") as scratch:
        asked = read_model(options, scratch)
        withdraw(asked.config.tools.key_names)
        if not key(VARIABLE) and options.host not in ("127.0.0.1", "::1", "localhost"):
            raise UserError(f"--host {options.host} serves other machines: set {VARIABLE} to the key that clients must send")
        family = socket.AF_INET6 if ":" in options.host else socket.AF_INET
        try:
            listener = socket.create_server((options.host, options.port), family=family, backlog=128)
        except (OSError, OverflowError) as exc:
            raise UserError(f"--host {options.host} --port {options.port}: {exc}") from None
        with listener:
            from hdpo.compose.stage import Stage
            with Stage(asked.config) as stage:
                _serve(stage.assistant(), asked, options, listener)
    return 0


def _serve(assistant: Assistant, asked: Asked, options: argparse.Namespace, listener: socket.socket) -> None:
    from hdpo.assistant.service import Service
    from hdpo.train.lifecycle import StopSignal
    name = options.name or options.model.absolute().name
    service = Service(
        assistant, name, asked.system, lambda request: asked.question(
            request.messages, request.images, request.temperature, request.max_tokens, request.seed),
        key=key(VARIABLE), host=options.host, allowed_hosts=options.allow_host, most=2 * asked.config.rollout.max_num_seqs)
    ended = asyncio.Event()
    host, port = listener.getsockname()[:2]
    address = f"[{host}]" if ":" in host else host
    with StopSignal() as stop:
        print(f"{name} on http://{address}:{port}/v1", flush=True)
        assistant.drive(service.serve(listener, ended), stop, ended.set)
