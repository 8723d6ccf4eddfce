"""Which answer several trajectories of a prompt elect: by number, or by the sum of their values."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from .answers import canonical_answer


def tally(answers: Iterable[str | None], weights: Iterable[float]) -> dict[str, float]:
    """
    The weight of each answer, by its canonical form; who gave no answer does not vote.

    Args:
        answers (`Iterable[str | None]`): of each trajectory.
        weights (`Iterable[float]`): of each trajectory; negative ones count nothing.
    """
    votes: dict[str, float] = {}
    for answer, weight in zip(answers, weights, strict=True):
        if answer:
            key = canonical_answer(answer)
            votes[key] = votes.get(key, 0.0) + max(weight, 0.0)
    return votes


def winning_answers(answers: Iterable[str | None], weights: Iterable[float]) -> list[str]:
    """The canonical answers of the largest weight: one, several in a tie, none where nothing was answered."""
    votes = tally(answers, weights)
    most = max(votes.values(), default=0.0)
    return sorted(answer for answer, weight in votes.items() if weight == most)


def elect(answers: Sequence[str | None], weights: Sequence[float], scores: Sequence[float]) -> int:
    """
    The trajectory of the highest score among those whose answer wins, or among all where nobody answered.

    Args:
        answers (`Sequence[str | None]`), weights (`Sequence[float]`), scores (`Sequence[float]`):
            Of each trajectory. In a tie between answers, and between scores, the higher score and then the earlier
            trajectory wins.

    Returns:
        `int`: its index.
    """
    winners = winning_answers(answers, weights)
    among = [index for index, answer in enumerate(answers) if answer and canonical_answer(answer) in winners] or range(
        len(answers)
    )
    return max(among, key=lambda index: (scores[index], -index))
