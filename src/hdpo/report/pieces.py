"""Token ids as text, with the tokenizer that the run's folder or its configuration names."""
from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from hdpo.config.file import load_config
from hdpo.errors import ConfigError


class Pieces:
    """`texts` gives nothing, and no error, where no tokenizer can be read: the ids are shown instead."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._tokenizer: Any = None
        self._looked = False

    def texts(self, ids: Iterable[int]) -> dict[int, str]:
        if not self._looked:
            self._looked, self._tokenizer = True, self._open()
        if self._tokenizer is None:
            return {}
        return {index: self._tokenizer.decode([index], skip_special_tokens=False) for index in set(ids)}

    def _open(self) -> Any:
        from tokenizers import Tokenizer
        places = sorted(self._folder.glob("checkpoints/*/tokenizer.json"), reverse=True)
        try:
            places.append(Path(load_config(self._folder / "config.yaml", environment={}).model.path) / "tokenizer.json")
        except ConfigError:
            pass
        for place in places:
            try:
                return Tokenizer.from_file(str(place))
            except Exception:    # noqa: BLE001  the library raises nothing more exact, for a missing file as for a damaged one
                continue
        return None
