"""What a policy wrote for an argument: text stays as it was written, anything else is read by the tool's schema."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from .python_values import read_python


DECODER = json.JSONDecoder(strict=False)
"""Reads strings with line breaks in them, too, as policies write code."""


def properties(tools: Sequence[Mapping[str, Any]], name: str) -> Mapping[str, Any]:
    """The schemas of a tool's arguments, empty for an unknown tool."""
    for tool in tools:
        function = tool.get("function", tool)
        if function.get("name") == name:
            return (function.get("parameters") or {}).get("properties") or {}
    return {}


def typed(text: str, schema: Mapping[str, Any] | None) -> Any:
    """An argument written without quotes: text where the schema allows text, else the value that is written."""
    types = _types(schema or {})
    if "null" in types and text.strip() in ("null", "None"):
        return None
    if schema is None or "string" in types:
        return text
    return literal(text)


def literal(text: str) -> Any:
    """The value that a text spells in JSON or in Python; the text itself where it spells none."""
    for read in (DECODER.decode, read_python):
        try:
            return read(text.strip())
        except ValueError:
            continue
        except RecursionError:
            break
    return text


def _types(schema: Mapping[str, Any]) -> set[str]:
    """Types that a JSON schema allows, as far as it names them."""
    own = schema.get("type")
    types = {own} if isinstance(own, str) else set(own or ())
    for key in ("anyOf", "oneOf", "allOf"):
        for option in schema.get(key) or ():
            types |= _types(option)
    if "enum" in schema and not types:
        types |= {"string" for value in schema["enum"] if isinstance(value, str)}
    return types
