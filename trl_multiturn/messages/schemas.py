"""Tools as chat templates take them: a list of `{"type": "function", "function": {...}}`, or of functions."""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import lru_cache
from typing import Any

from .nulls import EXACT, NEVER, Shape, allows_null, field_shape, item_shape
from .text import brief


# Where a JSON schema holds values of the user's, in which a null is a value like any other
_VALUES = ("default", "const")
_LISTS_OF_VALUES = ("enum", "examples")


def normalize_tools(tools: Any, shape: Shape = None) -> list[Any] | None:
    """Brings tools into the form that chat templates take.

    Args:
        tools (`list`, `str`, *optional*):
            A list of JSON schemas or functions, or a JSON string of the former. A schema may be bare (`name` and
            `parameters`, or `input_schema`, at the top) or a JSON string itself.
        shape (`Shape`, *optional*):
            How it was stored (see `nulls`).

    Returns:
        `list`, or `None` where there are no tools.

    Raises:
        `ValueError`: if it is something else.
    """
    if isinstance(tools, str):
        return _read_tools(tools)
    if tools is None:
        return None
    if not isinstance(tools, (list, tuple)):
        raise _no_tools(tools)
    return [_read_tool(tool, item_shape(shape), tools) for tool in tools]


@lru_cache(maxsize=256)
def _parse(text: str) -> Any:
    return json.loads(text)


def _read_tools(text: str) -> list[Any] | None:
    if not text.strip():
        return None
    try:
        tools = _parse(text)
    except json.JSONDecodeError as error:
        raise ValueError(
            f"`tools` is no valid JSON ({error}): {brief(text)}. Pass a list of JSON schemas, or `json.dumps` of it."
        ) from error
    if isinstance(tools, str):
        raise _no_tools(tools)
    return normalize_tools(tools, EXACT)


def _read_tool(tool: Any, shape: Shape, tools: Any) -> Any:
    if isinstance(tool, str):
        try:
            tool, shape = json.loads(tool), EXACT
        except json.JSONDecodeError:
            raise _no_tools(tools) from None
    if not isinstance(tool, Mapping):
        if callable(tool):
            return tool
        raise _no_tools(tools)
    function = tool.get("function")
    if isinstance(function, Mapping):
        cleaned = _clean(function, field_shape(shape, "function"))
        rest = {k: v for k, v in tool.items() if k not in ("type", "function") and v is not None}
        return {"type": tool.get("type") or "function", "function": cleaned, **rest}
    if not isinstance(tool.get("name"), str):
        return _clean(tool, shape)  # a form of the template's own
    bare = {k: v for k, v in tool.items() if k not in ("type", "function")}
    if isinstance(bare.get("input_schema"), Mapping) and bare.get("parameters") is None:
        bare["parameters"] = bare.pop("input_schema")
    return {"type": "function", "function": _clean(bare, shape)}


def _clean(schema: Any, shape: Shape) -> Any:
    """A schema without nulls where a schema has none."""
    if isinstance(schema, (list, tuple)):
        return [_clean(item, item_shape(shape)) for item in schema]
    if not isinstance(schema, Mapping):
        return schema
    cleaned: dict[str, Any] = {}
    for key, value in schema.items():
        inner = field_shape(shape, key)
        if key in _VALUES:
            if value is not None or _null_is_meant(schema, shape, key):
                cleaned[key] = value
        elif key in _LISTS_OF_VALUES and isinstance(value, (list, tuple)):
            cleaned[key] = list(value)
        elif key == "properties" and isinstance(value, Mapping):
            cleaned[key] = _properties(value, inner, schema.get("required") or ())
        elif value is not None:
            cleaned[key] = _clean(value, inner)
    return cleaned


def _properties(properties: Mapping[str, Any], shape: Shape, required: Any) -> dict[str, Any]:
    cleaned = {k: _clean(v, field_shape(shape, k)) for k, v in properties.items() if v is not None}
    # A struct of nothing but nulls: some writers know no null struct
    return {k: v for k, v in cleaned.items() if v != {} or not properties[k] or k in required}


def _null_is_meant(schema: Mapping[str, Any], shape: Shape, key: str) -> bool:
    """Whether `"default": null` was written: a struct has it in every schema as soon as one has a default."""
    in_struct = isinstance(shape, Mapping) and shape.get(key, NEVER) != NEVER
    return not in_struct or (allows_null(schema) and "type" in schema)


def _no_tools(tools: Any) -> ValueError:
    return ValueError(
        f"`tools` is {brief(tools)}, but chat templates take a list of JSON schemas "
        "(`[{'type': 'function', 'function': {…}}]`) or of functions. Wrap a single schema in a list."
    )
