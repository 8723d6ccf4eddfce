"""Rows for `train_step.py`: synthetic multi-turn trajectories, and recorded ones, as padded batches."""

from __future__ import annotations

import json
import random
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast


VOCAB = 32_000


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
    trajectories: int = 0  # of one prompt, for OREO and DQO
    value: str = "adapter"
    lora: bool = False
    bf16: bool = False
    checkpointing: bool = False
    device: str = "cpu"
    weights: str = "float32"
    online: bool = False  # whether our arm computes the reference in the step, as TRL's default does
    checkpoint: str = ""  # a real model, whose tokenizer reads real rows, too
    body: dict[str, int] = field(default_factory=dict)


class SyntheticRows:
    """Multi-turn trajectories whose lengths follow the module's docstring."""

    def __init__(self, seed: int, setting: Setting) -> None:
        self.rng, self.setting = random.Random(seed), setting
        self.vocab = setting.body.get("vocab_size", VOCAB)

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
        texts = [row["code"][0] for rows in sets for row in rows]
        if setting.checkpoint:
            self.tokenizer = AutoTokenizer.from_pretrained(setting.checkpoint).backend_tokenizer
        else:
            self.tokenizer = _byte_pair_tokenizer(texts)
        sides = [{row["idx"]: row for row in rows} for rows in sets]
        shared = sorted(set(sides[0]) & set(sides[1]))
        self.rng.shuffle(shared)
        self.questions = iter((sides[0][i], sides[1][i]) for i in shared)

    def encode(self, text: str) -> list[int]:
        return self.tokenizer.encode(text, add_special_tokens=False).ids

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


def any_tokenizer() -> PreTrainedTokenizerFast:
    """One that the trainers accept; the rows are token ids already."""
    vocabulary = {"<pad>": 0, "<eos>": 1, "a": 2, "b": 3, "c": 4}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>")


def _byte_pair_tokenizer(texts: list[str]) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(texts, trainers.BpeTrainer(vocab_size=8000, initial_alphabet=alphabet))
    return tokenizer


def trajectories_of(source: SyntheticRows) -> list[dict[str, Any]]:
    """Token rows of one prompt; each trajectory may go along with an earlier one."""
    prompt, sides = source.tokens(100, 300), [source.trajectory()]
    while len(sides) < source.setting.trajectories:
        sides.append(source.sibling(source.rng.choice(sides)))
    return [
        {"prompt_ids": prompt, "completion_ids": side.ids, "action_mask": side.mask, "reward": float(i % 2)}
        for i, side in enumerate(sides)
    ]


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
