"""
One training step of TRL's trainers and of the packed path, side by side in one process, on the same rows.

    python benchmarks/train_step.py                          # every table, about two hours
    python benchmarks/train_step.py dpo:0 groups --batches 4 # some tables, or one row of one
    python benchmarks/train_step.py groups --scale 0.25      # a quick look, on shorter rows
    python benchmarks/train_step.py real-model --model path/to/SmolLM2-135M-Instruct --real path/to/data
    python benchmarks/train_step.py cuda large-models --warm-up 4   # on a GPU
    python benchmarks/train_step.py --output benchmarks/results/train_step.md

Each arm is a real trainer's `compute_loss` and `backward()` on padded batches as TRL collates them, whose
`completion_mask` leaves out observations. Arms alternate batch by batch and start from the same weights. A row is
printed only if every arm's loss and gradient norm agree with the first arm's; then the median of the paired ratios,
with minimum and maximum. TRL has no OREO, no DQO and no group regression: there the first arm is our trainer with
`packed=False`.
In bfloat16 each arm's loss is held against the same loss in float32 instead, and may be as far off as TRL's.
`limit` is the step's necessary arithmetic, a value model's included, at the rate of this machine's own matrix
products, without and with the reference's forward pass (`train_step_limit.py`), then the fraction of it that each arm
achieves, of the latter where the arm computes its reference. `launches` counts the operators of a step, but views and
allocations.
Times are CPU seconds of one thread, or wall-clock seconds of several (`--threads`) or of a GPU, packing and metrics
included; peak memory is that of a process which runs one arm alone, above what the process held before the step (on a
GPU, what the step allocates).

Model: Qwen2 style, 8 layers, hidden 512, vocabulary 32k, random weights. Rows: prompts of 100-300 tokens, 2-6 turns
with tool results between them, at most 2048 tokens, about 0.9k on average, 40 % trained; `--real` names a folder with
the trajectories of `tora_*_trajectories.jsonl` instead.
"""

from __future__ import annotations

import argparse
import ctypes
import datetime
import gc
import os
import platform
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from launch_counter import LaunchCounter
from train_step_arms import ON_OUTCOMES, Step, add_reference, arms_of, make_trainer, run_step, without_reference
from train_step_limit import Limit, limit_of, shares_of_limit
from train_step_rows import RealRows, Setting, SyntheticRows, batch_of, trajectories_of
from train_step_run import whole_runs
from train_step_tables import HALF_B, NEED_A_GPU, NEED_A_MODEL, TABLES

from trl_multiturn.packing import pack_rows


# --- measurements ----------------------------------------------------------------------------------------------------


@dataclass
class Result:
    setting: Setting
    tokens: dict[str, float]
    ratios: dict[str, list[float]]
    seconds: dict[str, float]
    loss_difference: float
    norm_difference: float
    rounding: float = 0.0  # how far the first arm's loss is from that in float32
    memory: dict[str, float] = field(default_factory=dict)
    launches: dict[str, int] = field(default_factory=dict)
    limits: list[Limit] = field(default_factory=list)


def source_of_rows(setting: Setting, real: Path | None, seed: int = 0) -> SyntheticRows:
    return SyntheticRows(seed, setting) if real is None else RealRows(seed, setting, real)


def loss_in_float32(setting: Setting) -> Callable[[dict], float]:
    """The loss of a batch on the baseline's path, in float32 whatever the setting's own precision."""
    trainer = make_trainer(replace(setting, bf16=False), packed=False, precomputed=False)
    trainer.model.float()

    def loss(batch: dict[str, torch.Tensor]) -> float:
        with torch.no_grad():
            return trainer.compute_loss(trainer.model, without_reference(batch)).item()

    return loss


def batches_of(setting: Setting, real: Path | None) -> Iterator[dict[str, torch.Tensor]]:
    """Batches with reference log-probabilities, as precomputation leaves them in the dataset."""
    rows = source_of_rows(setting, real)
    scorer = make_trainer(setting, packed=setting.kind in ON_OUTCOMES, precomputed=False)
    while True:
        if setting.kind in ON_OUTCOMES:
            prepared = scorer._prepare_dataset(
                Dataset.from_list(trajectories_of(rows)), scorer.processing_class, scorer.args, "benchmark"
            )
            batch = scorer.data_collator(list(prepared))
            yield {name: x.to(setting.device) for name, x in batch.items()}
        else:
            batch = {name: x.to(setting.device) for name, x in batch_of(setting.kind, rows.pairs()).items()}
            with torch.no_grad(), torch.autocast(setting.device, torch.bfloat16, enabled=setting.bf16):
                batch = add_reference(setting, batch, scorer)
            yield batch


def measure(setting: Setting, batches: int, warm_up: int, real: Path | None) -> Result:
    """Paired steps of every arm, after `warm_up` untimed ones."""
    # First, because accelerate knows one precision at a time
    exact = loss_in_float32(setting) if setting.bf16 else None
    arms, source = arms_of(setting), batches_of(setting, real)
    first = next(iter(arms))
    result = Result(setting, {}, {name: [] for name in arms}, {}, 0.0, 0.0)
    times: dict[str, list[float]] = {name: [] for name in arms}
    counts = {"padded": 0, "raw": 0, "unique": 0, "trained": 0}
    for i in range(batches + warm_up):
        batch = next(source)
        if i == warm_up - 1:
            for name, arm in arms.items():
                with LaunchCounter() as counter:
                    arm.step(batch)
                result.launches[name] = counter.launches
        if i < warm_up:
            continue
        order = list(arms)[i % len(arms) :] + list(arms)[: i % len(arms)]
        steps = {name: arms[name].step(batch) for name in order}
        model = arms[first].trainer.accelerator.unwrap_model(arms[first].trainer.model)
        result.limits.append(limit_of(model, batch, torch.bfloat16 if setting.bf16 else torch.float32))
        expected = exact(batch) if exact else steps[first].loss
        result.rounding = max(result.rounding, abs(steps[first].loss - expected) / max(1.0, abs(expected)))
        for name, step in steps.items():
            result.ratios[name].append(steps[first].seconds / step.seconds)
            times[name].append(step.seconds)
            norm = abs(step.gradient_norm / steps[first].gradient_norm - 1)
            if name != first:
                difference = abs(step.loss - expected) / max(1.0, abs(expected))  # DQO's sums over tokens are large
                result.loss_difference = max(difference, result.loss_difference)
            result.norm_difference = max(norm, result.norm_difference)
            if setting.device == "cuda":
                result.memory[name] = max(step.allocated, result.memory.get(name, 0.0))
        _count(counts, batch)
    limit, norm_limit = (2 * result.rounding + 5e-3, 5e-2) if setting.bf16 else (1e-4, 1e-3)
    result.memory = {name: result.memory[name] for name in (first, "packed") if name in result.memory}
    if not (result.loss_difference <= limit and result.norm_difference <= norm_limit):  # NaN must not pass
        raise SystemExit(
            f"{setting.name}: the arms differ by {result.loss_difference:.1e} in loss and "
            f"{result.norm_difference:.1e} in gradient norm, so their speeds are not those of the same computation. "
            "Nothing is reported."
        )
    result.seconds = {name: statistics.median(seconds) for name, seconds in times.items()}
    result.tokens = {name: count / batches for name, count in counts.items()}
    return result


def _count(counts: dict[str, int], batch: dict[str, torch.Tensor]) -> None:
    row = pack_rows(batch["input_ids"], batch["attention_mask"])
    counts["padded"] += batch["input_ids"].numel()
    counts["raw"] += row.raw_tokens
    counts["unique"] += len(row)
    counts["trained"] += int(batch["completion_mask"].sum())


def peak_memory(setting: Setting, arm: str, real: Path | None) -> float:
    """Gigabytes that one step of one arm adds to the process's resident memory; to be called in a fresh process."""
    trainer = make_trainer(setting, packed=arm == "packed", precomputed=arm not in ("TRL", "padded"))
    source, peaks = batches_of(setting, real), []
    for _ in range(2):
        batch = next(source)
        batch = without_reference(batch) if arm == "TRL" else batch
        peaks.append(peak_of_step(trainer, batch)[0])
    return max(peaks)


def peak_of_step(trainer: Any, batch: dict[str, torch.Tensor]) -> tuple[float, Step]:
    """Gigabytes that one step adds to the process's resident memory at its peak, and the step."""
    for parameter in trainer.model.parameters():
        parameter.grad = None
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    before = _memory("VmRSS")
    step = run_step(trainer, batch)
    return _memory("VmHWM") - before, step


def _memory(name: str) -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(name)).split()[1]) / 2**20


def measure_memory(table: str, index: int, arguments: argparse.Namespace) -> dict[str, float]:
    memory = {}
    for arm in ("padded", "packed") if TABLES[table][index].kind in ON_OUTCOMES else ("TRL", "packed"):
        command = [sys.executable, __file__, table, "--memory-of", f"{index}:{arm}", "--threads", arguments.threads]
        command += ["--scale", arguments.scale]
        command += ["--real", str(arguments.real)] if arguments.real else []
        command += ["--model", arguments.model] if arguments.model else []
        output = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=True).stdout
        memory[arm] = float(output.splitlines()[-1])
    return memory


def measure_table(name: str, arguments: argparse.Namespace) -> list[str]:
    """The lines of a table, or of one of its rows (`name:index`), each row printed when it is there."""
    table, _, row = name.partition(":")
    results = []
    for index in [int(row)] if row else range(len(TABLES[table])):
        results.append(measure(TABLES[table][index], arguments.batches, arguments.warm_up, arguments.real))
        if arguments.memory:
            results[-1].memory = measure_memory(table, index, arguments)
        print(list(report(table, results[-1:]))[-1], flush=True)
    return list(report(table, results))


# --- report ----------------------------------------------------------------------------------------------------------


def report(table: str, results: list[Result]) -> Iterator[str]:
    first, *others = results[0].ratios
    yield f"\n### {table}\n"
    columns = ["setting", "tokens: padded, unpadded, unique", first]
    columns += [f"{name}: s, x (min..max)" for name in others]
    columns += [
        "limit, and with reference: s; fraction of it",
        "launches",
        "trained tokens/s",
        "loss Δ (bf16: to float32; TRL's), grad norm Δ",
        f"peak GB: {first}, packed",
    ]
    yield f"| {' | '.join(columns)} |"
    yield f"| {' | '.join(['---'] * len(columns))} |"
    for r in results:
        cells = [r.setting.name, ", ".join(f"{r.tokens[name]:.0f}" for name in ("padded", "raw", "unique"))]
        cells.append(_time(r.seconds[first]))
        for name in others:
            ratios = r.ratios[name]
            median = statistics.median(ratios)
            cells.append(f"{_time(r.seconds[name])}, **{median:.2f}** ({min(ratios):.2f}..{max(ratios):.2f})")
        online = r.setting.online or r.setting.kind in ON_OUTCOMES
        computes = [name == first or (name == "packed" and online) for name in r.seconds]
        cells.append(shares_of_limit(r.limits, list(r.seconds.values()), computes))
        cells.append(", ".join(map(str, r.launches.values())) or "not counted")
        cells.append(" → ".join(f"{r.tokens['trained'] / r.seconds[name]:.0f}" for name in (first, "packed")))
        rounding = f" ({r.rounding:.0e})" if r.setting.bf16 else ""
        cells.append(f"{r.loss_difference:.0e}{rounding}, {r.norm_difference:.0e}")
        cells.append(", ".join(f"{value:.2f}" for value in r.memory.values()) or "not measured")
        yield f"| {' | '.join(cells)} |"


def _time(seconds: float) -> str:
    return f"{seconds:.1f} s" if seconds >= 1 else f"{1000 * seconds:.0f} ms"


def header(arguments: argparse.Namespace) -> str:
    name = next((line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines()
                 if line.startswith("model name")), platform.processor())  # fmt: skip
    load = os.getloadavg()[0]
    if torch.cuda.is_available():
        name = f"{torch.cuda.get_device_name()}, {name}"
    return (
        f"`python benchmarks/train_step.py {' '.join(sys.argv[1:])}`, {datetime.date.today()}, {name}, "
        f"{os.cpu_count()} cores, {arguments.threads} thread(s), load average {load:.1f} at the start, "
        f"torch {torch.__version__}. {'CPU' if arguments.threads == 1 else 'Wall-clock'} seconds per step; x is the "
        "first arm's step over the arm's, paired."
    )


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "tables", nargs="*", help=f"of {', '.join(TABLES)}, run and run-cuda (50 steps); all for CPUs by default"
    )
    parser.add_argument("--batches", type=int, default=4)
    parser.add_argument("--warm-up", type=int, default=1, help="untimed batches; 4 are right on a GPU")
    parser.add_argument("--scale", type=float, default=1.0, help="factor on all lengths, for a quick look")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--memory", action="store_true", help="also measure each arm's peak in a process of its own")
    parser.add_argument("--real", type=Path, help="folder with tora_*_trajectories.jsonl, instead of synthetic rows")
    parser.add_argument("--model", help="checkpoint of the table `real-model`")
    parser.add_argument("--output", type=Path, help="Markdown file to append the tables to")
    parser.add_argument("--memory-of", help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> None:
    arguments = parse()
    torch.set_num_threads(arguments.threads)
    for settings in TABLES.values():
        for setting in settings:
            setting.scale *= arguments.scale
            if setting.checkpoint:
                setting.checkpoint = arguments.model
    if arguments.memory_of:
        index, arm = arguments.memory_of.split(":")
        print(peak_memory(TABLES[arguments.tables[0]][int(index)], arm, arguments.real))
        return
    lines = [header(arguments)]
    print(lines[0], flush=True)
    for table in arguments.tables or [*(name for name in TABLES if name not in NEED_A_GPU + NEED_A_MODEL), "run"]:
        if table in ("run", "run-cuda"):
            for line in whole_runs(arguments.scale, HALF_B if table == "run-cuda" else None):
                print(line, flush=True)
                lines.append(line)
            continue
        lines += measure_table(table, arguments)
    if arguments.output:
        with arguments.output.open("a", encoding="utf-8") as file:
            file.write("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
