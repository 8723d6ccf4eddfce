"""A search's winners and losers as rows to train on, so that the policy learns what the search found."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

from datasets import Dataset

from ..concurrency import run_coroutine
from ..rollout.judging import Judge
from ..rows.pairing import build_preference_dataset, build_unpaired_dataset
from ..rows.selection import PairingConfig, UnpairedConfig
from ..trajectory import StopReason, Trajectory, Verdict
from ..verify.answers import canonical_answer, final_answer


def distilled_rows(
    found: Sequence[Trajectory],
    prompts: Dataset | Sequence[Mapping[str, Any]],
    reward_funcs: Any = None,
    row_format: Literal["preference", "unpaired"] = "preference",
    config: PairingConfig | UnpairedConfig | None = None,
    answer: Callable[[list[dict[str, Any]]], str | None] = final_answer,
) -> Dataset:
    """
    Rows from what a search found and what it passed over: pairs for M-DPO, or trajectories for OREO, DQO and M-KTO.

    Args:
        found (`Sequence[Trajectory]`):
            From [`value_guided_search`] with `keep_candidates=True`.
        prompts (`Dataset` or `list[dict]`):
            The rows that were searched, for the reward functions.
        reward_funcs (`Callable`, `str` or list of them, *optional*):
            What tells winners from losers. Without any the search itself does: a candidate with the answer that it
            chose is a winner, any other a loser; prompts without an answer give no rows.
        row_format (`str`, *optional*, defaults to `"preference"`):
            `"preference"`, or `"unpaired"` (with `reward`).
        config ([`PairingConfig`] or [`UnpairedConfig`], *optional*):
            How to pair or to sample; by default the papers' ([`build_preference_dataset`],
            [`build_unpaired_dataset`] with [`UnpairedConfig`]).
        answer (`Callable[[list[dict]], str | None]`, *optional*):
            The answer of a completion, where the search tells winners from losers.

    Returns:
        `Dataset`: as [`build_preference_dataset`] or [`build_unpaired_dataset`] writes it; `info` of a row holds the
        candidate's `score` and how often it was drawn, under `search`.

    Raises:
        `ValueError`: if the trajectories hold no candidates, or `row_format` is unknown.

    Example:

    ```python
    found = value_guided_search(prompts, engine, tools, score, beam=4, vote="weighted", keep_candidates=True)
    trainer = MultiTurnDPOTrainer(model, args=args, train_dataset=distilled_rows(found, prompts, math_reward))
    ```
    """
    if row_format not in ("preference", "unpaired"):
        raise ValueError(f"`row_format={row_format!r}` is none of 'preference', 'unpaired'.")
    groups = [[winner, *_candidates(winner, index)] for index, winner in enumerate(found)]
    if reward_funcs is None:
        judged = [each for group in groups for each in _judged_by_search(group, answer)]
    else:
        pairs = [(each, prompts[group[0].info["prompt_index"]]) for group in groups for each in group]
        judged = run_coroutine(Judge(reward_funcs).judge(pairs))
    if row_format == "preference":
        assert not isinstance(config, UnpairedConfig), "pairs are described by a `PairingConfig`"
        return build_preference_dataset(judged, config)
    return build_unpaired_dataset(judged, UnpairedConfig() if config is None else config)


def _candidates(winner: Trajectory, index: int) -> list[Trajectory]:
    told = winner.info.get("search", {}).get("candidates")
    if told is None:
        raise ValueError(
            f"Trajectory {index} holds no `info['search']['candidates']`, so there are no losers. Search with "
            "`keep_candidates=True`."
        )
    place = {name: value for name, value in winner.info.items() if name not in ("search", "rewards", "verifiers")}
    trajectories = []
    for candidate in told:
        search = {name: candidate[name] for name in ("score", "draws")}
        fields = {name: value for name, value in candidate.items() if name not in search}
        trajectory = Trajectory.from_dict({**fields, "info": {**place, **candidate["info"], "search": search}})
        if trajectory.stop_reason is not StopReason.TOOL_FAILED:  # the machine's failure is no evidence
            trajectories.append(trajectory)
    return trajectories


def _judged_by_search(
    group: list[Trajectory], answer: Callable[[list[dict[str, Any]]], str | None]
) -> list[Trajectory]:
    """The candidates of a prompt, those with the winner's answer correct; none where it gave no answer."""
    answers = [answer(trajectory.completion) for trajectory in group]
    if not answers[0]:
        return []
    chosen = canonical_answer(answers[0])
    right = [bool(text) and canonical_answer(text or "") == chosen for text in answers]
    return [
        trajectory.judged(Verdict.CORRECT if good else Verdict.INCORRECT, float(good))
        for trajectory, good in zip(group, right, strict=True)
    ]
