"""Generated rows in the Metis-RL schema: photographs of real sizes, JPEG-encoded, in files of any size and layout.

Sizes are those of the data the 8B settings are meant for: 19 % 800x600, 25 % 1000x800, 36 % 1280x960, 14 % 2250x1500, 5 %
4032x3024, 1 % 7680x4320. A picture's file is padded behind its end with bytes of its own to about 0.5 bytes a pixel (0.7 MB in
the mean), so that no two rows are equal and decoders still read them.
"""
from __future__ import annotations

import io
import json
import random
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

SIZES = [(800, 600)] * 19 + [(1000, 800)] * 25 + [(1280, 960)] * 36 + [(2250, 1500)] * 14 + [(4032, 3024)] * 5 + [(7680, 4320)]
BYTES_PER_PIXEL = 0.5
SCHEMA = pa.schema([
    ("data_source", pa.string()), ("prompt", pa.list_(pa.struct([("role", pa.string()), ("content", pa.string())]))),
    ("images", pa.list_(pa.struct([("bytes", pa.binary()), ("path", pa.string())]))),
    ("reward_model", pa.struct([("ground_truth", pa.string()), ("style", pa.string())])),
    ("extra_info", pa.struct([("index", pa.string())]))])


@lru_cache
def photograph(width: int, height: int) -> Image.Image:
    """Smooth areas, edges and a little noise."""
    coarse = np.random.default_rng(width).integers(0, 256, (height // 40, width // 40, 3), dtype=np.uint8)
    image = np.array(Image.fromarray(coarse).resize((width, height), Image.Resampling.BILINEAR))
    noise = np.random.default_rng(height).integers(0, 8, (512, 512, 3), dtype=np.uint8)
    image //= 2
    image += np.tile(noise, (height // 512 + 1, width // 512 + 1, 1))[:height, :width]
    return Image.fromarray(image)


@lru_cache
def jpeg(width: int, height: int) -> bytes:
    buffer = io.BytesIO()
    photograph(width, height).save(buffer, "JPEG", quality=85)
    return buffer.getvalue()


def _picture(index: int) -> tuple[tuple[int, int], int]:
    """(width and height, bytes of the file) of a row's picture."""
    coin = random.Random(index)
    size = coin.choice(SIZES)
    return size, int(size[0] * size[1] * BYTES_PER_PIXEL * (0.7 + 0.6 * coin.random()))


def row_bytes(index: int) -> int:
    size, wanted = _picture(index)
    return max(wanted, len(jpeg(*size)) + 16)


def row(index: int) -> dict[str, Any]:
    data = jpeg(*_picture(index)[0])
    padding = random.Random(-index).randbytes(row_bytes(index) - len(data))
    return {"data_source": "generated", "prompt": [{"role": "user", "content": f"<image>What is written on sign {index}?"}],
            "images": [{"bytes": data + padding, "path": None}],
            "reward_model": {"ground_truth": str(index), "style": "rule"}, "extra_info": {"index": str(index)}}


def write_rows(file: Path, rows: int, group_rows: int) -> int:
    """`rows` rows in row groups of `group_rows` (what `datasets` writes: 100; pandas: all in one). Returns the file's bytes;
    a file beside it (.sizes.json) holds those of each row's picture.

    A group is in memory as a whole while it is written.
    """
    with pq.ParquetWriter(file, SCHEMA, compression="none", use_dictionary=False) as writer:
        for first in range(0, rows, group_rows):
            last = min(rows, first + group_rows)
            batches = [pa.RecordBatch.from_pylist([row(i) for i in range(start, min(last, start + 100))], SCHEMA)
                       for start in range(first, last, 100)]
            writer.write_table(pa.Table.from_batches(batches), row_group_size=group_rows)
    file.with_suffix(".sizes.json").write_text(json.dumps([row_bytes(index) for index in range(rows)]))
    return file.stat().st_size
