"""Messages in TRL's form, whoever wrote them.

The form: `role` is `system`, `developer`, `user`, `assistant` or `tool`; `content` is text; a turn's calls are its
`tool_calls`, their `arguments` objects; a result names its tool where its call can be told; an assistant's turn that
must not be trained says `"train": False`; reasoning keeps the key that it came with; no value is null.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, MutableMapping, Sequence
from typing import Any

from .calls import is_normal_call, normalize_calls, read_call
from .flags import FLAGS, read_flag
from .items import is_item, read_item
from .nulls import EXACT, Shape, field_shape, item_shape
from .text import brief, find_content, read_content, read_text


Message = dict[str, Any]

ROLES = ("system", "developer", "user", "assistant", "tool")
REASONING = ("reasoning_content", "reasoning", "thinking")

# Names that other tools give to these roles, in lower case
_ALIASES = {
    **dict.fromkeys(("human",), "user"),
    **dict.fromkeys(("gpt", "chatgpt", "bot", "model", "ai", "agent", "bing", "bard"), "assistant"),
    **dict.fromkeys(("function", "observation", "tool_response", "tool_result", "tool_results"), "tool"),
    **dict.fromkeys(("function_response", "function_result", "function_output", "tool_output"), "tool"),
    # The policy's calls as a message of their own, whose text is the call as JSON
    **dict.fromkeys(("tool_call", "tool_calls", "function_call", "function_calls"), "assistant"),
}
_CALL_ROLES = ("tool_call", "tool_calls", "function_call", "function_calls")

_READ = {"role", "from", "content", "value", "tool_calls", "function_call", *FLAGS}
_PLAIN_KEYS = frozenset(("role", "content", "name", "tool_call_id"))
_ASSISTANT_KEYS = frozenset(("role", "content", "name", "tool_calls", "train", *REASONING))
_SPEAKER = "Give it one: 'system', 'user', 'assistant' or 'tool'."


def normalize_messages(
    messages: Any,
    column: str = "messages",
    *,
    after: Sequence[Message] = (),
    schemas: Sequence[Any] | None = None,
    shape: Shape = None,
    template: str = "",
    left_out: MutableMapping[str, int] | None = None,
) -> list[Message]:
    """Brings messages into TRL's form. Messages that are in it come back as they are; none is ever changed.

    Args:
        messages (`list[dict]`):
            Messages of OpenAI's two forms, with roles for calls and results, with `from` and `value`, with content in
            parts; with flat calls, arguments as JSON strings, or the nulls that Arrow fills in.
        column (`str`, *optional*, defaults to `"messages"`):
            Where they stand, for errors.
        after (`list[dict]`, *optional*):
            What was said before them, in TRL's form: results may answer its last calls.
        schemas (`list[dict]`, *optional*):
            The tools in the form of [`normalize_tools`]; they tell which nulls of a call were written.
        shape (`Shape`, *optional*):
            How the messages were stored (see `nulls`).
        template (`str`, *optional*):
            The chat template: roles and keys that it names itself are let through.
        left_out (`dict[str, int]`, *optional*):
            Counts keys that nobody knows, which are left out; without it they are refused.

    Returns:
        `list[dict]`: the messages; a call that stood in a message of its own has joined its turn.

    Raises:
        `ValueError`: naming column, message, key and remedy, where a word would get lost.

    Example:

    ```python
    >>> normalize_messages([{"from": "function_call", "value": '{"name": "add", "arguments": {"a": 2}}'}])
    [{'role': 'assistant', 'content': '',
      'tool_calls': [{'type': 'function', 'function': {'name': 'add', 'arguments': {'a': 2}}}]}]
    ```
    """
    if isinstance(messages, (str, Mapping)) or not isinstance(messages, Sequence):
        raise ValueError(f"`{column}` is {brief(messages)}, not a list of messages. Write one, or drop the row.")
    if all(map(_is_normal, messages)):
        return list(messages)
    reader = _Reader(column, after, _parameters(schemas), template, left_out)
    inner = item_shape(shape)
    for number, message in enumerate(messages):
        reader.read(number, message, inner)
    return reader.finish()


def without_reasoning(messages: Sequence[Message]) -> list[Message]:
    """Messages in TRL's form without what the assistant thought."""
    return [
        {key: value for key, value in message.items() if key not in REASONING or message["role"] != "assistant"}
        for message in messages
    ]


class _Reader:
    """Reads the messages of one conversation, one after another."""

    def __init__(
        self,
        column: str,
        after: Sequence[Message],
        schemas: Mapping[str, Any],
        template: str,
        left_out: MutableMapping[str, int] | None,
    ):
        self.messages: list[Message] = []
        self._column = column
        self._schemas = schemas
        self._template = template
        self._left_out = left_out
        self._unanswered = _open_calls(after)
        self._thought = ""  # of the turn to come

    def read(self, number: int, message: Any, shape: Shape) -> None:
        """Reads a message; it joins the turn before it where it is that turn's call."""
        if isinstance(message, Mapping):
            message = {key: value for key, value in message.items() if value is not None}
            if is_item(message):
                message, thought = read_item(message, f"`{self._column}`: item {number}")
                self._thought += thought
                if message is None:
                    return
        written, role = self._role(number, message)
        where = f"`{self._column}`: message {number} ({written})"
        content, key = find_content(message, where)
        is_call = written.lower() in _CALL_ROLES and role == "assistant"
        form: Message = {"role": role, "content": ""}
        if is_call:
            form["tool_calls"] = self._calls_of_text(content, field_shape(shape, key), where)
        else:
            form["content"] = read_content(content, role, where)
            form |= self._calls(message, role, shape, where)
        self._take_over(form, message, where)
        if self._thought:
            self._take_thought(form, where)
        if not read_flag(message, role, where) and role == "assistant":
            form["train"] = False
        if content is None and form.keys() <= {"role", "content", "name", "train"}:
            raise ValueError(
                f"{where} has neither `content` nor `tool_calls`. Write what was said (an empty string, if nothing "
                "was), or drop the row."
            )
        self._append(form, is_call, where)

    def finish(self) -> list[Message]:
        """What was read."""
        if self._thought:
            self._take_thought({"role": "end"}, f"The end of `{self._column}`")
        return self.messages

    def _role(self, number: int, message: Any) -> tuple[str, str]:
        """The role as it is written, and what it is in TRL's form."""
        role = message.get("role", message.get("from")) if isinstance(message, Mapping) else None
        if not isinstance(role, str):
            raise ValueError(
                f"`{self._column}`: message {number} has no `role` ({brief(message)}), so nobody knows who speaks. "
                f"{_SPEAKER}"
            )
        if role.lower() in ROLES:
            return role, role.lower()
        known = _ALIASES.get(role.lower())
        # A role of the template's own is its author's word, unless the template knows TRL's name for it, too
        if self._names(role) and (known is None or not self._names(known)):
            return role, role
        if known is None:
            raise ValueError(
                f"`{self._column}`: message {number} has the role {role!r}, which is none that the chat template "
                "names, so it would be shown to the policy as a stranger's, and never trained. Call it 'system', "
                "'user', 'assistant' or 'tool'. (Read as these are the roles of other tools: "
                f"{', '.join(map(repr, _ALIASES))}.)"
            )
        return role, known

    def _names(self, role: str) -> bool:
        return re.search(rf"['\"]{re.escape(role)}['\"]", self._template) is not None

    def _calls_of_text(self, content: Any, shape: Shape, where: str) -> list[dict[str, Any]]:
        if isinstance(content, str):
            try:
                content, shape = json.loads(content), EXACT
            except json.JSONDecodeError as error:
                raise ValueError(
                    f"{where}: the call is no valid JSON ({error}): {brief(content)}. Write "
                    "`{'name': …, 'arguments': {…}}`, or drop the row."
                ) from error
        if isinstance(content, (list, tuple)):
            return normalize_calls(content, self._schemas, shape, where)
        return [read_call(content, self._schemas, shape, where)]

    def _calls(self, message: Mapping[str, Any], role: str, shape: Shape, where: str) -> dict[str, Any]:
        calls = []
        if message.get("tool_calls"):
            calls = normalize_calls(message["tool_calls"], self._schemas, field_shape(shape, "tool_calls"), where)
        if legacy := message.get("function_call"):
            call = read_call(legacy, self._schemas, field_shape(shape, "function_call"), f"{where}: `function_call`")
            if calls and [c["function"] for c in calls] != [call["function"]]:
                raise ValueError(
                    f"{where} has a `function_call` beside other `tool_calls`, and chat templates print the latter "
                    "only. Write every call into `tool_calls`."
                )
            calls = calls or [call]
        if calls and role in ("system", "developer", "user", "tool"):
            raise ValueError(
                f"{where} calls a tool ({calls[0]['function']['name']}), which only the policy does, and chat "
                f"templates "
                "print no such call. Give the message the role 'assistant'."
            )
        return {"tool_calls": calls} if calls else {}

    def _take_over(self, form: Message, message: Mapping[str, Any], where: str) -> None:
        """Takes over the keys of a message that are neither its role nor its words nor its calls nor its flags."""
        for key, value in message.items():
            if key in _READ:
                continue
            if key in ("name", "tool_call_id"):
                form[key] = value
            elif key == "id" and form["role"] == "tool" and "tool_call_id" not in message:
                form["tool_call_id"] = value
            elif key in REASONING and form["role"] == "assistant":
                thought = read_text(value, "assistant", f"{where}: `{key}`")
                if thought and thought not in (form.get(other) for other in REASONING):
                    form[key] = thought
            elif value:
                self._take_unknown(form, key, value, where)

    def _take_unknown(self, form: Message, key: str, value: Any, where: str) -> None:
        if re.search(rf"\.{re.escape(key)}\b|['\"]{re.escape(key)}['\"]", self._template):
            form[key] = value
        elif self._left_out is None:
            raise ValueError(
                f"{where} has the key `{key}` ({brief(value)}), which the chat template does not print, so what it "
                f"says "
                "would vanish. Write it into `content`, or remove the key; `trl-multiturn convert` leaves such keys "
                "out and counts them."
            )
        else:
            self._left_out[key] = self._left_out.get(key, 0) + 1

    def _take_thought(self, form: Message, where: str) -> None:
        if form["role"] != "assistant" or any(form.get(key) for key in REASONING):
            raise ValueError(
                f"{where} follows a thought ({brief(self._thought)}) that is of no turn, so it would vanish. Put it "
                "before the turn that it led to, or drop the row."
            )
        form["reasoning_content"], self._thought = self._thought, ""

    def _append(self, form: Message, is_call: bool, where: str) -> None:
        last = self.messages[-1] if self.messages else {}
        if is_call and last.get("role") == "assistant":
            if last.get("train", True) != form.get("train", True):
                raise ValueError(
                    f"{where} belongs to the turn before it, but one of the two is to be trained and the other is "
                    f"not. "
                    "Flag both alike: a turn is trained as a whole or not at all."
                )
            if "reasoning_content" in form:
                raise ValueError(
                    f"{where} has a thought of its own beside the turn before it, and a turn thinks first. Join the "
                    "two as one message, or drop the row."
                )
            calls = [*last.get("tool_calls", ()), *form["tool_calls"]]
            form = {**form, **self.messages.pop(), "tool_calls": calls}
        if form["role"] == "assistant":
            self._unanswered = list(form.get("tool_calls", ()))
        elif form["role"] == "tool":
            self._name_result(form)
        self.messages.append(form)

    def _name_result(self, result: Message) -> None:
        """Gives a result the name of its call, which is told by its id or else by the order of calls."""
        identity, name = result.get("tool_call_id"), result.get("name")
        if identity is not None and any("id" in call for call in self._unanswered):
            matching = (call for call in self._unanswered if call.get("id") == identity)
        else:
            matching = (call for call in self._unanswered if name in (None, call["function"]["name"]))
        call = next(matching, None)
        if call is not None:
            self._unanswered.remove(call)
            result.setdefault("name", call["function"]["name"])


def _open_calls(messages: Sequence[Message]) -> list[dict[str, Any]]:
    """The calls of the last assistant turn that no result has answered, as far as their number tells."""
    results = 0
    for message in reversed(messages):
        if message["role"] != "tool":
            return list(message.get("tool_calls", ()))[results:]
        results += 1
    return []


def _is_normal(message: Any) -> bool:
    """Whether a message has TRL's form and nothing is to be added to it."""
    if type(message) is not dict or type(message.get("content")) is not str or None in message.values():
        return False
    role = message.get("role")
    if role == "assistant":
        return message.keys() <= _ASSISTANT_KEYS and (len(message) == 2 or _is_normal_turn(message))
    if role == "tool":
        return "name" in message and message.keys() <= _PLAIN_KEYS
    return role in ROLES and message.keys() <= _PLAIN_KEYS


def _is_normal_turn(message: Message) -> bool:
    calls = message.get("tool_calls")
    if "tool_calls" in message and (type(calls) is not list or not calls or not all(map(is_normal_call, calls))):
        return False
    reasoning = [message[key] for key in REASONING if key in message]
    return message.get("train", False) is False and len(reasoning) < 2 and all(type(r) is str and r for r in reasoning)


def _parameters(tools: Sequence[Any] | None) -> dict[str, Any]:
    """The schemas of the tools' parameters, by name."""
    functions = [tool.get("function") for tool in tools or () if isinstance(tool, Mapping)]
    return {f["name"]: f.get("parameters") or {} for f in functions if isinstance(f, Mapping) and "name" in f}
