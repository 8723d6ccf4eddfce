"""Token ids as text, one by one: what a decoder makes of a whole sequence loses which token wrote what."""

from __future__ import annotations

import re
from collections.abc import Iterable
from functools import lru_cache
from typing import Any

from ..rollout.provenance import describe_tokenizer


_BYTE_TOKEN = re.compile(r"<0x([0-9A-F]{2})>")
_WORD_START = "▁"  # SentencePiece's


def token_texts(tokenizer: Any, ids: Iterable[int]) -> dict[int, str | list[int]]:
    """
    The text of each token.

    Returns:
        `dict[int, str | list[int]]`: by id; the bytes of a token that is a part of a character only.
    """
    tokenizer = getattr(tokenizer, "tokenizer", tokenizer)  # a processor's
    return {token: _text(tokenizer, token) for token in sorted(set(ids))}


def other_tokenizer(tokenizer: Any, info: dict[str, Any]) -> bool:
    """Whether a trajectory's provenance says that its ids are of another tokenizer than this one."""
    return "tokenizer" in info and info["tokenizer"] != describe_tokenizer(tokenizer)["tokenizer"]


def _text(tokenizer: Any, token: int) -> str | list[int]:
    symbol = tokenizer.convert_ids_to_tokens(token)
    if symbol is None:  # a gap in the vocabulary
        return ""
    text = tokenizer.decode([token], skip_special_tokens=False, clean_up_tokenization_spaces=False)
    if match := _BYTE_TOKEN.fullmatch(symbol):
        return [int(match[1], 16)]
    if "\ufffd" in text and "\ufffd" not in symbol:
        symbols = _byte_symbols()
        if all(character in symbols for character in symbol):
            return [symbols[character] for character in symbol]
    if symbol.startswith(_WORD_START) and not text.startswith(" "):  # a decoder drops a sequence's first blank
        return " " + text
    return text


@lru_cache
def _byte_symbols() -> dict[str, int]:
    """GPT-2's alphabet for bytes: printable ones stand for themselves, the others are moved above 255."""
    plain = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    moved = [byte for byte in range(256) if byte not in plain]
    return {chr(byte): byte for byte in plain} | {chr(256 + i): byte for i, byte in enumerate(moved)}
