"""The trajectories of a run's evaluations: what stands behind each pass@1."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from ..trajectory import Trajectory
from .journal import read_dataset, write_parquet
from .run_folder import RunFolder


def write_evaluation(run: RunFolder, iterations: int, trajectories: Iterable[Trajectory]) -> None:
    """
    Writes the trajectories of an evaluation, whole or not at all; an earlier one in the same place is replaced.

    Args:
        run ([`RunFolder`]):
            Of the run.
        iterations (`int`):
            How many iterations the policy was trained for.
        trajectories (`Iterable[Trajectory]`):
            Judged ones.
    """
    write_parquet(trajectories, run.evaluation(iterations))


def read_evaluations(run: RunFolder) -> Iterator[tuple[int, list[Trajectory]]]:
    """The evaluations of a run, each with the number of iterations that its policy was trained for."""
    for iterations in (0, *(folder.number + 1 for folder in run.iterations())):
        path = run.evaluation(iterations)
        if path.exists():
            yield iterations, read_dataset(path)
