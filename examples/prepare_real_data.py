# /// script
# dependencies = ["trl-multiturn"]
# ///
"""
Turn recorded solutions of real language models into multi-turn training rows.

Three sources, two of them about GSM8K's test problems:

- `gsm8k`: solutions of four models by Cobbe et al. (2021). Every `<<16-3=13>>` in them is a call of a calculator in
  the middle of a sentence: what comes before the call is one assistant turn, with a native tool call; the value is the
  tool's answer; the sentence goes on in the next turn.
- `tora`: trajectories of ToRA (Gou et al., 2024), two models on the same problems: reasoning and a fenced Python
  block, the interpreter's output as a user turn, and the boxed answer.
- `gsm8k_train`: the gold solutions of GSM8K's training problems in the form of `gsm8k`, and up to two copies of each
  with one mistake (`embedded/one_mistake.py`), whose calculators really gave what they say; with `--variants` the same
  again for each problem told with other numbers.

```bash
python examples/prepare_real_data.py --data_dir ../shared/data --output data
```

writes `<source>_preference.jsonl` (`prompt`, `chosen`, `rejected`) for `examples/multi_turn_dpo.py` and
`<source>_trajectory.jsonl` (`prompt`, `completion`, `label`, `reward`) for M-KTO, OREO and DQO:

```bash
accelerate launch examples/multi_turn_dpo.py --dataset_name data/gsm8k_preference.jsonl ...
```
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
from collections import defaultdict
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

from datasets import Dataset
from embedded.one_mistake import one_mistake, other_numbers

from trl_multiturn.verify import MathVerifier


Message = dict[str, Any]
Row = dict[str, Any]

SOURCES = ("gsm8k", "tora", "gsm8k_train")
GSM8K_FILE = "gsm8k_model_solutions.jsonl"
GSM8K_TRAIN_FILE = "gsm8k_train.jsonl"
GSM8K_MODELS = ("6b_finetuning", "6b_verification", "175b_finetuning", "175b_verification")
TORA_FILES = {
    "tora-code-34b": "tora_code_34b_gsm8k_trajectories.jsonl",
    "tora-70b": "tora_70b_gsm8k_trajectories.jsonl",
}

CALCULATOR = {
    "type": "function",
    "function": {
        "name": "calculator",
        "description": "Evaluates an arithmetic expression.",
        "parameters": {
            "type": "object",
            "properties": {"expression": {"type": "string", "description": "For example `16-3-4`."}},
            "required": ["expression"],
        },
    },
}

# `<<expr=value>>`; the value is what follows the last equals sign. A mark that a cut-off sample left open is text.
_CALL = re.compile(r"<<([^<>]*)=([^<>=]*)>>")
_PROGRAM = re.compile(
    r"\A(?P<code>.*?```python\n.*?\n```)\s*(?P<output>```output\n.*?\n```)\s*(?P<answer>.*)\Z", re.DOTALL
)


def default_data_dir() -> Path:
    """`$TRL_MULTITURN_DATA`, or `../shared/data` from the project's root."""
    return Path(os.environ.get("TRL_MULTITURN_DATA") or Path(__file__).parents[2] / "shared" / "data")


def calculator_turns(solution: str) -> list[Message]:
    """A solution with calculator marks → assistant turns with tool calls, and the calculator's answers.

    Text is stripped at the turns' borders, as many chat templates do anyway.
    """
    messages, end = [], 0
    for match in _CALL.finditer(solution):
        function = {"name": "calculator", "arguments": {"expression": match[1].strip()}}
        call = {"type": "function", "function": function}
        messages.append({"role": "assistant", "content": solution[end : match.start()].strip(), "tool_calls": [call]})
        messages.append({"role": "tool", "name": "calculator", "content": match[2].strip()})
        end = match.end()
    return [*messages, {"role": "assistant", "content": solution[end:].strip()}]


def program_turns(solution: str) -> list[Message]:
    """A ToRA solution → reasoning with a program, the interpreter's output as a user turn, the answer.

    A solution that stops before the interpreter answered is one turn.
    """
    match = _PROGRAM.match(solution.strip())
    if match is None:
        return [{"role": "assistant", "content": solution.strip()}]
    return [
        {"role": "assistant", "content": match["code"].strip()},
        {"role": "user", "content": match["output"]},
        {"role": "assistant", "content": match["answer"].strip()},
    ]


def program_of(message: Message) -> str:
    """The Python program in an assistant turn of [`program_turns`]."""
    return re.search(r"```python\n(.*)\n```", message["content"], re.DOTALL)[1]


def read_trajectories(data_dir: str | Path, source: str, variants: int = 0) -> list[Row]:
    """Every recorded solution as a row: `prompt`, `completion`, `label`, `reward`, `question_id`, `model`.

    The rows of `gsm8k` and `gsm8k_train` also have `tools`.

    Args:
        data_dir (`str` or `Path`):
            Folder with the recorded solutions.
        source (`str`):
            `"gsm8k"`, `"tora"` or `"gsm8k_train"`. A `question_id` counts the problems of its source's file.
        variants (`int`, *optional*, defaults to `0`):
            For `"gsm8k_train"`: how often a problem is told again with other numbers, where that can be done. It keeps
            its `question_id`, so that whoever holds out a problem holds out its variants.
    """
    if source not in SOURCES:
        raise ValueError(f"`source={source!r}` is unknown. Use one of {', '.join(SOURCES)}.")
    readers = {"gsm8k": _gsm8k_rows, "tora": _tora_rows, "gsm8k_train": partial(_gsm8k_train_rows, variants=variants)}
    rows = readers[source](Path(data_dir))
    return sorted(rows, key=lambda row: row["question_id"])


def _lines(path: Path) -> list[dict[str, Any]]:
    if not path.exists():
        raise FileNotFoundError(
            f"{path} does not exist, so there is nothing to convert. Pass the folder that holds the recorded "
            "solutions as `--data_dir`, or set `TRL_MULTITURN_DATA`."
        )
    with open(path, encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def _row(question: str, completion: list[Message], correct: bool, **extra: Any) -> Row:
    prompt = [{"role": "user", "content": question.strip()}]
    return {"prompt": prompt, "completion": completion, "label": correct, "reward": float(correct), **extra}


def _gsm8k_rows(data_dir: Path) -> Iterator[Row]:
    for question_id, record in enumerate(_lines(data_dir / GSM8K_FILE)):
        for model in GSM8K_MODELS:
            sample = record[model]
            turns = calculator_turns(sample["solution"])
            extra = {"question_id": question_id, "model": model, "tools": [CALCULATOR]}
            yield _row(record["question"], turns, sample["is_correct"], **extra)


def _gsm8k_train_rows(data_dir: Path, copies: int = 2, variants: int = 0, seed: int = 0) -> Iterator[Row]:
    rng, retelling = random.Random(seed), random.Random(seed)
    for question_id, record in enumerate(_lines(data_dir / GSM8K_TRAIN_FILE)):
        solution, _, gold = record["answer"].rpartition("\n#### ")
        told = (record["question"], solution, gold.replace(",", "").strip())
        others = [other_numbers(told[0], solution, retelling) for _ in range(variants)]
        # the last result has to be the answer of the problem as it was: then it is the new one's
        solved = solution.rpartition("=")[2].startswith(f"{told[2]}>>")
        for question, text, answer in [told, *(dict.fromkeys(filter(None, others)) if solved else ())]:
            yield from _gold_and_mistaken(question, text, answer, question_id, copies, rng)


def _gold_and_mistaken(
    question: str, solution: str, gold: str, question_id: int, copies: int, rng: random.Random
) -> Iterator[Row]:
    mistaken = [one_mistake(question, solution, rng) for _ in range(copies)]
    wrong = {text: answer for text, answer in filter(None, mistaken) if answer != gold}
    for text, answer in {solution: gold, **wrong}.items():
        extra = {"question_id": question_id, "model": "one_mistake" if text in wrong else "gold"}
        turns = _as_recorded(calculator_turns(f"{text}\nA: {answer}"))
        yield _row(question, turns, text not in wrong, **extra, tools=[CALCULATOR])


def _as_recorded(turns: list[Message]) -> list[Message]:
    """The recorded models' calculator was Python's: a quotient has a decimal point, whatever its value."""
    for call, answer in zip(turns, turns[1:], strict=False):
        if answer["role"] == "tool" and "/" in call["tool_calls"][0]["function"]["arguments"]["expression"]:
            answer["content"] += "" if "." in answer["content"] else ".0"
    return turns


def _tora_rows(data_dir: Path) -> Iterator[Row]:
    verifier = MathVerifier()
    for model, name in TORA_FILES.items():
        records = _lines(data_dir / name)
        verdicts = verifier.verify([record["gt"] for record in records], [record["pred"][0] for record in records])
        for record, correct in zip(records, verdicts, strict=True):
            if correct is not None:  # undecided: neither a winner nor a loser
                extra = {"question_id": record["idx"], "model": model}
                yield _row(record["question"], program_turns(record["code"][0]), correct, **extra)
    verifier.close()


def pair(trajectories: list[Row]) -> list[Row]:
    """Preference rows: each correct trajectory of a problem with an incorrect one, none of them used twice."""
    by_question: dict[int, dict[bool, list[Row]]] = defaultdict(lambda: {True: [], False: []})
    for row in trajectories:
        by_question[row["question_id"]][row["label"]].append(row)
    rows = []
    for question_id, sides in by_question.items():
        for winner, loser in zip(sides[True], sides[False], strict=False):
            row = {"prompt": winner["prompt"], "chosen": winner["completion"], "rejected": loser["completion"]}
            row |= {"question_id": question_id, "chosen_model": winner["model"], "rejected_model": loser["model"]}
            rows.append({**row, "tools": winner["tools"]} if "tools" in winner else row)
    return rows


def read_preferences(data_dir: str | Path, source: str) -> list[Row]:
    """The preference rows of a source; see [`read_trajectories`] and [`pair`]."""
    return pair(read_trajectories(data_dir, source))


def to_dataset(rows: list[Row]) -> Dataset:
    """A dataset that keeps messages as they are (Arrow would fill the missing keys of a message with `None`)."""
    return Dataset.from_list(rows, on_mixed_types="use_json")


def main() -> None:
    parser = argparse.ArgumentParser(description="Turn recorded solutions of real models into multi-turn rows.")
    parser.add_argument(
        "--data_dir", type=Path, default=default_data_dir(), help="Folder with the recorded solutions."
    )
    parser.add_argument("--output", type=Path, default=Path("data"), help="Folder for the rows.")
    parser.add_argument("--source", choices=(*SOURCES, "all"), default="all", help="Which recorded solutions.")
    parser.add_argument("--variants", type=int, default=0, help="Other numbers for each problem of `gsm8k_train`.")
    args = parser.parse_args()
    args.output.mkdir(parents=True, exist_ok=True)
    for source in SOURCES if args.source == "all" else (args.source,):
        trajectories = read_trajectories(args.data_dir, source, args.variants)
        for kind, rows in (("trajectory", trajectories), ("preference", pair(trajectories))):
            path = args.output / f"{source}_{kind}.jsonl"
            with open(path, "w", encoding="utf-8") as file:
                file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
            print(f"{path}: {len(rows)} rows")


if __name__ == "__main__":
    main()
