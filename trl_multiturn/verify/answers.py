r"""From a text to the answer in it: the last `\boxed{}` of a completion, and a key under which equal answers vote."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from .reading.forms import Phrase, read
from .reading.numerals import BasedNumber
from .reading.quantities import Quantity


# an escaped brace is a symbol, not a group, and two backslashes are a line's end
_BRACES = re.compile(r"(?P<box>\\f?box(?:ed)?\s*+\{)|\\\\(?!f?box)|\\[{}]|[{}]")
# A box that is mentioned, not filled in: blanks, also those of LaTeX, and dots
_EMPTY = re.compile(r"(?:\\(?:[ ,;:!]|quad|dots|ldots|cdots)|[\s~.…])*")


def message_text(message: dict[str, Any]) -> str:
    """The text of a message whose content is a string, a list of content blocks, or absent."""
    content = message.get("content")
    if content is None:
        return ""
    if isinstance(content, str):
        return content
    return "".join(block.get("text") or "" for block in content if block.get("type", "text") == "text")


def boxed_answers(text: str) -> list[str]:
    r"""The contents of the complete `\boxed{…}` (or `\fbox{…}`) of a text, braces balanced, in order.

    A box that the text leaves open (a generation cut off) is no answer, and neither is an empty one ("I will put the
    answer in \boxed{}"): both are passed over.
    """
    opened: list[re.Match[str]] = []
    found: list[tuple[int, str]] = []
    for token in _BRACES.finditer(text):
        if token[0] == "}" and opened:
            opening = opened.pop()
            if opening["box"]:
                found.append((opening.start(), text[opening.end() : token.start()].strip()))
        elif token[0].endswith("{") and token[0] != "\\{":
            opened.append(token)
    return [content for _, content in sorted(found) if not _EMPTY.fullmatch(content)]


def last_boxed(text: str) -> str | None:
    r"""The content of the last `\boxed{…}` (or `\fbox{…}`) that holds an answer; `None` where there is none."""
    answers = boxed_answers(text)
    return answers[-1] if answers else None


def final_answer(completion: str | Sequence[dict[str, Any]]) -> str | None:
    r"""The answer that a completion ends on: the last `\boxed{}` of its last assistant turn.

    Boxes in earlier turns and in observations do not count. A plain string is read whole.
    """
    if isinstance(completion, str):
        return last_boxed(completion)
    for message in reversed(completion):
        if message["role"] == "assistant":
            return last_boxed(message_text(message))
    return None


def canonical_answer(text: str) -> str:
    r"""A key under which plainly equal answers meet, for voting: `0.5`, `1/2` and `$\dfrac{1}{2}$` share one.

    All answer one question, so a unit changes no vote: `18 eggs`, `$18` and `18` are one. Answers that are equal only
    by algebra keep different keys: a vote compares thousands of answers, and each of them was compared with the gold
    answer by the verifier already.
    """
    reading = read(text)
    match reading.form:
        case Quantity(number=number, percent=percent) if number is not None:
            return f"{number}%" if percent else str(number)
        case BasedNumber(value=value):
            return str(value)
        case Phrase(words=words):
            return " ".join(words)
    return reading.text.replace(" ", "")
