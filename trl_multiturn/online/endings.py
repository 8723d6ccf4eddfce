"""A run and its folder: one run in it at a time, and what it says when it ends or is stopped."""

from __future__ import annotations

import os
import shlex
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from transformers import TrainingArguments

from ..distributed.lock import FolderLock
from ..distributed.main_process import on_main
from ..distributed.shared_folder import refuse_unshared_folder
from ..journal.run_folder import RunFolder
from .report import IterationReport


@contextmanager
def alone_in(run: RunFolder, args: TrainingArguments) -> Iterator[None]:
    """
    Inside the body no other run works in the folder, which all processes share.

    Ctrl-C has the run say where it was stopped, how it goes on, and where to look at it.
    """
    refuse_unshared_folder(run.path)
    lock = FolderLock(run.lock)
    on_main(lock.acquire)
    try:
        yield
    except KeyboardInterrupt:
        if args.process_index == 0:
            print(f"{stopped(run)}\n{where_to_look(run, args.output_dir)}", flush=True)
        raise
    finally:
        if args.process_index == 0:
            lock.release()


def stopped(run: RunFolder) -> str:
    """Where a run was stopped by Ctrl-C, and how it goes on."""
    again = "Start it again with the same command (in Python, with `resume_from_checkpoint=True`), and it goes on."
    return f"\nStopped {_where(run)}. Nothing that finished is lost. {again}"


def _where(run: RunFolder) -> str:
    reports = [report for folder in run.iterations() if (report := IterationReport.load(folder.path)) is not None]
    if not reports:
        return "before the first iteration"
    # The first that has not ended: the next one's rollouts may have begun
    report = next((report for report in reports if report.last_step is None), reports[-1])
    if not report.ready:
        return f"in iteration {report.iteration + 1}, while it rolled out"
    if report.last_step is None:
        return f"in iteration {report.iteration + 1}, while it trained on its {report.trained_rows} rows"
    return f"after iteration {report.iteration + 1}"


def where_to_look(run: RunFolder, output_dir: str) -> str:
    """A line to copy into a shell, which shows the run."""
    output = Path(output_dir)
    return f"Look at it: {view_command(output if run.path.parent == output else run.path)}"


def view_command(path: str | os.PathLike) -> str:
    """The line to copy into a shell that shows a run, wherever the package is installed."""
    return shlex.join([*_program(), "view", os.path.relpath(path) if _is_below(Path(path), Path.cwd()) else str(path)])


def _program() -> list[str]:
    if shutil.which("trl-multiturn"):
        return ["trl-multiturn"]
    beside = Path(sys.executable).with_name("trl-multiturn")  # of an environment that is not activated
    if beside.exists():
        return [os.path.relpath(beside) if _is_below(beside, Path.cwd()) else str(beside)]
    return [sys.executable, "-m", "trl_multiturn.cli"]


def _is_below(path: Path, folder: Path) -> bool:
    return Path(os.path.abspath(path)).is_relative_to(folder)
