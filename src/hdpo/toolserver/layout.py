"""Texts the model reads after a tool call, in the layout its data was made with.

`REFERENCE` is byte for byte the layout of the reference's tool server, with which its data and checkpoints were made; only what
a traceback says differs. `COMPACT` says the same in fewer tokens. `<image>` in a text is the place of the reply's next image;
where there is none, the agent appends their placeholders. What tools print or find never holds one.
"""
from __future__ import annotations

from collections.abc import Collection, Sequence

IMAGE_MARKER = "<image>"
NO_OUTPUT = "Script executed successfully (no output)."
NO_IMAGE_RESULT = "No result found for image search."
SESSION_RESTARTED = "The Python session was restarted: all variables are lost, except the images image_1, image_2, ..."
MAX_SNIPPET_CHARS = 20_000
"""Longest snippet of a search result, characters."""
_NO_VIDEO = "Your browser can't play this video."


class Reference:
    """The reference's own words."""

    def images(self, images: tuple[bytes, ...], opened: Collection[int], ok: bool) -> tuple[bytes, ...]:
        """Those of a cell's images that are returned: none of a cell that failed, and none that `image.show()` opened."""
        return tuple(image for place, image in enumerate(images) if place not in opened) if ok else ()

    def python_result(self, stdout: str, stderr: str, num_images: int, ok: bool = True) -> str:
        """Result of one cell, streams as they were written. `ok`: it ran to its end."""
        if ok and not stdout and not num_images:
            stdout = NO_OUTPUT
        if not ok:
            stderr = stderr.rstrip("\n")      # a traceback ends with its last line
        text = f"Code execution result:\nstdout:\n```\n{stdout}\n```\n\nstderr:\n```\n{stderr}\n```"
        return without_markers(text + "\n\nImages:\n" * bool(num_images))

    def search_results(self, query: str, results: Sequence[tuple[str, str, str]]) -> str:
        """Ranked (title, link, snippet): rows without a snippet and repeated ones are dropped, numbers are those of all rows."""
        if not results:
            return f"No results found for '{query}'."
        pages: dict[str, str] = {}
        for number, (title, link, snippet) in enumerate(results, start=1):
            if (snippet := snippet.strip()) and snippet not in pages:
                pages[snippet] = _page(number, title.strip(), link.strip(), snippet).replace(_NO_VIDEO, "")
        return _found(query, list(pages.values())) if pages else f"No search results found for {query}."

    def image_results(self, titles: Sequence[str], shown: Sequence[bool]) -> str:
        """Titles of the pages that show the found images, best first, each behind its image; `shown`: whether it has one."""
        if not titles:
            return NO_IMAGE_RESULT
        rows = [f"{number}. {f'{IMAGE_MARKER}{chr(10)}' * has}[{without_markers(title)}]\n".replace(_NO_VIDEO, "")
                for number, (title, has) in enumerate(zip(titles, shown, strict=True), start=1)]
        return f"A Google image search for the image found {len(rows)} results:\n\n## Web Results\n" + "\n\n".join(rows)

    def image_search_used(self, times: int) -> str:
        """A further image search, after as many as are allowed."""
        return (f"You have already called 'image_search' {times} time(s) and the results are the same. "
                "Do not call this tool again. "
                "Please analyze the results you already have and provide your final answer using <answer> tags.")


class Compact(Reference):
    """The same in fewer tokens, for small models: nothing empty is shown, and images follow the text."""

    def images(self, images: tuple[bytes, ...], opened: Collection[int], ok: bool) -> tuple[bytes, ...]:
        """All of them."""
        return images

    def python_result(self, stdout: str, stderr: str, num_images: int, ok: bool = True) -> str:
        """Empty streams are left out; neither output nor image says so in a sentence."""
        stdout, stderr = (without_markers(stream).strip("\n") for stream in (stdout, stderr))
        if not stdout and not stderr:
            if num_images:
                return f"Code execution result:\n{num_images} image{'s' if num_images > 1 else ''}"
            stdout = NO_OUTPUT
        streams = [f"{name}:\n```\n{text}\n```" for name, text in (("stdout", stdout), ("stderr", stderr)) if text]
        return "Code execution result:\n" + "\n".join(streams)

    def search_results(self, query: str, results: Sequence[tuple[str, str, str]]) -> str:
        """Repeated snippets are dropped. Rows without one repeat by title and link."""
        pages: list[str] = []
        seen: set[tuple[str, ...]] = {("", "")}     # a row with nothing to read
        for title, link, snippet in results:
            same = (snippet,) if snippet else (title, link)
            if same not in seen:
                seen.add(same)
                pages.append(_page(len(pages) + 1, title, link, snippet))
        return _found(query, pages) if pages else f"No search results found for {query}."

    def image_results(self, titles: Sequence[str], shown: Sequence[bool]) -> str:
        if not titles:
            return NO_IMAGE_RESULT
        return "\n".join(f"{number}. [{without_markers(title)}]" for number, title in enumerate(titles, start=1))

    def image_search_used(self, times: int) -> str:
        return ("Image search was already called for this question and its result is above. "
                "Use it, call another tool, or give the final answer now.")


REFERENCE, COMPACT = Reference(), Compact()
LAYOUTS = {"reference": REFERENCE, "compact": COMPACT}


def without_markers(text: str) -> str:
    """Text from outside, which must not take an image's place."""
    while IMAGE_MARKER in text:      # what is left may spell another
        text = text.replace(IMAGE_MARKER, "")
    return text


def _page(number: int, title: str, link: str, snippet: str) -> str:
    if len(snippet) > MAX_SNIPPET_CHARS:
        snippet = snippet[:MAX_SNIPPET_CHARS] + "..."
    return f"Page {number}. [Title: {title}](Link: {link})\nSnippet: {snippet}\n"


def _found(query: str, pages: Sequence[str]) -> str:
    return f"A Google search for '{query}' found {len(pages)} results:\n\n## Web Results\n" + "\n".join(pages)


def nothing_to_search(query: str) -> str:
    return f"Tool call error: the query {query[:40]!r} holds nothing to search for; write what you want to know in words."


def tool_not_offered(name: str, tools: Sequence[str]) -> str:
    """A well-formed call of a tool this server does not run."""
    return f"Tool call error: {name} is not available here; the tools are {', '.join(tools)}."


def session_gone(calls: int) -> str:
    """The server was started again after the trajectory's first `calls` Python calls."""
    return f"The tool server was restarted after Python call {calls}. {SESSION_RESTARTED}"


def timed_out(seconds: float, kept: bool) -> str:
    """A cell ran longer than its limit; `kept` when it could be interrupted without losing the session."""
    return f"Execution timed out after {seconds:g} s." + (" Variables set before are kept." if kept else "")
