r"""Gold answers as datasets hold them: a number, LaTeX, a solution with its answer, or nothing to read."""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Sequence
from typing import Any

from .answers import last_boxed
from .reading.forms import Phrase, read


logger = logging.getLogger(__name__)

_MISSING = frozenset(("", "nan", "null", "n/a", "<na>", "unknown", "?", "-", "[invalid]"))
_TAGGED = re.compile(r"<answer>(.*?)</answer>", re.DOTALL | re.IGNORECASE)
_MARKED = re.compile(
    r"(?i)(?:.*\b(?:final\s+|correct\s+)?answer\s*(?:is|are|was|[:=])+|\W*(?:A|ans|result|solution)\s*[:=])[\s*:]*(\S.*)"
)
_LONGEST_PHRASE = 8  # words; a longer text is a sentence, not a name
_LOOKED_AT = 1000
_MANY = 0.05


def gold_answer(answer: Any) -> str | None:
    r"""The gold answer as LaTeX or plain text; `None` where there is none, or none that is plain.

    Takes what datasets hold: a number, a text that ends in `#### 18` (GSM8K) or in a line `A: 18`, a solution with a
    `\boxed{}` (MATH), a sentence (`The answer is 18.`), `<answer>18</answer>`, or the answer itself. NaN, an empty
    text, several lines without such a mark and a long sentence without a single number are no gold answers: what they
    would be compared with stays undecided.
    """
    if isinstance(answer, list | tuple) and len(answer) == 1:
        answer = answer[0]
    if answer is None or isinstance(answer, dict | list | tuple) or (isinstance(answer, float) and math.isnan(answer)):
        return None
    text = str(answer).strip()
    found = _marked(text)
    if found is not None:
        return None if found.casefold() in _MISSING else found
    if text.casefold() in _MISSING or ("\n" in text and "\\begin" not in text):
        return None
    return text if _says_one_thing(text) else None


def _marked(text: str) -> str | None:
    """What a text itself marks as its answer."""
    if "####" in text:
        return text.rsplit("####", 1)[1].strip()
    tagged = _TAGGED.findall(text)
    if tagged:
        return tagged[-1].strip()
    boxed = last_boxed(text)
    if boxed is not None:
        return boxed
    match = _MARKED.fullmatch(text.rpartition("\n")[2].strip())
    return match[1].strip("*_ ") if match else None


def _says_one_thing(text: str) -> bool:
    form = read(text).form
    if isinstance(form, Phrase):
        return len(form.words) <= _LONGEST_PHRASE
    return form is not None or len(re.findall(r"(?<![\\A-Za-z])[A-Za-z]{3,}", text)) <= _LONGEST_PHRASE


def look_at_golds(golds: Sequence[Any], column: str = "answer") -> None:
    """Warns where many gold answers cannot be read: every rollout on such a row stays undecided.

    Args:
        golds (`Sequence`):
            The column, or a part of it; the first 1,000 values are looked at.
        column (`str`, *optional*, defaults to `"answer"`):
            Its name, for the message.
    """
    looked_at = golds[:_LOOKED_AT]
    unread = [row for row, gold in enumerate(looked_at) if gold_answer(gold) is None]
    if len(unread) <= _MANY * len(looked_at):
        return
    logger.warning(
        "%d of the first %d values of the column `%s` cannot be read as an answer (row %d: %.80r), so every answer to "
        "those rows stays undecided and none is trained on. Put the answer alone into the column, or let the text end "
        r"in a line `#### 18` or `A: 18`, or in `\boxed{18}`.",
        len(unread), len(looked_at), column, unread[0], looked_at[unread[0]],
    )  # fmt: skip
