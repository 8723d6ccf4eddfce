"""
How many operators a training step launches on a CUDA device, counted without one.

    python benchmarks/launches.py
    python benchmarks/launches.py --layers 30 --output benchmarks/results/train_step.md

Every operator counts, forward and backward, but views and allocations; see `launch_counter.py` for how. An attention
kernel, a norm of PyTorch's and a tile of TRL's Triton head count once each, as they are launched there. `waits` is how
often the host needs a value from the device. Counts depend on layers and rows, not on widths, so the models are
narrow; weights are float32, products bfloat16 (autocast).
"""

from __future__ import annotations

import argparse
import datetime
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from launch_counter import autocast, counted
from torch import Tensor
from train_step_arms import make_trainer
from train_step_rows import Setting, SyntheticRows, batch_of


def narrow(layers: int) -> dict[str, Any]:
    """A model of Qwen2.5's shape whose widths do not matter."""
    return dict(
        num_hidden_layers=layers,
        hidden_size=32,
        intermediate_size=48,
        vocab_size=512,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=True,
    )


class Count(NamedTuple):
    """Of one step: launches of the forward pass and of both, waits, and the loss."""

    forward: int
    both: int
    waits: int
    loss: float


def count_step(trainer: Any, batch: dict[str, Tensor]) -> Count:
    """A step of a trainer, after one that decided how it runs."""
    for forward in getattr(trainer, "_packed_forwards", None) or ():
        forward.remove()
    trainer._packed_forwards = None
    with counted() as counter:
        for _ in range(2):
            trainer.model.zero_grad()
            inputs = {name: x.clone() for name, x in batch.items()}
            counter.operators.clear()
            counter.waits = 0
            with autocast():
                loss = trainer.compute_loss(trainer.model, inputs)
            forward_launches = counter.launches
            loss.backward()
        return Count(forward_launches, counter.launches, counter.waits, loss.item())


# Whether they pack, and `fused_layers`
ARMS = {"TRL, precomputed": (False, None), "packed": (True, None), "packed, layers as they came": (True, False)}


def count(setting: Setting, arms: Iterable[str] = tuple(ARMS)) -> dict[str, Count]:
    """Each arm's step on the same rows."""
    batch = batch_of(setting.kind, SyntheticRows(0, setting).pairs())
    reference = torch.full((len(batch["input_ids"]) // 2,), -50.0)
    batch |= {"ref_chosen_logps": reference, "ref_rejected_logps": reference}
    counts = {}
    for name in arms:
        packed, fuse = ARMS[name]
        trainer = make_trainer(setting, packed, precomputed=True)
        trainer.args.fused_layers = fuse
        counts[name] = count_step(trainer, batch)
    return counts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=24)
    parser.add_argument("--pairs", type=int, default=2)
    parser.add_argument("--output", type=Path, help="Markdown file to append to")
    arguments = parser.parse_args()
    lines = [
        f"`{' '.join(['python benchmarks/launches.py', *sys.argv[1:]])}`, {datetime.date.today()}, torch "
        f"{torch.__version__}: {arguments.layers} layers, {arguments.pairs} pairs, reference precomputed.\n",
        "| step | forward | forward and backward | x | waits |",
        "| --- | ---: | ---: | ---: | ---: |",
    ]
    counts = count(Setting("launches", pairs=arguments.pairs, scale=0.05, body=narrow(arguments.layers)))
    first = next(iter(counts.values()))
    for name, each in counts.items():
        if abs(each.loss - first.loss) > 1e-3 * max(1.0, abs(first.loss)):
            raise SystemExit(f"{name}: a loss of {each.loss}, where TRL has {first.loss}. Nothing is reported.")
        lines.append(f"| {name} | {each.forward} | {each.both} | **{each.both / first.both:.2f}** | {each.waits} |")
    print("\n".join(lines))
    if arguments.output:
        with arguments.output.open("a", encoding="utf-8") as file:
            file.write("\n" + "\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
