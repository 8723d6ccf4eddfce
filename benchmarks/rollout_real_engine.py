"""
How much of the tools' latency a real engine hides: the same rollouts with tools of several latencies.

    python benchmarks/rollout_real_engine.py
    python benchmarks/rollout_real_engine.py --output benchmarks/results/rollout.md

`TransformersEngine` has fewer slots than there are trajectories, so it always has something to sample while tools run.
Each trajectory's seeds decide its tokens and its calls, so that the engine's work does not depend on the latency. What
is hidden does not show; what is left is the last turn's.
"""

from __future__ import annotations

import argparse
import datetime
import platform
import sys
import time
from pathlib import Path

import torch
import trl
from datasets import Dataset
from rollout import byte_tokenizer, make_tool, tiny_model

from trl_multiturn import RolloutConfig, generate_trajectories
from trl_multiturn.engines.transformers.engine import TransformersEngine


# A turn ends with one of these, after about 260 / 6 tokens of the random model
STOPS = list("aeinst")


def roll_out(trajectories: int, slots: int, calls: int, latency: float) -> tuple[float, int, int]:
    """Wall-clock seconds, tool calls and sampled tokens of one rollout of so many trajectories."""
    tokenizer = byte_tokenizer()
    engine = TransformersEngine(tiny_model(tokenizer), tokenizer, max_batch_size=slots)
    prompts = Dataset.from_dict({"prompt": [[{"role": "user", "content": f"Job {i}"}] for i in range(trajectories)]})
    config = RolloutConfig(
        num_generations=1, dialect="action", action_prefix="", max_turn_tokens=1000, stop_strings=STOPS,
        max_tool_calling_iterations=calls, max_trajectory_tokens=16_000, max_concurrent_trajectories=trajectories,
    )  # fmt: skip
    start = time.perf_counter()
    done = generate_trajectories(prompts, engine, [make_tool(latency)], config, progress=False)
    elapsed = time.perf_counter() - start
    tokens = sum(sum(trajectory.action_mask) for trajectory in done)
    return elapsed, sum(trajectory.info["tool_calls"] for trajectory in done), tokens


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trajectories", type=int, default=64)
    parser.add_argument("--slots", type=int, default=16)
    parser.add_argument("--calls", type=int, default=3)
    parser.add_argument("--latencies", type=float, nargs="+", default=[0.0, 0.2, 1.0])
    parser.add_argument("--output", type=Path, help="Markdown file to append the table to")
    arguments = parser.parse_args()
    work = (arguments.trajectories, arguments.slots, arguments.calls)
    _, *expected = roll_out(*work, 0.0)  # warm-up
    lines = [
        "\n## Latency that a real engine hides\n",
        f"`python benchmarks/rollout_real_engine.py {' '.join(sys.argv[1:])}`, {datetime.date.today()}, "
        f"{torch.get_num_threads()} thread(s), Python {platform.python_version()}, torch {torch.__version__}, trl "
        f"{trl.__version__}: {work[0]} trajectories in {work[1]} slots, up to {work[2]} tool "
        f"calls each, {expected[0]} calls and {expected[1]} sampled tokens in all.\n",
        "| tool | seconds | more than without latency | serial latency of one trajectory |",
        "| --- | ---: | ---: | ---: |",
    ]
    base = None
    for latency in arguments.latencies:
        elapsed, *did = roll_out(*work, latency)
        if did != expected:
            raise SystemExit(f"{did} calls and tokens in place of {expected}: not the same work.")
        base = elapsed if base is None else base
        lines.append(f"| {latency} s | {elapsed:.2f} | {elapsed - base:.2f} | {work[2] * latency:.1f} |")
        print(lines[-1], flush=True)
    if arguments.output:
        with arguments.output.open("a", encoding="utf-8") as file:
            file.write("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
