"""Where the reasoning steps of a trajectory lie, in tokens (OREO, https://huggingface.co/papers/2412.16145)."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Literal


if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


StepDelimiter = Literal["turn", "line", "sentence"]

# A step ends with the delimiter. Blank lines belong to the step before them: an empty step would hold no decision.
_DELIMITERS = {"line": re.compile(r"\n\s*"), "sentence": re.compile(r"\n\s*|\.\$?\s+")}


def step_ids(
    tokenizer: PreTrainedTokenizerBase, completion_ids: list[int], action_mask: list[int], delimiter: StepDelimiter
) -> list[int]:
    """
    Number the steps of a completion, one non-decreasing integer per token.

    A turn always ends a step. With `"line"` a line break inside a turn does too (the paper's GSM8K), with `"sentence"`
    also a period, or one that closes a formula (`.$`), that white space follows (the paper's MATH). A token that holds
    the end of one step and the start of the next belongs to the first.

    Args:
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]): turns tokens back into text.
        completion_ids (`list[int]`): tokens after the prompt.
        action_mask (`list[int]`): 1 on the tokens that the policy sampled. Other tokens get the number of the step
            before them, 0 before the first.
        delimiter (`str`): `"turn"`, `"line"` or `"sentence"`.

    Raises:
        `ValueError`: if `delimiter` is unknown.

    Example:

    ```python
    >>> step_ids(tokenizer, tokenizer("a\\nb c").input_ids, [1, 1, 1, 1], "line")  # tokens: a, \\n, b, " c"
    [0, 0, 1, 1]
    ```
    """
    if delimiter not in ("turn", *_DELIMITERS):
        raise ValueError(f"`step_delimiter={delimiter!r}` is unknown. Choose 'turn', 'line' or 'sentence'.")
    ids, step = [], -1
    start = 0
    while start < len(action_mask):
        stop = start
        while stop < len(action_mask) and bool(action_mask[stop]) == bool(action_mask[start]):
            stop += 1
        if action_mask[start]:
            lasts = [] if delimiter == "turn" else _step_ends(tokenizer, completion_ids[start:stop], delimiter)
            step += 1
            for position in range(stop - start):
                ids.append(step)
                if position in lasts and position < stop - start - 1:
                    step += 1
        else:
            ids += [max(step, 0)] * (stop - start)
        start = stop
    return ids


def _step_ends(tokenizer: PreTrainedTokenizerBase, ids: list[int], delimiter: str) -> set[int]:
    """Positions of the tokens in which a delimiter ends."""
    token_of_character: list[int] = []
    pieces = []
    for position, piece in enumerate(_pieces(tokenizer, ids)):
        pieces.append(piece)
        token_of_character += [position] * len(piece)
    return {token_of_character[match.end() - 1] for match in _DELIMITERS[delimiter].finditer("".join(pieces))}


def _pieces(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> list[str]:
    """
    The text of each token. Decoded behind a fixed token, because some tokenizers strip the space at the very start.

    Half a character of a byte-level tokenizer decodes to a replacement mark: wrong as text, right as a position.
    """
    anchor = tokenizer.decode([ids[0]])
    return [tokenizer.decode([ids[0], token])[len(anchor) :] for token in ids]
