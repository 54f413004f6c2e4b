"""An author's file paths in recorded code -> the session's, so that the code runs where the policy's code runs.

A session has the row's pictures as `image_1`, `image_2`, ..., not as files, and an empty working folder of its own. A path
of the row's picture becomes image_1.png, written first; other absolute paths of pictures become bare names; a picture that
is only saved and its path printed is displayed too, where the recorded observation shows one.
"""
from __future__ import annotations

import re
from collections.abc import Sequence

_PICTURE = r"\.(?:png|jpe?g|bmp|webp|tiff?|gif)"
_LITERAL = re.compile(
    rf"""(?P<prefix>(?<!\w)[rRbBfF]{{0,2}})(?P<quote>["'])(?P<path>(?:/|[A-Za-z]:[\\/]|~)[^"'\n]*?{_PICTURE})(?P=quote)""",
    re.IGNORECASE)
_SAVED = re.compile(r"""(?:\.save|imwrite|savefig)\(\s*(?P<target>[A-Za-z_][\w.]*|[rf]?"[^"\n]*"|[rf]?'[^'\n]*')""")
_SHOWS = re.compile(r"\bshow\(|\bdisplay\(")


def rewrite(code: str, authors_paths: Sequence[str], num_images: int, shows_picture: bool) -> str:
    """The code for a session whose row has `num_images` pictures; `authors_paths` are theirs, in order."""
    names = {path: f"image_{number}.png" for number, path in enumerate(authors_paths, start=1)}
    written = {name: False for name in names.values()}

    def session_path(match: re.Match[str]) -> str:
        path = match["path"]
        name = names.get(path) or re.split(r"[\\/]", path)[-1]
        if name in written:
            written[name] = True
        return f"{match['prefix']}{match['quote']}{name}{match['quote']}"

    code = _LITERAL.sub(session_path, code)
    before = [f'{name.removesuffix(".png")}.save("{name}")' for name, used in written.items() if used]
    if num_images and re.search(r"\bimage_path\b", code) and not re.search(r"^\s*image_path\s*=", code, re.MULTILINE):
        before += ['image_1.save("image_1.png")'] * ('image_1.save("image_1.png")' not in before) + ['image_path = "image_1.png"']
    saved = [match["target"] for match in _SAVED.finditer(code)]
    after = []
    if shows_picture and saved and not _SHOWS.search(code):
        after = ["from PIL import Image as _Image", f"display(_Image.open({saved[-1]}))"]
    return "\n".join([*before, code, *after])
