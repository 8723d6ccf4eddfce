"""Text that a model wrote, for a terminal: what would steer the terminal is shown, not sent."""

from __future__ import annotations

import functools
import unicodedata


# Cc: control characters, the escape among them; Cf: writing direction and what prints as nothing; Zl, Zp: line ends
# that a terminal may not know; Cs: halves of characters, which no encoding takes
_STEERING = frozenset(("Cc", "Cf", "Zl", "Zp", "Cs"))
_HARMLESS = "\n\t\u200c\u200d"  # line breaks, tabs, and the joiners of Indic scripts, Persian and emoji


@functools.lru_cache(maxsize=4096)
def _shown(character: str) -> str:
    if character in _HARMLESS or unicodedata.category(character) not in _STEERING:
        return character
    code = ord(character)  # written as in a Python string
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"


def visible(text: str) -> str:
    r"""A text in which control and direction characters stand as escapes (`\x1b[2J`, `\u202e`), so that none acts.

    Previews, reports, tables and logs of this package pass through here what a model, a dataset or a tool wrote. Line
    breaks and tabs stay.
    """
    return text if text.isprintable() else "".join(map(_shown, text))
