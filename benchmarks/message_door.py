"""What it costs that messages and tools come through one door before they are rendered.

Tokenizes preference rows of several turns with tool calls as the trainers do, and times the door's part of it (reading
the row, and bringing messages and tools into TRL's form, which a row passes twice) beside the whole, row by row in
turns. The ratio is the door's time to that of all the rest (rendering, finding spans, tokenizing).

    python benchmarks/message_door.py [--rows 200] [--output benchmarks/results/message_door.md]
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import trl
from datasets import Dataset
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from trl_multiturn.data.tokenization import read_messages, tokenize_preference_row, turn_template
from trl_multiturn.formats import column_shapes
from trl_multiturn.messages import arguments_as_strings, normalize_tools, without_flags


SIDES = ("chosen", "rejected")
WORDS = "the a tide ferry harbour high water fare of in at is two three north south leaves later stone".split()
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": name,
            "description": f"Looks up the {name}.",
            "parameters": {
                "type": "object",
                "properties": {"query": {"type": "string"}, "limit": {"type": "integer"}},
                "required": ["query"],
            },
        },
    }
    for name in ("tide", "fare", "weather")
]


def sentence(rng: random.Random, words: int) -> str:
    return " ".join(rng.choices(WORDS, k=words)) + "."


def side(rng: random.Random, turns: int) -> list[dict[str, Any]]:
    messages: list[dict[str, Any]] = []
    for turn in range(turns - 1):
        name = rng.choice(TOOLS)["function"]["name"]
        arguments = {"query": sentence(rng, 6), "limit": turn}
        call = {"id": f"call{turn:05d}", "type": "function", "function": {"name": name, "arguments": arguments}}
        messages.append({"role": "assistant", "content": sentence(rng, 12), "tool_calls": [call]})
        result = {"role": "tool", "tool_call_id": call["id"], "name": name, "content": sentence(rng, 40)}
        messages.append(result)
    return [*messages, {"role": "assistant", "content": sentence(rng, 40)}]


def preference_rows(count: int) -> list[dict[str, Any]]:
    rng = random.Random(0)
    return [
        {
            "prompt": [{"role": "user", "content": sentence(rng, 30)}],
            **{name: side(rng, rng.randint(1, 4)) for name in SIDES},
            "tools": TOOLS,
        }
        for _ in range(count)
    ]


def as_an_api_writes(row: dict[str, Any]) -> dict[str, Any]:
    """Arguments and tools as JSON strings."""
    return {**row, **{name: arguments_as_strings(row[name]) for name in SIDES}, "tools": json.dumps(row["tools"])}


def tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE with the chat template of Qwen2.5."""
    fast = Tokenizer(models.BPE())
    fast.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    fast.decoder = decoders.ByteLevel()
    special = ["<|im_start|>", "<|im_end|>", "<pad>"]
    trainer = trainers.BpeTrainer(vocab_size=2000, special_tokens=special, show_progress=False)
    rng = random.Random(1)
    fast.train_from_iterator((sentence(rng, 20) for _ in range(500)), trainer)
    loaded = PreTrainedTokenizerFast(tokenizer_object=fast, eos_token="<|im_end|>", pad_token="<pad>")
    template = Path(trl.__file__).parent / "chat_templates" / "qwen2_5.jinja"
    loaded.chat_template = template.read_text(encoding="utf-8")
    return loaded


def door(row: dict[str, Any], processing_class: Any, shapes: Any) -> None:
    """All that a row passes of the door on its way to tokens."""
    read = read_messages(row, processing_class, shapes)
    template = turn_template(processing_class, read["tools"])
    for name in SIDES:
        without_flags(read["prompt"])
        messages, _ = without_flags(read[name])
        normalize_tools(read["tools"])
        prompt = template.normalize(read["prompt"], "prompt")
        without_flags(template.normalize(messages, "completion", prompt))


def seconds(function: Callable[..., Any], *arguments: Any) -> float:
    start = time.perf_counter()
    function(*arguments)
    return time.perf_counter() - start


def measure(rows: Any, processing_class: Any, shapes: Any) -> tuple[float, float]:
    """Seconds of the whole and of the door, the medians over the rows."""
    whole, parts = [], []
    for row in rows:
        whole.append(seconds(tokenize_preference_row, row, processing_class, shapes))
        parts.append(seconds(door, row, processing_class, shapes))
    return statistics.median(whole), statistics.median(parts)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=200)
    parser.add_argument("--output", type=Path, default=None)
    options = parser.parse_args()
    processing_class, written = tokenizer(), preference_rows(options.rows)
    kinds: dict[str, tuple[Any, Any]] = {"in TRL's form": (written, None)}
    kinds["as an API writes them"] = ([as_an_api_writes(row) for row in written], None)
    stored = Dataset.from_list(written)
    kinds["stored by Arrow"] = (stored.to_list(), column_shapes(stored))
    lines = ["| rows | whole row, ms | door, ms | door to the rest |", "| --- | ---: | ---: | ---: |"]
    for name, (rows, shapes) in kinds.items():
        measure(rows[:20], processing_class, shapes)  # the template is built once
        whole, part = measure(rows, processing_class, shapes)
        lines.append(f"| {name} | {1e3 * whole:.2f} | {1e3 * part:.3f} | {100 * part / (whole - part):.1f} % |")
    table = "\n".join(lines)
    print(table)
    if options.output is not None:
        where = f"{time.strftime('%Y-%m-%d')}; {os.cpu_count()} cores ({platform.machine()}); Python "
        where += f"{platform.python_version()}, trl {trl.__version__}."
        command = f"`python benchmarks/message_door.py --rows {options.rows} --output {options.output}`"
        options.output.write_text(
            f"# The one door for messages\n\n{command}\n\n{where}\n\n{table}\n", encoding="utf-8"
        )


if __name__ == "__main__":
    main()
