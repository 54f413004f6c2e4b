"""The pictures of a recorded row, each checked once to be readable."""
from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hdpo.agent.images import check_image
from hdpo.curation.record import Unreadable
from hdpo.data.pictures import encoded_images
from hdpo.errors import DataError


def pictures_of(cell: Any, folders: Sequence[Path]) -> tuple[bytes, ...]:
    """Bytes, {bytes, path}, base64 or paths, one or a list -> encoded files. Raises Unreadable."""
    try:
        found = encoded_images(cell, folders)
    except DataError as exc:
        raise Unreadable("image_missing", str(exc)) from exc
    try:
        for number, data in enumerate(found):
            check_image(data, f"image {number}")
    except DataError as exc:
        raise Unreadable("image_broken", str(exc)) from exc
    return found
