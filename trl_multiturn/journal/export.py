"""All trajectories of a run in one file."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from itertools import groupby
from pathlib import Path

from ..distributed.durable import written_whole
from ..trajectory import Trajectory
from .journal import Journal, JournalError, write_parquet
from .run_folder import IterationFolder, RunFolder


_NOTHING: tuple[float, dict[str, str]] = (math.inf, {})  # behind the last prompt


def run_trajectories(run_folder: str | os.PathLike) -> Iterator[Trajectory]:
    """The trajectories of a run, iteration by iteration, by prompt, policy and sample; those of one prompt at a time.

    Where a trajectory had no part in the selection of rows, `info["dropped"]` says why (the name of a filter, say).
    """
    for folder in RunFolder(Path(run_folder)).iterations():
        for group in iteration_trajectories(folder):
            yield from group


def iteration_trajectories(folder: IterationFolder) -> Iterator[list[Trajectory]]:
    """The trajectories of an iteration, one prompt after another, each with why it was dropped."""
    dropped = _read_dropped(folder.dropped)
    prompt, reasons = next(dropped, _NOTHING)
    for group in Journal(folder.journal).read_by_prompt():
        while prompt < group[0].info["prompt_index"]:
            prompt, reasons = next(dropped, _NOTHING)
        here = reasons if prompt == group[0].info["prompt_index"] else {}
        yield [_with_reason(trajectory, here.get(str(trajectory.info.get("trajectory_id")))) for trajectory in group]


def _with_reason(trajectory: Trajectory, reason: str | None) -> Trajectory:
    return replace(trajectory, info={**trajectory.info, "dropped": reason}) if reason else trajectory


@contextmanager
def dropped_writer(path: Path) -> Iterator[Callable[[Trajectory, str], None]]:
    """Writes to a file why trajectories had no part in the selection: all at the end, or nothing.

    The body calls what it is given with one trajectory and reason after another, prompt by prompt in rising order.
    """
    with written_whole(path) as partial, open(partial, "w", encoding="utf-8") as file:

        def write(trajectory: Trajectory, reason: str) -> None:
            line = [trajectory.info["prompt_index"], trajectory.info["trajectory_id"], reason]
            file.write(json.dumps(line) + "\n")

        yield write


def _read_dropped(path: Path) -> Iterator[tuple[float, dict[str, str]]]:
    """Reasons by `trajectory_id`, of one prompt after another that has any."""
    if not path.exists():
        return
    with open(path, encoding="utf-8") as file:
        try:
            for prompt, lines in groupby(map(json.loads, file), key=lambda line: line[0]):
                yield prompt, {name: reason for _, name, reason in lines}
        except (LookupError, TypeError, ValueError) as error:
            raise JournalError(
                f"{path} is damaged ({error}), so it is unknown what dropped which trajectory. Restore it, or delete "
                "it to go without."
            ) from error


def export_trajectories(run_folder: str | os.PathLike, output: Path) -> int:
    """Writes a run's trajectories with their provenance, and returns how many.

    Args:
        run_folder (`Path`):
            The folder with the `iteration_*` folders.
        output (`Path`):
            `.jsonl`: a JSON object per line, [`Trajectory.from_dict`] reads it. `.parquet`: the same columns, with
            `prompt`, `completion` and `info` as JSON strings; `load_dataset` reads it, and can push it to the Hub.

    Raises:
        `ValueError`: for another ending.
    """
    return write_trajectories(run_trajectories(run_folder), output)


def write_trajectories(trajectories: Iterable[Trajectory], output: Path) -> int:
    """Writes any trajectories as [`export_trajectories`] does, and returns how many."""
    if output.suffix not in (".jsonl", ".parquet"):
        raise ValueError(f"{output} ends in neither `.jsonl` nor `.parquet`, so its format is unknown.")
    return (_write_jsonl if output.suffix == ".jsonl" else write_parquet)(trajectories, output)


def _write_jsonl(trajectories: Iterable[Trajectory], path: Path) -> int:
    count = 0
    # Half of a surrogate pair, which a policy can write into a call's arguments as JSON, is in no encoding
    with written_whole(path) as partial, open(partial, "w", encoding="utf-8", errors="replace") as file:
        for count, trajectory in enumerate(trajectories, 1):  # noqa: B007
            file.write(json.dumps(trajectory.to_dict(), ensure_ascii=False) + "\n")
    return count
