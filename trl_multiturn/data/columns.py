"""Columns of lists beside rows on disk, written as they are computed."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from secrets import token_hex
from typing import TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.compute
from datasets import Dataset, Features, List, Value, concatenate_datasets


T = TypeVar("T")

_ROWS_PER_BATCH = 256


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
        for batch in in_batches(values):
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


def in_batches(rows: Iterable[T]) -> Iterator[list[T]]:
    """Lists of a few hundred rows each, the last one shorter."""
    batch: list[T] = []
    for row in rows:
        batch.append(row)
        if len(batch) == _ROWS_PER_BATCH:
            yield batch
            batch = []
    if batch:
        yield batch
