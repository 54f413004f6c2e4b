"""TensorBoard behind `LogSink`: scalars, and text and picture panels for a few trajectories a step."""
from __future__ import annotations

import io
import math
import os
from typing import TYPE_CHECKING

from tensorboard.compat.proto.summary_pb2 import Summary
from torch.utils.tensorboard import SummaryWriter

if TYPE_CHECKING:
    from collections.abc import Sequence

    from PIL.Image import Image

    from hdpo.protocols import ShownRollout

Q_SIZE = "hdpo/q_size_is/"

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
        "seconds of a tool call": ["Multiline", ["tool/seconds/.*"]],
        "seconds a tool call waits for its turn": ["Multiline", ["tool/queue_wait_seconds/.*"]],
        "Python sessions that are alive": ["Multiline", ["tool/python_sessions/.*"]],
        "sessions lost, by reason": ["Multiline", ["odd/session/.*", "odd/tool/.*_unavailable"]],
        "judge: failures and seconds waited for": ["Multiline", ["judge/.*", "score/wait_s"]],
        "what was odd": ["Multiline", ["odd/.*"]]},
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
        self._sizes(step, scalars)
        self._writer.flush()

    def write_rollouts(self, step: int, rollouts: Sequence[ShownRollout]) -> None:
        """Text as it is: an indented block, so that the viewer's Markdown leaves the model's text alone."""
        for index, one in enumerate(rollouts):
            text = f"{one.text}\n\n{one.outcome}"
            self._writer.add_text(f"rollouts/{index}", "\n".join("    " + line for line in text.splitlines()), step)
            for number, image in enumerate(one.images, start=1):
                self._image(step, f"rollouts/{index}/image_{number}", image)

    def _sizes(self, step: int, scalars: dict[str, float]) -> None:
        """|Q| of the step's groups as a histogram: a bar for each size."""
        groups = scalars.get("hdpo/groups", 0.0)
        counts = {int(name.removeprefix(Q_SIZE)): round(share * groups) for name, share in scalars.items()
                  if name.startswith(Q_SIZE)}
        if groups and counts:
            sizes = sorted(counts)
            self._writer.add_histogram_raw(
                "hdpo/q_size", min=sizes[0], max=sizes[-1], num=sum(counts.values()),
                sum=sum(size * count for size, count in counts.items()),
                sum_squares=sum(size * size * count for size, count in counts.items()),
                bucket_limits=[size + 0.5 for size in sizes], bucket_counts=[counts[size] for size in sizes], global_step=step)

    def _image(self, step: int, tag: str, image: Image) -> None:
        """As JPEG: `SummaryWriter.add_image` makes a PNG, with ten times the bytes and CPU seconds of a photograph's."""
        buffer = io.BytesIO()
        image.convert("RGB").save(buffer, "JPEG", quality=85)
        shown = Summary.Image(height=image.height, width=image.width, colorspace=3, encoded_image_string=buffer.getvalue())
        self._writer._get_file_writer().add_summary(Summary(value=[Summary.Value(tag=tag, image=shown)]), step)

    def close(self) -> None:
        self._writer.close()
