"""Which of the policy's turns train: what the rows say of each, and what the trainer chooses among them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal


TrainOnTurns = Literal["all", "last", "answer"]

TRAIN_ON_TURNS = ("all", "last", "answer")

# Per assistant turn, on rows with one completion; those of a pair begin with `chosen_` and `rejected_`
TURN_COLUMNS = ("turn_weights", "turn_calls")


def check_train_on_turns(train_on_turns: str) -> None:
    """Raises `ValueError` for a choice that there is not."""
    if train_on_turns not in TRAIN_ON_TURNS:
        raise ValueError(f"`train_on_turns` must be 'all', 'last' or 'answer', got {train_on_turns!r}.")


def turn_spans(mask: Sequence[int]) -> list[tuple[int, int]]:
    """Half-open spans of the turns in a mask of what the policy sampled.

    Example:

    ```python
    >>> turn_spans([0, 1, 1, 0, 1])
    [(1, 3), (4, 5)]
    ```
    """
    spans, start = [], None
    for position, bit in enumerate([*mask, 0]):
        if bit and start is None:
            start = position
        elif not bit and start is not None:
            spans.append((start, position))
            start = None
    return spans


def columns_of_turns(ids_column: str) -> tuple[str, str]:
    """The columns that say which turns of a side train, and which of them call tools.

    Example:

    ```python
    >>> columns_of_turns("chosen_ids"), columns_of_turns("completion_ids")
    (('chosen_turn_weights', 'chosen_turn_calls'), ('turn_weights', 'turn_calls'))
    ```
    """
    side = ids_column.removesuffix("ids").removesuffix("completion_")
    return f"{side}turn_weights", f"{side}turn_calls"


def branches_column(ids_column: str) -> str:
    """The column that says where a side leaves its path (see `trl_multiturn.segments`).

    Example:

    ```python
    >>> branches_column("chosen_ids"), branches_column("completion_ids"), branches_column("KL_completion_ids")
    ('chosen_branches', 'branches', 'KL_branches')
    ```
    """
    return ids_column.removesuffix("ids").removesuffix("completion_") + "branches"


def choose_tokens(
    row: Mapping[str, Any],
    ids_column: str,
    actions: Sequence[int],
    *,
    train_on_turns: TrainOnTurns = "all",
    mask_observations: bool = True,
) -> list[int]:
    """The mask of what trains.

    Args:
        row (`Mapping[str, Any]`):
            The token row; of its turns it may tell the weights (0 and 1) and which of them call tools.
        ids_column (`str`):
            The side, by its ids.
        actions (`Sequence[int]`):
            1 on what the policy sampled.
        train_on_turns (`"all"`, `"last"` or `"answer"`, *optional*, defaults to `"all"`):
            Which turns train, of those that have the weight 1.
        mask_observations (`bool`, *optional*, defaults to `True`):
            `False` trains on what the policy did not sample, too, if all turns are chosen.

    Raises:
        `ValueError`: if a column of turns does not fit the mask, or is missing.
    """
    weights_column, calls_column = columns_of_turns(ids_column)
    weights, calls = row.get(weights_column), row.get(calls_column)
    if train_on_turns == "all" and (weights is None or all(weight == 1 for weight in weights)):
        if weights is not None and mask_observations:
            _check_turns(weights, weights_column, len(turn_spans(actions)))
        return list(actions) if mask_observations else [1] * len(actions)
    spans = turn_spans(actions)
    trains = [True] * len(spans)
    if weights is not None:
        _check_turns(weights, weights_column, len(spans))
        trains = [weight == 1 for weight in weights]
    if train_on_turns == "last":
        trains[:-1] = [False] * (len(trains) - 1)
    elif train_on_turns == "answer":
        _check_calls(calls, calls_column, len(spans))
        trains = [flag and not call for flag, call in zip(trains, calls or (), strict=True)]
    mask = [0 if mask_observations or train_on_turns != "all" else 1] * len(actions)
    for (start, stop), flag in zip(spans, trains, strict=True):
        mask[start:stop] = [int(flag)] * (stop - start)
    return mask


def _check_turns(values: Sequence[Any], column: str, turns: int) -> None:
    if len(values) != turns:
        raise ValueError(
            f"`{column}` has {len(values)} entries, but the mask shows {turns} turns of the policy. Give one entry "
            "per assistant turn."
        )
    wrong = next((value for value in values if value not in (0, 1)), None)
    if wrong is not None:
        raise ValueError(
            f"`{column}` holds {wrong!r}, but a turn is trained (1) or not (0): there are no weights between. Write "
            "one of these."
        )


def _check_calls(calls: Sequence[Any] | None, column: str, turns: int) -> None:
    if calls is None:
        raise ValueError(
            f"`train_on_turns='answer'` trains the turns that call no tool, but nothing says which do: there is no "
            f"`{column}`. Add it (1 for each assistant turn with a call, 0 for one without), or pass rows of messages."
        )
    _check_turns(calls, column, turns)
