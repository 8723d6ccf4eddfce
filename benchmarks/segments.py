"""
What segments cost. A training step on trajectories of k segments that share their prompt, beside plain ones of as many
unique tokens; and what plain trajectories cost, beside a checkout from before there were segments.

    python benchmarks/segments.py
    python benchmarks/segments.py --against ../earlier_checkout

Small models on one thread. Rounds alternate between the two arms, and processor time is counted, so that other work on
the machine falls on both alike; each ratio is the median over rounds of one round's two arms. Results:
results/segments.md.
"""

from __future__ import annotations

import argparse
import functools
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

import trl_multiturn
from trl_multiturn import (
    Generation,
    MultiTurnDPOConfig,
    MultiTurnDPOTrainer,
    MultiTurnKTOConfig,
    MultiTurnKTOTrainer,
    OREOConfig,
    OREOTrainer,
    RolloutConfig,
    generate_trajectories,
)


VOCABULARY = 2048
COMMON = dict(use_cpu=True, bf16=False, report_to="none", max_length=None, packed=True, gradient_checkpointing=False,
              disable_tqdm=True)  # fmt: skip
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
PLAIN = ("m-dpo step", "m-kto step", "oreo step", "m-dpo preparation", "rollouts")


def segmented_rows(segments: int, unique: int, count: int) -> Dataset:
    """Trajectories of so many segments and unique tokens: a prompt of a third, the rest in turns of equal length."""
    from trl_multiturn.segments import RowBuilder  # an earlier checkout has none

    generator = torch.Generator().manual_seed(0)
    made = []
    for number in range(count):
        tokens = torch.randint(3, VOCABULARY, (unique,), generator=generator).tolist()
        prompt, rest = tokens[: unique // 3], tokens[unique // 3 :]
        size = len(rest) // segments
        row = RowBuilder()
        for start in range(0, size * segments, size):
            # Each segment reads the prompt and what is new, and none of the turns before
            part = rest[start : start + size]
            row.add(prompt + part[: size // 2], part[size // 2 :])
        length = row.prompt_length
        made.append(
            {
                "prompt_ids": row.ids[:length],
                "completion_ids": row.ids[length:],
                "action_mask": row.action_mask[length:],
                "branches": row.branches,
                "label": number % 2 == 0,
            }
        )
    return Dataset.from_list(made)


def plain_rows(unique: int, count: int, pairs: bool) -> Dataset:
    """Token rows of four turns with observations between them."""
    generator = torch.Generator().manual_seed(0)
    turn = unique // 12
    mask = ([1] * turn + [0] * turn) * 4
    made = []
    for number in range(count):
        ids = torch.randint(3, VOCABULARY, (unique // 3 + 2 * len(mask),), generator=generator).tolist()
        prompt, first, second = ids[: unique // 3], ids[unique // 3 :][: len(mask)], ids[-len(mask) :]
        row: dict[str, Any] = {"prompt_ids": prompt}
        if pairs:
            row |= {"chosen_ids": first, "chosen_action_mask": mask}
            row |= {"rejected_ids": second, "rejected_action_mask": mask}
        else:
            row |= {"completion_ids": first, "action_mask": mask, "label": number % 2 == 0, "reward": number % 2 / 1}
        made.append(row)
    return Dataset.from_list(made)


def make_trainer(name: str, dataset: Dataset, layers: int, hidden: int) -> Any:
    core = Tokenizer(models.WordLevel({f"t{i}": i for i in range(VOCABULARY)}, unk_token="t0"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, pad_token="t0", eos_token="t1", unk_token="t0")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=hidden, intermediate_size=3 * hidden, num_hidden_layers=layers,
        num_attention_heads=8, num_key_value_heads=8,
    )  # fmt: skip
    trainer_class, config_class, more = {
        "m-dpo": (MultiTurnDPOTrainer, MultiTurnDPOConfig, {}),
        "m-kto": (MultiTurnKTOTrainer, MultiTurnKTOConfig, {"loss_type": "apo_zero_unpaired"}),
        "oreo": (OREOTrainer, OREOConfig, {"value_model": "head"}),
    }[name]
    return trainer_class(
        model=LlamaForCausalLM(config), ref_model=LlamaForCausalLM(config),
        args=config_class(tempfile.mkdtemp(), **COMMON, **more), train_dataset=dataset, processing_class=tokenizer,
    )  # fmt: skip


def step(trainer: Any) -> None:
    """One batch of all rows, forward and backward."""
    batch = trainer._prepare_inputs(trainer.data_collator(list(trainer.train_dataset)))
    trainer.compute_loss(trainer.model, batch).backward()
    trainer.model.zero_grad()


def cpu_seconds(work: Callable[[], None]) -> float:
    start = time.process_time()
    work()
    return time.process_time() - start


def chat_tokenizer() -> PreTrainedTokenizerFast:
    """One token per byte, and ChatML's."""
    core = Tokenizer(
        models.BPE({symbol: i for i, symbol in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}, [])
    )
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    core.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<|im_end|>", pad_token="<pad>")
    tokenizer.add_tokens(["<|im_start|>"], special_tokens=True)
    tokenizer.chat_template = CHATML
    return tokenizer


class Answers:
    """An engine that answers at once, so that the loop is all that costs: two calls, and an answer."""

    weights = "shared"

    def __init__(self, processing_class: PreTrainedTokenizerFast):
        self.processing_class = processing_class
        turns = ("```python\nprint(1)\n```", "```python\nprint(2)\n```", "The answer is \\boxed{4}.")
        self._turns = [processing_class(f"{turn}<|im_end|>")["input_ids"] for turn in turns]
        self._output = processing_class("```output")["input_ids"]

    async def generate(self, prompt_ids: list[int], sampling: Any, *, session: str | None = None) -> Generation:
        width = len(self._output)
        outputs = sum(prompt_ids[at : at + width] == self._output for at in range(len(prompt_ids)))
        ids = self._turns[outputs]
        return Generation(ids, [0.0] * len(ids), "stop")

    def release(self, session: str) -> None: ...

    def refresh(self, model_path: str | None = None) -> None: ...

    def describe(self) -> dict[str, Any]:
        return {"engine": "answers"}


def roll_out(tokenizer: PreTrainedTokenizerFast) -> None:
    """256 trajectories of three turns."""
    prompts = [{"prompt": [{"role": "user", "content": f"{number}?"}]} for number in range(8)]

    def python(code: str) -> str:
        """Runs code.

        Args:
            code: The code.
        """
        return "4"

    config = RolloutConfig(num_generations=32, dialect="fenced", seed=0)
    found = list(generate_trajectories(prompts, Answers(tokenizer), [python], config, progress=False))
    assert [len(each.completion) for each in found] == [5] * 256


def plain_work(options: argparse.Namespace) -> dict[str, Callable[[], None]]:
    """What an arm does with plain trajectories, by name."""
    pairs, single = (plain_rows(options.unique, options.count, pairs) for pairs in (True, False))
    many = plain_rows(options.unique, 64, True)
    trainers = {
        name: make_trainer(name, pairs if name == "m-dpo" else single, options.layers, options.hidden)
        for name in ("m-dpo", "m-kto", "oreo")
    }
    work: dict[str, Callable[[], None]] = {
        f"{name} step": functools.partial(step, trainer) for name, trainer in trainers.items()
    }
    work["m-dpo preparation"] = lambda: make_trainer("m-dpo", many, 1, 64) and None
    work["rollouts"] = functools.partial(roll_out, chat_tokenizer())
    return work


def serve(options: argparse.Namespace) -> None:
    """An arm in a process of its own: reads names of work, answers with processor seconds."""
    checkout = str(Path(trl_multiturn.__file__).resolve().parents[1])
    if checkout != os.environ["PYTHONPATH"]:
        raise SystemExit(f"{checkout} was imported in place of {os.environ['PYTHONPATH']}.")
    work = plain_work(options)
    for line in sys.stdin:
        print(f"seconds {cpu_seconds(work[line.strip()])}", flush=True)


class Arm:
    """A process that works with one checkout of the package."""

    def __init__(self, checkout: Path, arguments: list[str]):
        self._process = subprocess.Popen(
            [sys.executable, str(Path(__file__).resolve()), "--serve", *arguments],
            env={**os.environ, "PYTHONPATH": str(checkout), "OMP_NUM_THREADS": "1"},
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip

    def __call__(self, name: str) -> float:
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write(f"{name}\n")
        self._process.stdin.flush()
        for line in self._process.stdout:
            if line.startswith("seconds "):
                return float(line.split()[1])
        raise SystemExit("An arm ended early; its error is above.")


def compare_checkouts(options: argparse.Namespace) -> None:
    arguments = [f"--{name}={getattr(options, name)}" for name in ("unique", "count", "layers", "hidden")]
    before, now = (
        Arm(Path(each).resolve(), arguments) for each in (options.against, Path(__file__).resolve().parents[1])
    )
    print("| plain trajectories | CPU seconds, before | now | ratio |\n| --- | --- | --- | --- |")
    for name in PLAIN:
        before(name), now(name)
        rounds = []
        for number in range(options.rounds):  # each arm goes first every other time
            order = (before, now) if number % 2 else (now, before)
            taken = {arm: arm(name) for arm in order}
            rounds.append((taken[before], taken[now]))
        ratio = statistics.median(b / a for a, b in rounds)
        first, second = (statistics.median(times) for times in zip(*rounds, strict=True))
        print(f"| {name} | {first:.3f} | {second:.3f} | {ratio:.2f} |", flush=True)


def compare_segments(options: argparse.Namespace) -> None:
    plain = make_trainer("m-kto", segmented_rows(1, options.unique, options.count), options.layers, options.hidden)
    print("| segments | unique tokens | tokens computed | CPU seconds | plain | ratio |")
    print("| --- | --- | --- | --- | --- | --- |")
    for segments in (2, 4, 8):
        rows = segmented_rows(segments, options.unique, options.count)
        cut = make_trainer("m-kto", rows, options.layers, options.hidden)
        step(plain), step(cut)
        pairs = [
            (cpu_seconds(functools.partial(step, cut)), cpu_seconds(functools.partial(step, plain)))
            for _ in range(options.rounds)
        ]
        computed = len(cut._packed_forwards[0].last_plan.row)
        unique = sum(len(row["prompt_ids"]) + len(row["completion_ids"]) for row in cut.train_dataset)
        ratio = statistics.median(a / b for a, b in pairs)
        first, second = (statistics.median(times) for times in zip(*pairs, strict=True))
        print(f"| {segments} | {unique} | {computed} | {first:.2f} | {second:.2f} | {ratio:.2f} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("unique", 768), ("count", 2), ("rounds", 9), ("layers", 4), ("hidden", 256)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--against", help="a checkout of this package from before there were segments")
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.serve:
        serve(options)
    elif options.against:
        compare_checkouts(options)
    else:
        compare_segments(options)


if __name__ == "__main__":
    main()
