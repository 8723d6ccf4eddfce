"""What an engine answers is looked at where it arrives, before a token of it is kept."""

from __future__ import annotations

import math

from ..errors import EngineError
from .engine import Engine, Generation


_ROUNDING = 1e-3  # engines round probabilities near 1


def vocabulary_of(engine: Engine, tokenizer_size: int) -> int:
    """One more than the largest id that the engine can mean.

    A model may have more tokens than its tokenizer; an engine that knows says so by `vocab_size`.
    """
    return max(getattr(engine, "vocab_size", 0), tokenizer_size)


def refuse_damaged(generation: Generation, engine: Engine, vocabulary: int) -> None:
    """Refuses ids outside the vocabulary, and numbers that are no log-probabilities.

    Raises:
        [`EngineError`]: naming the engine and the first token that cannot be.
    """
    name, ids, logps = type(engine).__name__, generation.token_ids, generation.logps
    if len(ids) != len(logps):
        raise EngineError(
            f"`{name}` returned {len(logps)} log-probabilities for {len(ids)} tokens, so they cannot be matched. One "
            "is needed for each sampled token."
        )
    for position, (token, logp) in enumerate(zip(ids, logps, strict=True)):
        if not 0 <= token < vocabulary:
            raise EngineError(
                f"`{name}` returned the token id {token} (token {position} of a turn), outside of the vocabulary of "
                f"{vocabulary}, so it samples with another model or tokenizer than the one trained. Compare both."
            )
        if not math.isfinite(logp) or logp > _ROUNDING:
            raise EngineError(
                f"`{name}` returned the log-probability {logp} (token {position} of a turn), which is none, so the "
                "policy that sampled cannot be told. Its weights may not be finite; look at the engine's log."
            )
