"""Which nulls were written, and which Arrow filled in."""

from __future__ import annotations

import json

import pytest

from trl_multiturn.messages import EXACT, NEVER, SET, normalize_messages, normalize_tools, nulls


STRUCT = {"a": SET, "b": SET, "c": NEVER, "nested": {"x": SET, "y": SET}}


def schema(*required, **properties):
    parameters = {"type": "object", "properties": properties, "required": list(required)}
    return [{"type": "function", "function": {"name": "f", "parameters": parameters}}]


def arguments(written, stored=None, tools=None):
    shape = [{"tool_calls": [{"function": {"arguments": stored}}]}] if stored not in (None, EXACT) else stored
    call = {"type": "function", "function": {"name": "f", "arguments": written}}
    messages = [{"role": "assistant", "content": "", "tool_calls": [call]}]
    return normalize_messages(messages, shape=shape, schemas=tools)[0]["tool_calls"][0]["function"]["arguments"]


INTEGER, NULLABLE = {"type": "integer"}, {"anyOf": [{"type": "integer"}, {"type": "null"}]}


@pytest.mark.parametrize(
    ("stored", "tools", "left"),
    [
        (STRUCT, None, {"a": 1}),  # set elsewhere in the column
        ({**STRUCT, "b": NEVER}, None, {"a": 1, "b": None}),  # set nowhere, so somebody wrote it
        (EXACT, schema(a=INTEGER), {"a": 1, "b": None}),  # written, though the tool has no such argument
        (None, None, {"a": 1, "b": None}),
        (None, schema(a=INTEGER), {"a": 1}),  # the tool has no such argument
        (None, schema(a=INTEGER, b=INTEGER), {"a": 1, "b": None}),
        (STRUCT, schema("b", a=INTEGER, b=INTEGER), {"a": 1}),
        (STRUCT, schema("b", a=INTEGER, b=NULLABLE), {"a": 1, "b": None}),
        (STRUCT, schema(a=INTEGER, b=NULLABLE), {"a": 1, "b": None}),
    ],
)
def test_nulls_of_a_call(stored, tools, left):
    assert arguments({"a": 1, "b": None}, stored, tools) == left


def test_nulls_are_taken_out_at_every_depth_but_not_out_of_lists():
    struct = {"nested": {"x": SET, "y": SET}, "list": [{"x": SET, "y": SET}]}
    written = {"nested": {"x": None, "y": 1}, "list": [{"x": 1, "y": None}, None]}
    assert arguments(written, struct) == {"nested": {"y": 1}, "list": [{"x": 1}, None]}


def test_nulls_in_a_json_string_were_written():
    assert arguments(json.dumps({"a": None}), STRUCT, schema(b=INTEGER)) == {"a": None}


@pytest.mark.parametrize(
    ("stored", "tools", "told"),
    [
        (STRUCT, None, "left out"),
        (STRUCT, schema(a=INTEGER, b=NULLABLE), "kept"),
        (None, None, "kept"),
        (STRUCT, schema(a=INTEGER), None),
        (STRUCT, schema("b", b=NULLABLE), None),
        (EXACT, None, None),
    ],
)
def test_a_null_that_cannot_be_told_from_a_fill_in_is_told_once(caplog, monkeypatch, stored, tools, told):
    monkeypatch.setattr(nulls, "_told", set())
    for _ in range(2):
        arguments({"a": 1, "b": None}, stored, tools)
    warnings = [record.message for record in caplog.records]
    assert len(warnings) == (told is not None)
    assert all(f"it is {told}" in text and 'on_mixed_types="use_json"' in text for text in warnings)


def test_a_schema_has_no_nulls_but_as_values():
    written = {
        "name": "f",
        "description": None,
        "parameters": {
            "type": "object",
            "properties": {
                "a": {"type": ["integer", "null"], "default": None, "enum": [1, None], "items": None},
                "b": None,
                "c": {"type": None, "description": None},
                "d": {"type": None},
            },
            "required": ["d"],
        },
    }
    properties = {"a": {"type": ["integer", "null"], "default": None, "enum": [1, None]}, "d": {}}
    function = {"name": "f", "parameters": {"type": "object", "properties": properties, "required": ["d"]}}
    assert normalize_tools([written]) == [{"type": "function", "function": function}]


@pytest.mark.parametrize(
    ("kind", "stored", "kept"), [("integer", SET, False), ("integer", None, True), ("null", SET, True)]
)
def test_a_null_default_is_a_fill_in_where_the_type_forbids_it(kind, stored, kept):
    properties = {"a": {"type": kind, "default": None}}
    shape = None if stored is None else {"a": {"type": SET, "default": stored}}
    for key in ("properties", "parameters"):
        shape = shape and {key: shape}
    tools = normalize_tools([{"name": "f", "parameters": {"properties": properties}}], shape and [shape])
    assert ("default" in tools[0]["function"]["parameters"]["properties"]["a"]) is kept
