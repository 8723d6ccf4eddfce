"""
Memory and time of a step on long trajectories with gradient checkpointing: the row in slices, and at once.

    python benchmarks/long_rows.py
    python benchmarks/long_rows.py --scale 0.25 --settings pairs
    python benchmarks/long_rows.py --output benchmarks/results/long_rows.md

`pairs`: 2 pairs of 8,192 tokens that share their prompts. `group`: 8 trajectories of 4,096 tokens, 4 pairs of one
prompt, whose turns branch after 512 and 2,048 tokens. 40 % are trained. Each arm is a process of its own; both start
from the same weights, and nothing is printed where losses or gradient norms differ. Memory is what a second step adds
to the process at its peak, gradients included; seconds are the CPU's, of the faster of two steps.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import random
import subprocess
import sys
from pathlib import Path

import torch
from train_step import peak_of_step
from train_step_arms import make_trainer, run_step
from train_step_rows import Setting, Trajectory, batch_of


BODY = {"num_hidden_layers": 6, "hidden_size": 256, "intermediate_size": 768, "vocab_size": 16_000,
        "num_attention_heads": 4}  # fmt: skip
ARMS = {"at once": 0, "in slices": None}


def turns(rng: random.Random, length: int, vocab: int) -> Trajectory:
    """Actions of 160 tokens and observations of 240."""
    mask = ([1] * 160 + [0] * 240) * (length // 400 + 1)
    return Trajectory([rng.randrange(3, vocab) for _ in range(length)], mask[:length])


def pairs_of(setting: str, scale: float, vocab: int) -> list[tuple[list[int], Trajectory, Trajectory]]:
    rng = random.Random(0)
    if setting == "pairs":
        prompts = [turns(rng, 300, vocab).ids for _ in range(2)]
        length = int(8192 * scale) - 300
        return [(prompt, turns(rng, length, vocab), turns(rng, length, vocab)) for prompt in prompts]
    prompt = turns(rng, int(512 * scale), vocab).ids
    branches = [turns(rng, int(1536 * scale), vocab) for _ in range(2)]
    sides = [branch + turns(rng, int(2048 * scale), vocab) for branch in branches for _ in range(4)]
    return [(prompt, sides[i], sides[i + 4]) for i in range(4)]


def run_arm(setting: str, arm: str, scale: float) -> dict[str, float]:
    trainer = make_trainer(Setting(setting, body=BODY, checkpointing=True), packed=True, precomputed=True)
    for forward in trainer._packed_forwards:  # the constructor decided how they run, as it computes references
        forward._slices = ARMS[arm]
    batch = batch_of("dpo", pairs_of(setting, scale, BODY["vocab_size"]))
    size = (len(batch["input_ids"]) // 2,)
    batch |= {"ref_chosen_logps": torch.full(size, -20.0), "ref_rejected_logps": torch.full(size, -25.0)}
    first = run_step(trainer, batch)
    peak, second = peak_of_step(trainer, batch)
    forward = trainer._packed_forwards[0]
    if bool(forward._slice_tokens) != (ARMS[arm] is None):
        raise SystemExit(f"{arm}: slices of {forward._slice_tokens} tokens. Nothing is reported.")
    return {
        "loss": second.loss, "norm": second.gradient_norm, "seconds": min(first.seconds, second.seconds),
        "peak": peak, "tokens": len(forward.last_plan.row), "slice": forward._slice_tokens,
    }  # fmt: skip


def measure(setting: str, scale: float) -> str:
    """A row of the table."""
    arms = {}
    for arm in ARMS:
        command = [sys.executable, __file__, "--arm", f"{setting}:{arm}", "--scale", str(scale)]
        arms[arm] = json.loads(
            subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()[-1]
        )
    whole, cut = arms.values()
    loss, norm = abs(cut["loss"] - whole["loss"]), abs(cut["norm"] / whole["norm"] - 1)
    if not (loss <= 1e-4 and norm <= 1e-3):  # NaN must not pass
        raise SystemExit(f"{setting}: the arms differ by {loss:.1e} in loss, {norm:.1e} in gradient norm.")
    return (
        f"| {setting} | {whole['tokens']:.0f} | {cut['slice']:.0f} | {whole['peak']:.2f} GB | {cut['peak']:.2f} GB | "
        f"**{cut['peak'] / whole['peak']:.2f}** | {whole['seconds']:.1f} | {cut['seconds']:.1f} | "
        f"**{cut['seconds'] / whole['seconds']:.2f}** | {loss:.0e}, {norm:.0e} |"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--settings", nargs="+", default=["pairs", "group"], choices=["pairs", "group"])
    parser.add_argument("--scale", type=float, default=1.0, help="factor on all lengths")
    parser.add_argument("--output", type=Path, help="Markdown file to append the table to")
    parser.add_argument("--arm", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if arguments.arm:
        print(json.dumps(run_arm(*arguments.arm.split(":"), arguments.scale)))
        return
    lines = [
        f"`python benchmarks/long_rows.py {' '.join(sys.argv[1:])}`, {datetime.date.today()}, {platform.machine()}, "
        f"{os.cpu_count()} cores, one thread, load average {os.getloadavg()[0]:.1f}, torch {torch.__version__}, "
        f"float32, gradient checkpointing; {BODY}",
        "",
        "| setting | tokens | slice | peak at once | in slices | x | CPU s at once | in slices | x | loss Δ, norm Δ |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | --- |",
    ]
    print("\n".join(lines), flush=True)
    for setting in arguments.settings:
        lines.append(measure(setting, arguments.scale))
        print(lines[-1], flush=True)
    if arguments.output:
        with arguments.output.open("a", encoding="utf-8") as file:
            file.write("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
