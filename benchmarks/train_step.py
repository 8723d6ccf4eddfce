"""
One training step of TRL's trainers and of the packed path, side by side in one process, on the same rows.

    python benchmarks/train_step.py                          # every table, about an hour on two cores
    python benchmarks/train_step.py dpo groups --batches 4   # some tables
    python benchmarks/train_step.py --output benchmarks/results/train_step.md

Each arm is a real trainer's `compute_loss` and `backward()` on batches from TRL's collator whose `completion_mask`
leaves out observations. Arms alternate batch by batch and start from the same weights. A row is printed only if every
arm's loss and gradient norm agree with stock TRL's; then the median of the paired ratios, with minimum and maximum.
Times are CPU seconds of one thread (`--threads`), packing and metrics included; peak memory is that of a process which
runs one arm alone, above what the process held before the step.

Model: Qwen2 style, 8 layers, hidden 512, vocabulary 32k, random weights. Rows: prompts of 100-300 tokens, 2-6 turns
with tool results between them, at most 2048 tokens, about 0.9k on average, 40 % trained; `--real` names a folder with
the trajectories of `tora_*_trajectories.jsonl` instead.
"""

from __future__ import annotations

import argparse
import datetime
import gc
import json
import os
import platform
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import LoraConfig, TaskType
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM
from trl import DPOConfig, DPOTrainer, KTOConfig, KTOTrainer

from trl_multiturn.packing import PackedTrainerMixin


VOCAB = 32_000


class PackedDPOTrainer(PackedTrainerMixin, DPOTrainer):
    pass


class PackedKTOTrainer(PackedTrainerMixin, KTOTrainer):
    pass


@dataclass
class Trajectory:
    """Token ids after the prompt, and which of them the policy sampled."""

    ids: list[int]
    mask: list[int]

    def __add__(self, other: Trajectory) -> Trajectory:
        return Trajectory(self.ids + other.ids, self.mask + other.mask)

    def cut(self, n: int) -> Trajectory:
        return Trajectory(self.ids[:n], self.mask[:n])


@dataclass
class Setting:
    """What one table row varies."""

    name: str
    kind: str = "dpo"
    pairs: int = 2
    turns_shared: float = 0.0  # probability that a side continues another side's first turns
    scale: float = 1.0  # of all lengths
    from_trajectories: int = 0  # pairs of one prompt over this many trajectories per side; 0 for independent pairs
    lora: bool = False
    bf16: bool = False
    checkpointing: bool = False
    online: bool = False  # whether our arm computes the reference in the step, as TRL's default does
    model: dict[str, int] = field(default_factory=dict)


SMALL_HEAD = {"num_hidden_layers": 6, "hidden_size": 768, "intermediate_size": 2304, "vocab_size": 4096}

TABLES: dict[str, list[Setting]] = {
    "dpo": [
        Setting("float32, reference precomputed"),
        Setting("float32, reference online", online=True),
        Setting("float32, 4 pairs a batch", pairs=4),
        Setting("head small against the body, as at 7B", model=SMALL_HEAD),
    ],
    "dtype": [
        Setting("bfloat16 autocast", bf16=True),
        Setting("LoRA r=16", lora=True),
        Setting("gradient checkpointing", checkpointing=True),
        Setting("bfloat16, checkpointing", bf16=True, checkpointing=True),
    ],
    "groups": [
        Setting("4 pairs from 2 x 2 trajectories of one prompt", pairs=4, from_trajectories=2),
        Setting("9 pairs from 3 x 3 trajectories of one prompt", pairs=9, from_trajectories=3),
    ],
    "kto": [
        Setting("KTO, 4 trajectories", kind="kto", pairs=2),
        Setting("KTO, 4 trajectories of one prompt", kind="kto", pairs=2, turns_shared=0.5, from_trajectories=2),
    ],
    "sharing": [Setting(f"turns shared with probability {p:.1f}", turns_shared=p) for p in (0.0, 0.2, 0.4, 0.6, 0.8)],
    "length": [Setting(f"lengths x {s}", scale=s) for s in (0.1, 0.25, 0.5, 1.0)],
}


# --- rows ------------------------------------------------------------------------------------------------------------


class SyntheticRows:
    """Multi-turn trajectories whose lengths follow the module's docstring."""

    def __init__(self, seed: int, setting: Setting) -> None:
        self.rng, self.setting = random.Random(seed), setting
        self.vocab = setting.model.get("vocab_size", VOCAB)

    def tokens(self, low: int, high: int) -> list[int]:
        n = max(2, round(self.rng.uniform(low, high) * self.setting.scale))
        return [self.rng.randrange(3, self.vocab) for _ in range(n)]

    def trajectory(self, start: Trajectory | None = None) -> Trajectory:
        parts = start or Trajectory([], [])
        for turn in range(self.rng.randint(2, 6)):
            if turn:
                result = self.tokens(40, 260)
                parts = parts + Trajectory(result, [0] * len(result))
            action = self.tokens(40, 130)
            parts = parts + Trajectory(action, [1] * len(action))
        return parts.cut(round(1740 * self.setting.scale))

    def sibling(self, other: Trajectory) -> Trajectory:
        """Another trajectory of the same prompt, which may go along with `other` up to the end of one of its turns."""
        ends = [i for i in range(1, len(other.mask)) if other.mask[i - 1] and not other.mask[i]]
        if not ends or self.rng.random() >= self.setting.turns_shared:
            return self.trajectory()
        observation = self.tokens(40, 260)
        start = other.cut(self.rng.choice(ends)) + Trajectory(observation, [0] * len(observation))
        return self.trajectory(start)

    def pairs(self) -> list[tuple[list[int], Trajectory, Trajectory]]:
        n = self.setting.from_trajectories
        if n and self.setting.kind == "dpo":
            prompt, first = self.tokens(100, 300), self.trajectory()
            sides = [first] + [self.sibling(first) for _ in range(2 * n - 1)]
            return [(prompt, c, r) for c in sides[:n] for r in sides[n:]]
        rows = []
        prompt, chosen = self.tokens(100, 300), self.trajectory()
        for _ in range(self.setting.pairs):
            rows.append((prompt, chosen, self.sibling(chosen)))
            if not n:
                prompt = self.tokens(100, 300)
            chosen = self.sibling(chosen) if n else self.trajectory()
        return rows


class RealRows(SyntheticRows):
    """Trajectories of two models on the same GSM8K questions, cut into turns at their code and output fences."""

    def __init__(self, seed: int, setting: Setting, folder: Path) -> None:
        super().__init__(seed, setting)
        files = sorted(folder.glob("tora_*_trajectories.jsonl"))
        sets = [[json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()] for file in files]
        self.tokenizer = _byte_pair_tokenizer([row["code"][0] for rows in sets for row in rows])
        sides = [{row["idx"]: row for row in rows} for rows in sets]
        shared = sorted(set(sides[0]) & set(sides[1]))
        self.rng.shuffle(shared)
        self.questions = iter((sides[0][i], sides[1][i]) for i in shared)

    def encode(self, text: str) -> list[int]:
        return self.tokenizer.encode(text).ids

    def cut_into_turns(self, text: str) -> Trajectory:
        parts, rest = Trajectory([], []), text
        while rest:
            action, fence, rest = rest.partition("```output")
            ids = self.encode(action)
            parts = parts + Trajectory(ids, [1] * len(ids))
            if fence:
                result, _, rest = rest.partition("```\n")
                ids = self.encode(fence + result + "```\n")
                parts = parts + Trajectory(ids, [0] * len(ids))
        return parts

    def pairs(self) -> list[tuple[list[int], Trajectory, Trajectory]]:
        rows = []
        while len(rows) < self.setting.pairs:
            first, second = next(self.questions)
            chosen, rejected = (self.cut_into_turns(row["code"][0]) for row in (first, second))
            if chosen.ids != rejected.ids:
                rows.append((self.encode(first["question"]), chosen, rejected))
        return rows


def _byte_pair_tokenizer(texts: list[str]) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(texts, trainers.BpeTrainer(vocab_size=8000, initial_alphabet=alphabet))
    return tokenizer


def batch_of(kind: str, rows: list[tuple[list[int], Trajectory, Trajectory]]) -> dict[str, torch.Tensor]:
    """A batch as TRL's collators make it, with the true masks; KTO's mismatched completions included."""
    if kind == "dpo":
        sequences = [(p, c) for p, c, _ in rows] + [(p, r) for p, _, r in rows]
        return _padded(sequences)
    sequences = [(p, side) for p, c, r in rows for side in (c, r)]
    mismatched = [(p, sequences[i - 1][1]) for i, (p, _) in enumerate(sequences)]
    batch = _padded(sequences) | {f"KL_{name}": x for name, x in _padded(mismatched).items()}
    return batch | {"label": torch.tensor([True, False] * len(rows))}


def _padded(sequences: list[tuple[list[int], Trajectory]]) -> dict[str, torch.Tensor]:
    width = max(len(prompt) + len(t.ids) for prompt, t in sequences)
    ids, real, mask = (torch.zeros(len(sequences), width, dtype=torch.long) for _ in range(3))
    for i, (prompt, t) in enumerate(sequences):
        n = len(prompt) + len(t.ids)
        ids[i, :n], real[i, :n] = torch.tensor(prompt + t.ids), 1
        mask[i, len(prompt) : n] = torch.tensor(t.mask)
    return {"input_ids": ids, "attention_mask": real, "completion_mask": mask}


# --- arms ------------------------------------------------------------------------------------------------------------


def make_trainer(setting: Setting, packed: bool, precomputed: bool) -> DPOTrainer | KTOTrainer:
    """A trainer of TRL, or the same class on the packed path, with its own copy of the same weights."""
    torch.manual_seed(0)
    settings = dict(num_hidden_layers=8, hidden_size=512, intermediate_size=1536, vocab_size=VOCAB) | setting.model
    config = Qwen2Config(
        **settings, num_attention_heads=8, num_key_value_heads=2, max_position_embeddings=4096, pad_token_id=0
    )
    policy, reference = Qwen2ForCausalLM(config), None
    if not precomputed and not setting.lora:
        reference = Qwen2ForCausalLM(config)
        reference.load_state_dict(policy.state_dict())
    base, args_class = (DPOTrainer, DPOConfig) if setting.kind == "dpo" else (KTOTrainer, KTOConfig)
    ours = {DPOTrainer: PackedDPOTrainer, KTOTrainer: PackedKTOTrainer}[base]
    row = {"prompt": "a", "chosen": "b", "rejected": "c"}
    if setting.kind == "kto":
        row = {"prompt": "a", "completion": "b", "label": True}
    # One unused row lets the constructor do its work without a precomputation; batches come from the benchmark
    trainer = (ours if packed else base)(
        model=policy,
        ref_model=reference,
        args=args_class(
            output_dir=tempfile.mkdtemp(), report_to="none", use_cpu=True, bf16=setting.bf16, disable_tqdm=True,
            gradient_checkpointing=setting.checkpointing, max_length=None,
            precompute_ref_log_probs=precomputed, per_device_train_batch_size=2,
        ),
        train_dataset=Dataset.from_list([row] * 2),
        processing_class=_any_tokenizer(),
        peft_config=LoraConfig(task_type=TaskType.CAUSAL_LM, r=16, target_modules="all-linear")
        if setting.lora
        else None,
    )  # fmt: skip
    if setting.checkpointing:
        trainer.model.gradient_checkpointing_enable()
    _move(trainer.model)
    return trainer


def _any_tokenizer() -> PreTrainedTokenizerFast:
    vocabulary = {"<pad>": 0, "<eos>": 1, "a": 2, "b": 3, "c": 4}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>")


def _move(model: torch.nn.Module) -> None:
    """A policy that differs from its reference, so that losses and gradients are not those of the first step."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(5e-4 * torch.randn(parameter.shape, generator=generator))


@dataclass
class Step:
    loss: float
    gradient_norm: float
    cpu_seconds: float
    wall_seconds: float


def run_step(trainer: DPOTrainer | KTOTrainer, batch: dict[str, torch.Tensor]) -> Step:
    """Forward and backward of one batch, without the optimizer."""
    trainer.model.train()
    for parameter in trainer.model.parameters():
        parameter.grad = None
    gc.collect()
    wall, cpu = time.perf_counter(), time.process_time()
    with trainer.compute_loss_context_manager():
        loss = trainer.compute_loss(trainer.model, dict(batch))
    loss.backward()
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    gradients = [p.grad.norm() for p in trainer.model.parameters() if p.grad is not None]
    return Step(loss.item(), torch.stack(gradients).norm().item(), cpu, wall)


def add_reference(setting: Setting, batch: dict[str, torch.Tensor], trainer: Any) -> dict[str, torch.Tensor]:
    """The batch with reference log-probabilities, as precomputation leaves them in the dataset."""
    first, second = trainer.compute_ref_log_probs(trainer.ref_model or trainer.model, batch)
    names = ("ref_chosen_logps", "ref_rejected_logps") if setting.kind == "dpo" else ("ref_logps", "ref_KL_logps")
    return batch | {name: x for name, x in zip(names, (first, second), strict=True) if x is not None}


# --- measurements ----------------------------------------------------------------------------------------------------


@dataclass
class Result:
    setting: Setting
    tokens: dict[str, float]
    ratios: dict[str, list[float]]
    seconds: dict[str, float]
    loss_difference: float
    norm_difference: float
    memory: dict[str, float] = field(default_factory=dict)


def source_of_rows(setting: Setting, real: Path | None, seed: int = 0) -> SyntheticRows:
    return SyntheticRows(seed, setting) if real is None else RealRows(seed, setting, real)


def measure(setting: Setting, batches: int, real: Path | None) -> Result:
    """Paired steps of stock TRL, stock TRL with precomputed reference, and the packed path."""
    stock = make_trainer(setting, packed=False, precomputed=False)
    tuned = make_trainer(setting, packed=False, precomputed=True)
    ours = make_trainer(setting, packed=True, precomputed=not setting.online)
    arms: dict[str, Callable[[dict], Step]] = {
        "TRL": lambda batch: run_step(stock, _without_reference(batch)),
        "TRL, precomputed": lambda batch: run_step(tuned, batch),
        "packed": lambda batch: run_step(ours, _without_reference(batch) if setting.online else batch),
    }
    rows = source_of_rows(setting, real)
    result = Result(setting, {}, {name: [] for name in arms}, {}, 0.0, 0.0)
    totals = dict.fromkeys(arms, 0.0)
    counts = {"padded": 0, "raw": 0, "unique": 0, "trained": 0}
    for i in range(batches + 1):
        batch = add_reference(setting, batch_of(setting.kind, rows.pairs()), stock)
        order = list(arms)[i % 3 :] + list(arms)[: i % 3]
        steps = {name: arms[name](batch) for name in order}
        if i == 0:
            continue  # warm-up: allocators, thread pools, the self-test
        for name, step in steps.items():
            result.ratios[name].append(steps["TRL"].cpu_seconds / step.cpu_seconds)
            totals[name] += step.cpu_seconds
            difference = abs(step.loss - steps["TRL"].loss)
            norm = abs(step.gradient_norm / steps["TRL"].gradient_norm - 1)
            result.loss_difference = max(difference, result.loss_difference)
            result.norm_difference = max(norm, result.norm_difference)
        _count(counts, batch)
    limit = 2e-2 if setting.bf16 else 1e-4
    norm_limit = 5e-2 if setting.bf16 else 1e-3
    if not (result.loss_difference <= limit and result.norm_difference <= norm_limit):  # NaN must not pass
        raise SystemExit(
            f"{setting.name}: the arms differ by {result.loss_difference:.1e} in loss and "
            f"{result.norm_difference:.1e} in gradient norm, so their speeds "
            "are not those of the same computation. Nothing is reported."
        )
    result.seconds = {name: total / batches for name, total in totals.items()}
    result.tokens = {name: count / batches for name, count in counts.items()}
    return result


def _without_reference(batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: x for name, x in batch.items() if not name.startswith("ref_")}


def _count(counts: dict[str, int], batch: dict[str, torch.Tensor]) -> None:
    from trl_multiturn.packing import pack_rows

    row = pack_rows(batch["input_ids"], batch["attention_mask"])
    counts["padded"] += batch["input_ids"].numel()
    counts["raw"] += row.raw_tokens
    counts["unique"] += len(row)
    counts["trained"] += int(batch["completion_mask"].sum())


def peak_memory(setting: Setting, arm: str, real: Path | None) -> float:
    """Gigabytes that one step of one arm adds to the process's resident memory; to be called in a fresh process."""
    trainer = make_trainer(setting, packed=arm == "packed", precomputed=arm != "TRL")
    rows = source_of_rows(setting, real)
    peaks = []
    for _ in range(3):
        batch = batch_of(setting.kind, rows.pairs())
        if arm != "TRL":
            with torch.no_grad():
                batch = add_reference(setting, batch, trainer)
        for parameter in trainer.model.parameters():
            parameter.grad = None
        gc.collect()
        torch._C._malloc_trim() if hasattr(torch._C, "_malloc_trim") else _malloc_trim()
        Path("/proc/self/clear_refs").write_text("5")
        before = _memory("VmRSS")
        run_step(trainer, batch)
        peaks.append(_memory("VmHWM") - before)
    return max(peaks)


def _malloc_trim() -> None:
    import ctypes

    ctypes.CDLL("libc.so.6").malloc_trim(0)


def _memory(name: str) -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(name)).split()[1]) / 2**20


def measure_memory(table: str, index: int, arguments: argparse.Namespace) -> dict[str, float]:
    memory = {}
    for arm in ("TRL", "TRL, precomputed", "packed"):
        command = [sys.executable, __file__, table, "--memory-of", f"{index}:{arm}", "--threads", arguments.threads]
        command += ["--real", str(arguments.real)] if arguments.real else []
        output = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=True).stdout
        memory[arm] = float(output.splitlines()[-1])
    return memory


# --- whole runs ------------------------------------------------------------------------------------------------------


def loss_curves(steps: int) -> tuple[float, float]:
    """Largest loss difference, and the ratio of CPU times, over a real `trainer.train()` of `steps` steps."""
    losses, seconds = [], []
    for packed in (False, True):
        trainer = make_trainer(Setting("run", model=dict(num_hidden_layers=4, hidden_size=256, vocab_size=8000)),
                               packed, precomputed=False)  # fmt: skip
        rows = SyntheticRows(5, Setting("run", scale=0.4, model=dict(vocab_size=8000)))
        optimizer = torch.optim.AdamW(trainer.model.parameters(), lr=1e-5)
        losses.append([])
        start = time.process_time()
        for _ in range(steps):
            losses[-1].append(run_step(trainer, batch_of("dpo", rows.pairs())).loss)
            optimizer.step()
        seconds.append(time.process_time() - start)
    return max(abs(a - b) for a, b in zip(*losses, strict=True)), seconds[0] / seconds[1]


# --- report ----------------------------------------------------------------------------------------------------------


def report(table: str, results: list[Result]) -> Iterator[str]:
    yield f"\n### {table}\n"
    yield (
        "| setting | tokens: padded, unpadded, unique | TRL | TRL, precomputed: s, x | packed: s, x (min..max) | "
        "trained tokens/s | loss Δ, grad norm Δ | peak GB: TRL, precomputed, packed |"
    )
    yield "| --- | --- | --- | --- | --- | --- | --- | --- |"
    for r in results:
        ratio = {name: statistics.median(values) for name, values in r.ratios.items()}
        low, high = min(r.ratios["packed"]), max(r.ratios["packed"])
        speeds = " → ".join(f"{r.tokens['trained'] / r.seconds[name]:.0f}" for name in ("TRL", "packed"))
        memory = ", ".join(f"{value:.2f}" for value in r.memory.values()) or "not measured"
        yield (
            f"| {r.setting.name} | {r.tokens['padded']:.0f}, {r.tokens['raw']:.0f}, {r.tokens['unique']:.0f} | "
            f"{r.seconds['TRL']:.1f} s | {r.seconds['TRL, precomputed']:.1f}, {ratio['TRL, precomputed']:.2f} | "
            f"{r.seconds['packed']:.1f}, **{ratio['packed']:.2f}** ({low:.2f}..{high:.2f}) | {speeds} | "
            f"{r.loss_difference:.0e}, {r.norm_difference:.0e} | {memory} |"
        )


def header(arguments: argparse.Namespace) -> str:
    name = next((line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines()
                 if line.startswith("model name")), platform.processor())  # fmt: skip
    load = os.getloadavg()[0]
    return (
        f"`python benchmarks/train_step.py {' '.join(sys.argv[1:])}`, {datetime.date.today()}, {name}, "
        f"{os.cpu_count()} cores, {arguments.threads} thread(s), load average {load:.1f} at the start, "
        f"torch {torch.__version__}. CPU seconds per step; x is TRL's default step over the arm's, paired."
    )


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tables", nargs="*", help=f"of {', '.join(TABLES)}, run (a 50-step run); all by default")
    parser.add_argument("--batches", type=int, default=4)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--memory", action="store_true", help="also measure each arm's peak in a process of its own")
    parser.add_argument("--real", type=Path, help="folder with tora_*_trajectories.jsonl, instead of synthetic rows")
    parser.add_argument("--output", type=Path, help="Markdown file to append the tables to")
    parser.add_argument("--memory-of", help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> None:
    arguments = parse()
    torch.set_num_threads(arguments.threads)
    if arguments.memory_of:
        index, arm = arguments.memory_of.split(":")
        print(peak_memory(TABLES[arguments.tables[0]][int(index)], arm, arguments.real))
        return
    lines = [header(arguments)]
    print(lines[0], flush=True)
    for table in arguments.tables or [*TABLES, "run"]:
        if table == "run":
            difference, ratio = loss_curves(50)
            lines.append(f"\n50 optimizer steps: losses within {difference:.1e} at every step, {ratio:.1f} x.")
            print(lines[-1], flush=True)
            continue
        results = []
        for index, setting in enumerate(TABLES[table]):
            results.append(measure(setting, arguments.batches, arguments.real))
            if arguments.memory:
                results[-1].memory = measure_memory(table, index, arguments)
            print(list(report(table, results[-1:]))[-1], flush=True)
        lines += report(table, results)
    if arguments.output:
        with arguments.output.open("a", encoding="utf-8") as file:
            file.write("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
