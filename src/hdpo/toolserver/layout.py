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
SESSION_LOST = "The Python session was restarted: all variables are lost, except the images image_1, image_2, ..."
MAX_SNIPPET_CHARS = 20_000
"""Longest snippet of a search result, characters."""

CALL_EXAMPLES = {
    "python": '<tool_call>{"name": "python", "arguments": {"code": "print(1 + 1)"}}</tool_call>',
    "text_search": '<tool_call>{"name": "text_search", "arguments": {"query": "height of Mount Everest"}}</tool_call>',
    "image_search": '<tool_call>{"name": "image_search", "arguments": {}}</tool_call>',
}
"""One right call of each tool, shown when a call could not be understood."""


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
    """Ranked (title, link, snippet); repeated snippets are dropped, long ones cut."""
    pages: list[str] = []
    seen: set[str] = set()
    for title, link, snippet in results:
        if snippet in seen:
            continue
        seen.add(snippet)
        if len(snippet) > MAX_SNIPPET_CHARS:
            snippet = snippet[:MAX_SNIPPET_CHARS] + "..."
        pages.append(f"Page {len(pages) + 1}. [Title: {title}](Link: {link})\nSnippet: {snippet}\n")
    if not pages:
        return f"No search results found for {query}."
    return f"A Google search for '{query}' found {len(pages)} results:\n\n## Web Results\n" + "\n".join(pages)


def image_results(titles: Sequence[str]) -> str:
    """Titles of the pages that show the found images, best first; the images themselves follow the text."""
    if not titles:
        return NO_IMAGE_RESULT
    return "\n".join(f"{number}. [{title}]" for number, title in enumerate(titles, start=1))


def malformed_call(problem: str, tools: Sequence[str]) -> str:
    """What was wrong with a call and how a right one looks, for each tool the server offers."""
    examples = "\n".join(CALL_EXAMPLES[tool] for tool in tools if tool in CALL_EXAMPLES)
    return f"Invalid tool call: {problem}\nA valid call looks like:\n{examples}"
