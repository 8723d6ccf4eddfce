"""Rows that keep their conversation a level deeper, as rows with columns."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..messages import Shape, field_shape
from .columns import SIDES, load_json


_PREFERENCE = ("preferred_output", "non_preferred_output")  # a provider's files for preference tuning
_REQUEST, _RESPONSE = "responses_create_params", "response"  # a gym's rollouts in the form of a provider's later API

# The columns that hold them
NESTED = ("input", *_PREFERENCE, _REQUEST, _RESPONSE)


def unfolded(row: Mapping[str, Any]) -> Mapping[str, Any]:
    """The row with its conversation in columns; any other as it is."""
    request = load_json(row.get("input"))
    if all(row.get(name) is not None for name in _PREFERENCE) and isinstance(request, Mapping):
        sides = {side: load_json(row[name]) for side, name in zip(SIDES, _PREFERENCE, strict=True)}
        rest = {name: value for name, value in row.items() if name not in ("input", *_PREFERENCE)}
        return {**rest, "prompt": request.get("messages"), "tools": request.get("tools"), **sides}
    request, response = load_json(row.get(_REQUEST)), load_json(row.get(_RESPONSE))
    if isinstance(request, Mapping) and isinstance(response, Mapping) and isinstance(response.get("output"), list):
        asked = request.get("input") or []
        if isinstance(asked, str):
            asked = [{"role": "user", "content": asked}]
        rest = {name: value for name, value in row.items() if name not in (_REQUEST, _RESPONSE)}
        system = {"system": request["instructions"]} if isinstance(request.get("instructions"), str) else {}
        return {**rest, **system, "messages": [*asked, *response["output"]], "tools": request.get("tools")}
    return row


def unfolded_shapes(shapes: Mapping[str, Shape]) -> Mapping[str, Shape]:
    """How the columns of [`unfolded`] rows were stored."""
    if "input" in shapes and all(name in shapes for name in _PREFERENCE):
        sides = {side: shapes[name] for side, name in zip(SIDES, _PREFERENCE, strict=True)}
        inner = {"prompt": field_shape(shapes["input"], "messages"), "tools": field_shape(shapes["input"], "tools")}
        return {**shapes, **inner, **sides}
    return shapes
