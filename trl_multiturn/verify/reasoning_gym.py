"""reasoning-gym's puzzles: prompts in one call, and the reward that scores their answers.

Needs the extra `reasoning-gym`. A puzzle is made anew from its dataset, seed and place wherever it is needed, so
that its row stays small and its answer is what the generator knows, of whatever type.

Scorers differ: some datasets store no answer, some pay a part for wrong ones. Look at a dataset's scorer before you
train on it, or count full scores alone (`ReasoningGymReward(full_score_only=True)`).
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from .answers import final_answer, message_text


if TYPE_CHECKING:
    from datasets import Dataset


INSTRUCTION = "\n\nThink step by step, and give the final answer in \\boxed{}."
_TAGGED = re.compile(r"<answer>(.*?)</answer>", re.S)


def reasoning_gym_prompts(
    dataset: str, size: int = 500, seed: int = 0, instruction: str = INSTRUCTION, **config: Any
) -> Dataset:
    """Puzzles of one of reasoning-gym's generators.

    Args:
        dataset (`str`):
            Its name, e.g. `"leg_counting"`.
        size (`int`, *optional*, defaults to `500`), seed (`int`, *optional*, defaults to `0`):
            How many puzzles, and the seed of the first. Disjoint ranges of seeds give other puzzles.
        instruction (`str`, *optional*):
            Follows the question; by default asks for `\\boxed{}`.
        **config:
            The generator's options, e.g. `min_animals=2`; JSON values.

    Returns:
        `Dataset`: `prompt`, `answer` (a text, empty where the generator knows none) and `puzzle`, for
        [`reasoning_gym_reward`].

    Raises:
        `ImportError`: if `reasoning-gym` is not installed.
        `ValueError`: if there is no such generator, or an option cannot be written as JSON.
    """
    try:
        settings = json.dumps({"size": size, "seed": seed, **config}, sort_keys=True)
    except TypeError as error:
        raise ValueError(f"An option of {dataset!r} is no JSON value ({error}), so no row can name it.") from error
    from datasets import Dataset

    puzzles, rows = _puzzles(dataset, settings), []
    for index in range(size):
        entry = puzzles[index]
        rows.append(
            {
                "prompt": [{"role": "user", "content": entry["question"] + instruction}],
                "answer": "" if entry["answer"] is None else str(entry["answer"]),
                "puzzle": json.dumps([dataset, settings, index]),
            }
        )
    return Dataset.from_list(rows)


class ReasoningGymReward:
    """The score, in [0, 1], that a puzzle's own generator gives to the final answer.

    The final answer is the last `\\boxed{}` of the last turn, or what stands between `<answer>` and `</answer>`.
    Without one the reward is 0. A generator that raises on an answer decides nothing: the row stays undecided.

    Args:
        full_score_only (`bool`, *optional*, defaults to `False`):
            Whether a score below 1 counts as 0.
    """

    __name__ = "reasoning_gym_reward"

    def __init__(self, full_score_only: bool = False):
        self.full_score_only = full_score_only

    def __call__(self, completions: Sequence[Any], puzzle: Sequence[str], **_: Any) -> list[float | None]:
        return [self._score(completion, place) for completion, place in zip(completions, puzzle, strict=True)]

    def _score(self, completion: Any, place: str) -> float | None:
        answer = puzzle_answer(completion)
        if answer is None:
            return 0.0
        dataset, settings, index = json.loads(place)
        puzzles = _puzzles(dataset, settings)
        try:
            score = float(puzzles.score_answer(answer, puzzles[index]))
        except Exception:  # a scorer that expects numbers, given words: its failure, and no verdict
            return None
        return float(score >= 1.0) if self.full_score_only else score


reasoning_gym_reward = ReasoningGymReward()


def puzzle_answer(completion: str | Sequence[dict[str, Any]]) -> str | None:
    """The answer that a completion ends with, or `None`."""
    answer = final_answer(completion)
    if answer is not None and answer.strip():
        return answer.strip()
    if not isinstance(completion, str):
        turns = [message_text(message) for message in completion if message.get("role") == "assistant"]
        completion = turns[-1] if turns else ""
    tagged = _TAGGED.findall(completion)
    return tagged[-1].strip() if tagged else None


@lru_cache(maxsize=64)
def _puzzles(dataset: str, settings: str) -> Any:
    try:
        import reasoning_gym
        from reasoning_gym.factory import DATASETS
    except ImportError as error:
        raise ImportError(
            "Puzzles need reasoning-gym, which is not installed. Run `pip install trl-multiturn[reasoning-gym]`."
        ) from error
    if dataset not in DATASETS:
        raise ValueError(f"reasoning-gym has no dataset {dataset!r}. It has {', '.join(sorted(DATASETS))}.")
    return reasoning_gym.create_dataset(dataset, **json.loads(settings))
