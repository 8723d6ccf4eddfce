"""For the offline examples: which rows train, a small policy without a download, and whether values know outcomes."""

from __future__ import annotations

import json
import random
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from datasets import Dataset
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast, Qwen3ForCausalLM

from .tiny_policy import build_policy, build_tokenizer, warm_start


Group = list[tuple[float, bool]]  # (value, label) of the trajectories of one problem


# As a learned vocabulary may merge them: what a tool call is wrapped in is one token, a number of up to three digits
# one token wherever it stands, so that it can be recognised, and a blank belongs to the word after it.
PIECES = (
    r'\n?<tool_call>\n\{"name": "\w+", "arguments": \{"\w+": "|"\}\}\n</tool_call>|(?:system|user|assistant|tool)\n'
    r"|\d{1,3}| ?[A-Za-z]+| ?[^\s\w]|\s|\w"
)


def hold_out(dataset: Dataset, share: float, seed: int = 0) -> tuple[Dataset, Dataset]:
    """Splits rows by `question_id`, so that no problem is on both sides; `share` of the problems is held out."""
    questions = sorted(set(dataset["question_id"]))
    return _split(dataset, set(random.Random(seed).sample(questions, round(share * len(questions)))))


def folds(dataset: Dataset, number: int, seed: int = 0) -> list[tuple[Dataset, Dataset]]:
    """Splits rows by `question_id` so that each problem is held out once: pairs of rows as in [`hold_out`]."""
    questions = sorted(set(dataset["question_id"]))
    random.Random(seed).shuffle(questions)
    return [_split(dataset, set(questions[fold::number])) for fold in range(number)]


def _split(dataset: Dataset, held_out: set[Any]) -> tuple[Dataset, Dataset]:
    sides = {False: [], True: []}
    for index, question in enumerate(dataset["question_id"]):
        sides[question in held_out].append(index)
    return dataset.select(sides[False]), dataset.select(sides[True])


def balance(dataset: Dataset, num_problems: int | None = None, seed: int = 0) -> Dataset:
    """
    Of each problem as many correct as incorrect rows, chosen at random; problems without both are left out.

    With `num_problems` so many of the problems that are left, chosen at random, too.

    A value model that sees all rows learns first which problems are hard, and what long solutions, which hard problems
    have, come to. Of one problem the longer solution is rather the *better* one. Here the problem says nothing about
    the outcome, so that only what the solution does can be learned (the OREO paper balances its rows likewise).
    """
    rng = random.Random(seed)
    sides: dict[Any, dict[bool, list[int]]] = defaultdict(lambda: {True: [], False: []})
    for index, (question, label) in enumerate(zip(dataset["question_id"], dataset["label"], strict=True)):
        sides[question][bool(label)].append(index)
    both = [rows for rows in sides.values() if rows[True] and rows[False]]
    kept = []
    for rows in both if num_problems is None else rng.sample(both, min(num_problems, len(both))):
        count = min(len(rows[True]), len(rows[False]))
        kept += rng.sample(rows[True], count) + rng.sample(rows[False], count)
    return dataset.select(sorted(kept))


def without_tools(rows: Dataset | None) -> Dataset | None:
    """Rows without the tools' schemas, whose tokens would cost a small model more than the problem's."""
    return rows.remove_columns("tools") if rows is not None and "tools" in rows.column_names else rows


def small_policy(rows: Dataset, folder: str, hidden_size: int = 64, num_layers: int = 2) -> str:
    """
    Builds a policy of a quarter million parameters and teaches it to write like the correct trajectories in `rows`.

    Args:
        rows (`Dataset`): `prompt` and `completion`; only rows for training.
        folder (`str`): where model and tokenizer are written.

    Returns:
        `str`: `folder`.
    """
    correct = [row for row in rows if row.get("label", row.get("reward", 1)) > 0]
    conversations = [row["prompt"] + row["completion"] for row in correct]
    model, tokenizer = new_policy(conversations, folder, hidden_size, num_layers)
    messages = Dataset.from_list([{"messages": messages} for messages in conversations], on_mixed_types="use_json")
    warm_start(
        model, tokenizer, messages, str(Path(folder, "warm_start")), assistant_only_loss=False, logging_steps=10
    )
    model.save_pretrained(folder)
    return folder


def new_policy(
    conversations: Iterable[list[dict[str, Any]]],
    folder: str,
    hidden_size: int,
    num_layers: int,
    vocabulary: int = 2000,
) -> tuple[Qwen3ForCausalLM, PreTrainedTokenizerFast]:
    """Builds an untrained policy and a tokenizer that knows the words of `conversations`, and saves both."""
    tokenizer = _learn_tokenizer(conversations, vocabulary)
    model = build_policy(tokenizer, hidden_size=hidden_size, num_layers=num_layers)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return model, tokenizer


def _learn_tokenizer(conversations: Iterable[list[dict[str, Any]]], size: int = 2000) -> PreTrainedTokenizerFast:
    """A byte-level BPE over the conversations as the chat template renders them, with merges inside [`PIECES`]."""
    fast = build_tokenizer([])  # its chat template and special tokens
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PIECES), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=[fast.pad_token, fast.eos_token, "<|im_start|>"],
        show_progress=False,
    )
    tokenizer.train_from_iterator((fast.apply_chat_template(c, tokenize=False) for c in conversations), trainer)
    learned = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=fast.eos_token,
        pad_token=fast.pad_token,
        additional_special_tokens=["<|im_start|>"],
        clean_up_tokenization_spaces=False,
    )
    learned.chat_template = fast.chat_template
    return learned


def last_values(trainer: Any, rows: Dataset) -> list[Group]:
    """
    The value of each trajectory's last state and its label, problem by problem, on prepared rows.

    The last state is the one in which the final end-of-turn token is chosen: everything has been said.

    Args:
        trainer: an [`OREOTrainer`] or a [`DQOTrainer`].
        rows (`Dataset`): token rows with `label` and `question_id`.
    """
    sequences = []
    for row in rows:
        last = max(t for t, action in enumerate(row["action_mask"]) if action)
        sequences.append(row["prompt_ids"] + row["completion_ids"][:last])
    values = scorer_of(trainer).score(sequences)
    problems: dict[Any, Group] = defaultdict(list)
    for value, label, question in zip(values, rows["label"], rows["question_id"], strict=True):
        problems[question].append((value, label))
    return list(problems.values())


def outcome_auc(groups: list[Group], resamples: int = 1000, seed: int = 0) -> dict[str, tuple[float, ...]]:
    """
    How well values tell correct from incorrect trajectories.

    Args:
        groups (`list`): the values and labels of one problem each, from [`last_values`].

    Returns:
        `{"auc": (estimate, low, high), "auc_within_problem": (estimate, low, high)}` with 95 % intervals from a
        bootstrap over problems. The first compares any two trajectories, the second only those of one problem, where
        knowing which problems are hard does not help. 0.5 where there is nothing to compare.
    """
    rng = random.Random(seed)
    samples = [[rng.choice(groups) for _ in groups] for _ in range(resamples)]
    result = {}
    for name, statistic in (("auc", _pooled_auc), ("auc_within_problem", _auc_within)):
        spread = sorted(statistic(sample) for sample in samples)
        result[name] = (statistic(groups), spread[int(0.025 * resamples)], spread[int(0.975 * resamples) - 1])
    return result


def report_auc(groups: list[Group]) -> None:
    """Prints [`outcome_auc`]."""
    for name, (estimate, low, high) in outcome_auc(groups).items():
        interval = f"{estimate:.3f} (95 % interval {low:.3f}–{high:.3f})"
        print(f"{name} on {len(groups)} held-out problems: {interval}")


def save_groups(groups: list[Group], path: Path) -> None:
    """Writes the values and labels of one fold, a line per problem."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(group) + "\n" for group in groups), encoding="utf-8")


def load_groups(folder: Path) -> list[Group]:
    """The values and labels of all folds below `folder` that are finished."""
    lines = [line for path in sorted(folder.glob("fold_*/values.jsonl")) for line in path.open(encoding="utf-8")]
    return [[(value, label) for value, label in json.loads(line)] for line in lines]


def scorer_of(trainer: Any) -> Any:
    """The trainer's value model as something that scores tokens; a head does so once it stands on its policy."""
    return trainer.value_model.standing_on(trainer.accelerator.unwrap_model(trainer.model))


def _wins(group: Group) -> tuple[float, int]:
    """Pairs in which the correct one has the higher value (ties count half), and all pairs."""
    ranked = sorted(group)
    wins, pairs, start, incorrect = 0.0, 0, 0, 0
    while start < len(ranked):
        stop = start
        while stop < len(ranked) and ranked[stop][0] == ranked[start][0]:
            stop += 1
        correct = sum(label for _, label in ranked[start:stop])
        ties = stop - start - correct
        wins += correct * (incorrect + ties / 2)
        incorrect += ties
        start = stop
    pairs = incorrect * (len(ranked) - incorrect)
    return wins, pairs


def _pooled_auc(groups: list[Group]) -> float:
    wins, pairs = _wins([entry for group in groups for entry in group])
    return wins / pairs if pairs else 0.5


def _auc_within(groups: list[Group]) -> float:
    totals = [sum(part) for part in zip(*map(_wins, groups), strict=True)]
    return totals[0] / totals[1] if totals[1] else 0.5
