"""Conversations that are rendered to learn what a template prints; their words are unlikely to stand in a template."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from os.path import commonprefix
from typing import Any

from ..messages import Message


# Nine letters and digits, which every family accepts
CALL_ID = "prb1call9"
USER: Message = {"role": "user", "content": "probe"}
ANSWER: Message = {"role": "assistant", "content": "answer"}


def tool_name(tools: Sequence[Any] | None) -> str:
    """The name of the first tool: strict templates look called names up."""
    first = tools[0] if tools else None
    if isinstance(first, Mapping):
        return str(first.get("function", first).get("name", "probe"))
    return getattr(first, "__name__", "probe")


def call_turn(
    name: str, arguments: Mapping[str, Any] | str, content: str = "", identity: str | None = CALL_ID
) -> Message:
    """An assistant turn with one call."""
    call: dict[str, Any] = {"type": "function", "function": {"name": name, "arguments": arguments}}
    if identity is not None:
        call = {"id": identity, **call}
    return {"role": "assistant", "content": content, "tool_calls": [call]}


def result(name: str, content: str = "result", identity: str | None = CALL_ID) -> Message:
    """The result of a call."""
    message = {"role": "tool", "name": name, "content": content}
    return message if identity is None else {**message, "tool_call_id": identity}


def conversations(name: str) -> Iterator[list[Message]]:
    """What a template should be able to show turn by turn."""
    call = call_turn(name, {"value": "1"})
    thinking = {**ANSWER, "reasoning_content": "thought"}
    yield [USER, ANSWER]
    yield [USER, ANSWER, USER, ANSWER]
    yield [USER, call, result(name), ANSWER, USER, ANSWER]
    yield [USER, thinking, USER, thinking]


def common_suffix(first: str, second: str) -> str:
    """The longest text with which both end."""
    return commonprefix([first[::-1], second[::-1]])[::-1]
