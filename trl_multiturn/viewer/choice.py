"""Which records of a source to show."""

from __future__ import annotations

import hashlib
import heapq
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING

from .fates import CUT, ROW


if TYPE_CHECKING:  # the command line knows these names before anything is loaded
    from .record import PairRecord, Record

# What `--only` takes, and which records that means
ONLY: dict[str, Callable[[Record], bool]] = {
    "dropped": lambda record: record.fate.startswith("dropped"),
    "rows": lambda record: record.fate in (ROW, CUT),
    "unused": lambda record: record.fate not in (ROW, CUT) and record.split != "evaluation",
    "correct": lambda record: record.verdict == "correct",
    "incorrect": lambda record: record.verdict == "incorrect",
    "undecided": lambda record: record.verdict == "undecided",
    "tool_errors": lambda record: any(status != "ok" for status in record.info.get("tool_statuses", [])),
    "evaluation": lambda record: record.split == "evaluation",
}


def choose(
    records: Iterable[Record], pairs: Sequence[PairRecord], only: str | None = None, sample: int | None = None
) -> Iterator[Record]:
    """
    The records to show, in their order.

    Args:
        records (`Iterable[Record]`):
            All of them; memory holds `sample` at a time.
        pairs (`Sequence[PairRecord]`):
            The sides of a pair are sampled together.
        only (`str`, *optional*):
            A name of `ONLY`.
        sample (`int`, *optional*):
            At most so many, drawn evenly; the same ones whenever the same source is read.

    Raises:
        `ValueError`: if `only` is unknown, or `sample` below 1.
    """
    if only is not None and only not in ONLY:
        raise ValueError(f"`only={only!r}` is unknown. Use one of {', '.join(map(repr, ONLY))}.")
    if sample is not None and sample < 1:
        raise ValueError(f"`sample` must be at least 1, got {sample}.")
    chosen = records if only is None else filter(ONLY[only], records)
    return iter(chosen) if sample is None else _sampled(chosen, pairs, sample)


def _sampled(records: Iterable[Record], pairs: Sequence[PairRecord], sample: int) -> Iterator[Record]:
    """The records whose names have the smallest hashes; the sides of a pair have that of the chosen one."""
    names = {pair.rejected: pair.chosen for pair in pairs}
    heap: list[tuple[int, int, Record]] = []
    for number, record in enumerate(records):
        name = names.get(record.id, record.id)
        entry = (-int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big"), -number, record)
        (heapq.heappush if len(heap) < sample else heapq.heappushpop)(heap, entry)
    yield from (record for _, _, record in sorted(heap, key=lambda entry: -entry[1]))
