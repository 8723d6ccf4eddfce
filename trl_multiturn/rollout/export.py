"""All trajectories of a run in one file."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from ..trajectory import Trajectory
from .journal import Journal, write_atomically, write_parquet


_DROPPED_FILE = "dropped.json"


def run_trajectories(run_folder: Path) -> Iterator[Trajectory]:
    """The trajectories of a run, iteration by iteration, by prompt and sample; one at a time.

    Where a trajectory had no part in the selection of rows, `info["dropped"]` says why (the name of a filter, say).
    """
    for folder in sorted(Path(run_folder).glob("iteration_*")):
        dropped = _read_dropped(folder)
        for trajectory in Journal(folder / "journal").read():
            reason = dropped.get(trajectory.info.get("trajectory_id"))
            yield replace(trajectory, info={**trajectory.info, "dropped": reason}) if reason else trajectory


def write_dropped(folder: Path, dropped: dict[str, str]) -> None:
    """Writes into an iteration's folder why trajectories, by `trajectory_id`, had no part in the selection."""
    write_atomically(folder / _DROPPED_FILE, json.dumps(dropped, indent=1).encode())


def _read_dropped(folder: Path) -> dict[str, str]:
    path = folder / _DROPPED_FILE
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


def export_trajectories(run_folder: Path, output: Path) -> int:
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
    if output.suffix not in (".jsonl", ".parquet"):
        raise ValueError(f"{output} ends in neither `.jsonl` nor `.parquet`, so its format is unknown.")
    trajectories = run_trajectories(run_folder)
    return (_write_jsonl if output.suffix == ".jsonl" else write_parquet)(trajectories, output)


def _write_jsonl(trajectories: Iterator[Trajectory], path: Path) -> int:
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    count = 0
    with open(partial, "w", encoding="utf-8") as file:
        for count, trajectory in enumerate(trajectories, 1):  # noqa: B007
            file.write(json.dumps(trajectory.to_dict(), ensure_ascii=False) + "\n")
    partial.replace(path)
    return count
