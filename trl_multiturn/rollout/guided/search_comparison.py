"""A search beside what the same number of sampled tokens buys without one, prompt by prompt."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from ...trajectory import Trajectory, Verdict
from ...verify.answers import canonical_answer
from ...verify.votes import winning_answers
from ..scoring import Score
from .estimates import Estimate


Answer = Callable[[Trajectory], str | None]
Groups = dict[int, list[Trajectory]]


@dataclass(frozen=True)
class SearchComparison:
    """
    Attributes:
        estimates (`dict[str, Estimate]`): the share of correct answers of `"search"`, `"greedy"`, `"one_sample"`,
            `"best_of_n"` (by the search's score), `"vote"`, `"weighted_vote"` (by the sum of scores) and `"any_of_n"`,
            the most that choosing among the samples can reach.
        differences (`dict[str, Estimate]`): the search minus each of the others, in pairs over prompts.
        n (`int`): samples per prompt: as many as take about the search's number of sampled tokens.
        search_tokens (`float`), sample_tokens (`float`): sampled per prompt by the search and by `n` samples.
    """

    estimates: dict[str, Estimate]
    differences: dict[str, Estimate]
    n: int
    search_tokens: float
    sample_tokens: float

    def __str__(self) -> str:
        tokens = f"{self.search_tokens:.0f} (search), {self.sample_tokens:.0f} ({self.n} samples)"
        lines = [f"{'sampled tokens per prompt':<28} {tokens}"]
        for name, estimate in self.estimates.items():
            lines.append(f"{name.replace('_', ' '):<28} {estimate}{self._against(name)}")
        return "\n".join(lines)

    def _against(self, name: str) -> str:
        difference = self.differences.get(name)
        if difference is None:
            return ""
        return f"   search {100 * difference.value:+.1f} ± {100 * difference.standard_error:.1f}"

    def metrics(self) -> dict[str, float]:
        """Flat numbers for a log: each estimate as `search/NAME`, its error and the difference with its error."""
        flat = {
            "search/n": float(self.n),
            "search/tokens": self.search_tokens,
            "search/sample_tokens": self.sample_tokens,
        }
        for name, estimate in self.estimates.items():
            flat |= {f"search/{name}": estimate.value, f"search/{name}_se": estimate.standard_error}
        for name, difference in self.differences.items():
            flat |= {f"search/minus_{name}": difference.value, f"search/minus_{name}_se": difference.standard_error}
        return flat


def samples_for(found: Sequence[Trajectory], samples: Sequence[Trajectory]) -> int:
    """How many samples of a prompt take as many sampled tokens as the search did, on average over prompts; at least 1.

    Args:
        found (`Sequence[Trajectory]`): one of each prompt, of [`value_guided_search`].
        samples (`Sequence[Trajectory]`): any samples.
    """
    return max(1, round(search_tokens(found) / (sum(t.num_sampled_tokens for t in samples) / len(samples))))


def search_tokens(found: Sequence[Trajectory]) -> float:
    """Sampled tokens of a search, on average over prompts; of a search that does not say, those of its results."""
    counts = [t.info.get("search", {}).get("sampled_tokens", t.num_sampled_tokens) for t in found]
    return sum(counts) / len(counts)


def compare_search(
    found: Sequence[Trajectory],
    greedy: Sequence[Trajectory],
    samples: Sequence[Trajectory],
    score: Score | None,
    answer: Answer,
    score_at: str = "state",
) -> SearchComparison:
    """
    Args:
        found (`Sequence[Trajectory]`), greedy (`Sequence[Trajectory]`): one of each prompt, judged.
        samples (`Sequence[Trajectory]`): the same number of each prompt, judged.
        score (`Callable`, *optional*): the search's; without it nothing is weighed by it.
        answer (`Callable[[Trajectory], str | None]`): with which a trajectory votes.
        score_at (`str`, *optional*, defaults to `"state"`): as in [`value_guided_search`].
    """
    groups: Groups = {}
    for trajectory in samples:
        groups.setdefault(trajectory.info["prompt_index"], []).append(trajectory)
    n = len(next(iter(groups.values())))
    by_prompt = {
        "search": {t.info["prompt_index"]: correctness([t]) for t in found},
        "greedy": {t.info["prompt_index"]: correctness([t]) for t in greedy},
        "one_sample": {prompt: correctness(group) for prompt, group in groups.items()},
        "vote": {prompt: elected(group, [1.0] * n, answer) for prompt, group in groups.items()},
        "any_of_n": {prompt: _any(group) for prompt, group in groups.items()},
    }
    if score is not None:
        numbers = iter(score([last_state(t, score_at) for group in groups.values() for t in group]))
        scores = {prompt: [float(next(numbers)) for _ in group] for prompt, group in groups.items()}
        by_prompt["best_of_n"] = {prompt: _best(group, scores[prompt]) for prompt, group in groups.items()}
        by_prompt["weighted_vote"] = {p: elected(group, scores[p], answer) for p, group in groups.items()}
    prompts = list(groups)
    columns = {name: [values.get(prompt) for prompt in prompts] for name, values in by_prompt.items()}
    return SearchComparison(
        estimates={name: Estimate.of(values) for name, values in columns.items()},
        differences={
            name: Estimate.of_differences(columns["search"], values)
            for name, values in columns.items()
            if name != "search"
        },
        n=n,
        search_tokens=search_tokens(found),
        sample_tokens=sum(t.num_sampled_tokens for t in samples) / len(groups),
    )


def last_state(trajectory: Trajectory, score_at: str = "state") -> list[int]:
    """The state in which the last token, which ends the trajectory, was chosen; with `"action"` the one after it."""
    last = max((t for t, action in enumerate(trajectory.action_mask) if action), default=-1)
    return trajectory.prompt_ids + trajectory.completion_ids[: max(last, 0) if score_at == "state" else last + 1]


def correctness(group: Sequence[Trajectory]) -> float | None:
    """The share of correct ones among the decided; `None` where none is decided."""
    decided = [t.verdict is Verdict.CORRECT for t in group if t.verdict is not Verdict.UNDECIDED]
    return sum(decided) / len(decided) if decided else None


def elected(group: Sequence[Trajectory], weights: Sequence[float], answer: Answer) -> float | None:
    """Whether the answer of the largest weight is correct; the expected value over a tie; `None` if undecided."""
    answers = [answer(trajectory) for trajectory in group]
    winners = winning_answers(answers, weights)
    if not winners:  # nobody answered: wrong, unless nobody could be judged at all
        return None if correctness(group) is None else 0.0
    keys = [canonical_answer(text) if text else None for text in answers]
    shares = [correctness([t for t, key in zip(group, keys, strict=True) if key == winner]) for winner in winners]
    decided = [share for share in shares if share is not None]
    return None if len(decided) < len(shares) else sum(decided) / len(decided)


def _best(group: Sequence[Trajectory], scores: Sequence[float]) -> float | None:
    best = max(scores)
    return correctness([t for t, score in zip(group, scores, strict=True) if score == best])


def _any(group: Sequence[Trajectory]) -> float | None:
    share = correctness(group)
    return None if share is None else float(share > 0)
