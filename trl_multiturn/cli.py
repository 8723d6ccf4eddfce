"""`trl-multiturn`: look at data, at a run, and at what this machine grants the interpreter."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .messages.terminal import visible


_FORMS = ["auto", "openai", "sharegpt", "tool-roles", "function-call", "episodes", "rollouts", "logs"]
_PAIRS = "Write pairs of a task's episodes, chosen so (see `PairingConfig.strategy`)."


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a sub-command; the exit status is 0 where it found nothing wrong."""
    options = build_parser().parse_args(arguments)
    try:
        return options.run(options)
    except (OSError, ValueError, _journal_error()) as error:  # what the user or the machine has to put right
        print(visible(f"trl-multiturn {options.command}: {error}"), file=sys.stderr)
        return 2


def build_parser() -> argparse.ArgumentParser:
    """The sub-commands and their options."""
    parser = argparse.ArgumentParser(prog="trl-multiturn", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)

    check = commands.add_parser("check", help="Read a dataset as the trainers will, and report what is wrong with it.")
    check.add_argument("--dataset", required=True, help="Name on the Hub, a folder, or a JSONL or Parquet file.")
    check.add_argument("--model", required=True, help="Model or tokenizer: a name on the Hub or a folder.")
    check.add_argument("--config", default=None, help="Configuration of the dataset.")
    check.add_argument("--split", default=None, help="Split to read; all of them by default.")
    check.add_argument("--max_length", type=int, default=None, help="The trainer's `max_length`.")
    check.add_argument("--preview", type=int, default=1, help="How many rows to show with their masks.")
    check.add_argument("--drop_reasoning", action="store_true", help="The trainer's `drop_reasoning`.")
    check.add_argument("--tool_dialect", default=None, help="The trainer's `tool_dialect`.")
    check.add_argument("--write_reasoning", action="store_true", help="The trainer's `write_reasoning`.")
    check.set_defaults(run=_check)

    convert = commands.add_parser("convert", help="Write rows that other tools wrote in the form that trainers read.")
    convert.add_argument("input", help="A JSONL, JSON or Parquet file, or a dataset's name.")
    convert.add_argument("output", type=Path, help="A `.parquet` or `.jsonl` file.")
    convert.add_argument("--from", dest="form", default="auto", choices=_FORMS, help="What the rows are.")
    convert.add_argument("--split", default=None, help="Split of a dataset that has several.")
    convert.add_argument("--reward", default=None, help="Column of the rewards, if it has a name of its own.")
    convert.add_argument("--label_above", type=float, default=None, help="Add `label`: is the reward above this?")
    convert.add_argument("--tools", type=Path, default=None, help="JSON file of schemas, for rows that say none.")
    convert.add_argument("--string_arguments", action="store_true", help="JSON strings as arguments in JSONL, too.")
    convert.add_argument("--pairs", choices=["random", "best_worst", "step"], default=None, help=_PAIRS)
    convert.add_argument("--max_pairs", type=int, default=1, help="Most pairs per task.")
    convert.add_argument("--min_reward_gap", type=float, default=0.0, help="Smallest gap between a pair's rewards.")
    convert.add_argument("--correct_above", type=float, default=0.5, help="Episodes above this reward are correct.")
    convert.add_argument("--task", default=None, help="Column that says which episodes are of one task.")
    convert.add_argument("--seed", type=int, default=0, help="Seed of the choice of pairs.")
    convert.set_defaults(run=_convert)

    doctor = commands.add_parser("doctor", help="What this machine grants the Python interpreter, layer by layer.")
    doctor.set_defaults(run=_doctor)

    stats = commands.add_parser("stats", help="The table of iterations of a run.")
    stats.add_argument("run_folder", type=Path, help="The trainer's `output_dir`, or its `rollouts` folder.")
    stats.set_defaults(run=_stats)

    export = commands.add_parser("export", help="Write the trajectories of a run to one file.")
    export.add_argument("run_folder", type=Path, help="The trainer's `output_dir`, or its `rollouts` folder.")
    export.add_argument("--output", type=Path, required=True, help="A `.parquet` or `.jsonl` file.")
    export.set_defaults(run=_export)

    _add_view(commands)
    return parser


def _add_view(commands: Any) -> None:
    from .viewer.command import add_view

    add_view(commands)


def _journal_error() -> type[Exception]:
    from .journal.journal import JournalError  # here, so that `--help` and `doctor` load nothing they need not

    return JournalError


def _check(options: argparse.Namespace) -> int:
    from .data.check import check_dataset, print_check

    report = check_dataset(
        options.dataset,
        options.model,
        options.config,
        options.split,
        options.max_length,
        options.preview,
        drop_reasoning=options.drop_reasoning,
        tool_dialect=options.tool_dialect,
        write_reasoning=options.write_reasoning,
    )
    print_check(report)
    return 1 if report.errors else 0


def _convert(options: argparse.Namespace) -> int:
    from .conversion import convert_rows, print_conversion
    from .rows.selection import PairingConfig

    pairing = options.pairs and PairingConfig(
        strategy=options.pairs,
        max_pairs_per_prompt=options.max_pairs,
        min_reward_gap=options.min_reward_gap,
        filters=[],
        seed=options.seed,
    )
    report = convert_rows(
        options.input,
        options.output,
        options.form,
        split=options.split,
        reward_column=options.reward,
        label_above=options.label_above,
        tools=options.tools and options.tools.read_text(encoding="utf-8"),
        string_arguments=options.string_arguments,
        pairing=pairing,
        correct_above=options.correct_above,
        task_column=options.task,
    )
    print_conversion(report)
    return 1 if report.unreadable else 0


def _doctor(options: argparse.Namespace) -> int:
    from .sandbox import doctor

    return doctor.main() or 0


def _stats(options: argparse.Namespace) -> int:
    from .journal.journal import Journal
    from .journal.run_folder import find_run_folder
    from .online.report import IterationReport, load_start, print_iterations

    run = find_run_folder(options.run_folder)
    reports = []
    for folder in run.iterations():
        if (report := IterationReport.load(folder.path)) is not None:
            reports.append(report)
            if not report.ready:  # what has finished so far
                for trajectory in Journal(folder.journal).read():
                    report.count(trajectory)
    start = load_start(run.path)
    print_iterations(reports, start and start["evaluation"])
    return 0


def _export(options: argparse.Namespace) -> int:
    from .journal.export import export_trajectories
    from .journal.run_folder import find_run_folder

    count = export_trajectories(find_run_folder(options.run_folder).path, options.output)
    print(f"{count} trajectories written to {options.output}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
