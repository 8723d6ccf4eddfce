"""Names of columns, as tools write them, and what stands in them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any


CONVERSATIONS = (
    "messages",
    "conversations",
    "conversation",
    "traj",
    "trajectory",
    "message_log",
    "dialogue",
    "dialog",
)
TOOLS = ("tools", "functions", "tool_defs", "oai_tools", "tool_schemas")
SYSTEM = ("system", "system_prompt")
SIDES = ("chosen", "rejected")


def load_json(value: Any) -> Any:
    """What a JSON string of a list or an object holds; anything else as it is."""
    if isinstance(value, str) and value.lstrip()[:1] in ("[", "{"):
        try:
            return json.loads(value)
        except json.JSONDecodeError:
            return value
    return value


def is_message(value: Any) -> bool:
    """Whether a value is a message, as far as its keys tell."""
    return isinstance(value, Mapping) and isinstance(value.get("role", value.get("from")), str)


def is_conversation(value: Any) -> bool:
    """Whether a value is a list of messages, as far as the first of them tells."""
    return isinstance(value, (list, tuple)) and bool(value) and is_message(value[0])


def conversation_column(row: Mapping[str, Any]) -> str | None:
    """The column that holds a whole conversation."""
    return next((name for name in CONVERSATIONS if is_conversation(load_json(row.get(name)))), None)


def tools_column(row: Mapping[str, Any]) -> str | None:
    """The column that holds tools."""
    return next((name for name in TOOLS if row.get(name) is not None), None)


def listed(names: Any) -> str:
    """Names for an error."""
    return ", ".join(f"`{name}`" for name in names)
