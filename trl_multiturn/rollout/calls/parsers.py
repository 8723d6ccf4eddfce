"""Parsers of calls that a user names: one of vLLM's registry, or a function of the user's own."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from ..._lazy import load_path
from ...tools.base import tool_version
from .learned import Thought
from .literals import Literals
from .reading import Call, Reading, Sampled, UnreadableCallError, call_of
from .samples import NAME, SAMPLE, Samples


ToolParserFunction = Callable[[str, Sequence[Mapping[str, Any]]], Any]
"""Takes a turn's text and the JSON schemas of the tools. It returns the calls, each as `{"name", "arguments"}` or in
TRL's form, or an assistant message; a `ValueError` says that a call was begun and cannot be read."""

# Parsers of command lines take a union's second member, if one of the others is `None`
ToolParserLike = ToolParserFunction | str | None
"""What `RolloutConfig.tool_parser` may be."""

_VLLM_HOMES = ("vllm.tool_parsers", "vllm.entrypoints.openai.tool_parsers")
_VLLM_REQUESTS = ("vllm.entrypoints.openai.chat_completion.protocol", "vllm.entrypoints.openai.protocol")


class FunctionReader:
    """Reads turns with a function of the user's own.

    Args:
        function (`Callable`): see [`ToolParserFunction`].
        name (`str`): what it is called.
    """

    def __init__(self, function: ToolParserFunction, name: str):
        self.name = name
        self._function = function

    def read(self, turn: Sampled) -> Reading:
        try:
            found = self._function(turn.text, turn.tools)
        except ValueError as error:
            raise UnreadableCallError(str(error)) from error
        if isinstance(found, Mapping):
            return self._of_message(found)
        if found is None or (isinstance(found, Sequence) and not isinstance(found, str)):
            calls = [self._call(call) for call in found or ()]
            return Reading("" if calls else turn.text, calls)
        raise TypeError(
            f"{self.name} returned a {type(found).__name__}. Return a list of calls, each with `name` and "
            "`arguments`, or an assistant message."
        )

    def _of_message(self, message: Mapping[str, Any]) -> Reading:
        calls = [self._call(call) for call in message.get("tool_calls") or ()]
        known = ("reasoning_content", "reasoning", "thinking")
        key = next((key for key in known if message.get(key)), known[0])
        return Reading(message.get("content") or "", calls, message.get(key) or "", key)

    def _call(self, call: Any) -> Call:
        function = call.get("function", call) if isinstance(call, Mapping) else None
        if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
            raise TypeError(f"{self.name} returned {call!r} as a call. Return `name` and `arguments` of each.")
        arguments = function.get("arguments")
        if isinstance(arguments, str):
            try:
                arguments = json.loads(arguments)
            except ValueError as error:
                raise UnreadableCallError(f"The arguments are no JSON: {error}") from error
        return call_of(function["name"], {} if arguments is None else arguments, call.get("id"))


class VLLMReader:
    """Reads turns with a parser of vLLM's registry.

    Args:
        name (`str`): its name there.
        samples ([`Samples`]): turns of the chat template, which say what begins a call and what is reasoning.
    """

    def __init__(self, name: str, samples: Samples):
        self.name = f"vLLM's parser {name!r}"
        self._parser = vllm_registry().get_tool_parser(name)
        self._protocol = _first_module(_VLLM_REQUESTS)
        self._tokenizer = samples.tokenizer
        literals = Literals(samples.added)
        printed = (samples.calls(SAMPLE) or "").removeprefix(samples.head)
        self._begun = literals.marker(printed.partition(NAME)[0])
        self._thought = Thought.learn(samples, literals, self._begun or NAME)

    def read(self, turn: Sampled) -> Reading:
        reasoning, start, key = "", 0, "reasoning_content"
        if self._thought is not None:
            limit = turn.text.find(self._begun, self._thought.end(turn.text)) if self._begun else -1
            reasoning, start = self._thought.split(turn.text, limit if limit >= 0 else len(turn.text))
            key = self._thought.key
        text = turn.text[start:]
        tools = [self._protocol.ChatCompletionToolsParam(**_bare(tool)) for tool in turn.tools]
        request = self._protocol.ChatCompletionRequest(model="", messages=[], tools=tools or None)
        found = self._made(tools).extract_tool_calls(text, request)
        if not found.tools_called:
            if self._begun and self._begun in text:
                raise UnreadableCallError(f"A call was begun with {self._begun} and cannot be read.")
            return Reading(text, [], reasoning, key)
        return Reading(found.content or "", [_vllm_call(call) for call in found.tool_calls], reasoning, key)

    def _made(self, tools: list[Any]) -> Any:
        """A new parser: those of vLLM keep what they have read."""
        takes_tools = len(inspect.signature(self._parser).parameters) > 1
        return self._parser(self._tokenizer, tools) if takes_tools else self._parser(self._tokenizer)


def resolve_tool_parser(tool_parser: ToolParserLike) -> ToolParserFunction | str | None:
    """The function or the name of vLLM's that `RolloutConfig.tool_parser` stands for.

    Raises:
        `TypeError`: for what is neither a name nor a function of two arguments.
        `ValueError`: if a name is unknown, a path leads nowhere, or vLLM is not installed.
    """
    if tool_parser is None:
        return None
    if isinstance(tool_parser, str) and "." not in tool_parser:
        return _known_to_vllm(tool_parser)
    found: Any = tool_parser
    if isinstance(tool_parser, str):
        try:
            found = load_path(tool_parser)
        except ValueError as error:
            raise ValueError(
                f"`tool_parser={tool_parser!r}` could not be loaded ({error}). Pass {_CHOICES}."
            ) from error
    if not callable(found):
        raise TypeError(f"`tool_parser={tool_parser!r}` is a {type(found).__name__}, not a function. Pass {_CHOICES}.")
    try:
        inspect.signature(found).bind(None, None)
    except (TypeError, ValueError) as error:
        raise TypeError(
            f"`tool_parser={tool_parser!r}` does not take the two arguments `text` and `tools` ({error}). Pass "
            f"{_CHOICES}."
        ) from None
    return found


def named_reader(tool_parser: ToolParserFunction | str, samples: Samples) -> FunctionReader | VLLMReader:
    """The reader for a parser that was resolved."""
    if isinstance(tool_parser, str):
        return VLLMReader(tool_parser, samples)
    return FunctionReader(tool_parser, f"`tool_parser={getattr(tool_parser, '__qualname__', tool_parser)}`")


def describe_tool_parser(tool_parser: ToolParserLike) -> str:
    """What identifies a parser: the name of vLLM's, or where a function comes from, with its version."""
    found = resolve_tool_parser(tool_parser)
    if found is None or isinstance(found, str):
        return str(found)
    named = found if hasattr(found, "__qualname__") else type(found)
    return f"{named.__module__}.{named.__qualname__} {tool_version(found)}"


_CHOICES = (
    "a name from vLLM's registry of tool parsers, a function `(text, tools)` that returns a turn's calls, or its "
    "dotted path"
)


def vllm_registry() -> Any:
    """vLLM's `ToolParserManager`."""
    return _first_module(_VLLM_HOMES).ToolParserManager


def vllm_parser_names() -> list[str]:
    """The names in vLLM's registry."""
    registry = vllm_registry()
    return sorted({*getattr(registry, "lazy_parsers", ()), *registry.tool_parsers})


def _known_to_vllm(name: str) -> str:
    if importlib.util.find_spec("vllm") is None:
        raise ValueError(
            f"`tool_parser={name!r}` names a parser of vLLM, which is not installed. Install `vllm`, leave "
            f"`tool_parser` out (most templates need none), or pass {_CHOICES}."
        )
    names = vllm_parser_names()
    if name not in names:
        raise ValueError(
            f"`tool_parser={name!r}` is not in the registry of the installed vLLM, which has: {', '.join(names)}."
        )
    return name


def _first_module(names: Sequence[str]) -> Any:
    for name in names:
        try:
            return importlib.import_module(name)
        except ModuleNotFoundError:
            continue
    raise ImportError(f"The installed vLLM has none of the modules {', '.join(names)}. Use vLLM 0.22 or newer.")


def _bare(tool: Mapping[str, Any]) -> dict[str, Any]:
    """A schema without keys that vLLM's request does not know."""
    function = tool.get("function", tool)
    kept = {key: function[key] for key in ("name", "description", "parameters") if key in function}
    return {"type": "function", "function": kept}


def _vllm_call(call: Any) -> Call:
    try:
        return call_of(call.function.name, json.loads(call.function.arguments or "{}"))
    except ValueError as error:
        raise UnreadableCallError(f"The arguments are no JSON: {error}") from error
