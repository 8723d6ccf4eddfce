"""Tool calls in TRL's form: `{"id", "type": "function", "function": {"name", "arguments": {...}}}`."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from .nulls import EXACT, NEVER, Shape, field_shape, is_plain, not_json, without_fill_ins
from .text import brief


# Other names of `arguments`, as providers and libraries write them
_ARGUMENTS = ("arguments", "parameters", "args", "input", "kwargs")
# What records of a call say beside it; no template prints it and no policy wrote it
_BOOKKEEPING = {
    "id",
    "type",
    "function",
    "name",
    "index",
    "call_id",
    "tool_call_id",
    "requestor",
    "status",
    "arguments",
}
_TYPES = (None, "function", "tool_call", "tool_use", "function_call")


def normalize_calls(calls: Any, schemas: Mapping[str, Any], shape: Shape, where: str) -> list[dict[str, Any]]:
    """A message's `tool_calls` in TRL's form; empty where there is none.

    Args:
        calls: a list of calls, flat or under `function`, their arguments objects or JSON strings; or a JSON string.
        schemas: JSON schemas of the parameters, by tool.
        shape: how it was stored.
        where: row, column and message, for errors.

    Raises:
        `ValueError`: naming the call and what cannot be read.
    """
    if isinstance(calls, str):
        calls, shape = _load(calls, f"{where}: `tool_calls`") if calls.strip() else [], EXACT
    if isinstance(calls, Mapping):
        calls = [calls]
    if not isinstance(calls, (list, tuple)):
        raise ValueError(f"{where}: `tool_calls` is {brief(calls)}, but it is a list of calls. Write one.")
    inner = None if shape is None else shape if shape == EXACT else _only(shape)
    return [
        read_call(call, schemas, inner, f"{where}: `tool_calls[{number}]`")
        for number, call in enumerate(calls)
        if call is not None
    ]


def read_call(
    call: Any, schemas: Mapping[str, Any] | None = None, shape: Shape = None, where: str = "The call"
) -> dict[str, Any]:
    """One call in TRL's form. See [`normalize_calls`]; a JSON string of a call is read, too."""
    if isinstance(call, str):
        call, shape = _load(call, where), EXACT
    if not isinstance(call, Mapping):
        raise ValueError(f"{where} is {brief(call)}, but a call has a `name` and `arguments`. Write both.")
    if call.get("type") not in _TYPES:
        raise ValueError(
            f"{where} is of the type {call['type']!r}, which chat templates do not print. Write a call of a function, "
            "`{'type': 'function', 'function': {'name': …, 'arguments': {…}}}`."
        )
    function, at = call.get("function"), "function"
    if isinstance(function, str) and call.get("name") is None:
        function, at = {**call, "name": function}, ""
    elif not isinstance(function, Mapping):
        function, at = call, ""
    name = function.get("name")
    if not isinstance(name, str) or not name:
        raise ValueError(f"{where} names no tool ({brief(call)}). Give it a `name`, or drop the row.")
    key = next((key for key in _ARGUMENTS if function.get(key) is not None), "arguments")
    _refuse_unknown(call, function, key, where)
    stored = field_shape(field_shape(shape, at) if at else shape, key)
    arguments = _read_arguments(function.get(key), schemas and schemas.get(name), stored, f"{where} ({name})")
    identity = call.get("id") or call.get("call_id") or call.get("tool_call_id")
    form = {"type": "function", "function": {"name": name, "arguments": arguments}}
    return form if identity is None else {"id": identity, **form}


def arguments_as_strings(messages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Messages in TRL's form with each call's `arguments` as a JSON string, for chat templates that print a string."""
    return [
        {**message, "tool_calls": list(map(_with_string, message["tool_calls"]))}
        if message.get("tool_calls")
        else dict(message)
        for message in messages
    ]


def is_normal_call(call: Any) -> bool:
    """Whether a call has TRL's form and holds no null."""
    if type(call) is not dict or call.get("type") != "function" or not call.keys() <= {"id", "type", "function"}:
        return False
    function = call.get("function")
    if type(function) is not dict or function.keys() != {"name", "arguments"} or type(function["name"]) is not str:
        return False
    return type(function["arguments"]) is dict and is_plain(function["arguments"]) and call.get("id", "") is not None


def _with_string(call: Mapping[str, Any]) -> dict[str, Any]:
    function = call["function"]
    if isinstance(function["arguments"], str):
        return dict(call)
    return {**call, "function": {**function, "arguments": json.dumps(function["arguments"], ensure_ascii=False)}}


def _refuse_unknown(call: Mapping[str, Any], function: Mapping[str, Any], arguments: str, where: str) -> None:
    known = _BOOKKEEPING | {arguments}
    unknown = [key for part in (call, function) for key in part if part[key] is not None and key not in known]
    if unknown:
        value = call.get(unknown[0], function.get(unknown[0]))
        raise ValueError(
            f"{where} has the key `{unknown[0]}` ({brief(value)}), which no chat template prints, so it would vanish. "
            "Write what it says into a message, or remove it."
        )


def _read_arguments(arguments: Any, schema: Any, shape: Shape, where: str) -> dict[str, Any]:
    if arguments is None:
        return {}
    if isinstance(arguments, str):
        return _load_object(arguments, where)
    if not isinstance(arguments, Mapping):
        raise ValueError(f"{where}: the arguments are {brief(arguments)}, but they are an object. Write one.")
    if shape == NEVER:  # a struct without a value anywhere
        return {}
    if is_plain(arguments):
        return dict(arguments)
    if (foreign := not_json(arguments)) is not None:
        raise ValueError(
            f"{where}: the arguments hold {brief(foreign)}, which is no JSON, so a chat template would print the name "
            f"of "
            "its type. Write it as text or as a number (`datasets` reads what looks like a date as one: write the "
            "arguments as JSON strings)."
        )
    return without_fill_ins(arguments, shape, schema, where)


def _load_object(text: str, where: str) -> dict[str, Any]:
    if not text.strip():
        return {}
    value: Any = text
    while isinstance(value, str):  # some exporters encode twice
        value = _load(value, f"{where}: the arguments")
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise ValueError(
            f"{where}: the arguments {brief(text)} are JSON, but no object, so nobody knows which argument is meant. "
            "Write an object, or drop the row."
        )
    return value


def _load(text: str, what: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(
            f"{what} are no valid JSON ({error}): {brief(text)}. Write an object, or drop the row."
        ) from error


def _only(shape: Shape) -> Shape:
    return shape[0] if isinstance(shape, Sequence) and not isinstance(shape, str) and shape else None
