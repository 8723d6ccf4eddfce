"""For the offline examples: held-out problems, a small policy without a download, and whether values know outcomes."""

from __future__ import annotations

import random
from collections import defaultdict
from pathlib import Path
from typing import Any

from datasets import Dataset
from tiny_policy import build_policy, build_tokenizer, warm_start
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast


def hold_out(dataset: Dataset, share: float, seed: int = 0) -> tuple[Dataset, Dataset]:
    """Splits rows by `question_id`, so that no problem is on both sides; `share` of the problems is held out."""
    questions = sorted(set(dataset["question_id"]))
    held_out = set(random.Random(seed).sample(questions, round(share * len(questions))))
    sides = {False: [], True: []}
    for index, question in enumerate(dataset["question_id"]):
        sides[question in held_out].append(index)
    return dataset.select(sides[False]), dataset.select(sides[True])


def small_policy(rows: Dataset, folder: str, hidden_size: int = 64, num_layers: int = 2) -> str:
    """
    Builds a policy of a quarter million parameters and teaches it to write trajectories like those in `rows`.

    Args:
        rows (`Dataset`): `prompt` and `completion`; only rows for training.
        folder (`str`): where model and tokenizer are written.

    Returns:
        `str`: `folder`.
    """
    conversations = [row["prompt"] + row["completion"] for row in rows]
    tokenizer = _learn_tokenizer(conversations)
    model = build_policy(tokenizer, hidden_size=hidden_size, num_layers=num_layers)
    messages = Dataset.from_list([{"messages": messages} for messages in conversations], on_mixed_types="use_json")
    warm_start(
        model, tokenizer, messages, str(Path(folder, "warm_start")), assistant_only_loss=False, logging_steps=10
    )
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def _learn_tokenizer(conversations: list[list[dict[str, Any]]], size: int = 2000) -> PreTrainedTokenizerFast:
    """A byte-level BPE over the conversations as the chat template renders them, each digit a token of its own."""
    fast = build_tokenizer([])  # its chat template and special tokens
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
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


def outcome_auc(trainer: Any, rows: Dataset, resamples: int = 1000, seed: int = 0) -> dict[str, tuple[float, ...]]:
    """
    How well the value of a trajectory's last state tells correct from incorrect, on prepared rows.

    The last state is the one in which the final end-of-turn token is chosen: everything has been said.

    Args:
        trainer: an [`OREOTrainer`] or a [`DQOTrainer`].
        rows (`Dataset`): token rows with `label` and `question_id`.

    Returns:
        `{"auc": (estimate, low, high), "auc_within_problem": (estimate, low, high)}` with 95 % intervals from a
        bootstrap over problems. The first compares any two trajectories, the second only those of one problem, where
        knowing which problems are hard does not help. 0.5 where there is nothing to compare.
    """
    sequences = []
    for row in rows:
        last = max(t for t, action in enumerate(row["action_mask"]) if action)
        sequences.append(row["prompt_ids"] + row["completion_ids"][:last])
    values = scorer_of(trainer).score(sequences)
    problems: dict[int, list[tuple[float, bool]]] = defaultdict(list)
    for value, label, question in zip(values, rows["label"], rows["question_id"], strict=True):
        problems[question].append((value, label))
    groups = list(problems.values())
    rng = random.Random(seed)
    samples = [[rng.choice(groups) for _ in groups] for _ in range(resamples)]
    result = {}
    for name, statistic in (("auc", _pooled_auc), ("auc_within_problem", _auc_within)):
        spread = sorted(statistic(sample) for sample in samples)
        result[name] = (statistic(groups), spread[int(0.025 * resamples)], spread[int(0.975 * resamples) - 1])
    return result


def scorer_of(trainer: Any) -> Any:
    """The trainer's value model as something that scores tokens; a head does so once it stands on its policy."""
    if trainer.value_model.kind != "head":
        return trainer.value_model
    from trl_multiturn import ValueModel

    folder = Path(trainer.args.output_dir, "value_model")
    trainer.value_model.save_pretrained(folder)
    return ValueModel.from_pretrained(folder, policy=trainer.accelerator.unwrap_model(trainer.model))


def _wins(group: list[tuple[float, bool]]) -> tuple[float, int]:
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


def _pooled_auc(groups: list[list[tuple[float, bool]]]) -> float:
    wins, pairs = _wins([entry for group in groups for entry in group])
    return wins / pairs if pairs else 0.5


def _auc_within(groups: list[list[tuple[float, bool]]]) -> float:
    totals = [sum(part) for part in zip(*map(_wins, groups), strict=True)]
    return totals[0] / totals[1] if totals[1] else 0.5
