"""TensorBoard behind `LogSink`: scalars, and text and picture panels for a few trajectories a step."""
from __future__ import annotations

import io
import math
import os
from typing import TYPE_CHECKING

from tensorboard.compat.proto.summary_pb2 import Summary
from torch.utils.tensorboard import SummaryWriter

if TYPE_CHECKING:
    from PIL.Image import Image


class TensorBoardSink:
    """Writes event files into `folder`. `resume_step`: the step a resumed run continues with; TensorBoard then hides
    what an interrupted run had written from that step on."""

    def __init__(self, folder: str | os.PathLike[str], resume_step: int | None = None) -> None:
        self._writer = SummaryWriter(str(folder), purge_step=resume_step, flush_secs=10)

    def write(self, step: int, scalars: dict[str, float]) -> None:
        for name, value in scalars.items():
            if math.isfinite(value):    # one infinite point would hide a curve's scale
                self._writer.add_scalar(name, value, step)
        self._writer.flush()

    def write_text(self, step: int, tag: str, text: str) -> None:
        """Shown as it is: an indented block, so that the viewer's Markdown leaves the model's text alone."""
        self._writer.add_text(tag, "\n".join("    " + line for line in text.splitlines()), step)

    def write_image(self, step: int, tag: str, image: Image) -> None:
        """As JPEG: `SummaryWriter.add_image` makes a PNG, with ten times the bytes and CPU seconds of a photograph's."""
        buffer = io.BytesIO()
        image.convert("RGB").save(buffer, "JPEG", quality=85)
        shown = Summary.Image(height=image.height, width=image.width, colorspace=3, encoded_image_string=buffer.getvalue())
        self._writer._get_file_writer().add_summary(Summary(value=[Summary.Value(tag=tag, image=shown)]), step)

    def close(self) -> None:
        self._writer.close()
