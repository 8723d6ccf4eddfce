"""Prompts and held-out prompts from whatever datasets of questions and answers people have."""

from __future__ import annotations

from typing import Any

from datasets import Dataset

from ..data.loading import choose_split, load_rows, load_split
from .arguments import PromptArguments


QUESTIONS = ("prompt", "question", "problem", "instruction", "query", "input")
ANSWERS = ("answer", "final_answer", "expected_answer", "ground_truth", "solution", "target", "output")
# What TRL passes to reward functions under a name of its own
RESERVED = {"prompts", "completion", "completions", "completion_ids", "trainer_state"}


def load_prompts(arguments: PromptArguments) -> tuple[Dataset, Dataset | None]:
    """
    The prompts of a script, and its held-out prompts.

    Args:
        arguments ([`PromptArguments`]):
            The dataset and its columns.

    Returns:
        `(prompts, eval_prompts)`, with the columns `prompt` (messages), `answer` and whatever else the dataset has,
        for reward functions; `eval_prompts` is `None` with `num_eval_prompts=0`.

    Raises:
        `ValueError`: if the dataset lacks a split or a column, or a question is empty.
    """
    name, config = arguments.dataset_name, arguments.dataset_config
    dataset = load_rows(name or "", config)
    prompts = as_prompts(choose_split(dataset, arguments.dataset_train_split, str(name)), arguments)
    if not arguments.num_eval_prompts:
        return prompts, None
    if arguments.eval_dataset_name:
        held_out = load_rows(arguments.eval_dataset_name)
        split = arguments.dataset_test_split if arguments.dataset_test_split in held_out else "train"
        held_out = choose_split(held_out, split, arguments.eval_dataset_name)
    elif arguments.dataset_test_split in dataset:
        held_out = dataset[arguments.dataset_test_split]
    else:
        raise ValueError(
            f"{name} has no split {arguments.dataset_test_split!r} to evaluate on, only "
            f"{', '.join(map(repr, dataset))}. Name held-out problems (`--eval_dataset_name FILE`, or "
            "`--dataset_test_split NAME`), or pass `--num_eval_prompts 0`, upon which the last policy is kept, not "
            "the best one."
        )
    return prompts, as_prompts(held_out.select(range(min(arguments.num_eval_prompts, len(held_out)))), arguments)


def load_held_out(arguments: PromptArguments) -> Dataset:
    """
    The prompts of an evaluation: the test split, or a file's only one.

    Raises:
        `ValueError`: if the dataset lacks the split or a column, or a question is empty.
    """
    name = arguments.eval_dataset_name or arguments.dataset_name or ""
    dataset = load_rows(name, None if arguments.eval_dataset_name else arguments.dataset_config)
    only_one = len(dataset) == 1 and arguments.dataset_test_split == "test"  # by default
    rows = choose_split(dataset, "train" if only_one else arguments.dataset_test_split, name)
    return as_prompts(rows.select(range(min(arguments.num_eval_prompts, len(rows)))), arguments)


def as_prompts(rows: Dataset, arguments: PromptArguments) -> Dataset:
    """Rows of questions and answers with the columns `prompt` (messages) and `answer`."""
    question = str(_column(rows, arguments.question_column, QUESTIONS, "question"))
    answers = _column(rows, arguments.answer_column, ANSWERS, "answer", "math_reward" in arguments.reward_funcs)

    def to_prompt(row: dict[str, Any], index: int) -> dict[str, Any]:
        return {"prompt": _messages(row[question], question, index)} | ({"answer": row[answers]} if answers else {})

    dropped = [c for c in rows.column_names if c in RESERVED or c == question]
    return rows.map(to_prompt, with_indices=True, remove_columns=dropped)


def _messages(question: Any, column: str, index: int) -> list[dict[str, Any]]:
    if isinstance(question, str) and question.strip():
        return [{"role": "user", "content": question}]
    if isinstance(question, list) and question and all(isinstance(m, dict) and "role" in m for m in question):
        return question
    raise ValueError(
        f"Row {index}: the column `{column}` holds {str(question)[:80]!r}, which is neither a question nor a list of "
        "messages, so there is nothing to ask. Mend or drop the row, or name the column (`--question_column`)."
    )


def _column(rows: Dataset, given: str | None, known: tuple[str, ...], what: str, required: bool = True) -> str | None:
    there = rows.column_names
    found = next((name for name in ([given] if given else known) if name in there), None)
    if found is None and (required or given):
        raise ValueError(
            f"The dataset has no column {given!r} with the {what}s: its columns are {', '.join(there)}."
            if given
            else f"None of the columns {', '.join(there)} is known to hold the {what}s. Name it: `--{what}_column`."
        )
    return found


def with_shots(prompts: Dataset, shots: list[list[dict[str, Any]]]) -> Dataset:
    """Prompts with worked examples in front, after a system message of their own."""
    if not shots:
        return prompts
    examples = [message for shot in shots for message in shot]

    def put_in_front(row: dict[str, Any]) -> dict[str, Any]:
        prompt = row["prompt"]
        opening = 1 if prompt[0]["role"] == "system" else 0
        return {"prompt": [*prompt[:opening], *examples, *prompt[opening:]]}

    return prompts.map(put_in_front)


def load_shots(name: str, count: int) -> list[list[dict[str, Any]]]:
    """The first `count` worked examples of a dataset: whole conversations, without system messages."""
    rows = load_split(name)
    if len(rows) < count:
        raise ValueError(f"{name} holds {len(rows)} worked examples, fewer than `--num_shots {count}`. Ask for fewer.")
    conversations = [row["messages"] if "messages" in row else row["prompt"] + row["completion"] for row in
                     rows.select(range(count)).to_list()]  # fmt: skip
    return [[message for message in messages if message["role"] != "system"] for messages in conversations]
