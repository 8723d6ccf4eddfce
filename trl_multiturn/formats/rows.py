"""A row of messages, whoever wrote it, as `prompt` and `completion`, or `prompt`, `chosen` and `rejected`."""

from __future__ import annotations

from collections.abc import Mapping, MutableMapping
from typing import Any

from ..messages import EXACT, Message, Shape, normalize_messages, normalize_tools, without_flags
from .columns import (
    CONVERSATIONS,
    SIDES,
    SYSTEM,
    conversation_column,
    is_conversation,
    is_message,
    listed,
    load_json,
    tools_column,
)
from .nested import unfolded, unfolded_shapes


Shapes = Mapping[str, Shape]

_REWARDS = ("reward", "total_reward")


def columns_read(row: Mapping[str, Any]) -> set[str]:
    """The columns that [`read_row`] finds in a row of messages, under whatever names."""
    row = unfolded(row)
    found = set()
    if all(row.get(side) is not None for side in SIDES):
        found = {"prompt", *SIDES}
    elif row.get("completion") is not None and (row.get("prompt") is not None or conversation_column(row)):
        found = {"prompt", "completion"}
    elif conversation_column(row) is not None:
        rejected = any(row.get(name) is not None for name in ("rejected_response", "rejected_messages"))
        found = {"prompt", *(SIDES if rejected else ("completion",))}
    if found and ("reward" in row or find_reward(row) is not None):
        found.add("reward")
    return found | {"label"} if found and "label" in row else found


def read_row(
    row: Mapping[str, Any],
    *,
    shapes: Shapes | None = None,
    template: str = "",
    left_out: MutableMapping[str, int] | None = None,
) -> dict[str, Any]:
    """Reads the conversation of a row.

    Args:
        row (`Mapping[str, Any]`):
            With `prompt` and `completion`, or `prompt`, `chosen` and `rejected` (each a list of messages or a single
            message; the prompt may be part of both sides); or with a whole conversation (`messages`, `conversations`,
            `traj`, …), whose completion begins with the first assistant turn that trains.
        shapes (`Mapping[str, Shape]`, *optional*):
            How its columns were stored (see `messages.nulls`).
        template (`str`, *optional*), left_out (`dict[str, int]`, *optional*):
            As for [`normalize_messages`].

    Returns:
        `dict`: `prompt` and `completion` or `chosen` and `rejected`, in TRL's form; `tools`, a list or `None`; and
        `reward`, where it stands under another name.

    Raises:
        `ValueError`: naming column, message and remedy.
    """
    row, shapes = unfolded(row), unfolded_shapes(shapes or {})
    tools = find_tools(row, shapes)
    output = {**_RowReader(row, tools, shapes, template, left_out).read(), "tools": tools}
    if "reward" not in row and (reward := find_reward(row)) is not None:
        output["reward"] = reward
    return output


def find_tools(row: Mapping[str, Any], shapes: Shapes | None = None) -> list[Any] | None:
    """A row's tools in the form of [`normalize_tools`], under whatever name they stand."""
    column = tools_column(row)
    if column is not None:
        return normalize_tools(row[column], (shapes or {}).get(column))
    info = load_json(row.get("info"))
    inner = info.get("oai_tools") if isinstance(info, Mapping) else None
    return None if inner is None else normalize_tools(inner)


def find_reward(row: Mapping[str, Any]) -> Any:
    """A row's reward, `None` where it has none: `reward`, `total_reward`, or the `reward` in its `reward_info`."""
    for name in _REWARDS:
        if row.get(name) is not None and not isinstance(row[name], Mapping):
            return row[name]
    for name in ("reward_info", "reward"):
        info = load_json(row.get(name))
        if isinstance(info, Mapping) and info.get("reward") is not None:
            return info["reward"]
    return None


class _RowReader:
    def __init__(
        self,
        row: Mapping[str, Any],
        tools: list[Any] | None,
        shapes: Shapes,
        template: str,
        left_out: MutableMapping[str, int] | None,
    ):
        self._row = row
        self._tools = tools
        self._shapes = shapes
        self._template = template
        self._left_out = left_out

    def read(self) -> dict[str, Any]:
        if all(name in self._row for name in SIDES):
            return self._preference()
        column = conversation_column(self._row)
        if "completion" in self._row and ("prompt" in self._row or column):
            prompt = self._prompt("prompt" if column is None or self._row.get("prompt") is not None else column)
            return {"prompt": prompt, "completion": self._messages("completion", after=prompt)}
        if column is None:
            raise ValueError(
                f"the columns are {listed(self._row)}, and none of them holds a conversation. Messages stand in "
                f"`prompt` "
                f"with `completion`, or with `chosen` and `rejected`, or in one of {listed(CONVERSATIONS)}."
            )
        rejected = next((n for n in ("rejected_response", "rejected_messages") if self._row.get(n) is not None), None)
        return self._split(column) if rejected is None else self._rejected(column, rejected)

    def _preference(self) -> dict[str, Any]:
        column = conversation_column(self._row)
        if "prompt" in self._row and not begins_both_sides(self._row) and (self._row["prompt"] or not column):
            column = "prompt"
        if column is None:
            return _share_prompt(*map(self._messages, SIDES))
        prompt = self._prompt(column)
        return {"prompt": prompt, **{side: self._messages(side, after=prompt) for side in SIDES}}

    def _rejected(self, column: str, rejected: str) -> dict[str, Any]:
        messages = self._with_system(self._messages(column))
        other = self._row[rejected]
        if isinstance(other, str):
            return {
                "prompt": messages[:-1],
                "chosen": messages[-1:],
                "rejected": [{"role": "assistant", "content": other}],
            }
        turns = self._messages(rejected)
        return _share_prompt(messages, self._with_system(turns) if turns[0]["role"] != "assistant" else turns)

    def _split(self, column: str) -> dict[str, Any]:
        messages = self._with_system(self._messages(column))
        first = first_trained(messages)
        if first is None:
            raise ValueError(
                f"no message is an assistant's that trains (`{column}`), so there is nothing to learn. Drop the row."
            )
        prompt, _ = without_flags(messages[:first])
        return {"prompt": prompt, "completion": messages[first:]}

    def _prompt(self, column: str) -> list[Message]:
        return self._with_system(self._messages(column))

    def _with_system(self, messages: list[Message]) -> list[Message]:
        words = next((self._row[name] for name in SYSTEM if isinstance(self._row.get(name), str)), "")
        if not words or (messages and messages[0]["role"] in ("system", "developer")):
            return messages
        return [{"role": "system", "content": words}, *messages]

    def _messages(self, column: str, after: list[Message] | tuple[()] = ()) -> list[Message]:
        value, shape = self._row[column], self._shapes.get(column)
        if isinstance(value, str) and column in (*CONVERSATIONS, "rejected_messages", "rejected_response"):
            value, shape = load_json(value), EXACT
        if is_message(value):  # a side that is one message
            value, shape = [value], shape and (shape if shape == EXACT else [shape])
        return normalize_messages(
            value,
            column,
            after=after,
            schemas=self._tools,
            shape=shape,
            template=self._template,
            left_out=self._left_out,
        )


def first_trained(messages: list[Message]) -> int | None:
    """Where the first assistant turn stands that trains."""
    turns = (i for i, m in enumerate(messages) if m["role"] == "assistant" and m.get("train", True))
    return next(turns, None)


def begins_both_sides(row: Mapping[str, Any]) -> bool:
    """Whether the prompt of a pair is a text that the first user turns of both sides say again."""
    prompt = row["prompt"]
    return isinstance(prompt, str) and all(_first_words(row.get(side)) == prompt for side in SIDES)


def _share_prompt(chosen: list[Message], rejected: list[Message]) -> dict[str, Any]:
    """Two whole conversations as what they share and how each goes on; each keeps a message at least."""
    shared = 0
    for one, other in zip(chosen[:-1], rejected[:-1], strict=False):
        if one != other:
            break
        shared += 1
    return {"prompt": chosen[:shared], "chosen": chosen[shared:], "rejected": rejected[shared:]}


def _first_words(side: Any) -> Any:
    """What a side's first user turn says."""
    if not is_conversation(side):
        return None
    users = (m for m in side if isinstance(m, Mapping) and m.get("role", m.get("from")) in ("user", "human"))
    first = next(users, {})
    return first.get("content", first.get("value"))
