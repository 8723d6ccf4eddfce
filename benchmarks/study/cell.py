"""One child process of the study: some arms of one world and seed, each result in a file of its own.

`python -m benchmarks.study.cell --out FOLDER --world late --seed 0 --arms m-dpo dpo`
"""

from __future__ import annotations

import argparse
import fcntl
import json
import os
import platform
import time
import traceback
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from .settings import Setting


PACKAGES = ("trl-multiturn", "trl", "transformers", "torch", "datasets")


def result_path(out: Path, world: str, seed: int, arm: str) -> Path:
    """Where the result of an arm is; it exists once the arm is finished."""
    return out / "results" / f"{world}-{seed}-{arm}.json"


def run_cell(out: Path, world: str, seed: int, arms: Sequence[str], quick: bool = False) -> None:
    """Runs those of the arms that have no result yet.

    One that raises leaves no result, and the others go on. One process at a time works on a world and seed: a child
    that outlived a killed study is waited for.
    """
    lock = out / "shared" / f"{world}-{seed}.lock"
    lock.parent.mkdir(parents=True, exist_ok=True)
    with lock.open("w") as stream:
        fcntl.flock(stream, fcntl.LOCK_EX)
        _run_missing(out, world, seed, arms, quick)


def _run_missing(out: Path, world: str, seed: int, arms: Sequence[str], quick: bool) -> None:
    failed = []
    for arm in arms:
        path = result_path(out, world, seed, arm)
        if path.exists():
            continue
        started, processor = time.perf_counter(), time.process_time()
        try:
            metrics = _runner_of(world)(out, world, seed, arm, quick)
        except Exception:
            traceback.print_exc()  # in the cell's log
            failed.append(arm)
            continue
        record = {
            "world": world,
            "seed": seed,
            "arm": arm,
            **metrics,
            "seconds": round(time.perf_counter() - started, 2),
            "processor_seconds": round(time.process_time() - processor, 2),
            "finished": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            **_versions(),
        }
        _write_whole(path, json.dumps(record, indent=1))
    if failed:
        raise SystemExit(f"{world}, seed {seed}: {', '.join(failed)} failed; the other arms are done.")


def run_arm(out: Path, world: str, seed: int, arm: str, quick: bool) -> dict[str, Any]:
    """Trains and measures one arm on a language model."""
    import torch

    from .arms import ARMS
    from .measuring import measure
    from .start import load, starting_policy
    from .training import train

    torch.set_num_threads(1)  # two cells share two cores, and so small a policy gains nothing from more
    setting = Setting.of(world, quick)
    shared = out / "shared" / f"{world}-{seed}"
    shared.mkdir(parents=True, exist_ok=True)
    start, tokenizer = load(starting_policy(setting, seed, shared))
    with TemporaryDirectory() as scratch:
        policy, trainer, facts = train(ARMS[arm], setting, seed, shared, Path(scratch))
        metrics = measure(ARMS[arm], policy, trainer, start, tokenizer, setting)
    return {**metrics, **facts}


def _runner_of(world: str) -> Callable[..., dict[str, Any]]:
    if world.startswith("tabular"):
        from .tabular import run_tabular

        return run_tabular
    return run_arm


def _versions() -> dict[str, str]:
    names = {name.replace("-", "_"): version(name) for name in PACKAGES}
    return {**names, "python": platform.python_version(), "machine": f"{os.cpu_count()} x {_processor()}"}


def _processor() -> str:
    """The processor's name, where the system says it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.machine()
    return next((line.partition(": ")[2] for line in lines if line.startswith("model name")), platform.machine())


def _write_whole(path: Path, text: str) -> None:
    """Writes a file that is either whole or not there, also after a kill."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    partial.write_text(text, encoding="utf-8")
    partial.replace(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--world", required=True)
    parser.add_argument("--seed", type=int, required=True)
    parser.add_argument("--arms", nargs="+", required=True)
    parser.add_argument("--quick", action="store_true")
    run_cell(**vars(parser.parse_args()))


if __name__ == "__main__":
    main()
