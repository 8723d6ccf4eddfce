r"""Final answers against gold: `math_reward`, math-verify behind a deadline that holds.

sympy can run for hours on a short answer, inside C code that no signal handler interrupts. The comparison therefore
runs in processes of its own that are killed when they are late or too large; math-verify's own timeouts, which need
the main thread and its alarm signal, are off.
"""

from __future__ import annotations

import importlib.metadata
import logging
import os
import re
import threading
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

from .answers import exact_number, final_answer, gold_answer
from .workers import WorkerPool


logger = logging.getLogger(__name__)

_SCRIPT = Path(__file__).with_name("_math_worker.py")
_CACHE_SIZE = 65_536
_PERCENT = re.compile(r"[\s$]*([^%]*?)\s*\\?%[\s$.]*")
# math-verify rounds to six decimals where a side is a decimal: numbers further apart than this differ under it too
_PLAINLY_DIFFERENT = Fraction(1, 100_000)


def compare_numbers(gold: str, answer: str) -> bool | None:
    r"""Compares two plain numbers without sympy: `True` when exactly equal, `False` when more than 1e-5 apart.

    A percentage equals its number and its hundredth, as in math-verify: `35.0\%` answers both `35` and `0.35`. `None`
    where either is not a plain number ([`~trl_multiturn.verify.exact_number`]), or they are so close that rounding
    decides: math-verify's business.
    """
    (gold, gold_percent), (answer, answer_percent) = _split_percent(gold), _split_percent(answer)
    left, right = exact_number(gold), exact_number(answer)
    if left is None or right is None:
        return None
    if left == right:
        return True
    if gold_percent != answer_percent:
        percent, plain = (left, right) if gold_percent else (right, left)
        return True if percent == 100 * plain else None
    return False if abs(left - right) > _PLAINLY_DIFFERENT else None


def _split_percent(text: str) -> tuple[str, bool]:
    match = _PERCENT.fullmatch(text)
    return (match[1], True) if match else (text, False)


class MathVerifier:
    """Compares answers with gold answers; the processes start with the first comparison that needs sympy.

    Args:
        timeout_seconds (`float`, *optional*, defaults to `5.0`):
            Wall-clock limit of one comparison. A comparison that takes longer has no verdict.
        num_workers (`int`, *optional*):
            Most processes at a time; by default the number of usable cores, at most 4.
        memory_limit_mb (`int`, *optional*, defaults to `2048`):
            Resident memory of a process, in MiB. A comparison that needs more has no verdict.
    """

    def __init__(self, timeout_seconds: float = 5.0, num_workers: int | None = None, memory_limit_mb: int = 2048):
        if timeout_seconds <= 0:
            raise ValueError(f"`timeout_seconds` must be positive, got {timeout_seconds}.")
        if num_workers is None:
            usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
            num_workers = min(4, usable)
        self.timeout_seconds = timeout_seconds
        self._pool = WorkerPool(_SCRIPT, num_workers, memory_limit_mb)
        self._cache: dict[tuple[str, str], bool] = {}

    def verify(self, golds: Sequence[str], answers: Sequence[str]) -> list[bool | None]:
        """Whether each answer equals its gold answer; `None` where no verdict was possible in time."""
        pairs = list(zip(golds, answers, strict=True))
        verdicts: dict[tuple[str, str], bool | None] = {}
        for gold, answer in pairs:
            same_text = gold.strip() == answer.strip()
            verdicts[gold, answer] = True if same_text else compare_numbers(gold, answer)
        for pair, verdict in verdicts.items():
            if verdict is None:
                verdicts[pair] = self._cache.get(pair)
        open_pairs = [pair for pair, verdict in verdicts.items() if verdict is None]
        requests = [{"gold": gold, "answer": answer, "seconds": self.timeout_seconds} for gold, answer in open_pairs]
        for pair, reply in zip(open_pairs, self._pool.ask_all(requests, self.timeout_seconds), strict=True):
            verdicts[pair] = None if reply is None else reply["equal"]
            if verdicts[pair] is not None:
                self._remember(pair, verdicts[pair])
            else:
                why = "it took too long or too much memory" if reply is None else reply.get("error")
                logger.info("No verdict on the answer %.80r against %.80r: %s.", pair[1], pair[0], why)
        return [verdicts[pair] for pair in pairs]

    def _remember(self, pair: tuple[str, str], verdict: bool) -> None:
        if len(self._cache) >= _CACHE_SIZE:
            self._cache.clear()
        self._cache[pair] = verdict

    def reward(
        self,
        prompts: Sequence[Any],
        completions: Sequence[Any],
        completion_ids: Sequence[list[int]] | None = None,
        answer: Sequence[Any] | None = None,
        **kwargs: Any,
    ) -> list[float | None]:
        """[`math_reward`] with this verifier's limits."""
        if answer is None:
            raise ValueError(
                "`math_reward` was called without `answer`, so there is nothing to compare with. Give the prompts "
                f"dataset a column `answer` with the gold answers (its other columns: {sorted(kwargs)})."
            )
        golds = [None if gold is None else gold_answer(gold) for gold in answer]
        found = [final_answer(completion) for completion in completions]
        rewards = [None if gold is None else 0.0 for gold in golds]
        to_compare = [i for i, text in enumerate(found) if text and golds[i] is not None]
        verdicts = self.verify([golds[i] for i in to_compare], [found[i] for i in to_compare])
        for i, verdict in zip(to_compare, verdicts, strict=True):
            rewards[i] = None if verdict is None else float(verdict)
        return rewards

    def close(self) -> None:
        """Ends the processes. The verifier stays usable: the next comparison starts new ones."""
        self._pool.close()


_lock = threading.Lock()
_default: MathVerifier | None = None


def math_reward(
    prompts: Sequence[Any],
    completions: Sequence[Any],
    completion_ids: Sequence[list[int]] | None = None,
    answer: Sequence[Any] | None = None,
    **kwargs: Any,
) -> list[float | None]:
    r"""1.0 where the final answer equals the gold answer, 0.0 where it does not, `None` where that is undecided.

    A reward function in TRL's signature. The final answer is the last `\boxed{}` of the last assistant turn; a
    completion without one gets 0.0. The same text is the same answer; plain integers, decimals, fractions and
    percentages are compared exactly ([`compare_numbers`]); everything else goes to math-verify in separate processes,
    five seconds each. Undecided are a comparison that is late, takes too much memory or fails inside sympy, a gold
    answer that cannot be parsed, and a row whose `answer` is `None`.

    Args:
        prompts (`Sequence`):
            Ignored.
        completions (`Sequence[list[dict]]` or `Sequence[str]`):
            Completions as messages (any number of turns) or as text.
        completion_ids (`Sequence[list[int]]`, *optional*):
            Ignored.
        answer (`Sequence`):
            The column `answer`: a number, LaTeX, a GSM8K answer (`… #### 18`) or a MATH solution (`… \boxed{18}`).

    Example:

    ```python
    >>> math_reward([None] * 2, [r"So \boxed{\frac{1}{2}}.", "I give up."], answer=["0.5", "3"])
    [1.0, 0.0]
    ```
    """
    global _default
    with _lock:
        if _default is None:
            _default = MathVerifier()
    return _default.reward(prompts, completions, completion_ids, answer, **kwargs)


try:
    math_reward.version = f"math-verify {importlib.metadata.version('math-verify')}"  # read for provenance
except importlib.metadata.PackageNotFoundError:
    math_reward.version = "math-verify missing"
