"""How the columns of a dataset are stored, which tells the nulls that Arrow filled in from those that were written."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..messages import EXACT, NEVER, SET, Shape


def column_shapes(dataset: Any) -> dict[str, Shape]:
    """The shape of every column that holds more than a value (see `messages.nulls`); empty where it is not known."""
    shapes = {name: shape_of(feature) for name, feature in (dataset.features or {}).items()}
    return {name: shape for name, shape in shapes.items() if shape not in (SET, NEVER)}


def shape_of(feature: Any) -> Shape:
    """The shape of a feature of `datasets`."""
    if isinstance(feature, Mapping):
        return {key: shape_of(inner) for key, inner in feature.items()}
    if isinstance(feature, (list, tuple)):
        return [shape_of(feature[0])] if feature else None
    if type(feature).__name__ == "Json":
        return EXACT
    if (inner := getattr(feature, "feature", None)) is not None:
        return [shape_of(inner)]
    return NEVER if getattr(feature, "dtype", None) == "null" else SET
