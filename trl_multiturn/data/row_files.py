"""Rows on disk, written as they are selected: memory holds a few of them, and a file is whole or not there."""

from __future__ import annotations

import shutil
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from secrets import token_hex
from typing import Any, Literal, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.compute
from datasets import Dataset, Features, List, Value, concatenate_datasets

from ..durable import put_in_place, writing
from .pairing import (
    OPTIONAL_COLUMNS,
    common_columns,
    dataset_of,
    optional_columns,
    preference_features,
    preference_row,
    unpaired_features,
    unpaired_row,
)
from .selection import Selection


T = TypeVar("T")

_ROWS_PER_BATCH = 256


def write_rows(selections: Iterable[Selection], folder: Path, row_format: Literal["preference", "unpaired"]) -> None:
    """
    Writes the rows of one selection after another to a folder that `datasets.load_from_disk` reads.

    They are those of [`build_preference_dataset`] or [`build_unpaired_dataset`] on all of them at once.

    Args:
        selections (`Iterable[Selection]`):
            Such as [`select_by_prompt`] finds.
        folder (`Path`):
            What is there is replaced, when all rows are written.
        row_format (`"preference"` or `"unpaired"`):
            Which rows to write.
    """
    brings: Counter[str] = Counter()
    count = 0

    def rows() -> Iterator[dict[str, Any]]:
        nonlocal count
        for selection in selections:
            if row_format == "preference":
                yield from map(preference_row, selection.pairs)
                continue
            for trajectory in selection.trajectories:
                count += 1
                brings.update(optional_columns(trajectory))
                yield unpaired_row(trajectory)

    # Which columns all rows have is known at the end, so they are first written with every column
    found = folder.with_name(f"{folder.name}.found")
    features = preference_features() if row_format == "preference" else unpaired_features(OPTIONAL_COLUMNS)
    schema = Features(features).arrow_schema
    with writing(found):
        found.parent.mkdir(parents=True, exist_ok=True)
        with pa.OSFile(str(found), "wb") as file, pa.ipc.new_stream(file, schema) as stream:
            for batch in _batches(rows()):
                stream.write_table(dataset_of(batch, features).data.table)
    dataset = Dataset.from_file(str(found))
    if row_format == "unpaired":
        common = common_columns(brings, count)
        dataset = dataset.remove_columns([name for name in OPTIONAL_COLUMNS if name not in common])
    save_rows(dataset, folder)
    found.unlink()


def save_rows(rows: Dataset, folder: Path) -> None:
    """Saves rows to a folder, whole or not at all; what was there is replaced."""
    partial = folder.with_name(f"{folder.name}.partial")
    with writing(folder):
        shutil.rmtree(partial, ignore_errors=True)
        rows.save_to_disk(partial, num_shards=1)  # without a number, an empty dataset is written as no shard at all
        if folder.exists():
            shutil.rmtree(folder)
        put_in_place(partial, folder)


def with_list_column(rows: Dataset, name: str, values: Iterable[np.ndarray]) -> Dataset:
    """
    The rows with one more column, a list of float32 per row, written as it is computed.

    Where the rows are files the column is one, too, beside them, like what `Dataset.map` computes
    ([`forget_caches`] deletes both); where they are in memory it takes 4 bytes a number there.

    Args:
        rows ([`~datasets.Dataset`]):
            Any rows.
        name (`str`):
            Of the new column.
        values (`Iterable[np.ndarray]`):
            One array per row, in order.
    """
    features = Features({name: List(Value("float32"))})
    folder = Path(rows.cache_files[0]["filename"]).parent if rows.cache_files else None
    memory = pa.BufferOutputStream()
    path = folder and folder / f"cache-{token_hex(8)}.arrow"
    with (
        pa.OSFile(str(path), "wb") if path else memory as sink,
        pa.ipc.new_stream(sink, features.arrow_schema) as stream,
    ):
        for batch in _batches(values):
            offsets = np.cumsum([0, *map(len, batch)], dtype=np.int32)
            lists = pa.ListArray.from_arrays(offsets, np.concatenate(batch).astype(np.float32, copy=False))
            stream.write_batch(pa.record_batch([lists], schema=features.arrow_schema))
    column = Dataset.from_file(str(path)) if path else Dataset.from_buffer(memory.getvalue())
    return concatenate_datasets([rows, column], axis=1)


def list_lengths(rows: Dataset, name: str) -> np.ndarray:
    """How many entries the lists of a column have, int64, one per row."""
    tables = rows.select_columns([name]).with_format("arrow").iter(_ROWS_PER_BATCH)
    lengths = [pa.compute.list_value_length(table[name]).to_numpy() for table in tables]
    return np.concatenate([np.empty(0, np.int64), *lengths]).astype(np.int64)


def forget_caches(rows: Dataset, within: Path) -> None:
    """Deletes what was computed, and not saved, beside the files of rows in a folder; rows that rest on it stay."""
    for folder in {Path(file["filename"]).resolve().parent for file in rows.cache_files}:
        for cache in folder.glob("cache-*.arrow") if within.resolve() in folder.parents else ():
            cache.unlink(missing_ok=True)  # another process was quicker


def _batches(rows: Iterable[T]) -> Iterator[list[T]]:
    batch: list[T] = []
    for row in rows:
        batch.append(row)
        if len(batch) == _ROWS_PER_BATCH:
            yield batch
            batch = []
    if batch:
        yield batch
