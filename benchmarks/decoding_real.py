"""
Decoding with a real model on one core: `TransformersEngine` and `generate`, 32 trajectories, float32.

    python benchmarks/decoding_real.py --model path/to/SmolLM2-135M-Instruct
    python benchmarks/decoding_real.py --model path/to/SmolLM2-135M-Instruct --output benchmarks/results/decoding.md

`uniform turns`: prompts of 200 tokens, 24 sampled tokens each. `tool trajectories`: two turns of 8 to 64 tokens, with
an observation of 20 to 120 tokens between them. `generate` goes in lock-step, as a loop around it does: a turn reads
the whole conversations, padded on the left, and lasts as long as the longest of them. The engine keeps what it has
read, and a trajectory goes on as soon as its turn is over. Both sample as many tokens of each turn. Seconds are of the
processor's time; the arms alternate; medians.

Last, a decoding step beside its matrix products alone, at the same sizes, and the difference of the engine's
log-probabilities to those of one forward pass over the finished trajectories.
"""

from __future__ import annotations

import argparse
import asyncio
import datetime
import os
import random
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from trl_multiturn import SamplingParams, TransformersEngine


TRAJECTORIES, CONTEXT, UNIFORM = 32, 200, 24
Turn = tuple[list[int], int]  # what the policy reads before it, and the tokens that it samples


def uniform(rng: random.Random, vocab: int) -> list[list[Turn]]:
    return [[(_ids(rng, CONTEXT, vocab), UNIFORM)] for _ in range(TRAJECTORIES)]


def with_tools(rng: random.Random, vocab: int) -> list[list[Turn]]:
    return [
        [
            (_ids(rng, rng.randint(100, 300), vocab), rng.randint(8, 64)),
            (_ids(rng, rng.randint(20, 120), vocab), rng.randint(8, 64)),
        ]
        for _ in range(TRAJECTORIES)
    ]


def _ids(rng: random.Random, count: int, vocab: int) -> list[int]:
    return [rng.randrange(20, vocab) for _ in range(count)]


def by_generate(model: PreTrainedModel, trajectories: list[list[Turn]]) -> None:
    """Turn after turn, all together."""
    conversations: list[list[int]] = [[] for _ in trajectories]
    for turn in range(len(trajectories[0])):
        conversations = [ids + turns[turn][0] for ids, turns in zip(conversations, trajectories, strict=True)]
        longest = max(map(len, conversations))
        ids = torch.tensor([[0] * (longest - len(each)) + each for each in conversations])
        mask = torch.tensor([[0] * (longest - len(each)) + [1] * len(each) for each in conversations])
        count = max(turns[turn][1] for turns in trajectories)
        sampled = model.generate(
            ids,
            attention_mask=mask,
            max_new_tokens=count,
            min_new_tokens=count,
            do_sample=True,
            top_k=0,
            pad_token_id=0,
        )[:, longest:].tolist()
        conversations = [
            before + new[: turns[turn][1]]
            for before, new, turns in zip(conversations, sampled, trajectories, strict=True)
        ]


def by_engine(engine: TransformersEngine, trajectories: list[list[Turn]]) -> list[tuple[list[int], list[float]]]:
    """Each trajectory by itself; the last turns' conversations and log-probabilities."""

    async def play(number: int, turns: list[Turn]) -> tuple[list[int], list[float]]:
        ids: list[int] = []
        for index, (read, count) in enumerate(turns):
            ids = ids + read
            sampling = SamplingParams(count, seed=100 * number + index)
            generation = await engine.generate(ids, sampling, session=str(number))
            ids, logps = ids + generation.token_ids, generation.logps
        engine.release(str(number))
        return ids, logps

    async def all_of_them() -> list[tuple[list[int], list[float]]]:
        return await asyncio.gather(*(play(i, turns) for i, turns in enumerate(trajectories)))

    return asyncio.run(all_of_them())


def timed(run: Callable[[], object]) -> float:
    started = time.process_time()
    run()
    return time.process_time() - started


def log_probs_differ_by(model: PreTrainedModel, done: list[tuple[list[int], list[float]]]) -> float:
    """Largest difference of the last turns' log-probabilities to those of a plain forward pass."""
    largest = 0.0
    for ids, logps in done[:4]:
        with torch.no_grad():
            plain = model(torch.tensor([ids])).logits[0].log_softmax(-1)
        targets = torch.tensor(ids[-len(logps) :])
        expected = plain[-len(logps) - 1 : -1].gather(1, targets[:, None])[:, 0]
        largest = max(largest, (expected - torch.tensor(logps)).abs().max().item())
    return largest


def seconds_of_products(model: PreTrainedModel) -> float:
    """Of all linear maps of one step, for as many rows as there are trajectories."""
    layers = [module for module in model.modules() if isinstance(module, nn.Linear)]
    inputs = {layer.in_features: torch.randn(TRAJECTORIES, layer.in_features) for layer in layers}

    def run() -> None:
        with torch.no_grad():
            for layer in layers:
                layer(inputs[layer.in_features])

    run()
    return statistics.median(timed(run) for _ in range(5))


def measure(path: str, repeats: int) -> Iterator[str]:
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    engine = TransformersEngine(model, AutoTokenizer.from_pretrained(path))
    vocab = model.config.vocab_size
    yield "| trajectories | sampled tokens | `generate`: CPU s | engine: CPU s | x (min..max) | log-probs differ by |"
    yield "| --- | ---: | ---: | ---: | ---: | ---: |"
    for name, make in (("uniform turns", uniform), ("tool trajectories of two turns", with_tools)):
        trajectories = make(random.Random(0), vocab)
        difference = log_probs_differ_by(model, by_engine(engine, trajectories))  # the warm-up, too
        pairs = [
            (timed(lambda: by_generate(model, trajectories)), timed(lambda: by_engine(engine, trajectories)))  # noqa: B023
            for _ in range(repeats)
        ]
        ratios = [stock / ours for stock, ours in pairs]
        stock, ours = (statistics.median(column) for column in zip(*pairs, strict=True))
        tokens = sum(count for turns in trajectories for _, count in turns)
        yield (
            f"| {name} | {tokens} | {stock:.1f} | {ours:.1f} | **{statistics.median(ratios):.2f}** "
            f"({min(ratios):.2f}..{max(ratios):.2f}) | {difference:.0e} |"
        )
    trajectories = uniform(random.Random(1), vocab)
    short = [[(ids, 4) for ids, _ in turns] for turns in trajectories]
    steps = [
        (timed(lambda: by_engine(engine, trajectories)) - timed(lambda: by_engine(engine, short))) / (UNIFORM - 4)
        for _ in range(repeats)
    ]
    products = seconds_of_products(model)
    step = statistics.median(steps)
    yield (
        f"\nA step of {TRAJECTORIES} rows at a context of {CONTEXT}: {1000 * step:.0f} ms, its matrix products alone "
        f"{1000 * products:.0f} ms: {step / products:.2f} x."
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="a checkpoint's folder")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--output", type=Path, help="Markdown file to append to")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    lines = [
        f"\n## A real model\n\n`python benchmarks/decoding_real.py --repeats {arguments.repeats} --model …` "
        f"({Path(arguments.model).name}), {datetime.date.today()}, {os.cpu_count()} cores, one thread, load average "
        f"{os.getloadavg()[0]:.1f}, torch {torch.__version__}, float32.\n"
    ]
    print(lines[0], flush=True)
    for line in measure(arguments.model, arguments.repeats):
        lines.append(line)
        print(line, flush=True)
    if arguments.output:
        with arguments.output.open("a", encoding="utf-8") as file:
            file.write("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
