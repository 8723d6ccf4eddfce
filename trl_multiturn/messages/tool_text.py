"""Calls, results and tools as text: for policies whose chat template shows none of them.

A *tool dialect* says in which words. Rollouts and rows of messages share it, so that a row under a dialect is what a
policy would have read and written that was sampled under it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from itertools import groupby
from typing import Any, Protocol


Message = dict[str, Any]

THOUGHT = "<think>\n{}\n</think>\n\n"
"""How reasoning is written that a chat template shows under no key."""


class ToolText(Protocol):
    """The words of a tool dialect."""

    def describe(self, tools: Sequence[Mapping[str, Any]]) -> str:
        """What tells a policy which tools there are, and how it calls them; empty where prompts say so themselves."""
        ...

    def call(self, name: str, arguments: Mapping[str, Any], tools: Sequence[Mapping[str, Any]]) -> str:
        """A call, as a policy writes it.

        Raises:
            `ValueError`: if the dialect has no words for it.
        """
        ...

    def result(self, output: str) -> str:
        """The output of a tool, as a policy reads it."""
        ...


class HermesText:
    """JSON in tags, as Hermes, Qwen2.5 and many other models are trained to write: any tool, any arguments.

    ```
    <tool_call>
    {"name": "add", "arguments": {"a": 2, "b": 2}}
    </tool_call>
    ```
    """

    def describe(self, tools: Sequence[Mapping[str, Any]]) -> str:
        if not tools:
            return ""
        schemas = "\n".join(json.dumps(tool, ensure_ascii=False) for tool in tools)
        return (
            "# Tools\n\nYou can call these functions, of which each line holds a JSON schema:\n"
            f"<tools>\n{schemas}\n</tools>\n\n"
            "A call is a JSON object with the function's name and its arguments, within tags:\n"
            '<tool_call>\n{"name": <name>, "arguments": <arguments>}\n</tool_call>\n'
            "Its result comes back within <tool_response></tool_response> tags."
        )

    def call(self, name: str, arguments: Mapping[str, Any], tools: Sequence[Mapping[str, Any]]) -> str:
        written = json.dumps({"name": name, "arguments": arguments}, ensure_ascii=False)
        return f"<tool_call>\n{written}\n</tool_call>"

    def result(self, output: str) -> str:
        return f"<tool_response>\n{output}\n</tool_response>"


class FencedText:
    """A fenced block with the name of a tool, whose text is the tool's one required argument; see [`FencedDialect`].

    The prompts themselves tell the policy of the tools.
    """

    def describe(self, tools: Sequence[Mapping[str, Any]]) -> str:
        return ""

    def call(self, name: str, arguments: Mapping[str, Any], tools: Sequence[Mapping[str, Any]]) -> str:
        text = next(iter(arguments.values()), None)
        schema = next((tool for tool in tools if tool.get("function", {}).get("name") == name), None)
        known = schema is None or text_parameter(schema) in arguments
        if len(arguments) != 1 or not isinstance(text, str) or not known:
            raise ValueError(
                f"`{name}` is called with the arguments {sorted(arguments)}, and a fenced block holds one required "
                "text. Use `tool_dialect='hermes'`, which writes any arguments."
            )
        # Longer than what begins a line of the text, which would end the block
        longest = max((len(fence) for fence in re.findall(r"^[ \t]*(`{3,})", text, re.MULTILINE)), default=2)
        fence = "`" * (longest + 1)
        return f"{fence}{name}\n{text}{'' if text.endswith(chr(10)) else chr(10)}{fence}"

    def result(self, output: str) -> str:
        return f"```output\n{output.rstrip()}\n```"


TOOL_DIALECTS: dict[str, ToolText] = {"hermes": HermesText(), "fenced": FencedText()}
"""Dialects in which calls and results are text."""


def tool_text(dialect: str) -> ToolText:
    """The words of a dialect.

    Raises:
        `ValueError`: if there is none of this name.
    """
    if dialect not in TOOL_DIALECTS:
        raise ValueError(
            f"`tool_dialect={dialect!r}` is none of {', '.join(map(repr, TOOL_DIALECTS))}, in which calls are text. "
            "Use one of these, or leave it out for the chat template's own calls."
        )
    return TOOL_DIALECTS[dialect]


def written_as_text(
    messages: Sequence[Message], words: ToolText, tools: Sequence[Mapping[str, Any]] = ()
) -> list[Message]:
    """Messages in TRL's form with calls and results as text; what needs no change stays the same object.

    Args:
        messages (`list[dict]`): each call goes behind the content of its turn; results in a row become one user turn.
        words ([`ToolText`]): the dialect.
        tools (`list[dict]`): JSON schemas of the tools.

    Raises:
        `ValueError`: if the dialect has no words for a call.
    """
    written: list[Message] = []
    for is_result, run in groupby(messages, key=lambda message: message["role"] == "tool"):
        if is_result:
            written.append({"role": "user", "content": joined_results([m.get("content") or "" for m in run], words)})
        else:
            written += (_with_calls_as_text(message, words, tools) for message in run)
    return written


def joined_results(outputs: Sequence[Any], words: ToolText) -> Any:
    """The content of the user turn that answers calls: text, or parts where an output has images."""
    parts = [[{"type": "text", "text": output}] if isinstance(output, str) else output for output in outputs]
    images = [part for output in parts for part in output if part.get("type") == "image"]
    texts = ("".join(part.get("text") or "" for part in output) for output in parts)
    text = "\n".join(map(words.result, texts))
    return [*images, {"type": "text", "text": text}] if images else text


def with_description(messages: Sequence[Message], description: str, in_system: bool) -> list[Message]:
    """Messages of which the first tells of the tools: the system's, behind its own words, or the first of a user.

    Args:
        messages (`list[dict]`): the beginning of a conversation.
        description (`str`): see [`ToolText.describe`].
        in_system (`bool`): whether the chat template shows system messages.
    """
    if not description:
        return list(messages)
    if messages and messages[0]["role"] in ("system", "developer"):
        return [_with_more(messages[0], behind=f"\n\n{description}"), *messages[1:]]
    user = next((at for at, message in enumerate(messages) if message["role"] == "user"), None)
    if in_system or user is None:
        return [{"role": "system", "content": description}, *messages]
    told = _with_more(messages[user], before=f"{description}\n\n")
    return [*messages[:user], told, *messages[user + 1 :]]


def with_thought_as_text(message: Message, keys: Sequence[str]) -> Message:
    """A turn with its reasoning before its words; one without reasoning stays the same object."""
    thought = next((message[key] for key in keys if message.get(key)), None)
    if thought is None or message["role"] != "assistant":
        return message
    bare = {name: value for name, value in message.items() if name not in keys}
    return _with_more(bare, before=THOUGHT.format(str(thought).strip("\n")))


def text_parameter(schema: Mapping[str, Any]) -> str | None:
    """The name of a tool's only required argument, where that is text."""
    parameters = schema["function"].get("parameters", {})
    required = parameters.get("required", [])
    if len(required) == 1 and parameters.get("properties", {}).get(required[0], {}).get("type") == "string":
        return str(required[0])
    return None


def _with_calls_as_text(message: Message, words: ToolText, tools: Sequence[Mapping[str, Any]]) -> Message:
    if not message.get("tool_calls"):
        return message
    functions = [call["function"] for call in message["tool_calls"]]
    calls = "\n".join(words.call(function["name"], function["arguments"], tools) for function in functions)
    silent = {key: value for key, value in message.items() if key != "tool_calls"}
    said = bool(message.get("content"))
    return _with_more(silent, behind=f"\n{calls}" if said else calls)


def _with_more(message: Message, before: str = "", behind: str = "") -> Message:
    content = message.get("content") or ""
    if isinstance(content, str):
        return {**message, "content": f"{before}{content}{behind}"}
    first, last = ([{"type": "text", "text": text}] if text else [] for text in (before, behind))
    return {**message, "content": [*first, *content, *last]}
