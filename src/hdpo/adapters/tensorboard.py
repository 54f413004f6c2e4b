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


LAYOUT = {
    "wisdom": {
        "tool rate": ["Multiline", ["tool/rate$", "tool/rate_needed", "tool/rate_not_needed"]],
        "tool rate by source and need": ["Multiline", ["tool/rate_of/.*"]],
        "accuracy, with a call and without": ["Multiline", ["reward/accuracy/mean", "reward/accuracy_with.*"]],
        "bad decisions": ["Multiline", ["tool/blind_call_rate", "tool/missed_call_rate", "tool/failed_call_rate"]]},
    "signal": {
        "share of groups whose |Q| is": ["Multiline", ["hdpo/q_size_is/.*"]],
        "groups with a signal": ["Multiline", ["hdpo/groups_with_.*"]],
        "tool channel's share of the gradient, of |A|": ["Multiline", ["hdpo/tool_gradient_share", "hdpo/tool_advantage_mass"]],
        "angle between the channels' gradients (cosine)": ["Multiline", ["hdpo/gradient_cosine"]]},
    "health": {
        "trainer against engine": ["Multiline", ["mismatch/k1", "mismatch/k3", "mismatch/abs"]],
        "who decided": ["Multiline", ["score/by_.*", "score/unscored"]],
        "tools failing for our own reasons": ["Multiline", ["tool/infrastructure", "end/infrastructure"]],
        "seconds of a tool call": ["Multiline", ["tool/seconds/.*"]]},
    "speed": {
        "seconds of a phase": ["Multiline", ["time/.*"]],
        "sampled tokens a second": ["Multiline", ["perf/sampled_tokens_per_second/.*"]],
        "learning rate": ["Multiline", ["actor/lr"]]},
}
"""The board under TensorBoard's "custom scalars"."""


class TensorBoardSink:
    """Writes event files into `folder`. `resume_step`: the step a resumed run continues with; TensorBoard then hides
    what an interrupted run had written from that step on."""

    def __init__(self, folder: str | os.PathLike[str], resume_step: int | None = None) -> None:
        self._writer = SummaryWriter(str(folder), purge_step=resume_step, flush_secs=10)
        self._writer.add_custom_scalars(LAYOUT)

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
