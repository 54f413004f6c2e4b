"""One session's interpreter: a namespace that lives across cells, and everything a cell shows.

Captured: stdout and stderr (of Python and of child processes), the last expression's value, matplotlib figures, PIL
images by `show()`, `display()` or as last expression. Tracebacks keep the frames of the model's own code only.
"""
from __future__ import annotations

import _signal
import ast
import builtins
import io
import linecache
import os
import random
import sys
import textwrap
import traceback
import types
from typing import Any

import magics
import pictures

MAX_IMAGE_PIXELS = 4096 * 4096
"""Largest image returned; bigger ones are scaled down."""


class Capture(io.RawIOBase):
    """A byte stream that keeps the first `limit` bytes and counts the rest."""

    def __init__(self, limit: int, fd: int) -> None:
        self.limit, self.fd = limit, fd
        self.kept, self.total = bytearray(), 0

    def writable(self) -> bool:
        return True

    def fileno(self) -> int:
        return self.fd

    def write(self, data: Any) -> int:
        view = memoryview(data).cast("B")
        room = self.limit - len(self.kept)
        if room > 0:
            self.kept += view[:room]
        self.total += len(view)
        return len(view)

    def clear(self) -> None:
        self.kept, self.total = bytearray(), 0

    def text(self) -> str:
        text = self.kept.decode("utf-8", errors="replace")
        if self.total > len(self.kept):
            text += f"\n... (output truncated: {self.total} bytes in all)"
        return text


class Interpreter:
    """The namespace of one trajectory. `run` executes a cell; nothing it does may raise out of it.

    Made in the template, so that sessions share what it is made of; `begin` makes it a session's own.
    """

    def __init__(self, max_output: int, max_images: int) -> None:
        self.max_output, self.max_images = max_output, max_images
        self.pid = os.getpid()
        self.running = False
        self.count = 0
        self.said = -1     # bytes of stdout up to the value that was shown last
        self.shown: list[bytes] = []
        self.opened: list[int] = []
        self.streams = Capture(max_output, 1), Capture(max_output, 2)
        self.module = types.ModuleType("__main__")
        self.names = self.module.__dict__
        sys.modules["__main__"] = self.module
        self.names["__builtins__"] = builtins
        self.names["display"] = self.display
        self._preload()

    def begin(self, images: list[bytes]) -> None:
        """In its process, before the first cell. Raises what a picture that can't be opened does."""
        self.pid = os.getpid()
        seed = int.from_bytes(os.urandom(4), "big")      # forked sessions would otherwise share one stream
        random.seed(seed)
        self.names["np"].random.seed(seed)
        self.listen()
        for number, data in enumerate(images, start=1):
            self.names[f"image_{number}"] = pictures.AtFirstUse(data)

    def listen(self) -> None:
        """For the order to stop a cell. The module's other half, `signal`, would make enumerations of it at each call."""
        _signal.signal(_signal.SIGINT, self.on_interrupt)

    def _preload(self) -> None:
        import base64
        import math
        from io import BytesIO

        import matplotlib.pyplot as plt
        import numpy as np
        from PIL import Image
        from PIL.Image import Image as ImageType
        self.names.update(base64=base64, math=math, os=os, sin=math.sin, cos=math.cos, BytesIO=BytesIO, plt=plt, np=np,
                          Image=Image)
        self.plt, self.image_type = plt, ImageType
        plt.show = self._show_figures
        ImageType.show = lambda image, *args, **kwargs: self._open(image)   # type: ignore[method-assign]

    # -- what a cell shows -------------------------------------------------------------------------------------------
    def display(self, *values: Any, **_: Any) -> None:
        """IPython's `display`: images and figures are captured, everything else is printed."""
        for value in values:
            if isinstance(value, self.image_type):
                self._add_image(value)
            elif hasattr(value, "savefig") and hasattr(value, "canvas"):
                self._add_figure(value)
            elif value is not None:
                self._say(repr(value))

    def _open(self, image: Any) -> None:
        """`image.show()`, which opens a window where there is one: not every reader of the result wants to see it."""
        before = len(self.shown)
        self.display(image)
        self.opened += range(before, len(self.shown))

    def _say(self, text: str) -> None:
        """A value's text. IPython shows it without an end of its line: where it is the last text of all, that is told."""
        print(text)
        _flush(sys.stdout)
        self.said = self.streams[0].total

    def _show_figures(self, *_: Any, **__: Any) -> None:
        for number in self.plt.get_fignums():
            self._add_figure(self.plt.figure(number))
        self.plt.close("all")

    def _add_figure(self, figure: Any) -> None:
        if figure.axes or figure.get_children()[1:]:
            buffer = io.BytesIO()
            figure.savefig(buffer, format="png", bbox_inches="tight")
            self._add(buffer.getvalue())
        self.plt.close(figure)

    def _add_image(self, image: Any) -> None:
        if not image.width * image.height:
            raise ValueError(f"this image is empty ({image.width} x {image.height} pixels): there is nothing to show. "
                             "A box lies inside of an image and has left < right and top < bottom")
        scale = (MAX_IMAGE_PIXELS / max(1, image.width * image.height)) ** 0.5
        if scale < 1:
            image = image.resize((max(1, int(image.width * scale)), max(1, int(image.height * scale))))
        if image.mode not in ("RGB", "RGBA", "L", "1", "P"):
            image = pictures.rgb(image)
        buffer = io.BytesIO()
        image.save(buffer, format="PNG", compress_level=1)
        self._add(buffer.getvalue())

    def _add(self, png: bytes) -> None:
        if len(self.shown) < self.max_images:
            self.shown.append(png)
        else:
            print(f"(only the first {self.max_images} images of a cell are returned)")

    # -- running -----------------------------------------------------------------------------------------------------
    def run(self, code: str) -> tuple[dict[str, Any], list[bytes]]:
        """({"ok", "stdout", "stderr", "ends_with_value", "opened"}, PNG files) of one cell. ends_with_value: stdout's last text
        is a value that was shown; opened: which files were shown by `image.show()`."""
        self.shown, self.opened, self.said = [], [], -1
        self._clear_streams()
        ok = self._guarded(code)
        if os.getpid() != self.pid:   # a child the cell forked ran off its end: it must not speak for the session
            os._exit(0)
        self.listen()
        reap()
        stdout, stderr = self._collect(0), self._collect(1)
        return {"ok": ok, "stdout": stdout, "stderr": stderr, "ends_with_value": self.said == self.streams[0].total,
                "opened": self.opened}, self.shown

    def _clear_streams(self) -> None:
        for name, stream in zip(("stdout", "stderr"), self.streams):
            stream.clear()
            if _size(stream.fd):
                os.ftruncate(stream.fd, 0)
            wrapper = getattr(sys, name)
            if getattr(wrapper, "buffer", None) is not stream or wrapper.closed:   # first cell, or replaced by the last
                setattr(sys, name, io.TextIOWrapper(stream, "utf-8", errors="replace", line_buffering=True))

    def _collect(self, which: int) -> str:
        stream = self.streams[which]
        _flush((sys.stdout, sys.stderr)[which])
        size = _size(stream.fd)      # what child processes and C code wrote to the descriptor itself
        if size:
            stream.write(os.pread(stream.fd, min(size, self.max_output), 0))
            stream.total += max(0, size - self.max_output)
        return stream.text()

    def on_interrupt(self, *_: Any) -> None:
        """SIGINT means: stop the cell. Outside a cell it comes too late and means nothing."""
        if self.running and os.getpid() == self.pid:
            self.running = False
            raise KeyboardInterrupt

    def _guarded(self, code: str) -> bool:
        self.count += 1
        ok = False
        try:
            self.running = True
            ok = self._execute(code, f"<cell {self.count}>")
            self._show_figures()
        except SystemExit as exc:
            ok = exc.code in (None, 0)
            if not ok:
                print(f"SystemExit: {exc.code}", file=sys.stderr)
        except BaseException as exc:  # noqa: B036,B902,BLE001 - the model's code may raise anything; the session goes on
            self.running = False
            self._report(exc)
        finally:
            self.running = False
        if not ok:
            self.plt.close("all")
        return ok

    def _execute(self, code: str, name: str) -> bool:
        """Run a cell; False when a command of it could not be had."""
        code, tree, skipped = magics.parse(textwrap.dedent(code), name)
        for note in skipped:
            print(note, file=sys.stderr)
        linecache.cache[name] = (len(code), None, code.splitlines(keepends=True), name)
        last = tree.body[-1] if tree.body else None
        if isinstance(last, ast.Expr):
            tree.body.pop()
        if tree.body:
            exec(compile(tree, name, "exec"), self.names)
        if isinstance(last, ast.Expr):
            value = eval(compile(ast.Expression(last.value), name, "eval"), self.names)
            if value is not None:
                self.names["_"] = value
                self._show_value(value)
        return not any(note.startswith("!") or note.startswith("%%") for note in skipped)

    def _show_value(self, value: Any) -> None:
        first = value[0] if isinstance(value, (list, tuple)) and value else value
        drawing = type(first).__module__.startswith("matplotlib") and not hasattr(value, "savefig")
        if not drawing:   # `plt.plot(...)` as last line: its figure is shown, its repr would only cost tokens
            self.display(value)

    def _report(self, exc: BaseException) -> None:
        try:
            report = traceback.TracebackException.from_exception(exc, compact=True)
            _trim(report, set())
            sys.stderr.write("".join(report.format()))
        except BaseException:  # noqa: B036,B902,BLE001 - e.g. __str__ of the model's exception raises, or memory is gone
            sys.stderr.write(f"{type(exc).__name__} (no details)\n")


def _size(fd: int) -> int:
    """Of a file; 0 where a cell has put something else, or nothing, in its place."""
    try:
        return os.lseek(fd, 0, os.SEEK_END)
    except OSError:
        return 0


def _flush(wrapper: Any) -> None:
    try:
        wrapper.flush()
    except (AttributeError, OSError, ValueError):   # the cell closed or replaced its own stdout
        pass


def _trim(report: Any, seen: set[int]) -> None:
    """Keep the frames of cells only, in the whole chain of causes."""
    if report is None or id(report) in seen:
        return
    seen.add(id(report))
    report.stack[:] = [frame for frame in report.stack if frame.filename.startswith("<cell")]
    for part in (report.__cause__, report.__context__, *(getattr(report, "exceptions", None) or ())):
        _trim(part, seen)


def reap() -> None:
    """Collect children that ended: a template's sessions, and in a session, the init of its PID namespace, any orphan."""
    try:
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass
    except ChildProcessError:
        pass
