"""Nulls that Arrow fills in: a struct has one set of fields, so what one call names, the others get as null.

A null is a fill-in where it stands in a struct field that is set elsewhere in the column. Where the schema of the
called tool decides, it decides; where nothing does, the null counts as a fill-in and the user is told once.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any


logger = logging.getLogger(__name__)

# What is known of how a value was stored. `None`: nothing. A mapping: an Arrow struct with these fields. A list of
# one: a list of such values. `EXACT`: as JSON, so that its nulls were written. `SET`, `NEVER`: a field with values, a
# field without any.
Shape = Mapping[str, Any] | Sequence[Any] | str | None
EXACT, SET, NEVER = "exact", "set", "never"

_told: set[str] = set()


def tell_once(message: str, topic: str | None = None) -> None:
    """Logs a warning, the same one, or one of the same topic, never twice."""
    if (topic or message) not in _told:
        _told.add(topic or message)
        logger.warning(message)


def field_shape(shape: Shape, key: str) -> Shape:
    """The shape of a struct's field; of what is known to be exact, or of which nothing is known, that."""
    if isinstance(shape, Mapping):
        return shape.get(key, NEVER)
    return shape if shape == EXACT else None


def item_shape(shape: Shape) -> Shape:
    """The shape of a list's items."""
    if isinstance(shape, str) or shape is None or isinstance(shape, Mapping):
        return shape if shape == EXACT else None
    return shape[0] if shape else None


def is_plain(value: Any) -> bool:
    """Whether a value is JSON without a null."""
    kind = type(value)
    if kind in (str, int, float, bool):
        return True
    if kind is dict:
        return all(map(is_plain, value.values()))
    return kind is list and all(map(is_plain, value))


def not_json(value: Any) -> Any:
    """The first part of a value that is no JSON, such as a date; `None` where there is none."""
    if isinstance(value, Mapping):
        value = list(value.values())
    if isinstance(value, (list, tuple)):
        return next((found for found in map(not_json, value) if found is not None), None)
    return None if value is None or isinstance(value, (str, int, float, bool)) else value


def without_fill_ins(arguments: Any, shape: Shape, schema: Any, where: str) -> Any:
    """A call's arguments, or a part of them, without the nulls that Arrow filled in.

    Args:
        arguments: JSON value. Nulls in lists stay: Arrow fills none into them.
        shape: how it was stored.
        schema: its JSON schema, or `None`.
        where: for the warning where a null cannot be told from a fill-in.
    """
    if shape == EXACT:
        return arguments
    if isinstance(arguments, Mapping):
        kept: dict[str, Any] = {}
        for key, value in arguments.items():
            if value is None:
                if _is_written(key, shape, schema, where):
                    kept[key] = None
            else:
                kept[key] = without_fill_ins(value, field_shape(shape, key), _property(schema, key), where)
        return kept
    if isinstance(arguments, (list, tuple)):
        items = schema.get("items") if isinstance(schema, Mapping) else None
        return [x if x is None else without_fill_ins(x, item_shape(shape), items, where) for x in arguments]
    return arguments


def _is_written(key: str, shape: Shape, schema: Any, where: str) -> bool:
    """Whether somebody wrote the null of `key`, rather than Arrow."""
    in_struct = isinstance(shape, Mapping) and shape.get(key, NEVER) != NEVER
    properties = schema.get("properties") if isinstance(schema, Mapping) else None
    if isinstance(properties, Mapping) and not schema.get("additionalProperties"):
        if properties.get(key) is None:
            return False  # the tool has no such argument; another one has
        allowed = allows_null(properties[key])
        if allowed and key in (schema.get("required") or ()):
            return True
        if in_struct and not allowed:
            return False
        keeps = allowed or not in_struct
    else:
        keeps = not in_struct
    if in_struct or shape is None:
        tell_once(
            f"{where}: `{key}` is null, and nothing says whether that was written or is what Arrow fills in where "
            f"other rows have the field; it is {'kept' if keeps else 'left out'}, as others like it. Write arguments "
            'as JSON strings, or load the rows with `on_mixed_types="use_json"`, and nulls are what was written.',
            "kept nulls" if keeps else "nulls left out",
        )
    return keeps


def _property(schema: Any, key: str) -> Any:
    properties = schema.get("properties") if isinstance(schema, Mapping) else None
    return properties.get(key) if isinstance(properties, Mapping) else None


def allows_null(schema: Any) -> bool:
    """Whether a JSON schema lets a value be null."""
    if not isinstance(schema, Mapping):
        return schema is True
    kinds = schema.get("type")
    if schema.get("nullable") or kinds == "null" or (isinstance(kinds, (list, tuple)) and "null" in kinds):
        return True
    if isinstance(schema.get("enum"), (list, tuple)):
        return None in schema["enum"]
    choices = [*(schema.get("anyOf") or ()), *(schema.get("oneOf") or ())]
    if choices:
        return any(map(allows_null, choices))
    return kinds is None and not schema.get("properties") and schema.get("$ref") is None
