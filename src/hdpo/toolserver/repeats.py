"""A log in which a line that repeats is counted instead of written: what fails thousands of times a second fills no disk."""
from __future__ import annotations

import logging
import re
import threading
from typing import TextIO

PERIOD_S = 60.0
MOST = 1000
"""Different lines that are counted at once; beyond it lines pass as they come, once a period in all."""
_VARIES = re.compile(r"0x[0-9a-f]+|\d+")


class Counting(logging.StreamHandler[TextIO]):
    """Writes a line when it is new; its repetitions within `period_s` are one line with their number afterwards.

    Lines that differ in numbers alone repeat each other.
    """

    def __init__(self, stream: TextIO, period_s: float = PERIOD_S) -> None:
        super().__init__(stream)
        self._period_s = period_s
        self._seen: dict[tuple[str, int, str], tuple[logging.LogRecord, int]] = {}
        self._timer: threading.Timer | None = None

    def emit(self, record: logging.LogRecord) -> None:      # called under the handler's lock
        kind = record.name, record.levelno, _VARIES.sub("#", record.getMessage())
        if kind not in self._seen and len(self._seen) >= MOST:
            kind = "", 0, ""
        if kind in self._seen:
            self._seen[kind] = record, self._seen[kind][1] + 1
            return
        self._seen[kind] = record, 0
        super().emit(record)
        if self._timer is None:
            self._timer = threading.Timer(self._period_s, self.tell)
            self._timer.daemon = True
            self._timer.start()

    def tell(self) -> None:
        """Write how often lines were repeated, and begin anew."""
        with self.lock or threading.RLock():
            seen, self._seen = self._seen, {}
            if self._timer is not None:
                self._timer.cancel()
                self._timer = None
            for record, times in seen.values():
                if times:
                    said = f"{record.getMessage().splitlines()[0]} (this and {times - 1} more like it)"
                    super().emit(logging.LogRecord(record.name, record.levelno, record.pathname, record.lineno, said, None, None))

    def close(self) -> None:
        self.tell()
        super().close()
