"""Where a run keeps what: the names of all files and folders that the online loop writes."""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path


logger = logging.getLogger(__name__)

_ITERATION = re.compile(r"iteration_(\d+)")


@dataclass(frozen=True)
class IterationFolder:
    """The folder of one iteration.

    Attributes:
        path (`Path`): the folder.
    """

    path: Path

    @property
    def number(self) -> int:
        """The iteration, 0-based."""
        return int(self.path.name.rpartition("_")[2])

    @property
    def report(self) -> Path:
        """Settings and counts ([`~trl_multiturn.online.report.IterationReport`])."""
        return self.path / "report.json"

    @property
    def journal(self) -> Path:
        """The folder of its trajectories ([`Journal`])."""
        return self.path / "journal"

    @property
    def dropped(self) -> Path:
        """Which trajectories had no part in the selection of rows, and why."""
        return self.path / "dropped.jsonl"

    @property
    def rows(self) -> Path:
        """The rows that were found in this iteration: pairs, or unpaired trajectories."""
        return self.path / "rows"

    @property
    def training_rows(self) -> Path:
        """The rows that its epoch trains on, with the reference's log-probabilities."""
        return self.path / "training_rows"

    def found_anew(self, earlier: int) -> IterationFolder:
        """Rows of an earlier iteration, judged and selected by this one's settings (`history="all"`)."""
        return IterationFolder(self.path / "earlier" / f"iteration_{earlier:03d}")

    @property
    def policy(self) -> Path:
        """The snapshot of π_t, the policy with which iteration t starts."""
        return self.path / "policy.safetensors"

    @property
    def evaluation(self) -> Path:
        """The trajectories on the held-out prompts, of the policy after the iteration."""
        return self.path / "evaluation.parquet"


@dataclass(frozen=True)
class RunFolder:
    """The folder of a run of the online loop: `<output_dir>/rollouts`, unless the user names another.

    ```
    rollouts/
    ├── lock.json                who works here, while somebody does
    ├── start.json               evaluation of the initial policy
    ├── start_evaluation.parquet its trajectories
    ├── iteration_000/
    │   ├── report.json          settings and counts; whether the rows stand
    │   ├── policy.safetensors   the policy with which the iteration starts
    │   ├── journal/             every trajectory and every verdict
    │   ├── dropped.jsonl        why trajectories had no part in the selection
    │   ├── rows/                what was selected
    │   ├── earlier/             the same of earlier iterations, where they were judged otherwise (history="all")
    │   ├── training_rows/       what the epoch trains on
    │   └── evaluation.parquet   the trajectories of the evaluation after it
    ├── engine_000003/           weights for engines that load checkpoints
    └── earlier_adapter_0/       the previous policy, while an engine samples from it beside the present one
    ```

    Attributes:
        path (`Path`): the folder.
    """

    path: Path

    @property
    def lock(self) -> Path:
        """Which process works in the folder."""
        return self.path / "lock.json"

    @property
    def start(self) -> Path:
        """The evaluation of the policy before the first iteration."""
        return self.path / "start.json"

    def evaluation(self, iterations: int) -> Path:
        """The trajectories of the evaluation after so many iterations, whether or not they are there."""
        return self.iteration(iterations - 1).evaluation if iterations else self.path / "start_evaluation.parquet"

    def iteration(self, number: int) -> IterationFolder:
        """The folder of an iteration (0-based), whether or not it is there."""
        return IterationFolder(self.path / f"iteration_{number:03d}")

    def iterations(self) -> list[IterationFolder]:
        """The iterations that have a folder, in order."""
        folders = (path for path in self.path.glob("iteration_*") if _ITERATION.fullmatch(path.name))
        return sorted((IterationFolder(path) for path in folders), key=lambda folder: folder.number)

    def engine_checkpoints(self) -> list[Path]:
        """What engines were given to load, in order."""
        return sorted(self.path.glob("engine_[0-9][0-9][0-9][0-9][0-9][0-9]"))

    def next_engine_checkpoint(self) -> Path:
        """A name for what engines are given next."""
        earlier = self.engine_checkpoints()
        number = 1 + int(earlier[-1].name.rpartition("_")[2]) if earlier else 0
        return self.path / f"engine_{number:06d}"

    def earlier_adapter(self, process: int) -> Path:
        """The previous policy's adapter, for the engine of a process."""
        return self.path / f"earlier_adapter_{process}"

    def set_aside(self, first: int) -> None:
        """Renames the folders of an iteration and of those after it. Nothing is lost."""
        # The last one first: what a killed process leaves is a run that ends earlier, never one with a gap
        for folder in reversed(self.iterations()):
            if folder.number >= first:
                aside = _free_name(folder.path)
                logger.warning("%s is of another policy than the present one. It is kept as %s.", folder.path, aside)
                folder.path.rename(aside)

    def forget_policies(self, before: int, keep: Collection[int | None]) -> None:
        """Deletes the snapshots of the iterations before one, but for those to keep."""
        for number in set(range(before)) - set(keep):
            self.iteration(number).policy.unlink(missing_ok=True)


def find_run_folder(path: str | os.PathLike) -> RunFolder:
    """The run in a trainer's `output_dir`, or in its `rollouts` folder.

    Raises:
        `FileNotFoundError`: if neither holds an iteration.
    """
    for candidate in (RunFolder(Path(path)), RunFolder(Path(path, "rollouts"))):
        if candidate.iterations():
            return candidate
    raise FileNotFoundError(
        f"{path} holds no run: neither it nor its `rollouts` folder has an `iteration_*` folder. Give the trainer's "
        "`output_dir`."
    )


def _free_name(folder: Path) -> Path:
    number = 1
    while (aside := folder.with_name(f"stale_{folder.name}_{number}")).exists():
        number += 1
    return aside
