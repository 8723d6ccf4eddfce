"""Runs cells (a world and a seed, with their arms) as child processes; what has a result is skipped."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from .cell import result_path


ROOT = Path(__file__).parents[2]


@dataclass(frozen=True)
class Cell:
    """Arms of one world and seed, which share a starting policy and its rollouts."""

    world: str
    seed: int
    arms: tuple[str, ...]

    def missing(self, out: Path) -> tuple[str, ...]:
        """The arms without a result."""
        return tuple(arm for arm in self.arms if not result_path(out, self.world, self.seed, arm).exists())

    def command(self, out: Path, quick: bool) -> list[str]:
        """The child process."""
        options = ["--out", str(out), "--world", self.world, "--seed", str(self.seed)]
        module = [sys.executable, "-m", "benchmarks.study.cell"]
        return [*module, *options, *(["--quick"] if quick else []), "--arms", *self.missing(out)]


def run(cells: Iterable[Cell], out: Path, workers: int = 2, quick: bool = False, until: float = float("inf")) -> bool:
    """
    Runs what is missing, in order.

    A cell that fails is told, its log is kept, and the others go on; started again, the study tries it again.

    Args:
        cells (`Iterable[Cell]`): what to run; no two of one world and seed are under way at the same time.
        out (`Path`): where results, logs and what cells share are kept.
        workers (`int`, *optional*, defaults to `2`): child processes at a time, one thread each.
        quick (`bool`, *optional*, defaults to `False`): shrink everything.
        until (`float`, *optional*): seconds since the epoch; what runs then is ended.

    Returns:
        `bool`: whether nothing is missing now.
    """
    waiting = [cell for cell in cells if cell.missing(out)]
    running: dict[subprocess.Popen[bytes], Cell] = {}
    with _ended_with_us(running):
        while (waiting or running) and time.time() < until:
            _collect(running)
            busy = {(cell.world, cell.seed) for cell in running.values()}
            ready = next((cell for cell in waiting if (cell.world, cell.seed) not in busy), None)
            if ready is None or len(running) >= workers:
                time.sleep(0.2)
                continue
            waiting.remove(ready)
            if ready.missing(out):
                running[_start(ready, out, quick)] = ready
    return not any(cell.missing(out) for cell in [*waiting, *cells])


def _start(cell: Cell, out: Path, quick: bool) -> subprocess.Popen[bytes]:
    log = out / "logs" / f"{cell.world}-{cell.seed}.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    print(f"{time.strftime('%H:%M:%S')} {cell.world} seed {cell.seed}: {' '.join(cell.missing(out))}", flush=True)
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    with log.open("ab") as stream:
        return subprocess.Popen(
            cell.command(out, quick), cwd=ROOT, env=environment, stdout=stream, stderr=subprocess.STDOUT
        )


def _collect(running: dict[subprocess.Popen[bytes], Cell]) -> None:
    """Takes out the children that have ended."""
    for process, cell in list(running.items()):
        if process.poll() is not None:
            del running[process]
            if process.returncode:
                print(
                    f"{cell.world} seed {cell.seed} ended with status {process.returncode}; see its log.", flush=True
                )


@contextlib.contextmanager
def _ended_with_us(running: dict[subprocess.Popen[bytes], Cell]) -> Iterator[None]:
    """Ends the children where the study ends first; what they have not finished is run again."""
    try:
        yield
    finally:
        for process in running:
            process.terminate()
        for process in running:
            process.wait()
