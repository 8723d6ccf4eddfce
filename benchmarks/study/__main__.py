"""`python -m benchmarks.study`: runs what is missing, two child processes at a time, and reports.

Killed and started again with the same command it goes on with what is missing. `--quick` is CI's: two arms, tiny.
`--report` only reports; `--worlds`, `--arms` and `--seeds` choose.
"""

from __future__ import annotations

import argparse
import signal
import sys
import time
from dataclasses import replace
from pathlib import Path

from .arms import ARMS
from .plan import quick_study, whole_study
from .report import report
from .results import collect, save
from .runner import Cell, run
from .settings import SIZES
from .tabular import TABULAR_ARMS, TABULAR_WORLDS


RESULTS = Path(__file__).parents[1] / "results" / "study"


def main() -> None:
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # so that children are ended, too
    options = make_parser().parse_args()
    cells = chosen(options)
    complete = True
    if not options.report:
        until = time.time() + 3600 * options.hours if options.hours else float("inf")
        complete = run(cells, options.out, options.workers, options.quick, until)
    results = collect(options.out)
    if results.empty:
        raise SystemExit(f"No arm is finished in {options.out}; its folder `logs` says why.")
    save(results, options.parquet or (options.out if options.quick else RESULTS) / "results.parquet")
    print(report(results, options.docs))
    if not complete:
        raise SystemExit("Some arms have no result yet. Start again with the same command, and it goes on from here.")


def chosen(options: argparse.Namespace) -> list[Cell]:
    """The cells that the options name; without options the study as it is planned."""
    if options.quick:
        return quick_study()
    cells = whole_study(tuple(options.seeds)) if options.seeds else whole_study()
    if options.worlds:
        cells = [cell for cell in cells if cell.world in options.worlds]
    if options.arms:
        cells = [replace(cell, arms=tuple(arm for arm in cell.arms if arm in options.arms)) for cell in cells]
    return [cell for cell in cells if cell.arms and (not options.seeds or cell.seed in options.seeds)]


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.study", description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("outputs/study"), help="Results, logs, starting policies.")
    parser.add_argument("--parquet", type=Path, help="Where the table goes; by default benchmarks/results/study.")
    parser.add_argument("--docs", type=Path, help="The page to update, with figures in a folder of its name.")
    parser.add_argument("--worlds", nargs="+", choices=[*SIZES, *TABULAR_WORLDS])
    parser.add_argument("--arms", nargs="+", choices=sorted({*ARMS, *TABULAR_ARMS}))
    parser.add_argument("--seeds", nargs="+", type=int)
    parser.add_argument("--workers", type=int, default=2, help="Child processes at a time, of one thread each.")
    parser.add_argument("--hours", type=float, help="Stop after so long; by default when everything is done.")
    parser.add_argument("--quick", action="store_true", help="Two arms, tiny.")
    parser.add_argument("--report", action="store_true", help="Run nothing.")
    return parser


if __name__ == "__main__":
    main()
