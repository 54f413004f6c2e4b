"""Rollout dumps: one Parquet part per step and rank, with the pictures the model saw. One row is one trajectory.

Every rank writes its own part: gathering trajectories to one rank would need memory that grows with the number of
ranks. Pictures are encoded files (never base64) of bounded side; those of the prompt are encoded once a group and
stored once per row group by dictionary encoding. A file appears whole or not at all.
"""
from __future__ import annotations

import dataclasses
import glob
import io
import json
import logging
import os
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from hdpo.agent.parse import extract_answer
from hdpo.config import Config
from hdpo.errors import DataError, boundary
from hdpo.state.trained import TrainedRow, write_trained
from hdpo.types import Judgement, Reward, RewardedGroup, Task, ToolCall, Trajectory

if TYPE_CHECKING:
    from hdpo.ranks.world import World

log = logging.getLogger(__name__)
_DATA_URL = re.compile(r"data:[\w.+-]+/[\w.+-]+;base64,([A-Za-z0-9+/=\r\n]{64,})")
_ROW_GROUP_BYTES = 32 * 2**20       # of tokens and pictures, a picture counted as often as it is shown
_LOSSLESS_PIXELS = 256 * 256       # pictures up to this size keep every pixel (PNG); larger ones are JPEG


@dataclass(frozen=True, slots=True)
class DumpedRollout:
    """One row. `images` [I] are encoded files: `num_prompt_images` of the prompt, then `num_images` of each call."""

    step: int
    task_id: str
    data_source: str
    tool_needed: bool | None
    sample_index: int
    prompt: str
    question: str
    turns: list[str]
    calls: list[dict[str, Any]]        # name, arguments, ok, num_images, seconds, infrastructure
    observations: list[str]            # one per call
    images: list[bytes]
    num_prompt_images: int
    answer: str | None                 # of the last turn; None when it holds none
    ground_truth: list[str]
    verdict: str
    by: str
    detail: str                        # the judge's raw reply or the rule's name
    end: str
    error: str
    reward_accuracy: float
    reward_tool: float
    correct: bool
    format_ok: bool
    scored: bool
    advantages: list[float]            # [C], empty outside training
    num_tool_calls: int
    prompt_length: int
    token_ids: list[int]               # [L]
    mask: list[int]                    # [L]
    log_probs: list[float]             # [L]
    weight_version: int
    seconds: float
    weight_versions: list[int]         # [L] of the weights that sampled each token with its log-prob; -1 where mask is 0
    index: int                         # number of its prompt in the step, over all ranks: to which mini-batch it belongs


_TYPES = {
    "int": pa.int64(), "str": pa.string(), "bool": pa.bool_(), "bool | None": pa.bool_(), "str | None": pa.string(),
    "float": pa.float64(), "list[str]": pa.list_(pa.string()), "list[bytes]": pa.list_(pa.binary()),
    "list[int]": pa.list_(pa.int32()), "list[float]": pa.list_(pa.float32()), "list[dict[str, Any]]": pa.string(),
}
SCHEMA = pa.schema([(field.name, _TYPES[str(field.type)]) for field in dataclasses.fields(DumpedRollout)])


class RolloutDumps:
    """The dumps of a run, within log.rollouts_gib: what is left of it is shared equally by the dumps to come.

    In the order of a rank's groups, a group whose pictures no longer fit into the dump's share is kept without them, and one
    whose text does not fit is left out. What is written stays, and no run ends for its dumps' size.
    """

    def __init__(self, config: Config, world: World) -> None:
        self._config, self._world = config, world
        self._folder = config.run.path / "rollouts"
        self._used: float | None = None      # bytes of this rank's share of the folder
        self._told = False

    def write(self, step: int, groups: Sequence[RewardedGroup], advantages: Sequence[Sequence[float]] | None,
              trained: Sequence[TrainedRow] = ()) -> None:
        """This rank's part of the dump of `step`, counted from 1. What the trainer saw takes at most a quarter of it."""
        world = self._world
        if self._used is None:
            self._used = sum(file.stat().st_size for file in self._folder.rglob("*.parquet")) / world.size
        limit = self._limit(step)
        beside = write_trained(self._folder, step, trained, world.rank, world.size, None if limit is None else limit // 4)
        used = beside.stat().st_size
        part = write_rollouts(self._folder / f"step_{step:06d}.parquet", groups, step=step, rank=world.rank, world=world.size,
                              advantages=advantages, byte_limit=None if limit is None else max(0, limit - used),
                              thinned=self._tell)
        self._used += part.stat().st_size + used

    def _tell(self, groups: int) -> None:
        if not self._told:
            self._told = True
            log.warning("rollout dumps are thinned to their share of log.rollouts_gib: in this one %d groups have no pictures or "
                        "are left out", groups)

    def _limit(self, step: int) -> int | None:
        given = self._config.log
        if not given.rollouts_gib or self._used is None:
            return None
        to_come = 1 + max(0, self._config.optim.steps - step) // given.rollouts_every
        return int(max(0.0, given.rollouts_gib * 2**30 / self._world.size - self._used) / to_come)


def write_rollouts(path: str | os.PathLike[str], groups: Sequence[RewardedGroup], *, step: int, rank: int = 0,
                   world: int = 1, advantages: Sequence[Sequence[float]] | None = None, image_side: int = 1024,
                   byte_limit: int | None = None, thinned: Callable[[int], None] | None = None) -> Path:
    """Write this rank's part of `path`, for example `rollouts/step_000012.parquet`; returns the file written.

    With one rank the file is `path` itself, otherwise `step_000012.rank3.parquet`; `read_rollouts(path)` finds either.
    `advantages` [B][C]: trajectories of group 0 first. `image_side`: longest side kept, pixels. `byte_limit`: about so large
    may the part be, see RolloutDumps (None: no limit); `thinned` is told how many groups are not whole for it.
    """
    rows: list[DumpedRollout] = []
    held, first, lacking = 0, 0, 0
    for group in groups:
        given = [list(some) for some in advantages[first:first + len(group.rewards)]] if advantages is not None else [
            [] for _ in group.rewards]
        first += len(group.rewards)
        text = sum(_text_bytes(trajectory) for trajectory in group.trajectories)
        if byte_limit is not None and held + text > byte_limit:
            lacking += 1
            continue
        pictures = _Pictures(image_side)
        shown = [pictures.of(trajectory, len(group.task.images)) for trajectory in group.trajectories]
        if byte_limit is not None and held + text + pictures.nbytes > byte_limit:
            shown, pictures.nbytes = [([], 0) for _ in shown], 0
            lacking += 1
        held += text + pictures.nbytes
        for trajectory, judgement, reward, own, (images, count) in zip(
                group.trajectories, group.judgements, group.rewards, given, shown, strict=True):
            rows.append(_dumped(step, trajectory, judgement, reward, own, images, count))
    if lacking and thinned is not None:
        thinned(lacking)
    part = _part(Path(path), rank, world)
    _remove_other_layout(Path(path), rank, world)
    write_rows(part, rows)
    return part


class _Pictures:
    """A group's pictures, each encoded once however many of its rollouts show it; `nbytes` of all of them."""

    def __init__(self, side: int) -> None:
        self._side, self.nbytes = side, 0
        self._encoded: dict[str, bytes] = {}

    def of(self, trajectory: Trajectory, in_prompt: int) -> tuple[list[bytes], int]:
        """(the trajectory's pictures, how many of them are the prompt's)."""
        keys = trajectory.image_keys or tuple(
            f"{'' if i < in_prompt else trajectory.sample_index} {i}" for i in range(len(trajectory.images)))
        for key, image in zip(keys, trajectory.images, strict=True):
            if key not in self._encoded:
                self._encoded[key] = encode_image(image, self._side)
                self.nbytes += len(self._encoded[key])
        return [self._encoded[key] for key in keys], min(in_prompt, len(keys))


def _text_bytes(trajectory: Trajectory) -> int:
    """About what a row takes without its pictures: 4 bytes a token for id, mask and log-prob compressed, and half its text."""
    text = sum(map(len, trajectory.turns)) + sum(len(call.observation) for call in trajectory.calls)
    return 4 * len(trajectory.token_ids) + text // 2 + 500


def _dumped(step: int, trajectory: Trajectory, judgement: Judgement, reward: Reward, advantages: list[float],
            images: list[bytes], num_prompt_images: int) -> DumpedRollout:
    task, truth = trajectory.task, trajectory.task.ground_truth
    answer = extract_answer(trajectory.final_turn)
    return DumpedRollout(
        step=step, task_id=task.id, data_source=task.data_source, tool_needed=task.tool_needed,
        sample_index=trajectory.sample_index, prompt=_prompt_text(task), question=_storable(task.question),
        turns=[_storable(turn) for turn in trajectory.turns], calls=[_call_fields(call) for call in trajectory.calls],
        observations=[_storable(call.observation) for call in trajectory.calls],
        images=images, num_prompt_images=num_prompt_images,
        answer=None if answer is None else _storable(answer),
        ground_truth=[truth] if isinstance(truth, str) else list(truth),
        verdict=judgement.verdict.value, by=judgement.by, detail=_storable(judgement.detail),
        end=trajectory.end.value, error=_storable(trajectory.error),
        reward_accuracy=reward.accuracy, reward_tool=reward.tool, correct=reward.correct, format_ok=reward.format_ok,
        scored=reward.scored, advantages=advantages, num_tool_calls=trajectory.num_tool_calls,
        prompt_length=trajectory.prompt_length, token_ids=trajectory.token_ids, mask=trajectory.mask,
        log_probs=trajectory.log_probs, weight_version=trajectory.weight_version, seconds=trajectory.seconds,
        weight_versions=trajectory.versions, index=trajectory.index)


def read_rollouts(path: str | os.PathLike[str], *, columns: Sequence[str] | None = None,
                  task_ids: Sequence[str] | None = None) -> list[DumpedRollout]:
    """Rows of a dump (all its parts) or of every dump in a folder, ordered by step, part and row.

    `columns` reads only those (the others are None), so that a large dump can be scanned without its pictures; `task_ids`
    reads only rows of those tasks.
    Raises DataError when there is no such dump or a part is damaged.
    """
    path = Path(path)
    parts = sorted(path.glob("*.parquet"), key=_part_order) if path.is_dir() else rollout_parts(path)
    if not parts:
        raise DataError(f"{path}: no rollout dump there")
    rows: list[DumpedRollout] = []
    for part in parts:
        with boundary(DataError, f"{part}: not a readable rollout dump", pa.ArrowException, OSError):
            kept = pq.read_schema(part).names
            table = pq.read_table(part, columns=None if columns is None else list(columns),
                                  filters=None if task_ids is None else [("task_id", "in", list(task_ids))])
        if "task_id" not in kept:
            raise DataError(f"{part}: no rollout dump, it has no column task_id")
        rows += [_from_columns(row) for row in table.to_pylist()]
    return rows


def encode_image(image: Image.Image, side: int = 1024) -> bytes:
    """A PNG or JPEG file of `image`, made smaller where a side is above `side` pixels."""
    if max(image.size) > side:
        scale = side / max(image.size)
        image = image.resize((max(1, round(image.width * scale)), max(1, round(image.height * scale))))
    image = image.convert("RGB")
    buffer = io.BytesIO()
    if image.width * image.height <= _LOSSLESS_PIXELS:
        image.save(buffer, "PNG")
    else:
        image.save(buffer, "JPEG", quality=90)
    return buffer.getvalue()


def _prompt_text(task: Task) -> str:
    return "\n\n".join(_storable(f"[{message['role']}]\n{message['content']}") for message in task.messages)


def _call_fields(call: ToolCall) -> dict[str, Any]:
    return {"name": call.name, "arguments": call.arguments, "ok": call.ok, "num_images": call.num_images,
            "seconds": call.seconds, "infrastructure": call.infrastructure}


def _storable(text: str) -> str:
    """Without base64 (pictures have a column of their own) and lone surrogates, which Parquet's UTF-8 cannot hold."""
    short = _DATA_URL.sub(lambda found: f"[{len(found[1])} characters of base64]", text)
    return short.encode("utf-8", "replace").decode()


def write_rows(path: Path, rows: Sequence[DumpedRollout]) -> None:
    """Write rows as they are, whole or not at all."""
    columns = {name: [getattr(row, name) for row in rows] for name in SCHEMA.names}
    columns["calls"] = [_storable(json.dumps(calls)) for calls in columns["calls"]]
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        table = pa.table(columns, schema=SCHEMA)
        with pq.ParquetWriter(temporary, SCHEMA, compression="zstd", use_dictionary=True,
                              dictionary_pagesize_limit=2**30) as writer:   # pictures: each once a row group
            for first, end in _row_groups(rows):
                writer.write_table(table.slice(first, end - first), row_group_size=max(1, end - first))
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _row_groups(rows: Sequence[DumpedRollout]) -> list[tuple[int, int]]:
    """(first row, end) of each row group: whole groups of rollouts, so large that a reader of one row reads little else."""
    found, first, held = [], 0, 0
    for index, row in enumerate(rows):
        if held >= _ROW_GROUP_BYTES and row.task_id != rows[index - 1].task_id:
            found.append((first, index))
            first, held = index, 0
        held += 9 * len(row.token_ids) + sum(map(len, row.images))
    return [*found, (first, len(rows))]


def _from_columns(row: dict[str, Any]) -> DumpedRollout:
    if row.get("calls") is not None:
        row["calls"] = json.loads(row["calls"])
    fields: dict[str, Any] = {name: row.get(name) for name in SCHEMA.names}
    return DumpedRollout(**fields)


def _part(path: Path, rank: int, world: int) -> Path:
    return path if world == 1 else path.with_suffix(f".rank{rank}.parquet")


def rollout_parts(path: Path) -> list[Path]:
    """The files that make up the dump `path`, in rank order; none if it was never written."""
    if path.exists():
        return [path]
    parts = path.parent.glob(f"{glob.escape(path.stem)}.rank*.parquet")
    return sorted((part for part in parts if part.stem.rpartition(".rank")[2].isdecimal()), key=_part_order)


def _part_order(path: Path) -> tuple[str, int]:
    stem, _, rank = path.stem.partition(".rank")
    return stem, int(rank) if rank.isdecimal() else 0


def _remove_other_layout(path: Path, rank: int, world: int) -> None:
    """Parts that another number of ranks left behind under the same name would be read as rows of this step."""
    if rank:
        return
    stale = [part for part in path.parent.glob(f"{path.stem}.rank*.parquet") if world == 1 or _part_order(part)[1] >= world]
    for part in stale + ([path] if world > 1 else []):
        part.unlink(missing_ok=True)
