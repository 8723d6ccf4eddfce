"""Text that a model or a tool wrote, for a terminal or a title: control characters are shown and act on nothing.

A terminal obeys escape sequences (colours, the cursor, the clipboard), and whatever lays out text obeys marks of
direction, by which what is read is not what is there. The viewer's page does the same in `page/text.js`.
"""

from __future__ import annotations

import re


# C0 and C1 but for tab and line feed; marks, overrides and isolates of direction; invisible separators and tags
_INVISIBLE = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200b\u200e\u200f\u2028-\u202e\u2060-\u2069\ufeff\U000e0000-\U000e007f\ud800-\udfff]"
)


def visible(text: str) -> str:
    r"""The text with every character that is not seen replaced by one that is.

    ```python
    >>> visible("a\x1b[31mb\u202ec")
    'a\\x1b[31mbU+202Ec'
    ```
    """
    return _INVISIBLE.sub(_shown, text)


def _shown(match: re.Match[str]) -> str:
    code = ord(match[0])
    return f"\\x{code:02x}" if code < 0x100 else f"U+{code:04X}"
