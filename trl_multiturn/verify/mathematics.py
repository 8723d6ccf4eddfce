r"""Final answers against gold: `math_reward`, exact reading first, then math-verify behind a deadline that holds.

sympy can run for hours on a short answer, inside C code that no signal handler interrupts. Its comparisons therefore
run in processes of their own that are killed when they are late or too large; math-verify's own timeouts, which need
the main thread and its alarm signal, are off.
"""

from __future__ import annotations

import functools
import importlib.metadata
import logging
import os
import threading
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, get_args

from .amounts import Open, compare_loosely
from .answers import final_answer, message_text
from .comparison import asks_for_percent, compare
from .golds import gold_answer, look_at_golds
from .workers import WorkerPool


logger = logging.getLogger(__name__)

Rules = Literal["exact", "math_verify", "paper"]

_SCRIPT = Path(__file__).with_name("_math_worker.py")
_CACHE_SIZE = 65_536
_VERSION = 2  # of the rules: verdicts of another version are made anew


class MathVerifier:
    """Compares answers with gold answers; the processes start with the first comparison that needs sympy.

    Args:
        timeout_seconds (`float`, *optional*, defaults to `5.0`):
            Wall-clock limit of one comparison. A comparison that takes longer has no verdict.
        num_workers (`int`, *optional*):
            Most processes at a time; by default the number of usable cores, at most 4.
        memory_limit_mb (`int`, *optional*, defaults to `2048`):
            Resident memory of a process, in MiB. A comparison that needs more has no verdict.
        rules (`str`, *optional*, defaults to `"exact"`):
            `"exact"`: numbers, quantities, times, lists and words are read and compared exactly, expressions by
            math-verify; what cannot be known has no verdict. `"math_verify"`: math-verify alone, as TRL's
            `accuracy_reward` uses it: six decimals, percent signs and units passed over. `"paper"`: as in the
            evaluation that the M-DPO paper builds on (ToRA, arXiv:2309.17452): numbers within one part in 10,000, also
            as percentages, everything else by math-verify.
    """

    def __init__(
        self,
        timeout_seconds: float = 5.0,
        num_workers: int | None = None,
        memory_limit_mb: int = 2048,
        rules: Rules = "exact",
    ):
        if timeout_seconds <= 0:
            raise ValueError(f"`timeout_seconds` must be positive, got {timeout_seconds}.")
        if rules not in get_args(Rules):
            raise ValueError(f"`rules={rules!r}` is unknown. Use one of {', '.join(get_args(Rules))}.")
        if num_workers is None:
            usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
            num_workers = min(4, usable)
        self.timeout_seconds = timeout_seconds
        self.rules = rules
        self._pool = WorkerPool(_SCRIPT, num_workers, memory_limit_mb)
        self._cache: dict[tuple[str, str], bool] = {}
        self._looked_at_golds = False

    def verify(
        self, golds: Sequence[str], answers: Sequence[str], questions: Sequence[str] | None = None
    ) -> list[bool | None]:
        """Whether each answer equals its gold answer; `None` where that cannot be known, or not in time.

        Args:
            golds (`Sequence[str]`), answers (`Sequence[str]`):
                As many answers as gold answers, LaTeX or plain text.
            questions (`Sequence[str]`, *optional*):
                What was asked. Where it asks for a percentage, an answer may leave the sign away.
        """
        asked = [""] * len(golds) if questions is None else questions
        tasks = list(zip(golds, answers, map(asks_for_percent, asked), strict=True))
        outcomes = {task: self._compare(*task) for task in tasks}
        opens = [outcome for outcome in outcomes.values() if isinstance(outcome, Open)]
        known = self._ask(dict.fromkeys(pair for outcome in opens for pair in outcome.pairs))
        return [
            outcome.decide([known[pair] for pair in outcome.pairs]) if isinstance(outcome, Open) else outcome
            for outcome in map(outcomes.__getitem__, tasks)
        ]

    def _compare(self, gold: str, answer: str, in_percent: bool) -> bool | None | Open:
        if self.rules == "exact":
            return compare(gold, answer, in_percent)
        if gold.strip() == answer.strip():
            return True
        return compare_loosely(gold, answer) if self.rules == "paper" else Open(((gold, answer),))

    def _ask(self, pairs: Iterable[tuple[str, str]]) -> dict[tuple[str, str], bool | None]:
        """math-verify's verdicts."""
        verdicts: dict[tuple[str, str], bool | None] = {pair: self._cache.get(pair) for pair in pairs}
        missing = [pair for pair, verdict in verdicts.items() if verdict is None]
        requests = [
            {"gold": gold, "answer": answer, "seconds": self.timeout_seconds, "as_library": self.rules != "exact"}
            for gold, answer in missing
        ]
        for pair, reply in zip(missing, self._pool.ask_all(requests, self.timeout_seconds), strict=True):
            verdict = None if reply is None else reply["equal"]
            verdicts[pair] = verdict
            if verdict is not None:
                self._remember(pair, verdict)
            else:
                why = "it took too long or too much memory" if reply is None else reply.get("error")
                logger.info("No verdict on the answer %.80r against %.80r: %s.", pair[1], pair[0], why)
        return verdicts

    def _remember(self, pair: tuple[str, str], verdict: bool) -> None:
        if len(self._cache) >= _CACHE_SIZE:
            self._cache.clear()
        self._cache[pair] = verdict

    def check_columns(self, columns: Mapping[str, Sequence[Any]]) -> None:
        """A look at the prompts before the first rollout: warns, once, where many gold answers cannot be read.

        Args:
            columns (`Mapping[str, Sequence]`):
                The columns of the prompts dataset, or a part of each.

        Raises:
            `ValueError`: if there is no column `answer`.
        """
        if columns.get("answer") is None:
            raise ValueError(
                "`math_reward` was called without `answer`, so there is nothing to compare with. Give the prompts "
                f"dataset a column `answer` with the gold answers (its other columns: {sorted(columns)})."
            )
        if not self._looked_at_golds:
            self._looked_at_golds = True
            look_at_golds(columns["answer"])

    def reward(
        self,
        prompts: Sequence[Any],
        completions: Sequence[Any],
        completion_ids: Sequence[list[int]] | None = None,
        answer: Sequence[Any] | None = None,
        **kwargs: Any,
    ) -> list[float | None]:
        """[`math_reward`] with this verifier's limits and rules."""
        self.check_columns({**kwargs, "answer": answer} if answer is not None else kwargs)
        golds = [gold_answer(gold) for gold in answer or ()]
        found = [final_answer(completion) for completion in completions]
        rewards: list[float | None] = [None if gold is None else 0.0 for gold in golds]
        tasks = {
            i: (gold, text, _question(prompt))
            for i, (gold, text, prompt) in enumerate(zip(golds, found, prompts, strict=True))
            if gold is not None and text
        }
        verdicts = self.verify(*zip(*tasks.values(), strict=True)) if tasks else []
        for i, verdict in zip(tasks, verdicts, strict=True):
            rewards[i] = None if verdict is None else float(verdict)
        return rewards

    def close(self) -> None:
        """Ends the processes. The verifier stays usable: the next comparison starts new ones."""
        self._pool.close()


def _question(prompt: Any) -> str:
    """The last user message of a prompt, which may be messages or a text."""
    if not isinstance(prompt, list | tuple):
        return prompt if isinstance(prompt, str) else ""
    return next((message_text(message) for message in reversed(prompt) if message["role"] == "user"), "")


_lock = threading.Lock()


@functools.cache
def _verifier(rules: Rules) -> MathVerifier:
    return MathVerifier(rules=rules)


def shared_verifier(rules: Rules = "exact") -> MathVerifier:
    """The verifier that the reward functions of this module share."""
    with _lock:
        return _verifier(rules)


def math_reward(
    prompts: Sequence[Any],
    completions: Sequence[Any],
    completion_ids: Sequence[list[int]] | None = None,
    answer: Sequence[Any] | None = None,
    **kwargs: Any,
) -> list[float | None]:
    r"""1.0 where the final answer equals the gold answer, 0.0 where it does not, `None` where that is undecided.

    A reward function in TRL's signature. The final answer is the last `\boxed{}` of the last assistant turn; a
    completion without one gets 0.0. Numbers, quantities, times, lists and words are read and compared exactly
    ([`~trl_multiturn.verify.comparison.compare`], `docs/verifiers.md`); expressions go to math-verify in separate
    processes, five seconds each. Undecided are a gold answer that cannot be read ([`gold_answer`]), what cannot be
    known from the two texts, and a comparison that is late, takes too much memory or fails inside sympy.

    `math_verify_reward` and `paper_reward` compare as TRL's `accuracy_reward` and as the M-DPO paper
    ([`MathVerifier`]'s `rules`).

    Args:
        prompts (`Sequence`):
            Read for whether a percentage is asked for; may hold `None`.
        completions (`Sequence[list[dict]]` or `Sequence[str]`):
            Completions as messages (any number of turns) or as text.
        completion_ids (`Sequence[list[int]]`, *optional*):
            Ignored.
        answer (`Sequence`):
            The column `answer`: a number, LaTeX, a GSM8K answer (`… #### 18`), a MATH solution (`… \boxed{18}`), or a
            sentence that states it.

    Example:

    ```python
    >>> math_reward([None] * 2, [r"So \boxed{\frac{1}{2}}.", "I give up."], answer=["0.5", "3"])
    [1.0, 0.0]
    ```
    """
    return shared_verifier("exact").reward(prompts, completions, completion_ids, answer, **kwargs)


def math_verify_reward(
    prompts: Sequence[Any],
    completions: Sequence[Any],
    completion_ids: Sequence[list[int]] | None = None,
    answer: Sequence[Any] | None = None,
    **kwargs: Any,
) -> list[float | None]:
    """[`math_reward`] with `rules="math_verify"`: math-verify alone, as TRL's `accuracy_reward` uses it."""
    return shared_verifier("math_verify").reward(prompts, completions, completion_ids, answer, **kwargs)


def paper_reward(
    prompts: Sequence[Any],
    completions: Sequence[Any],
    completion_ids: Sequence[list[int]] | None = None,
    answer: Sequence[Any] | None = None,
    **kwargs: Any,
) -> list[float | None]:
    """[`math_reward`] with `rules="paper"`: numbers within one part in 10,000, also as percentages."""
    return shared_verifier("paper").reward(prompts, completions, completion_ids, answer, **kwargs)


def _describe(function: Any, rules: Rules) -> None:
    """What others read on a reward function: its version, for provenance, and its look at the prompts."""
    try:
        library = f"math-verify {importlib.metadata.version('math-verify')}"
    except importlib.metadata.PackageNotFoundError:
        library = "math-verify missing"
    function.version = f"{library}, {rules} {_VERSION}"
    function.check_columns = lambda columns: shared_verifier(rules).check_columns(columns)


_describe(math_reward, "exact")
_describe(math_verify_reward, "math_verify")
_describe(paper_reward, "paper")
