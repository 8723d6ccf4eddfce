"""Consecutive pieces of a text to ids, so that no token crosses from one into the next."""

from __future__ import annotations

from transformers import PreTrainedTokenizerBase


def encode(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Ids of a text as `apply_chat_template` tokenizes: the template prints the special tokens itself."""
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def encode_pieces(tokenizer: PreTrainedTokenizerBase, pieces: list[str]) -> list[list[int]]:
    """Tokenizes consecutive pieces so that no token crosses from one into the next.

    Where tokens of the whole text fall on the boundaries anyway (a special token stands there) this is the
    tokenization of the whole. Where a merge crosses a boundary (a turn that begins with a newline after a header that
    ends with one), the split is what the policy saw: its prompt ended there.

    Raises:
        `ValueError`: if a merge across a boundary cannot be undone.
    """
    text = "".join(pieces)
    whole = encode(tokenizer, text)
    parts = [encode(tokenizer, piece) if piece else [] for piece in pieces]
    if [token for part in parts for token in part] == whole:
        return parts
    # Pieces alone may tokenize differently than in place (a tokenizer that marks the beginning of the text), so
    # measure with prefixes of the text and fall back to a piece alone only where a merge crosses its boundary.
    result: list[list[int]] = []
    before: list[int] = []
    end = 0
    for piece, part in zip(pieces, parts, strict=True):
        end += len(piece)
        upto = encode(tokenizer, text[:end])
        result.append(upto[len(before) :] if upto[: len(before)] == before else part)
        before = upto
    joined = tokenizer.decode([token for part in result for token in part])
    if joined != tokenizer.decode(whole):
        raise ValueError(
            "The tokenizer merges text across the boundary of a turn in a way that cannot be undone, so the tokens "
            "that the policy sampled are unknown. Use a chat template that puts special tokens around turns, or rows "
            "that carry token ids and masks."
        )
    return result
