"""One row in the form that is written."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from ..formats import (
    FORMATS,
    SIDES,
    SYSTEM,
    Shapes,
    conversation_column,
    find_reward,
    read_row,
    read_token_log,
    recognize,
    tools_column,
    unfolded,
)
from ..messages.images import images_in


_FIRST = ("prompt", "completion", *SIDES, "prompt_ids", "completion_ids", "action_mask", "tools", "reward", "label")
_JUDGED = ("episodes", "rollouts")


@dataclass
class RowConverter:
    """How rows are converted.

    Attributes:
        form (`str`): of `FORMATS`, or `"auto"`.
        shapes (`dict`): how the input's columns were stored.
        reward_column (`str`, *optional*): a column whose numbers are the rewards.
        label_above (`float`, *optional*): adds `label`: whether the reward is above it.
        tools (`list`, *optional*): of rows that say none.
        left_out (`dict[str, int]`): counts keys of messages that were left out.
    """

    form: str = "auto"
    shapes: Shapes = field(default_factory=dict)
    reward_column: str | None = None
    label_above: float | None = None
    tools: list[Any] | None = None
    left_out: dict[str, int] = field(default_factory=dict)

    def convert(self, row: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
        """What a row was taken for, and the row in the form that is written.

        Raises:
            `ValueError`: if it cannot be read.
        """
        if self.reward_column is not None:
            if row.get(self.reward_column) is None:
                raise ValueError(f"there is no reward in `{self.reward_column}`.")
            row = {**row, "reward": row[self.reward_column]}
        written = recognize(row)
        as_tokens = self.form == "logs" or (self.form == "auto" and written in ("logs", "tokens", "text"))
        if written in _JUDGED:
            _refuse_unjudged(row)
        if written in ("tokens", "text") and as_tokens:
            output = dict(row)
        elif as_tokens:
            output = {**_others(row), **read_token_log(row)}
        else:
            output = self._read_messages(row)
        if "reward" in output and output["reward"] is not None:
            output["reward"] = _number(output["reward"])
            if self.label_above is not None:
                output["label"] = output["reward"] > self.label_above
        found = "logs" if self.form == "logs" and written is None else written or "trl"
        return found, {name: output[name] for name in sorted(output, key=_place)}

    def _read_messages(self, row: Mapping[str, Any]) -> dict[str, Any]:
        read = read_row(row, shapes=self.shapes, left_out=self.left_out)
        if any(images_in(read[side]) for side in ("prompt", "completion", *SIDES) if side in read):
            raise ValueError(
                "the conversation shows images, and text alone is converted. Rows with images train as they are, if "
                "their messages have TRL's form."
            )
        if not read["prompt"]:
            raise ValueError("the conversation begins with the policy's turn, so there is no prompt.")
        read["tools"] = read["tools"] or self.tools
        if read["tools"] is None:
            del read["tools"]
        return {**_others(row), **read}


def _others(row: Mapping[str, Any]) -> dict[str, Any]:
    """The columns that are kept as they are."""
    row = unfolded(row)
    taken = {conversation_column(row), tools_column(row), "prompt", "completion", *SIDES, *SYSTEM}
    taken |= {"rejected_response", "rejected_messages"}
    if "completion" in row or all(side in row for side in SIDES) and "prompt" in row:
        taken -= {conversation_column(row)}
    return {name: value for name, value in row.items() if name not in taken}


def _refuse_unjudged(row: Mapping[str, Any]) -> None:
    if row.get("error"):
        raise ValueError(
            f"the rollout ended in an error ({str(row['error'])[:80]}), which is the machine's and not the policy's, "
            f"so "
            "its reward says nothing."
        )
    if find_reward(row) is None:
        raise ValueError("there is no reward, so nobody has judged it.")


def _number(reward: Any) -> float:
    try:
        number = float(reward)
    except (TypeError, ValueError):
        raise ValueError(f"the reward is {reward!r}, but an outcome is one number.") from None
    if not math.isfinite(number):
        raise ValueError(f"the reward is {reward!r}, which no value can regress to.")
    return number


def _place(name: str) -> tuple[int, str]:
    return (_FIRST.index(name), "") if name in _FIRST else (len(_FIRST), "")


def check_form(form: str) -> None:
    """Raises `ValueError` for a form that there is not."""
    if form != "auto" and form not in FORMATS:
        raise ValueError(f"The form {form!r} is unknown. Choose among 'auto', {', '.join(map(repr, FORMATS))}.")
