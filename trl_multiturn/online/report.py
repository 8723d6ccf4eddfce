"""What an iteration did, as one row of a table: kept with the run, printed at its end, read back by `stats`."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from rich.console import Console
from rich.table import Table
from rich.text import Text

from ..distributed.durable import write_whole
from ..journal.run_folder import IterationFolder, RunFolder
from ..messages.terminal import visible
from ..verify.filters import FILTERS


T = TypeVar("T")

_REASONS = {
    "tool_failed": "the machine failed, not the policy",
    "undecided": "no verdict: a reward function said `None`, raised, or was late",
    "duplicate": "another trajectory of the prompt has the same tokens",
    "contradictory": "the same tokens were judged correct and incorrect",
    "no_correct_one": "a pair needs one, and the prompt has none left",
    "no_incorrect_one": "a pair needs one, and the prompt has none left",
    "in_no_pair": "the prompt's pairs are of others (`max_pairs_per_prompt`, `min_reward_gap`, `min_shared_turns`)",
    "not_drawn": "the prompt has enough rows of others (`strategy`, `max_positives`, `max_negatives`)",
}

Samples = dict[str, list[range]]  # by policy, which samples of each prompt it draws


@dataclass
class IterationReport:
    """Counts of one iteration.

    Attributes:
        iteration (`int`): 0-based.
        first_step (`int`), last_step (`int`, *optional*): optimizer steps of the run before and after this iteration;
            `last_step` is `None` until its epoch is over.
        policy_revision (`str`): hash of the policy that rolled out.
        settings (`dict`): what decides which rows are found (see `online.plan` for what of it may change).
        samples (`dict`, *optional*): by policy, the first and one past the last of each span of samples drawn.
        ready (`bool`): whether the rows are on disk; `False` while the iteration still rolls out.
        trajectories, correct, incorrect, undecided (`int`): rollouts by verdict.
        rows (`int`): pairs (preference) or trajectories (unpaired) found in this iteration.
        trained_rows (`int`): rows of the training set; more than `rows` with `history="all"`.
        row_statistics (`dict[str, float]`): what the trainer counted of its rows (`data/…`).
        dropped (`dict[str, int]`): rollouts dropped, by the name of the filter.
        unused (`dict[str, int]`): rollouts that were not dropped and are in no row, by why ([`Selection`]).
        reward_errors (`int`): rollouts on which a reward function raised; they are among the undecided.
        stop_reasons (`dict[str, int]`): rollouts by stop reason.
        segments (`int`): token sequences of all trajectories; 0 in reports from before they were counted.
        tool_calls, tool_failures (`int`): calls, and how many of them ended in an error the policy saw.
        rollout_seconds, train_seconds, eval_seconds (`float`): wall time by stage.
        evaluation (`dict[str, float]`, *optional*): metrics of the policy *after* the iteration on held-out prompts.
        evaluated_by (`str`, *optional*): hash of what decides the evaluation; those of others are not compared.
        agreement (`dict[str, float]`): how far the engine's log-probabilities are from the trainer's (`sampling/…`).
        step_layout (`dict`, *optional*): what decides which of its rows each optimizer step trains on.
        starting_revision (`str`, *optional*): hash of the policy that its epoch begins with; `policy_revision`, unless
            the policy that rolled out is older.
        policy_lag (`int`): how many iterations older.
        overlapped_seconds (`float`): wall time of those rollouts that ran while the iteration before trained; not in
            `rollout_seconds`.
    """

    iteration: int
    first_step: int = 0
    last_step: int | None = None
    policy_revision: str = ""
    settings: dict[str, Any] = field(default_factory=dict)
    ready: bool = True
    trajectories: int = 0
    correct: int = 0
    incorrect: int = 0
    undecided: int = 0
    rows: int = 0
    trained_rows: int = 0
    row_statistics: dict[str, float] = field(default_factory=dict)
    dropped: dict[str, int] = field(default_factory=dict)
    unused: dict[str, int] = field(default_factory=dict)
    reward_errors: int = 0
    stop_reasons: dict[str, int] = field(default_factory=dict)
    segments: int = 0
    tool_calls: int = 0
    tool_failures: int = 0
    rollout_seconds: float = 0.0
    train_seconds: float = 0.0
    eval_seconds: float = 0.0
    evaluation: dict[str, float] | None = None
    samples: dict[str, list[list[int]]] | None = None
    evaluated_by: str | None = None
    step_layout: dict[str, Any] | None = None
    agreement: dict[str, float] = field(default_factory=dict)
    starting_revision: str | None = None
    policy_lag: int = 0
    overlapped_seconds: float = 0.0

    @property
    def correct_share(self) -> float:
        """Share of correct rollouts among the decided ones, 0 where none is."""
        return self.correct / max(self.correct + self.incorrect, 1)

    def spans(self) -> Samples | None:
        """`samples`; of a report of an earlier release, those that its settings imply."""
        if self.samples is not None:
            return {policy: [range(*span) for span in spans] for policy, spans in self.samples.items()}
        try:
            total = int(self.settings["num_generations"])
            explored = int(self.settings["previous_policy_generations"]) if self.iteration else 0
        except (LookupError, TypeError, ValueError):
            return None
        spans = {"current": range(total - explored), "previous": range(total - explored, total)}
        return {policy: [span] if span else [] for policy, span in spans.items()}

    def count(self, trajectory: Any, dropped: str | None = None, unused: str | None = None) -> None:
        """Counts a trajectory, and what dropped it, or why it is in no row though nothing did."""
        self.trajectories += 1
        verdict, stop_reason = trajectory.verdict.value, trajectory.stop_reason.value
        setattr(self, verdict, getattr(self, verdict) + 1)
        self.stop_reasons[stop_reason] = self.stop_reasons.get(stop_reason, 0) + 1
        self.segments += len(trajectory.branches) + 1
        self.tool_calls += trajectory.info.get("tool_calls", 0)
        self.tool_failures += trajectory.info.get("tool_errors", 0)
        self.reward_errors += "reward_errors" in trajectory.info
        for counts, reason in ((self.dropped, dropped), (self.unused, unused)):
            if reason:
                counts[reason] = counts.get(reason, 0) + 1

    def metrics(self) -> dict[str, float]:
        """The numbers under TRL's metric names."""
        return {
            "rollout/trajectories": self.trajectories,
            "rollout/correct_share": self.correct_share,
            "rollout/undecided": self.undecided,
            "rollout/rows": self.rows,
            "rollout/time_s": self.rollout_seconds,
            "tools/call_frequency": self.tool_calls / max(self.trajectories, 1),
            "tools/failure_frequency": self.tool_failures / max(self.tool_calls, 1),
            **({"rollout/segments": self.segments / self.trajectories} if self.segments > self.trajectories else {}),
            **({"rollout/reward_errors": self.reward_errors} if self.reward_errors else {}),
            **{f"data/dropped_{name}": count for name, count in self.dropped.items()},
            **{f"data/unused_{name}": count for name, count in self.unused.items()},
            **({"rollout/policy_lag": self.policy_lag} if self.policy_lag else {}),
            **({"rollout/overlapped_time_s": self.overlapped_seconds} if self.overlapped_seconds else {}),
            **self.agreement,
        }

    def save(self, folder: str | os.PathLike) -> None:
        """Writes the report into an iteration's folder, atomically."""
        _write_json(IterationFolder(Path(folder)).report, asdict(self))

    @classmethod
    def load(cls, folder: str | os.PathLike) -> IterationReport | None:
        """The report in an iteration's folder, or `None` where the iteration has not begun.

        Raises:
            `ValueError`: if the file is damaged.
        """
        return _read_json(IterationFolder(Path(folder)).report, lambda fields: cls(**fields))


def load_reports(run_folder: str | os.PathLike) -> list[IterationReport]:
    """The reports of the iterations whose rows were found; `run_folder` holds the `iteration_*` folders."""
    reports = (IterationReport.load(folder.path) for folder in RunFolder(Path(run_folder)).iterations())
    return [report for report in reports if report is not None and report.ready]


def load_start(run_folder: str | os.PathLike) -> dict[str, Any] | None:
    """`policy_revision` and `evaluation` of the policy before the first iteration, where it was evaluated."""
    return _read_json(RunFolder(Path(run_folder)).start, lambda start: {**start, "evaluation": start["evaluation"]})


def save_start(run_folder: str | os.PathLike, start: dict[str, Any]) -> None:
    """Writes `policy_revision` and `evaluation` of the policy before the first iteration."""
    _write_json(RunFolder(Path(run_folder)).start, start)


def _write_json(path: Path, value: dict[str, Any]) -> None:
    write_whole(path, json.dumps(value, indent=2).encode())


def _read_json(path: Path, make: Callable[[Any], T]) -> T | None:
    if not path.exists():
        return None
    try:
        return make(json.loads(path.read_text(encoding="utf-8")))
    except (LookupError, TypeError, ValueError) as error:
        raise ValueError(
            f"{path} is damaged, or of another version ({error}), so it is unknown how far the run came. Restore it, "
            "delete it (the iteration's rows are then found anew from its rollouts), "
            "or start anew in another `output_dir`."
        ) from error


def _pass_at_1(evaluation: dict[str, float] | None) -> str:
    if not evaluation:
        return "–"
    return f"{100 * evaluation['pass@1']:.1f} ± {100 * evaluation['pass@1_se']:.1f}"


def iteration_table(reports: list[IterationReport], start: dict[str, float] | None = None) -> Table:
    """A `rich` table with a line per iteration; `start` is the evaluation before the first one."""
    table = Table(title="Iterations (pass@1 on held-out prompts, after training)", title_justify="left")
    for name in ("iteration", "rollouts", "correct %", "rows", "tool calls", "failed", "pass@1 % ± s.e.", "seconds"):
        table.add_column(name, justify="right")
    table.add_column("in no row")
    rewritten = any(r.segments > r.trajectories for r in reports)
    if rewritten:
        table.add_column("segments", justify="right")
    if start:
        table.add_row("start", *[""] * 5, _pass_at_1(start))
    for r in reports:
        table.add_row(
            str(r.iteration + 1) if r.ready else f"{r.iteration + 1}, under way",
            str(r.trajectories),
            f"{100 * r.correct_share:.1f}",
            str(r.rows),
            str(r.tool_calls),
            str(r.tool_failures),
            _pass_at_1(r.evaluation),
            f"{r.rollout_seconds + r.train_seconds + r.eval_seconds:.0f}",
            Text(visible("\n".join(f"{name} {count}" for name, count in _in_no_row(r).items())) or "–"),
            *([f"{r.segments / max(r.trajectories, 1):.2f}"] if rewritten else []),
        )
    return table


def _in_no_row(report: IterationReport) -> dict[str, int]:
    """The rollouts that are in no row, by reason: those dropped before those left over."""
    dropped, unused = (dict(sorted(counts.items())) for counts in (report.dropped, report.unused))
    return {name: count for name, count in {**dropped, **unused}.items() if count}


def explain_reasons(names: Iterable[str]) -> list[str]:
    """A line for each reason why rollouts are in no row; a filter of the user's own explains itself."""
    known = {**_REASONS, **{name: filter.description for name, filter in FILTERS.items()}}
    return [f"{name}: {known[name]}" for name in names if name in known]


def print_iterations(reports: list[IterationReport], start: dict[str, float] | None = None) -> None:
    """Prints [`iteration_table`], as wide as it needs where the output is no terminal."""
    console = Console()
    if not console.is_terminal:
        console = Console(width=140)
    console.print(iteration_table(reports, start))
    for line in explain_reasons(dict.fromkeys(name for report in reports for name in _in_no_row(report))):
        console.print(visible(line), markup=False, highlight=False)
