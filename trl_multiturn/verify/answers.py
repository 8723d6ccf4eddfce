r"""From a text to the answer in it: the last `\boxed{}`, the gold answer of a row, and numbers read exactly."""

from __future__ import annotations

import re
from collections.abc import Sequence
from fractions import Fraction
from typing import Any


_BOX = re.compile(r"\\f?box(?:ed)?\s*\{")
# A box that is mentioned, not filled in: blanks, also those of LaTeX, and dots
_EMPTY = re.compile(r"(?:\\(?:[ ,;:!]|quad|dots|ldots|cdots)|[\s~.…])*")
_DECIMAL = re.compile(r"[+-]?(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?|[+-]?\.\d+")
_SLASH = re.compile(r"([+-]?\d+)\s*/\s*(\d+)")
_FRAC = re.compile(r"([+-]?)\\[dt]?frac\s*\{\s*([+-]?\d+)\s*\}\s*\{\s*(\d+)\s*\}")
# longer numbers are nobody's answer, and Python refuses to convert those beyond 4,300 digits
_MAX_NUMBER_LENGTH = 100


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
    contents = (_content(text, match.end()) for match in _BOX.finditer(text))
    return [content for content in contents if content is not None and not _EMPTY.fullmatch(content)]


def _content(text: str, start: int) -> str | None:
    """What stands before the brace that closes the one before `start`; `None` where none does."""
    depth, i = 1, start
    while i < len(text):
        if text[i] == "\\":
            i += 2  # an escaped brace is a symbol, not a group
            continue
        depth += {"{": 1, "}": -1}.get(text[i], 0)
        if depth == 0:
            return text[start:i].strip()
        i += 1
    return None


def last_boxed(text: str) -> str | None:
    r"""The content of the last `\boxed{…}` (or `\fbox{…}`) that holds an answer; `None` where there is none."""
    return (boxed_answers(text) or [None])[-1]


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


def gold_answer(answer: Any) -> str:
    r"""The gold answer as a LaTeX or plain text.

    Takes what datasets hold: a number, a text that ends in `#### 18` (GSM8K), a solution with a `\boxed{}` (MATH), or
    the answer itself.
    """
    text = str(answer).strip()
    if "####" in text:
        return text.rsplit("####", 1)[1].strip()
    boxed = last_boxed(text)
    return text if boxed is None else boxed


def _bare(text: str) -> str:
    """The text without math delimiters, currency signs and a closing full stop."""
    text = text.strip().removesuffix(".").strip()
    if len(text) > 1 and text[0] == text[-1] == "$":
        text = text[1:-1].strip()
    return text.removeprefix("\\$").removeprefix("$").strip().replace("{,}", ",").replace("\\!", "")


def exact_number(text: str) -> Fraction | None:
    r"""The value of a plain integer, decimal or fraction, exactly; `None` for anything else.

    Read are `18`, `-3.50`, `1,234`, `\$18`, `$18$`, `18.`, `3/4`, `\frac{3}{4}` (and `\dfrac`, `\tfrac`). Percentages,
    units, mixed numbers and expressions are not numbers here.
    """
    text = _bare(text)
    if len(text) > _MAX_NUMBER_LENGTH:
        return None
    if _DECIMAL.fullmatch(text):
        return Fraction(text.replace(",", ""))
    if match := _SLASH.fullmatch(text):
        numerator, denominator = int(match[1]), int(match[2])
    elif match := _FRAC.fullmatch(text):
        numerator, denominator = int(match[1] + "1") * int(match[2]), int(match[3])
    else:
        return None
    return Fraction(numerator, denominator) if denominator else None


def canonical_answer(text: str) -> str:
    r"""A key under which plainly equal answers meet, for voting: `0.5`, `1/2` and `$\dfrac{1}{2}$` share one.

    Answers that are equal only by algebra keep different keys: a vote compares thousands of answers, and each of them
    was compared with the gold answer by the verifier already.
    """
    number = exact_number(text)
    if number is not None:
        return str(number)
    text = re.sub(r"\\(?:left|right|[,;:!])|\s+", "", _bare(text))
    return re.sub(r"\\[dt]frac", r"\\frac", text)
