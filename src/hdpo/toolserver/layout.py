"""Texts the model reads after a tool call. Pure strings in the layout the reference trains on, kept short in tokens.

No `<image>` tags: images travel beside the text, and the agent appends their placeholders itself.
"""
from __future__ import annotations

from collections.abc import Sequence

NO_OUTPUT = "Script executed successfully (no output)."
NO_IMAGE_RESULT = "No result found for image search."
IMAGE_SEARCH_USED = (
    "Image search was already called for this question and its result is above. "
    "Use it, call another tool, or give the final answer now.")
SESSION_RESTARTED = "The Python session was restarted: all variables are lost, except the images image_1, image_2, ..."
MAX_SNIPPET_CHARS = 20_000
"""Longest snippet of a search result, characters."""


def python_result(stdout: str, stderr: str, num_images: int) -> str:
    """Result of one cell. Empty streams are left out; neither output nor image says so in a sentence."""
    stdout, stderr = stdout.strip("\n"), stderr.strip("\n")
    if not stdout and not stderr:
        if num_images:
            return f"Code execution result:\n{num_images} image{'s' if num_images > 1 else ''}"
        stdout = NO_OUTPUT
    streams = [f"{name}:\n```\n{text}\n```" for name, text in (("stdout", stdout), ("stderr", stderr)) if text]
    return "Code execution result:\n" + "\n".join(streams)


def search_results(query: str, results: Sequence[tuple[str, str, str]]) -> str:
    """Ranked (title, link, snippet); repeated snippets are dropped, long ones cut. Rows without one repeat by title and link."""
    pages: list[str] = []
    seen: set[tuple[str, ...]] = {("", "")}     # a row with nothing to read
    for title, link, snippet in results:
        same = (snippet,) if snippet else (title, link)
        if same in seen:
            continue
        seen.add(same)
        if len(snippet) > MAX_SNIPPET_CHARS:
            snippet = snippet[:MAX_SNIPPET_CHARS] + "..."
        pages.append(f"Page {len(pages) + 1}. [Title: {title}](Link: {link})\nSnippet: {snippet}\n")
    if not pages:
        return f"No search results found for {query}."
    return f"A Google search for '{query}' found {len(pages)} results:\n\n## Web Results\n" + "\n".join(pages)


def nothing_to_search(query: str) -> str:
    return f"Tool call error: the query {query[:40]!r} holds nothing to search for; write what you want to know in words."


def image_results(titles: Sequence[str]) -> str:
    """Titles of the pages that show the found images, best first; the images themselves follow the text."""
    if not titles:
        return NO_IMAGE_RESULT
    return "\n".join(f"{number}. [{title}]" for number, title in enumerate(titles, start=1))


def tool_not_offered(name: str, tools: Sequence[str]) -> str:
    """A well-formed call of a tool this server does not run."""
    return f"Tool call error: {name} is not available here; the tools are {', '.join(tools)}."


def session_gone(calls: int) -> str:
    """The server was started again after the trajectory's first `calls` Python calls."""
    return f"The tool server was restarted after Python call {calls}. {SESSION_RESTARTED}"


def timed_out(seconds: float, kept: bool) -> str:
    """A cell ran longer than its limit; `kept` when it could be interrupted without losing the session."""
    return f"Execution timed out after {seconds:g} s." + (" Variables set before are kept." if kept else "")
