"""Rows as training records: tasks of the Metis-RL schema, and demonstrations.

Every row is checked once a node (see index.py). What a stream hands out is read when it is asked for, by whoever asks: in RL
the rank that claims the prompt. Images stay encoded at their original size.
"""
from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from PIL.Image import Image

from hdpo.agent.chat import IMAGE_MARKER, ChatFormat
from hdpo.agent.demonstration import demonstration_length
from hdpo.agent.images import check_image, decode_image
from hdpo.config import DataConfig
from hdpo.data.index import Checked, RowIndex, index_rows
from hdpo.data.pictures import encoded_images, outside_file, picture_cells
from hdpo.data.rows import checked_extra, checked_messages, checked_truth, row_text
from hdpo.data.sources import DatasetName, kind_of, parquet_footer, resolve
from hdpo.data.store import Row, file_state, open_rows, require
from hdpo.data.streams import RowStream, Unread, bad_rows
from hdpo.errors import DataError
from hdpo.types import Task

TASK_COLUMNS = ("prompt", "reward_model")
DEMONSTRATION_COLUMNS = ("messages",)


class _Reader:
    """Rows of files with the columns that a record needs."""

    columns: tuple[str, ...]
    text_column: str

    def __init__(self, files: Sequence[str], chat: ChatFormat, config: DataConfig) -> None:
        self.rows = open_rows(files, cache=config.cache, image_root=config.image_root)
        self.rows.require(self.columns)
        self.chat, self.config = chat, config
        self.known: dict[str, Any] = {}      # how the picture files were that rows refer to, when they were checked

    def read(self, index: int) -> tuple[Row, list[dict[str, str]], tuple[bytes, ...]]:
        """(the row, its messages, its pictures)."""
        row = self.rows.row(index)
        if absent := [column for column in self.columns if column not in row]:
            raise DataError(f"{', '.join(absent)} is missing")
        images = encoded_images(row.get("images"), self.rows.folders(index))
        for cell in picture_cells(row.get("images")) if self.known else ():
            file = outside_file(cell, self.rows.folders(index))
            if file is not None and self.known.get(str(file), [])[1:] != file_state(str(file))[1:]:
                raise DataError(f"{file} was rewritten")
        return row, self._with_markers(checked_messages(row[self.text_column], self.text_column), len(images)), images

    def checked(self, index: int, row: Row, length: int) -> Checked:
        files = (outside_file(cell, self.rows.folders(index)) for cell in picture_cells(row.get("images")))
        source = row_text(str(row.get("data_source") or "unknown"))
        return Checked(length, tuple(file for file in files if file is not None), source)

    def indexed(self, wanted: int = 0) -> RowIndex:
        """What checking the rows has found, now or before; what is read later must be as it was then."""
        self.index = index_rows(self.rows, self.check, self.settings(), cache=self.config.cache, wanted=wanted)
        self.known = {state[0]: state for state in self.index.outside}
        return self.index

    def check(self, index: int) -> Checked:
        """Raises DataError for a bad row."""
        raise NotImplementedError

    def settings(self) -> list[Any]:
        """Differ where the outcomes of `check` may."""
        raise NotImplementedError

    def again(self, index: int, exc: DataError) -> DataError:
        """What is said of a row that was good when it was checked."""
        return DataError(f"{self.rows.name(index)}: {exc} (it was readable when the data was checked)")

    def _with_markers(self, messages: list[dict[str, str]], images: int) -> list[dict[str, str]]:
        """With data.insert_markers, a text without any marker gets one for each picture, before the first user message."""
        given = [message for message in messages if message["role"] != "assistant"]
        if not self.config.insert_markers or not images or any(IMAGE_MARKER in message["content"] for message in given):
            return messages
        first = next(number for number, message in enumerate(messages) if message["role"] == "user")
        content = IMAGE_MARKER * images + "\n" + messages[first]["content"]
        return [*messages[:first], messages[first] | {"content": content}, *messages[first + 1:]]


class _Tasks(_Reader):
    columns, text_column = TASK_COLUMNS, "prompt"

    def __init__(self, files: Sequence[str], chat: ChatFormat, config: DataConfig, max_images: int | None) -> None:
        super().__init__(files, chat, config)
        self.max_images = max_images

    def check(self, index: int) -> Checked:
        row, messages, images = self.read(index)
        task = self._task(index, row, messages, images)
        if self.chat.sees and self.max_images is not None and len(task.images) > self.max_images:
            raise DataError(f"the prompt has {len(task.images)} images, rollout.max_images is {self.max_images}")
        sizes = [check_image(data, f"image {i}") for i, data in enumerate(task.images)]
        length = self.chat.prompt_length(task.messages, sizes)
        if length > self.config.max_prompt_tokens:
            raise DataError(f"the prompt has {length} tokens, data.max_prompt_tokens is {self.config.max_prompt_tokens}")
        return self.checked(index, row, length)

    def make(self, index: int) -> Task:
        try:
            return self._task(index, *self.read(index))
        except DataError as exc:
            raise self.again(index, exc) from exc

    def _task(self, index: int, row: Row, messages: list[dict[str, str]], images: tuple[bytes, ...]) -> Task:
        name, source = self.rows.name(index), row.get("data_source")
        task = Task(name, row_text(str(source or "unknown")), messages, images, checked_truth(row["reward_model"]),
                    checked_extra(row.get("extra_info")))
        return replace(task, id=task.row_index or name, row=index)

    def settings(self) -> list[Any]:
        return ["task", self.chat.fingerprint, self.config.max_prompt_tokens, self.config.insert_markers, self.max_images]


class TaskStream(RowStream[Task]):
    """RL rows: prompt [{role, content}], reward_model {ground_truth}, and if there are any images, data_source, extra_info.

    The task's id is extra_info.index, or file and row. A row is bad if an image is broken, a field has a shape that
    `hdpo.data.rows` can't read, or the prompt is longer than config.max_prompt_tokens or has more than `max_images` images.
    """

    def __init__(self, files: Sequence[str], chat: ChatFormat, config: DataConfig, seed: int,
                 max_images: int | None = None) -> None:
        reader = _Tasks(files, chat, config, max_images)
        index = reader.indexed()
        super().__init__(reader.rows, index, reader.make, config, seed)


@dataclass(frozen=True, slots=True)
class Demonstration:
    """A recorded conversation, checked; `images` decodes the encoded files at original size."""

    id: str
    messages: list[dict[str, str]]
    encoded_images: tuple[bytes, ...]
    num_tokens: int
    source: int = -1           # number of its data_source, see DemonstrationStream.sources

    @property
    def images(self) -> list[Image]:
        return [decode_image(data, f"{self.id}: image {i}") for i, data in enumerate(self.encoded_images)]


class _Demonstrations(_Reader):
    columns, text_column = DEMONSTRATION_COLUMNS, "messages"

    def __init__(self, files: Sequence[str], chat: ChatFormat, config: DataConfig, max_tokens: int) -> None:
        super().__init__(files, chat, config)
        self.max_tokens = max_tokens

    def check(self, index: int) -> Checked:
        row, messages, images = self.read(index)
        sizes = [check_image(data, f"image {i}") for i, data in enumerate(images)]
        length = demonstration_length(self.chat, messages, sizes)
        if self.max_tokens and length > self.max_tokens:
            raise DataError(f"the demonstration has {length} tokens, the limit is {self.max_tokens}")
        return self.checked(index, row, length)

    def make(self, index: int) -> Demonstration:
        try:
            _, messages, images = self.read(index)
        except DataError as exc:
            raise self.again(index, exc) from exc
        return Demonstration(self.rows.name(index), messages, images, self.index.lengths[index], self.index.source_of[index])

    def settings(self) -> list[Any]:
        return ["demonstration", self.chat.fingerprint, self.max_tokens, self.config.insert_markers]


class DemonstrationStream(RowStream[Demonstration]):
    """SFT rows: messages [{role, content}] (see hdpo.agent.demonstration), and images if there are any.

    A row is bad if its messages have another shape, an image is broken, or it is longer than `max_tokens` (0: no limit).
    """

    def __init__(self, files: Sequence[str], chat: ChatFormat, config: DataConfig, seed: int, max_tokens: int = 0,
                 rows_per_step: int = 0) -> None:
        reader = _Demonstrations(files, chat, config, max_tokens)
        index = reader.indexed()
        super().__init__(reader.rows, index, reader.make, config, seed, rows_per_step)

    @property
    def sources(self) -> list[str]:
        """The rows' data_source, the most frequent first; equal on every rank."""
        return self.index.sources


def read_tasks(files: Sequence[str], chat: ChatFormat, config: DataConfig, rows: int = 0,
               max_images: int | None = None) -> Unread[Task]:
    """Held-out tasks in file order, the first `rows` good ones (0: all), each read when it is asked for."""
    reader = _Tasks(files, chat, config, max_images)
    index = reader.indexed(rows)
    bad_rows(reader.rows, index, config)
    return Unread(reader.make, index.good())


def read_demonstrations(files: Sequence[str], chat: ChatFormat, config: DataConfig, rows: int = 0,
                        max_tokens: int = 0) -> Unread[Demonstration]:
    """Held-out demonstrations in file order, the first `rows` good ones (0: all), each read when it is asked for."""
    reader = _Demonstrations(files, chat, config, max_tokens)
    index = reader.indexed(rows)
    bad_rows(reader.rows, index, config)
    return Unread(reader.make, index.good())


def check_columns(files: Sequence[str], config: DataConfig, *, demonstrations: bool) -> int:
    """Rows in files of RL rows or demonstrations; of Parquet files the footers are read alone.

    Raises DataError for a missing file or column.
    """
    columns = DEMONSTRATION_COLUMNS if demonstrations else TASK_COLUMNS
    total = 0
    for source in files:
        found = resolve(source)
        footers = [] if isinstance(found, DatasetName) else [parquet_footer(file) for file in found if kind_of(file) == "parquet"]
        if isinstance(found, DatasetName) or len(footers) < len(found):
            rows = open_rows([source], cache=config.cache)
            rows.require(columns)
            total += len(rows)
            continue
        for file, (count, names) in zip(found, footers, strict=True):
            require(str(file), columns, names)
            total += count
    return total
