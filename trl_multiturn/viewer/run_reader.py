"""A run on disk as records: its reports, rows, trajectories, evaluations and the trainer's log."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from datasets import Dataset, load_from_disk

from ..journal.evaluations import read_evaluations
from ..journal.export import iteration_trajectories
from ..journal.run_folder import IterationFolder, RunFolder, find_run_folder
from ..online.report import IterationReport, load_start
from ..trajectory import Trajectory
from .fates import HELD_OUT, fates
from .record import PairRecord, Record, Source


_SIDES = ("chosen", "rejected")
_COUNTS = ("trajectories", "correct", "incorrect", "undecided", "stop_reasons", "tool_calls", "tool_failures")
_SAMPLES_AS_TRAINED = {"temperature": 1.0, "temperature_variants": [], "top_p": 1.0, "top_k": 0, "min_p": 0.0}


def read_run(path: Path, iteration: int | None = None) -> Source:
    """
    A run, finished or under way.

    Args:
        path (`Path`):
            The trainer's `output_dir`, or the folder with the `iteration_*` folders.
        iteration (`int`, *optional*):
            The only one to read, from 1.

    Raises:
        `FileNotFoundError`: if there is no run.
        `ValueError`: if a file of the run is damaged, or it has no such iteration.
    """
    run = find_run_folder(path)
    iterations = [Iteration.load(folder) for folder in run.iterations()]
    begun = [each for each in iterations if each is not None and iteration in (None, each.number)]
    if not begun:
        wanted = "" if iteration is None else f" {iteration}"
        raise ValueError(
            f"{run.path} has no iteration{wanted} that has begun to roll out, so there is nothing to show."
        )
    start = load_start(run.path)

    def records() -> Iterator[Record]:
        for each in begun:
            yield from each.records()
        for number, trajectories in read_evaluations(run):
            if iteration in (None, number):
                yield from evaluation_records(number, trajectories)

    return Source(
        title=str(path),
        kind="run",
        read=records,
        pairs=[pair for each in begun for pair in each.rows.pairs],
        iterations=[each.report for each in begun],
        start=start and start["evaluation"],
        log=training_log(_output_dir(run)),
    )


def tokenizer_folders(path: Path) -> Iterator[Path]:
    """Where a run's tokenizer may be, the likeliest first."""
    output = _output_dir(find_run_folder(path))
    for folder in (output, *sorted(output.glob("checkpoint-*"), reverse=True)):
        if (folder / "tokenizer_config.json").exists():
            yield folder


def _output_dir(run: RunFolder) -> Path:
    """The trainer's: its checkpoints lie beside the run's folder, unless the user named another."""
    return run.path.parent if run.path.name == "rollouts" else run.path


def training_log(output: Path) -> list[dict[str, Any]]:
    """What the trainer logged, of the checkpoint that came furthest; empty where there is none."""

    def steps(file: Path) -> int:
        return int(file.parent.name.rpartition("-")[2]) if file.parent != output else 0

    for file in sorted(output.glob("checkpoint-*/trainer_state.json"), key=steps, reverse=True):
        try:
            return json.loads(file.read_text(encoding="utf-8"))["log_history"]
        except (OSError, ValueError, LookupError):  # being written
            continue
    return []


def evaluation_records(number: int, trajectories: list[Trajectory]) -> Iterator[Record]:
    """An evaluation after `number` iterations."""
    for i, trajectory in enumerate(trajectories):
        policy = trajectory.info.get("policy", "").removeprefix("evaluation-")
        place = "/".join(str(trajectory.info.get(name, 0)) for name in ("prompt_index", "sample_index"))
        name = f"evaluation/{number}/{policy}/{place}"
        yield Record.of(trajectory, i, "evaluation", id=name, iteration=number, policy=policy, fate=HELD_OUT)


@dataclass
class Iteration:
    """One iteration on disk: its report, its rows, and its trajectories when they are asked for."""

    folder: IterationFolder
    report: IterationReport
    rows: Rows

    @classmethod
    def load(cls, folder: IterationFolder) -> Iteration | None:
        """The iteration in a folder; `None` where it has not begun."""
        report = IterationReport.load(folder.path)
        if report is None:
            return None
        return cls(folder, report, Rows.load(folder) if report.ready else Rows())

    @property
    def number(self) -> int:
        """From 1, as in the table that a run prints."""
        return self.report.iteration + 1

    def records(self) -> Iterator[Record]:
        """Its trajectories, prompt by prompt."""
        counted = IterationReport(self.report.iteration)
        found, trained = (self.rows.found, self.rows.trained) if self.report.ready else (None, None)
        paired = self.report.settings.get("pairing", {}).get("kind") != "UnpairedConfig"
        for group in iteration_trajectories(self.folder):
            for trajectory, fate in zip(group, fates(group, found, trained, paired), strict=True):
                counted.count(trajectory)
                yield self._record(trajectory, counted.trajectories, fate)
        if not self.report.ready:  # it counts when it has selected its rows; until then, what has finished
            for name in _COUNTS:
                setattr(self.report, name, getattr(counted, name))

    def _record(self, trajectory: Trajectory, number: int, fate: str) -> Record:
        record = Record.of(trajectory, number, fate=fate)
        if record.id in self.rows.lengths:
            record.kept = self.rows.lengths[record.id] - len(record.prompt_ids)
        reference = self.rows.reference_logps(record.id, len(record.completion_ids))
        if reference is not None:
            record.layers["ref_logps"] = reference
            if self._reference_sampled(trajectory):
                record.layers["trainer_logps"] = reference
        return record

    def _reference_sampled(self, trajectory: Trajectory) -> bool:
        """Whether the reference is the very policy, and its distribution the one, that this was drawn from."""
        sampler = trajectory.info.get("sampler", {})
        return (
            self.report.settings.get("reference") == "previous"
            and trajectory.info.get("policy_revision") == self.report.policy_revision
            and not self.report.policy_lag
            and all(sampler.get(name) == value for name, value in _SAMPLES_AS_TRAINED.items())
        )


@dataclass
class Rows:
    """
    The rows of an iteration, by the ids of their trajectories.

    Attributes:
        pairs (`list[PairRecord]`): the pairs, where rows are pairs.
        found (`set[str]`): trajectories in rows; trained (`set[str]`): in rows that reached training.
        lengths (`dict[str, int]`): tokens of prompt and completion that training kept.
    """

    pairs: list[PairRecord] = field(default_factory=list)
    found: set[str] = field(default_factory=set)
    trained: set[str] = field(default_factory=set)
    lengths: dict[str, int] = field(default_factory=dict)
    _training: Dataset | None = None
    _places: dict[str, int] = field(default_factory=dict)  # in `_training`

    @classmethod
    def load(cls, folder: IterationFolder) -> Rows:
        """The rows of an iteration; none where they are not there."""
        if not folder.rows.exists():
            return cls()
        found = load_from_disk(folder.rows)
        training = load_from_disk(folder.training_rows) if folder.training_rows.exists() else None
        rows = cls(_training=training)
        if "chosen_ids" in found.column_names:
            rows._read_pairs(found, folder.number)
        else:
            rows._read_unpaired(found, folder.number)
        return rows

    def reference_logps(self, name: str, length: int) -> list[float] | None:
        """The reference's log-probability per completion token, where training kept that."""
        if name not in self._places or self._training is None or "ref_logps" not in self._training.column_names:
            return None
        logps = self._training[self._places[name]]["ref_logps"]
        return list(logps) + [0.0] * (length - len(logps)) if isinstance(logps, list) else None

    def _read_pairs(self, found: Dataset, iteration: int) -> None:
        for row, (chosen, rejected) in _with_ids(found, ("chosen_info", "rejected_info"), iteration):
            self.found |= {chosen, rejected}
            self.pairs.append(PairRecord(chosen, rejected, iteration + 1, len(row["prompt_ids"]), trained=False))
        by_sides: dict[tuple[str, ...], PairRecord] = {(pair.chosen, pair.rejected): pair for pair in self.pairs}
        for row, sides in _with_ids(self._training, ("chosen_info", "rejected_info"), iteration):
            self.trained |= set(sides)
            if (pair := by_sides.get(sides)) is not None:
                pair.trained = True
                for name in ("margin", "ref_chosen_logps", "ref_rejected_logps"):
                    setattr(pair, name, row.get(name))
                for name, side in zip(sides, _SIDES, strict=True):
                    self.lengths[name] = len(row["prompt_ids"]) + len(row[f"{side}_ids"])

    def _read_unpaired(self, found: Dataset, iteration: int) -> None:
        self.found = {name for _, (name,) in _with_ids(found, ("info",), iteration)}
        for place, (row, (name,)) in enumerate(_with_ids(self._training, ("info",), None)):
            if name in self.found:
                self.trained.add(name)
                self.lengths[name] = len(row["prompt_ids"]) + len(row["completion_ids"])
                self._places[name] = place


def _with_ids(
    rows: Dataset | None, columns: tuple[str, ...], iteration: int | None
) -> Iterator[tuple[dict[str, Any], tuple[str, ...]]]:
    """Rows with the ids of their trajectories; of one iteration only, as a training set may hold those of others."""
    if rows is None or not set(columns) <= set(rows.column_names):
        return
    for row in rows:
        infos = [json.loads(row[column]) for column in columns]
        if iteration is None or infos[0].get("iteration") == iteration:
            yield row, tuple(info.get("trajectory_id", "") for info in infos)
