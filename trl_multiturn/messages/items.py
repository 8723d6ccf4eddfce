"""Items of a conversation in the form of OpenAI's later API (Responses), as messages."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .text import read_text


_ROLES = {"function_call": "function_call", "function_call_output": "tool"}
_BOOKKEEPING = ("id", "status", "type", "phase")


def is_item(message: Mapping[str, Any]) -> bool:
    """Whether a message is an item that has a type in place of a role, or beside it."""
    kind = message.get("type")
    return kind in _ROLES or kind == "reasoning" or (kind == "message" and "role" in message)


def read_item(item: Mapping[str, Any], where: str) -> tuple[dict[str, Any] | None, str]:
    """The message that an item is, `None` for one that only thinks, and the thought that it holds."""
    kind = item["type"]
    rest = {key: value for key, value in item.items() if key not in _BOOKKEEPING}
    if kind == "reasoning":
        return None, _thought(item, where)
    if kind == "function_call":
        call = {key: rest.pop(key) for key in ("name", "arguments", "call_id") if key in rest}
        return {"role": "function_call", "content": call, **rest}, ""
    if kind == "function_call_output":
        names = {"output": "content", "call_id": "tool_call_id"}
        return {"role": "tool", **{names.get(key, key): value for key, value in rest.items()}}, ""
    return rest, ""


def _thought(item: Mapping[str, Any], where: str) -> str:
    """What a reasoning item says: the thought itself, or else its summary."""
    for key in ("content", "summary"):
        parts = item.get(key)
        if isinstance(parts, (list, tuple)):
            parts = [part.get("text") if isinstance(part, Mapping) else part for part in parts]
        if parts:
            return read_text(parts, "assistant", where)
    return ""
