"""Lets the CUDA builds of torchvision, torchaudio and torchcodec stand beside a CPU build of torch.

PyPI's builds of the three are made for CUDA and vLLM's CPU build brings them along. Beside torch+cpu their extensions
cannot load. For torchvision the operators `nms` and `qnms` are then never declared and its own fake kernels for them
fail at import; torchaudio refuses to be imported at all; torchcodec raises an OSError where vLLM is prepared for an
ImportError. Each makes Qwen3-VL unimportable, in transformers, in vLLM or in vLLM's helper processes, though nothing of
them is ever called here. So the operators are declared, torchaudio is told that it has no extension, and torchcodec
fails as an optional package should. Where an extension loads, nothing is changed.

    python -m hdpo.adapters.torchvision_shim --install | --remove

copies this file and a .pth line into the environment's site-packages, so that every interpreter, including helper
processes, has the hook. That copy runs at interpreter start: this module imports a few words of the standard library
only, and torch not before one of the three itself is being imported.
"""
from __future__ import annotations

import sys
from importlib.machinery import ModuleSpec, PathFinder

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

_COPY = "_hdpo_torchvision_shim"


def _declare_operators(extension: Any) -> None:
    """After torchvision.extension ran: declare what a loaded extension would have declared."""
    if extension._has_ops():
        return
    import torch

    for name in ("nms", "qnms"):
        if not hasattr(torch.ops.torchvision, name):
            torch.library.define(
                f"torchvision::{name}", "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")


def _tolerate_missing_library(utils: Any) -> None:
    """After torchaudio._extension.utils ran: a library that can't be loaded counts as one that isn't there."""
    load = utils._load_lib

    def load_or_say_no(library: str) -> bool:
        try:
            return load(library)
        except OSError:
            return False

    utils._load_lib = load_or_say_no


def _fail_as_not_installed(utils: Any) -> None:
    """After torchcodec's loader ran: a library that can't be loaded is an ImportError, which its users expect."""
    load = utils.load_image_library

    def load_or_import_error() -> None:
        try:
            load()
        except OSError as exc:
            raise ImportError(str(exc)) from exc

    utils.load_image_library = load_or_import_error


_FIXES: dict[str, Callable[[Any], None]] = {
    "torchvision.extension": _declare_operators,
    "torchaudio._extension.utils": _tolerate_missing_library,
    "torchcodec._internally_replaced_utils": _fail_as_not_installed,
}


class _FixAfterImport:
    """A meta path finder that leaves finding to the ordinary one and adds a fix after the modules named above."""

    hdpo_torchvision_shim = True

    def find_spec(self, fullname: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        if fullname not in _FIXES:
            return None
        spec = PathFinder.find_spec(fullname, path, target)
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def execute_and_fix(module: Any) -> None:
                execute(module)
                _FIXES[fullname](module)

            spec.loader.exec_module = execute_and_fix   # type: ignore[method-assign]
        return spec


def activate() -> None:
    """Hook the imports. Idempotent, imports nothing, and also knows the installed copy of itself."""
    if not any(getattr(finder, "hdpo_torchvision_shim", False) for finder in sys.meta_path):
        sys.meta_path.insert(0, _FixAfterImport())   # type: ignore[arg-type]


def install(folder: str | None = None) -> list[str]:
    """Write the copy and its .pth into `folder` (default: this environment's site-packages); returns both paths."""
    module, pth = _paths(folder)
    with open(__file__, encoding="utf-8") as source, open(module, "w", encoding="utf-8") as copy:
        copy.write(source.read())
    with open(pth, "w", encoding="utf-8") as line:
        line.write(f"import {_COPY}; {_COPY}.activate()\n")
    return [module, pth]


def remove(folder: str | None = None) -> list[str]:
    """Undo `install`; returns the paths that were there."""
    import os

    present = [path for path in _paths(folder) if os.path.exists(path)]
    for path in present:
        os.remove(path)
    return present


def _paths(folder: str | None) -> tuple[str, str]:
    import os
    import sysconfig

    folder = folder or sysconfig.get_paths()["purelib"]
    return os.path.join(folder, f"{_COPY}.py"), os.path.join(folder, f"{_COPY}.pth")


def main(arguments: list[str] | None = None) -> int:
    import argparse

    parser = argparse.ArgumentParser(prog="hdpo.adapters.torchvision_shim", description=(__doc__ or "").split("\n")[0])
    choice = parser.add_mutually_exclusive_group(required=True)
    choice.add_argument("--install", action="store_true", help="hook every interpreter of this environment")
    choice.add_argument("--remove", action="store_true", help="undo --install")
    parser.add_argument("--folder", default=None, help="site-packages to use instead of this environment's")
    options = parser.parse_args(arguments)
    paths = install(options.folder) if options.install else remove(options.folder)
    verb = "wrote" if options.install else "removed"
    print("\n".join(f"{verb} {path}" for path in paths) or "nothing to remove")
    return 0


if __name__ == "__main__":
    sys.exit(main())
