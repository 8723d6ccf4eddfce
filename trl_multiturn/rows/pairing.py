"""Verdicts → rows: preference pairs (M-DPO) and unpaired trajectories (M-KTO, OREO, DQO) from judged trajectories.

Rows carry the tokens that were sampled and their masks; nothing is rendered or tokenized again.
"""

from __future__ import annotations

import json
import logging
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from datasets import Dataset, Features, List, Value

from ..messages.images import images_in
from ..trajectory import Trajectory, Verdict
from .selection import Pair, PairingConfig, Selection, UnpairedConfig, check_pairing, select, terminal_reward


__all__ = [
    "PairingConfig",
    "Selection",
    "UnpairedConfig",
    "build_preference_dataset",
    "build_unpaired_dataset",
    "select",
]

logger = logging.getLogger(__name__)

_IDS, _MASK, _FLOATS = List(Value("int32")), List(Value("int8")), List(Value("float32"))
BRANCHES = List(List(Value("int32")))
_IMAGES = List(Value("string"))  # as data URLs
_PROVENANCE = {"prompt_index": Value("int64")}


def build_preference_dataset(
    trajectories: Sequence[Trajectory] | Selection,
    pairing: PairingConfig | None = None,
    include_messages: bool = False,
) -> Dataset:
    """Preference rows for [`MultiTurnDPOTrainer`] from judged trajectories.

    Args:
        trajectories (`Sequence[Trajectory]` or [`Selection`]):
            Judged trajectories, or what [`select`] made of them.
        pairing ([`PairingConfig`], *optional*):
            How to pair; not with a [`Selection`].
        include_messages (`bool`, *optional*, defaults to `False`):
            Add `prompt_messages`, `chosen_messages` and `rejected_messages`, each a JSON string, for reading. The
            trainers never look at them.

    Returns:
        `Dataset` with the columns `prompt_ids`, `chosen_ids`, `chosen_action_mask`, `chosen_turn_calls`,
        `rejected_ids`, `rejected_action_mask`, `rejected_turn_calls` and, as provenance, `prompt_index` (-1 where
        unknown), `chosen_reward`, `rejected_reward`, `chosen_info`, `rejected_info` (JSON strings); where a trajectory
        is more than one token sequence, `chosen_branches` and `rejected_branches`; where one shows images, `images`,
        `chosen_images` and `rejected_images`. One row per pair, possibly none.
    """
    pairs = _selection(trajectories, pairing, PairingConfig).pairs
    features = preference_features(include_messages, branching=any(map(branches, pairs)))
    return without_unseen_images(dataset_of([preference_row(pair, include_messages) for pair in pairs], features))


def preference_features(include_messages: bool = False, branching: bool = False) -> dict[str, Any]:
    """The columns of preference rows; with those of branches, where a trajectory is more than one token sequence."""
    features = {"prompt_ids": _IDS, "images": _IMAGES, **_PROVENANCE}
    for side in ("chosen", "rejected"):
        features |= {f"{side}_ids": _IDS, f"{side}_action_mask": _MASK, f"{side}_turn_calls": _MASK}
        features |= {f"{side}_images": _IMAGES, f"{side}_reward": Value("float64")}
        features |= {f"{side}_info": Value("string")}
    if branching:
        features |= {f"{side}_branches": BRANCHES for side in ("chosen", "rejected")}
    if include_messages:
        features |= {f"{part}_messages": Value("string") for part in ("prompt", "chosen", "rejected")}
    return features


def preference_row(pair: Pair, include_messages: bool = False) -> dict[str, Any]:
    """A pair as values of [`preference_features`]."""
    cut = pair.shared_tokens
    row = {
        "prompt_ids": pair.chosen.prompt_ids + pair.chosen.completion_ids[:cut],
        "prompt_index": _prompt_index(pair.chosen),
    }
    sides = {"chosen": pair.chosen, "rejected": pair.rejected}
    for side, trajectory in sides.items():
        row |= {
            f"{side}_ids": trajectory.completion_ids[cut:],
            f"{side}_action_mask": trajectory.action_mask[cut:],
            f"{side}_turn_calls": trajectory.turn_calls[pair.shared_turns :],
            f"{side}_branches": trajectory.branches,
            f"{side}_reward": terminal_reward(trajectory),
            f"{side}_info": _info(trajectory),
        }
    opening = _opening_messages(pair.chosen, pair.shared_turns)
    row["images"] = images_in([*pair.chosen.prompt, *pair.chosen.completion[:opening]])
    row |= {f"{side}_images": images_in(trajectory.completion[opening:]) for side, trajectory in sides.items()}
    if include_messages:
        row["prompt_messages"] = json.dumps(pair.chosen.prompt + pair.chosen.completion[:opening])
        row |= {f"{side}_messages": json.dumps(sides[side].completion[opening:]) for side in sides}
    return row


def branches(pair: Pair) -> bool:
    """Whether a side of a pair is more than one token sequence."""
    return bool(pair.chosen.branches or pair.rejected.branches)


def _opening_messages(trajectory: Trajectory, turns: int) -> int:
    """How many messages of a completion come before its assistant turn number `turns` (counted from 0)."""
    starts = [i for i, message in enumerate(trajectory.completion) if message["role"] == "assistant"]
    return starts[turns] if turns else 0


def build_unpaired_dataset(
    trajectories: Sequence[Trajectory] | Selection,
    config: PairingConfig | UnpairedConfig | None = None,
    include_messages: bool = False,
) -> Dataset:
    """Unpaired rows for [`MultiTurnKTOTrainer`], [`OREOTrainer`] and [`DQOTrainer`] from judged trajectories.

    Args:
        trajectories (`Sequence[Trajectory]` or [`Selection`]):
            Judged trajectories, or what [`select`] made of them.
        config ([`PairingConfig`] or [`UnpairedConfig`], *optional*):
            With a [`PairingConfig`] (the default), both sides of the pairs, in turns: M-KTO as in the M-DPO paper; a
            `"step"` pair's sides are whole trajectories here. With an [`UnpairedConfig`], the paper's balanced
            sampling for OREO, all trajectories, or the winners alone.
        include_messages (`bool`, *optional*, defaults to `False`):
            Add `prompt_messages` and `completion_messages`, each a JSON string, for reading.

    Returns:
        `Dataset` with the columns `prompt_ids`, `completion_ids`, `action_mask`, `turn_calls` (which of the policy's
        turns call tools, for `train_on_turns="answer"`), `label` (verdict `CORRECT`), `reward`, `behavior_logps` (left
        out where a trajectory has none), `turn_rewards` (where every trajectory has
        `info["turn_rewards"]`), `process_rewards` (aligned with `completion_ids`, where every trajectory has
        `info["process_rewards"]`), `branches` (where a trajectory is more than one token sequence; see
        `trl_multiturn.segments`) and, as provenance, `prompt_index` (-1 where unknown), `info` (a JSON string).
    """
    chosen = _selection(trajectories, config, (PairingConfig, UnpairedConfig)).trajectories
    brings = Counter(name for trajectory in chosen for name in optional_columns(trajectory))
    features = unpaired_features(common_columns(brings, len(chosen)), include_messages)
    return without_unseen_images(dataset_of([unpaired_row(trajectory) for trajectory in chosen], features))


def without_unseen_images(rows: Dataset) -> Dataset:
    """Rows without the columns of images, where no row has one."""
    columns = [name for name in rows.column_names if name == "images" or name.endswith("_images")]
    if any(any(rows[name][:]) for name in columns):
        return rows
    return rows.remove_columns(columns)


OPTIONAL_COLUMNS = ("behavior_logps", "turn_rewards", "process_rewards", "branches")


def optional_columns(trajectory: Trajectory) -> list[str]:
    """Those of `OPTIONAL_COLUMNS` for which a trajectory has values."""
    logps = ["behavior_logps"] if trajectory.logps is not None else []
    in_info = [name for name in ("turn_rewards", "process_rewards") if name in trajectory.info]
    return logps + in_info + (["branches"] if trajectory.branches else [])


def common_columns(brings: Mapping[str, int], count: int) -> list[str]:
    """The optional columns that `count` rows get: those that every trajectory brings, and `branches` where one does;
    warns where some bring no log-probabilities.

    Args:
        brings (`Mapping[str, int]`):
            How many trajectories have values for each optional column.
        count (`int`):
            Number of rows.
    """
    without = count - brings.get("behavior_logps", 0)
    if 0 < without < count:
        logger.warning(
            "%d of %d trajectories carry no log-probabilities, so `behavior_logps` is left out of every row and "
            "importance weights cannot use it.",
            without,
            count,
        )
    # An empty dataset has `behavior_logps`, which rollouts bring, and no other
    common = [n for n in OPTIONAL_COLUMNS[:-1] if brings.get(n, 0) == count and (count or n == "behavior_logps")]
    return common + (["branches"] if brings.get("branches") else [])  # a plain trajectory has none


def unpaired_features(optional: Iterable[str], include_messages: bool = False) -> dict[str, Any]:
    """The columns of unpaired rows, with these of the optional ones."""
    features = {
        "prompt_ids": _IDS,
        "completion_ids": _IDS,
        "action_mask": _MASK,
        "turn_calls": _MASK,
        "images": _IMAGES,
        "completion_images": _IMAGES,
        "label": Value("bool"),
        "reward": Value("float64"),
        **_PROVENANCE,
        "info": Value("string"),
        **{name: BRANCHES if name == "branches" else _FLOATS for name in optional},
    }
    if include_messages:
        features |= {"prompt_messages": Value("string"), "completion_messages": Value("string")}
    return features


def unpaired_row(trajectory: Trajectory) -> dict[str, Any]:
    """A trajectory as values of [`unpaired_features`], for all optional columns."""
    return {
        "prompt_ids": trajectory.prompt_ids,
        "completion_ids": trajectory.completion_ids,
        "action_mask": trajectory.action_mask,
        "turn_calls": trajectory.turn_calls,
        "label": trajectory.verdict is Verdict.CORRECT,
        "reward": terminal_reward(trajectory),
        "images": images_in(trajectory.prompt),
        "completion_images": images_in(trajectory.completion),
        "prompt_index": _prompt_index(trajectory),
        "info": _info(trajectory),
        "behavior_logps": trajectory.logps,
        "turn_rewards": trajectory.info.get("turn_rewards"),
        "process_rewards": _aligned(trajectory.info.get("process_rewards", []), len(trajectory.completion_ids)),
        "branches": trajectory.branches,
        "prompt_messages": json.dumps(trajectory.prompt),
        "completion_messages": json.dumps(trajectory.completion),
    }


def _aligned(rewards: list[list[float]], length: int) -> list[float]:
    """Pairs of a position and a reward, as one number per token."""
    aligned = [0.0] * length
    for position, reward in rewards:
        aligned[int(position)] += reward
    return aligned


def _info(trajectory: Trajectory) -> str:
    outcome = {"stop_reason": trajectory.stop_reason.value, "verdict": trajectory.verdict.value}
    return json.dumps({**trajectory.provenance, **outcome})


def _prompt_index(trajectory: Trajectory) -> int:
    return trajectory.info.get("prompt_index", -1)


def _selection(trajectories: Any, config: Any, kinds: Any) -> Selection:
    if isinstance(trajectories, Selection):
        if config is not None:
            raise ValueError(
                "A `Selection` was passed together with a configuration, which it already obeyed once. Pass the "
                "trajectories, or leave the configuration out."
            )
        return trajectories
    check_pairing(config)
    if config is not None and not isinstance(config, kinds):
        raise TypeError(f"Preference rows are selected by a `PairingConfig`, got {type(config).__name__}.")
    return select(trajectories, config)


def dataset_of(rows: list[dict[str, Any]], features: dict[str, Any]) -> Dataset:
    """Rows, of which only the named columns are taken, as a dataset in memory."""
    # By columns with explicit types: rows of dicts would be merged into one struct, with `None` in every gap.
    return Dataset.from_dict({name: [row[name] for row in rows] for name in features}, Features(features))
