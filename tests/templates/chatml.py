"""Small ChatML templates, each with one habit of real ones."""

from __future__ import annotations

from tests.support import byte_tokenizer


TEXT = "{{ m.content }}"
CALLS = "{% for c in m.tool_calls or [] %}<tool_call>{{ c.function | tojson }}</tool_call>{% endfor %}"
END = "<|im_end|>\n"


def chatml(words: str = TEXT + CALLS, end: str = END, before: str = "", prompt: str = "", top: str = "") -> str:
    """A template that prints `words` for each message `m`, then `end`; `prompt` follows the assistant's header."""
    return (
        f"{top}{{% for m in messages %}}{before}<|im_start|>{{{{ m.role }}}}\n{words}{end}{{% endfor %}}"
        f"{{% if add_generation_prompt %}}<|im_start|>assistant\n{prompt}{{% endif %}}"
    )


def tokenizer(**parts: str):
    """A byte-level tokenizer with such a template."""
    return byte_tokenizer(chatml(**parts))
