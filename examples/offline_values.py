"""For the offline examples: held-out problems, a small policy without a download, and whether values know outcomes."""

from __future__ import annotations

import random
from collections import defaultdict
from pathlib import Path
from typing import Any

from datasets import Dataset
from tiny_policy import build_policy, build_tokenizer, warm_start


def hold_out(dataset: Dataset, share: float, seed: int = 0) -> tuple[Dataset, Dataset]:
    """Splits rows by `question_id`, so that no problem is on both sides; `share` of the problems is held out."""
    questions = sorted(set(dataset["question_id"]))
    held_out = set(random.Random(seed).sample(questions, round(share * len(questions))))
    sides = {False: [], True: []}
    for index, question in enumerate(dataset["question_id"]):
        sides[question in held_out].append(index)
    return dataset.select(sides[False]), dataset.select(sides[True])


def small_policy(rows: Dataset, folder: str, hidden_size: int = 128, num_layers: int = 4) -> str:
    """
    Builds a policy of about a million parameters and teaches it to write trajectories like those in `rows`.

    Args:
        rows (`Dataset`): `prompt` and `completion`; only rows for training.
        folder (`str`): where model and tokenizer are written.

    Returns:
        `str`: `folder`.
    """
    texts = [message["content"] for row in rows for message in row["prompt"] + row["completion"]]
    tokenizer = build_tokenizer(_frequent_words(texts))
    model = build_policy(tokenizer, hidden_size=hidden_size, num_layers=num_layers)
    messages = [{"messages": row["prompt"] + row["completion"]} for row in rows]
    warm_start(
        model,
        tokenizer,
        Dataset.from_list(messages, on_mixed_types="use_json"),
        str(Path(folder, "warm_start")),
        assistant_only_loss=False,
    )
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def _frequent_words(texts: list[str], least: int = 8) -> list[str]:
    counts: dict[str, int] = defaultdict(int)
    for text in texts:
        for word in text.split():
            if word.isalpha():
                counts[word] += 1
                counts[" " + word] += 1
    return [word for word, count in counts.items() if count >= least]


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
        knowing which problems are hard does not help.
    """
    sequences = []
    for row in rows:
        last = max(t for t, action in enumerate(row["action_mask"]) if action)
        sequences.append(row["prompt_ids"] + row["completion_ids"][:last])
    values = _values(trainer, sequences)
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


def _values(trainer: Any, sequences: list[list[int]]) -> list[float]:
    value_model = trainer.value_model
    if value_model.kind != "head":
        return value_model.score(sequences)
    from trl_multiturn.modeling import ValueModel

    folder = Path(trainer.args.output_dir, "value_model")  # a head reads tokens only once it stands on its policy
    value_model.save_pretrained(folder)
    return ValueModel.from_pretrained(folder, policy=trainer.accelerator.unwrap_model(trainer.model)).score(sequences)


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
    return wins / max(pairs, 1)


def _auc_within(groups: list[list[tuple[float, bool]]]) -> float:
    totals = [sum(part) for part in zip(*map(_wins, groups), strict=True)]
    return totals[0] / max(totals[1], 1)
