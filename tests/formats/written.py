"""Three conversations in TRL's form, and the same as other tools write them."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from typing import Any


Row = dict[str, Any]


def _schema(name: str, **kinds: str) -> Row:
    properties = {key: {"type": kind} for key, kind in kinds.items()}
    parameters = {"type": "object", "properties": properties, "required": list(properties)}
    return {"type": "function", "function": {"name": name, "description": f"Does {name}.", "parameters": parameters}}


TOOLS = [_schema("lookup", word="string"), _schema("shift", text="string", by="integer")]


def _call(number: int, name: str, **arguments: Any) -> Row:
    return {"id": f"call{number:05d}", "type": "function", "function": {"name": name, "arguments": arguments}}


def _turn(text: str, *calls: Row) -> Row:
    return {"role": "assistant", "content": text, **({"tool_calls": list(calls)} if calls else {})}


def _result(number: int, name: str, text: str) -> Row:
    return {"role": "tool", "tool_call_id": f"call{number:05d}", "name": name, "content": text}


def rows() -> list[Row]:
    """`prompt`, `completion`, `tools`, `reward`."""
    lookup, shift = _call(1, "lookup", word="quay"), _call(2, "shift", text="abc", by=2)
    conversations = [
        ("What is a quay?", [_turn("", lookup), _result(1, "lookup", "a wharf"), _turn("A wharf.")], 1.0),
        ("Shift abc by 2.", [_turn("", shift), _result(2, "shift", "cde"), _turn("cde")], 1.0),
        (
            "Both at once!",
            [_turn("", lookup, shift), _result(1, "lookup", "a wharf"), _result(2, "shift", "cde"), _turn("No.")],
            0.0,
        ),
    ]
    return [
        {"prompt": [{"role": "user", "content": prompt}], "completion": completion, "tools": TOOLS, "reward": reward}
        for prompt, completion, reward in copy.deepcopy(conversations)
    ]


def pairs() -> list[Row]:
    """`prompt`, `chosen`, `rejected`, `tools`."""
    return [
        {
            "prompt": row["prompt"],
            "chosen": row["completion"],
            "rejected": [*row["completion"][:-1], _turn("I cannot say.")],
            "tools": row["tools"],
        }
        for row in rows()
    ]


def without_ids(row: Row) -> Row:
    """A row without the ids of calls, which some forms cannot say."""
    row = json.loads(json.dumps(row))
    for column in ("prompt", "completion", "chosen", "rejected"):
        for message in row.get(column, ()):
            message.pop("tool_call_id", None)
            for call in message.get("tool_calls", ()):
                call.pop("id", None)
    return row


# Messages


def _each_call(message: Row, change: Callable[[Row], Row]) -> Row:
    if not message.get("tool_calls"):
        return message
    return {**message, "tool_calls": [change(call) for call in message["tool_calls"]]}


def _api(message: Row) -> Row:
    def stringed(call: Row) -> Row:
        function = call["function"]
        return {**call, "function": {**function, "arguments": json.dumps(function["arguments"])}}

    message = _each_call(message, stringed)
    return {**message, "content": None} if message.get("tool_calls") else message


def _flat(message: Row) -> Row:
    def flat(call: Row) -> Row:
        return {"id": call["id"], **call["function"], "arguments": json.dumps(call["function"]["arguments"])}

    return _each_call(message, flat)


def _filled(message: Row) -> Row:
    def filled(call: Row) -> Row:
        arguments = {**dict.fromkeys(("word", "text", "by")), **call["function"]["arguments"]}
        return {**call, "function": {**call["function"], "arguments": arguments}}

    return {**dict.fromkeys(("tool_calls", "tool_call_id", "name", "train")), **_each_call(message, filled)}


def _parts(message: Row) -> Row:
    return {**message, "content": [{"type": "text", "text": message["content"]}]}


def _roles(message: Row) -> list[Row]:
    calls = [call["function"] for call in message.get("tool_calls", ())]
    if calls:
        return [{"role": "tool_call", "content": json.dumps(call)} for call in calls]
    return [{"role": {"tool": "tool_response"}.get(message["role"], message["role"]), "content": message["content"]}]


def _from_value(message: Row) -> list[Row]:
    calls = [call["function"] for call in message.get("tool_calls", ())]
    if calls:
        return [{"from": "function_call", "value": json.dumps(call)} for call in calls]
    speaker = {"user": "human", "assistant": "gpt", "tool": "observation", "system": "system"}[message["role"]]
    return [{"from": speaker, "value": message["content"]}]


def _first_form(message: Row) -> list[Row]:
    if message["role"] == "tool":
        return [{"role": "function", "name": message["name"], "content": message["content"]}]
    calls = _api(message).get("tool_calls", [])
    if not calls:
        return [message]
    return [{"role": "assistant", "content": None, "function_call": calls[0]["function"]}]


def _in_columns(change: Callable[[Row], Any]) -> Callable[[Row], Row]:
    """The same columns, their messages changed one by one."""

    def write(row: Row) -> Row:
        columns = [name for name in ("prompt", "completion", "chosen", "rejected") if name in row]
        changed = {}
        for name in columns:
            written = [change(message) for message in row[name]]
            changed[name] = [m for w in written for m in (w if isinstance(w, list) else [w])]
        return {**row, **changed}

    return write


def _one_column(name: str, change: Callable[[Row], Any], **keys: Any) -> Callable[[Row], Row]:
    """Prompt and completion in one column."""

    def write(row: Row) -> Row:
        written = [change(message) for message in row["prompt"] + row["completion"]]
        messages = [m for w in written for m in (w if isinstance(w, list) else [w])]
        return {name: messages, "tools": row["tools"], "reward": row["reward"], **keys}

    return write


def _filled_schemas(row: Row) -> Row:
    tools = copy.deepcopy(row["tools"])
    for tool in tools:
        parameters = tool["function"]["parameters"]
        parameters["properties"] = {k: parameters["properties"].get(k) for k in ("word", "text", "by")}
    return {**_in_columns(_filled)(row), "tools": tools}


def _sharegpt(row: Row) -> Row:
    written = _one_column("conversations", _from_value)(row)
    return {**written, "tools": json.dumps([tool["function"] for tool in row["tools"]])}


def _functions(row: Row) -> Row:
    written = _one_column("messages", _first_form)(row)
    return {**written, "functions": [tool["function"] for tool in written.pop("tools")]}


def _simulation(row: Row) -> Row:
    written = _one_column("messages", _flat, task_id="0", trial=1)(row)
    return {**written, "reward_info": {"reward": written.pop("reward"), "note": "n"}}


# What rows with one completion look like, by the name that they are recognized by; the first keeps two calls apart
TRAJECTORIES: dict[str, tuple[str, Callable[[Row], Row]]] = {
    "the form itself": ("trl", dict),
    "arguments as strings": ("trl", _in_columns(_api)),
    "flat calls": ("trl", _in_columns(_flat)),
    "fill-ins": ("trl", _filled_schemas),
    "text parts": ("trl", _in_columns(_parts)),
    "roles in columns": ("tool-roles", _in_columns(_roles)),
    "from and value in columns": ("sharegpt", _in_columns(_from_value)),
    "an API's messages": ("openai", _one_column("messages", _api)),
    "messages as a JSON string": (
        "openai",
        lambda row: {**_one_column("messages", dict)(row), "messages": json.dumps(row["prompt"] + row["completion"])},
    ),
    "roles": ("tool-roles", _one_column("messages", _roles)),
    "ShareGPT": ("sharegpt", _sharegpt),
    "OpenAI's first form": ("function-call", _functions),
    "an episode": ("episodes", _one_column("traj", _api, task_id=7, trial=0, info={"note": "n"})),
    "a simulation": ("episodes", _simulation),
    "a rollout": ("rollouts", lambda row: {**_in_columns(_flat)(row), "example_id": 3, "metrics": {"n": 1.0}}),
}
ONE_CALL = {"OpenAI's first form"}  # cannot say two calls in one turn

PAIRS: dict[str, Callable[[Row], Row]] = {
    "the form itself": dict,
    "arguments as strings": _in_columns(_api),
    "fill-ins": _filled_schemas,
    "text parts": _in_columns(_parts),
    "from and value": _in_columns(_from_value),
    "the prompt under another name": lambda row: {**row, "conversations": row.pop("prompt")},
    "the prompt in both sides": lambda row: {
        **row,
        **{side: row["prompt"] + row[side] for side in ("chosen", "rejected")},
        "prompt": row["prompt"][0]["content"],
    },
    "no prompt, one side with other nulls": lambda row: {
        "chosen": [_filled(m) for m in row["prompt"] + row["chosen"]],
        "rejected": row["prompt"] + row["rejected"],
        "tools": row["tools"],
    },
}
