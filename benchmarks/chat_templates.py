"""The table of `docs/templates.md`: what the chat templates that TRL ships allow.

    python benchmarks/chat_templates.py          # prints it
    python benchmarks/chat_templates.py --write  # puts it into docs/templates.md

Templates are rendered with a tokenizer of one token per byte and one per special token; no model is needed.
"""

from __future__ import annotations

import argparse
import re
import warnings
from collections.abc import Iterator
from importlib.resources import files
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from trl_multiturn.rollout.calls import UnreadableTemplateError, choose_reader
from trl_multiturn.templates import TurnTemplate


DOCUMENT = Path(__file__).parents[1] / "docs" / "templates.md"
START, END = "<!-- table: python benchmarks/chat_templates.py --write -->", "<!-- end of the table -->"
HEAD = (
    "| chat template | answers | reasoning | calls | native rollouts, read by | several calls a turn | dialect |\n"
    "| --- | --- | --- | --- | --- | --- | --- |\n"
)
_SPECIAL = re.compile(
    r"<\|[^|<>\s]+\|>|<\|[a-z_]+>|<[a-z_]+\|>|<｜[^｜<>\n]+｜>|</?(?:think|tool_call|tool_response)>|<\|\"\|>"
)
_EOS = (
    "<|im_end|>",
    "<|eot_id|>",
    "<end_of_turn>",
    "<turn|>",
    "<|end|>",
    "<|END_OF_TURN_TOKEN|>",
    "<｜end▁of▁sentence｜>",
)
TOOL: dict[str, Any] = {
    "type": "function",
    "function": {
        "name": "add",
        "description": "Adds.",
        "parameters": {
            "type": "object",
            "properties": {
                "a": {"type": "integer", "description": "A."},
                "b": {"type": "integer", "description": "B."},
            },
            "required": ["a", "b"],
        },
    },
}
CALL = {"id": "call12345", "type": "function", "function": {"name": "add", "arguments": {"a": 271, "b": 828}}}
ANSWERS = [("user", "quiz1"), ("assistant", "reply1"), ("user", "quiz2"), ("assistant", "reply2")]


def shipped_templates() -> Iterator[tuple[str, str]]:
    """Name and text of every chat template in the installed TRL; its training templates are taken where they fit."""
    for path in sorted(files("trl").joinpath("chat_templates").iterdir(), key=lambda path: path.name):
        if path.name.endswith(".jinja") and not path.name.endswith("_training.jinja"):
            yield path.name.removesuffix(".jinja"), path.read_text(encoding="utf-8")


def byte_tokenizer(template: str) -> PreTrainedTokenizerFast:
    """A tokenizer of one token per byte, and one for each special token of a chat template."""
    vocabulary = {symbol: i for i, symbol in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    eos = next((token for token in _EOS if token in template), "</s>")
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<bos>", eos_token=eos, pad_token="<pad>")
    fast.add_tokens(sorted(set(_SPECIAL.findall(template)) - {"<pad>", "<bos>", eos}), special_tokens=True)
    fast.chat_template = template
    return fast


def _masks(tokenizer: PreTrainedTokenizerFast, messages: list[dict[str, Any]], tools: list[Any] | None = None) -> str:
    try:
        TurnTemplate(tokenizer, tools=tools).tokenize(messages[:1], messages[1:])
    except ValueError:
        return "refused"
    return "exact"


def row(name: str, template: str) -> str:
    """A template's line of the table."""
    tokenizer = byte_tokenizer(template)
    answers = [{"role": role, "content": words} for role, words in ANSWERS]
    thinking = [answers[0], {**answers[1], "reasoning_content": "thought1"}]
    call = {"role": "assistant", "content": "", "tool_calls": [CALL]}
    calls = [
        answers[0],
        call,
        {"role": "tool", "name": "add", "content": "1099", "tool_call_id": CALL["id"]},
        answers[1],
    ]
    cells = [_masks(tokenizer, answers), _masks(tokenizer, thinking), _masks(tokenizer, calls, [TOOL])]
    try:
        fit = choose_reader(tokenizer)
        cells += [fit.reader.name, "yes" if fit.parallel else "a hint", "`native`"]
    except UnreadableTemplateError:
        cells += ["no", "–", "`fenced`"]
    return f"| `{name}` | " + " | ".join(cells) + " |"


def table() -> str:
    """The whole table."""
    return HEAD + "\n".join(row(name, template) for name, template in shipped_templates()) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="put the table into docs/templates.md")
    warnings.simplefilter("ignore")
    if not parser.parse_args().write:
        print(table())
        return
    before, _, rest = DOCUMENT.read_text(encoding="utf-8").partition(START)
    after = rest.partition(END)[2]
    DOCUMENT.write_text(f"{before}{START}\n\n{table()}\n{END}{after}", encoding="utf-8")


if __name__ == "__main__":
    main()
