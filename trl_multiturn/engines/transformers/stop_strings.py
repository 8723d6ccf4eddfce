"""Sampled token ids → does the text contain a stop string yet?"""

from __future__ import annotations

from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase


class StopStringMatcher:
    """Finds stop strings in decoded turns, special tokens included.

    The whole turn is decoded for every answer, as pieces decoded one by one need not add up to the text; but only
    where the newest token can have completed a stop string: its own text contains the last character of one. The
    shortcut is not taken for strings that end in white space or outside ASCII, which a decoder may strip from, or
    spread over, single tokens.

    Args:
        processing_class ([`~transformers.PreTrainedTokenizerBase`]):
            Tokenizer of the policy.
    """

    def __init__(self, processing_class: PreTrainedTokenizerBase) -> None:
        self._tokenizer = processing_class
        self._pieces: dict[int, str] = {}

    def matches(self, token_ids: Sequence[int], stop_strings: Sequence[str]) -> bool:
        """Whether the text of `token_ids` contains one of `stop_strings`, given that without its last token it did
        not."""
        candidates = [string for string in stop_strings if self._may_complete(token_ids[-1], string)]
        if not candidates:
            return False
        text = self._decode(token_ids)
        return any(string in text for string in candidates)

    def _may_complete(self, token_id: int, string: str) -> bool:
        last = string[-1]
        if last.isspace() or not last.isascii():
            return True
        piece = self._pieces.get(token_id)
        if piece is None:
            piece = self._pieces[token_id] = self._decode([token_id])
        return last in piece

    def _decode(self, token_ids: Sequence[int]) -> str:
        return self._tokenizer.decode(token_ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
