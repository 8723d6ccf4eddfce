"""Tiny local tokenizers, models and conversations, so that no test downloads anything."""

from __future__ import annotations

import importlib
import os
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import trl
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM


TEMPLATES_DIR = Path(trl.__file__).parent / "chat_templates"

# Whatever looks like a special token in a template: `<|im_end|>`, `<turn|>`, `<｜User｜>`, `[gMASK]`, `</s>` ...
_SPECIAL = re.compile(
    r"<\|[^|<>\s]+\|>|<\|[a-z_]+>|<[a-z_]+\|>|<｜[^｜]+｜>|\[gMASK\]|<sop>"
    r"|</?(?:s|think|tool_call|tool_response)>|<(?:start_of_turn|end_of_turn|end_of_utterance)>"
)

TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "add",
            "description": "Adds two integers.",
            "parameters": {
                "type": "object",
                "properties": {
                    "a": {"type": "integer", "description": "First."},
                    "b": {"type": "integer", "description": "Second."},
                },
                "required": ["a", "b"],
            },
            "return": {"type": "integer", "description": "The sum."},
        },
    }
]


def needs(module: str) -> Any:
    """A module of an extra; without it its tests are skipped, or fail where `EXTRAS_REQUIRED` is set."""
    return importlib.import_module(module) if "EXTRAS_REQUIRED" in os.environ else pytest.importorskip(module)


def template_text(name: str) -> str:
    """A chat template that TRL ships, e.g. `"qwen3"`."""
    return (TEMPLATES_DIR / f"{name}.jinja").read_text(encoding="utf-8")


def byte_tokenizer(chat_template: str | None = None, merges: list[tuple[str, str]] = ()) -> PreTrainedTokenizerFast:
    """A byte-level tokenizer: one token per byte, one per special token of the template (a TRL name or a text).

    `merges` adds BPE merges of byte-level symbols (`Ċ` is a newline, `Ġ` a space).
    """
    if chat_template is None:
        chat_template = "qwen2_5"
    if "{" not in chat_template:
        chat_template = template_text(chat_template)
    vocab = {symbol: index for index, symbol in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    for left, right in merges:
        vocab[left + right] = len(vocab)
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=list(merges)))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = sorted(set(_SPECIAL.findall(chat_template)) - {"<pad>", "<bos>", "<eos>"})
    eos = next((token for token in ("<|im_end|>", "<|eot_id|>") if token in special), "<eos>")
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<bos>", eos_token=eos, pad_token="<pad>")
    fast.add_tokens(special, special_tokens=True)
    fast.chat_template = chat_template
    return fast


def tiny_model(
    tokenizer: PreTrainedTokenizerFast, architecture: str = "qwen2", seed: int = 0, **overrides: Any
) -> torch.nn.Module:
    """A two-layer causal LM with random weights, large enough to tell tokens apart."""
    config_class, model_class = {
        "qwen2": (Qwen2Config, Qwen2ForCausalLM),
        "llama": (LlamaConfig, LlamaForCausalLM),
    }[architecture]
    settings = dict(
        vocab_size=len(tokenizer),
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=2048,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        initializer_range=0.2,
    )
    torch.manual_seed(seed)
    return model_class(config_class(**{**settings, **overrides}))


def save_tiny(folder: Path, tokenizer: PreTrainedTokenizerFast | None = None, **kwargs: Any) -> str:
    """Writes a tiny model and its tokenizer to `folder`, as `from_pretrained` expects them; the path."""
    tokenizer = tokenizer or byte_tokenizer()
    tiny_model(tokenizer, **kwargs).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def call(a: int, b: int, content: str = "") -> dict[str, Any]:
    """An assistant turn that calls `add`."""
    function = {"name": "add", "arguments": {"a": a, "b": b}}
    return {"role": "assistant", "content": content, "tool_calls": [{"type": "function", "function": function}]}


def result(text: str) -> dict[str, Any]:
    return {"role": "tool", "name": "add", "content": text}


def user(text: str) -> dict[str, Any]:
    return {"role": "user", "content": text}


def assistant(text: str, **extra: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": text, **extra}


def preference_rows(n: int = 4) -> list[dict[str, Any]]:
    """Preference rows whose sides hold two assistant turns with a tool result between them, of varied lengths."""
    return [
        {
            "prompt": [user(f"What is {i} plus {i}?")],
            "chosen": [call(i, i), result(str(2 * i) * (i + 1)), assistant(f"It is {2 * i}.")],
            "rejected": [call(i, 1), result("error: bad" * (i + 1)), assistant("No idea" + "!" * i)],
        }
        for i in range(n)
    ]


def render_actions(tokenizer: PreTrainedTokenizerFast, row: dict[str, list[int]]) -> list[str]:
    """The maximal runs of trained tokens, decoded: what the mask says that the policy sampled, turn by turn."""
    runs, current = [], []
    for token, trained in zip(row["completion_ids"] + [-1], row["action_mask"] + [0], strict=True):
        if trained:
            current.append(token)
        elif current:
            runs.append(tokenizer.decode(current))
            current = []
    return runs
