"""
Decoding at long contexts: `TransformersEngine` and `generate`, side by side in one run.

    python benchmarks/decoding.py                                   # the table, a few minutes on one core
    python benchmarks/decoding.py --contexts 200 --trajectories 5 --repeats 1
    python benchmarks/decoding.py --output benchmarks/results/decoding.md

Both sample from one model, float32, the same number of trajectories at once, each with a context of its own. What a
token costs is the difference between sampling many and few after the same prompts, so that reading these is left out,
in seconds of the processor's time, as other jobs may run beside it.
The third arm is the engine with the rows that only fill up its matrices taking part in attention, as they would
without `rollout/slot_attention.py`. The arms alternate; medians.
"""

from __future__ import annotations

import argparse
import asyncio
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from unittest.mock import patch

import torch
from rollout import byte_tokenizer, report, tiny_model

from trl_multiturn import SamplingParams, TransformersEngine


FEW, MANY = 8, 40


def decoding(contexts: list[int], trajectories: list[int], repeats: int) -> list[str]:
    tokenizer = byte_tokenizer()
    model = tiny_model(tokenizer).eval()
    generator = torch.Generator().manual_seed(0)

    def by_generate(prompts: torch.Tensor, count: int) -> None:
        model.generate(prompts, attention_mask=torch.ones_like(prompts), max_new_tokens=count, min_new_tokens=count,
                       do_sample=True, pad_token_id=tokenizer.pad_token_id)  # fmt: skip

    def by_engine(prompts: torch.Tensor, count: int) -> None:
        engine = TransformersEngine(model, tokenizer)

        async def sample() -> None:
            requests = (engine.generate(ids, SamplingParams(count, seed=i)) for i, ids in enumerate(prompts.tolist()))
            await asyncio.gather(*requests)

        asyncio.run(sample())

    def by_engine_with_padding(prompts: torch.Tensor, count: int) -> None:
        with patch("trl_multiturn.engines.transformers.decoding.uses_slot_attention", return_value=False):
            by_engine(prompts, count)

    lines = [
        f"tokens per second of processor time, beyond the first {FEW} of each trajectory; 4 layers, float32",
        "",
        "| context | trajectories | generate | engine, padding attends | engine | engine / generate | / padding |",
        "| ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for context in contexts:
        for count in trajectories:
            prompts = torch.randint(200, (count, context), generator=generator)
            arms = (by_generate, by_engine_with_padding, by_engine)
            seconds: dict[Callable, list[float]] = {arm: [] for arm in arms}
            for _ in range(repeats):
                for arm in arms:
                    seconds[arm].append(timed(arm, prompts, MANY) - timed(arm, prompts, FEW))
            rates = [count * (MANY - FEW) / statistics.median(seconds[arm]) for arm in arms]
            lines.append(
                f"| {context} | {count} | {rates[0]:.0f} | {rates[1]:.0f} | {rates[2]:.0f} | "
                f"{rates[2] / rates[0]:.2f} | {rates[2] / rates[1]:.2f} |"
            )
            print(lines[-1], flush=True)
    return lines


def timed(arm: Callable, prompts: torch.Tensor, count: int) -> float:
    started = time.process_time()
    arm(prompts, count)
    return time.process_time() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--contexts", type=int, nargs="*", default=[200, 1900])
    parser.add_argument("--trajectories", type=int, nargs="*", default=[1, 5, 8, 16])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--output", type=Path, help="Markdown file for the table.")
    parser.add_argument("--note", help="A sentence about the machine, for the file.")
    args = parser.parse_args()
    tables = {"Tokens per second": decoding(args.contexts, args.trajectories, args.repeats)}
    text = report(tables, sys.argv[1:], args.note, "Decoding at long contexts", "decoding.py")
    print("\n" + text)
    if args.output:
        args.output.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
