"""From what a cell produced to what the policy reads.

The M-DPO paper (arXiv:2409.02392, appendix on tools) returns the standard output of the last cell, or, when the code
fails, only the error message, "typically less than 20 tokens". Long outputs keep their head and their tail.
"""

from __future__ import annotations

import re


# terminal colors and cursor movements, which tokenize badly and mean nothing to a policy
_ANSI = re.compile(r"\x1b(?:\[[0-?]*[ -/]*[@-~]|\][^\x07\x1b]*(?:\x07|\x1b\\)|[@-Z\\-_])")
# ipykernel names a cell after a hash of its text: the same mistake must read the same in every session
_CELL_FILE = re.compile(r"\((?:\d+\.py|<ipython-input-[^>]*>), line (\d+)\)")
# of an object on the heap or in a mapping, as a 64-bit system prints it
_ADDRESS = re.compile(r"(?<= )at 0x([57][0-9a-f]{11})\b")


def clean(text: str) -> str:
    """Removes terminal escapes, NULs and lone surrogates, none of which a tokenizer can represent faithfully."""
    if "\x1b" in text:
        text = _ANSI.sub("", text)
    if "\x00" in text:
        text = text.replace("\x00", "")
    return text.encode("utf-8", "replace").decode("utf-8")


def truncate(text: str, limit: int, dropped: int = 0) -> str:
    """Keeps the head and the tail of a text and announces the cut in between.

    Args:
        text (`str`):
            The text.
        limit (`int`):
            Characters to keep, the announcement not counted.
        dropped (`int`, *optional*, defaults to `0`):
            Characters that were already dropped between the first `limit - limit // 2` characters and the rest.
    """
    if len(text) <= limit and not dropped:
        return text
    head = limit - limit // 2
    tail = text[max(head, len(text) - limit // 2) :]
    cut = len(text) - min(head, len(text)) - len(tail) + dropped
    return f"{text[:head]}\n[... {cut} characters cut ...]\n{tail}"


def error_message(name: str, value: str) -> str:
    """What an exception says, its name first: `NameError: name 'x' is not defined`."""
    return error_text(f"{name}: {value}" if value else name)


def error_text(text: str) -> str:
    """An error as the policy reads it: the same mistake reads the same in every session."""
    return _CELL_FILE.sub(r"(<cell>, line \1)", text).rstrip()


class Addresses:
    """Replaces the addresses in `<… object at 0x7f…>`, which differ from run to run, by ones that repeat.

    They are numbered as they appear in a session: equal ones stay equal, and different ones different.
    """

    def __init__(self) -> None:
        self._numbers: dict[str, int] = {}

    def repeat(self, text: str) -> str:
        """The text with addresses that repeat."""
        return _ADDRESS.sub(self._replacement, text) if " at 0x" in text else text

    def _replacement(self, match: re.Match[str]) -> str:
        number = self._numbers.setdefault(match[1], len(self._numbers) + 1)
        return f"at 0x7f{16 * number:010x}"


def timeout_message(timeout: float) -> str:
    """What the policy reads about a cell that ran too long."""
    return f"TimeoutError: the cell ran longer than {timeout:g} seconds"
