"""How a policy writes a tool call, and how the answer reaches it: the text between two sampled turns.

A dialect reads one sampled turn (message, calls, whether it answers) and words the observations. What the policy wrote
badly is data: [`Turn.problem`] says what was wrong, in words for the policy.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from transformers import PreTrainedTokenizerBase

from .. import _upstream
from ..sandbox.result import ToolResult, encodable
from ..tools.base import ToolCall


Message = dict[str, Any]

_MOST_LEVELS = 64

BOXED = r"\\boxed\s*\{"


@dataclass(frozen=True)
class Turn:
    """One sampled turn, read.

    Attributes:
        message (`dict`): the assistant message; without calls, its content is exactly what the policy wrote.
        calls (`list[ToolCall]`): the calls in it, in order.
        answered (`bool`): whether it is a final answer.
        problem (`str`, *optional*): what is wrong with a call that could not be read.
    """

    message: Message
    calls: list[ToolCall]
    answered: bool
    problem: str | None = None


class Dialect(Protocol):
    """Reads turns and words observations; made by [`choose_dialect`].

    `stop_strings` end a turn; `template_tools` are the schemas that the chat template shows to the policy, or `None`.
    """

    name: str
    stop_strings: tuple[str, ...]
    template_tools: list[dict[str, Any]] | None

    def read(self, text: str, sampled_ids: Sequence[int], prefix_ids: Sequence[int]) -> Turn:
        """Reads a turn that was sampled after `prefix_ids`; `text` is the turn without the token that ended it."""
        ...

    def observe(self, turn: Turn, results: Sequence[ToolResult]) -> list[Message]:
        """The messages that answer a turn's calls, or its problem where there are no `results`."""
        ...


class FencedDialect:
    r"""The M-DPO paper's format: code in a fence, its output in a user turn, the answer in `\boxed{}`.

    A fence named after a tool is a call of it; its text is the tool's one required argument. Calls in a turn that also
    answers (outside its code) are not run, as in the authors' code.

    Args:
        schemas (`list[dict]`):
            Tools with one required text argument, such as [`PythonTool`].
        answer_pattern (`str`, *optional*):
            Regular expression of a final answer.
    """

    name = "fenced"
    template_tools = None

    def __init__(self, schemas: Sequence[dict[str, Any]], answer_pattern: str | None = None):
        self._parameters = {}
        for schema in schemas:
            parameter = _text_parameter(schema)
            if parameter is None:
                raise ValueError(
                    f"Tool `{schema['function']['name']}` does not take exactly one required text argument, so a "
                    "fenced block cannot call it. Use `dialect='native'` with a chat template that supports tool "
                    "calls, or give the tool one argument."
                )
            self._parameters[schema["function"]["name"]] = parameter
        self.stop_strings = ("```output",) if self._parameters else ()
        self._answer = re.compile(answer_pattern or BOXED)
        names = "|".join(map(re.escape, self._parameters)) or r"(?!)"
        # A closing fence stands at the beginning of a line, so that code may hold backticks in its strings
        self._block = re.compile(rf"```({names})[ \t]*\n(.*?)(?P<close>^[ \t]*```|\Z)", re.DOTALL | re.MULTILINE)

    def read(self, text: str, sampled_ids: Sequence[int], prefix_ids: Sequence[int]) -> Turn:
        message = {"role": "assistant", "content": text}
        if self._answer.search(self._block.sub("", text)):
            return Turn(message, [], answered=True)
        blocks = list(self._block.finditer(text))
        if blocks and not blocks[-1]["close"]:
            return Turn(message, [], answered=False, problem="SyntaxError: the code block is not closed by a line ```")
        calls = [ToolCall(match[1], {self._parameters[match[1]]: match[2]}) for match in blocks]
        return Turn(message, calls, answered=False)

    def observe(self, turn: Turn, results: Sequence[ToolResult]) -> list[Message]:
        outputs = [result.output for result in results] or [turn.problem]
        blocks = [f"```output\n{output.rstrip()}\n```" for output in outputs]
        return [{"role": "user", "content": "\n".join(blocks)}]


class NativeDialect:
    """The chat template's own tool calls, read by TRL's `parse_response`; results are messages of role `tool`.

    Args:
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            With a `response_template`, unless there are no tools.
        schemas (`list[dict]`):
            The tools.
        answer_pattern (`str`, *optional*):
            Regular expression of a final answer; any text without a call by default, as in [`~trl.GRPOTrainer`].
    """

    name = "native"
    stop_strings = ()

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        schemas: Sequence[dict[str, Any]],
        answer_pattern: str | None = None,
    ):
        self._tokenizer = tokenizer
        self.template_tools = list(schemas) or None
        self._answer = re.compile(answer_pattern or r"\S")
        self._opening = _call_opening(tokenizer) if schemas else None

    def read(self, text: str, sampled_ids: Sequence[int], prefix_ids: Sequence[int]) -> Turn:
        written = {"role": "assistant", "content": text}
        if self._opening is None or not sampled_ids:
            return Turn(written, [], answered=self._answer.search(text) is not None)
        try:
            message = _plain(
                _upstream.parse_response(
                    self._tokenizer, list(sampled_ids), prefix=list(prefix_ids), tools=self.template_tools
                )
            )
        except RecursionError:  # a policy that degenerates writes brackets in brackets
            message = dict(written)
        # Some parsers leave the end of a tool call's turn in the content
        message["content"] = message["content"].removesuffix(self._tokenizer.decode(sampled_ids)[len(text) :])
        opened = self._opening in text
        if message.get("tool_calls") and opened:
            return Turn(message, [_tool_call(call) for call in message["tool_calls"]], answered=False)
        if message.get("tool_calls"):  # some response patterns also match prose, such as `, f(` for `[f(`
            return Turn(written, [], answered=self._answer.search(text) is not None)
        if opened:
            return Turn(written, [], answered=False, problem=str({"error": "The tool call could not be read."}))
        answered = self._answer.search(message["content"]) is not None
        # The parser trims blanks; what it takes apart (reasoning, channels) must stay apart to render again
        return Turn(written if text.strip() == message["content"].strip() else message, [], answered)

    def observe(self, turn: Turn, results: Sequence[ToolResult]) -> list[Message]:
        if not results:  # strict templates accept a tool message only after a call
            return [{"role": "user", "content": turn.problem}]
        messages = []
        for call, result in zip(turn.calls, results, strict=True):
            message = {"role": "tool", "name": call.name, "content": result.output}
            messages.append({**message, "tool_call_id": call.id} if call.id else message)
        return messages


class ActionDialect:
    """Text environments in ALFWorld's manner: a turn is an action, its observation a user turn.

    Args:
        schemas (`list[dict]`):
            The environment's one tool, with one required text argument.
        prefix (`str`, *optional*, defaults to `"Action:"`):
            What stands before the action; the rest of that line is the action, and what stands before is thought.
            Empty: the whole turn is the action.
        answer_pattern (`str`, *optional*):
            Regular expression of a final answer. By default there is none: the environment ends the episode.
    """

    name = "action"
    stop_strings = ()
    template_tools = None

    def __init__(self, schemas: Sequence[dict[str, Any]], prefix: str = "Action:", answer_pattern: str | None = None):
        parameter = _text_parameter(schemas[0]) if len(schemas) == 1 else None
        if parameter is None:
            names = ", ".join(schema["function"]["name"] for schema in schemas) or "none"
            raise ValueError(
                "`dialect='action'` needs exactly one tool with one required text argument, to which every turn goes; "
                f"the tools are: {names}. Use an environment with one such method, or another dialect."
            )
        self._tool, self._parameter, self._prefix = schemas[0]["function"]["name"], parameter, prefix
        self._answer = re.compile(answer_pattern) if answer_pattern else None

    def read(self, text: str, sampled_ids: Sequence[int], prefix_ids: Sequence[int]) -> Turn:
        message = {"role": "assistant", "content": text}
        if self._answer is not None and self._answer.search(text):
            return Turn(message, [], answered=True)
        action = text.strip()
        if self._prefix:
            action = text.rpartition(self._prefix)[2].strip().partition("\n")[0] if self._prefix in text else ""
        if not action:
            return Turn(message, [], answered=False, problem=f"Error: write `{self._prefix}` and one action after it.")
        return Turn(message, [ToolCall(self._tool, {self._parameter: action})], answered=False)

    def observe(self, turn: Turn, results: Sequence[ToolResult]) -> list[Message]:
        return [{"role": "user", "content": results[0].output if results else turn.problem}]


def choose_dialect(
    dialect: str,
    processing_class: Any,
    schemas: Sequence[dict[str, Any]],
    answer_pattern: str | None = None,
    action_prefix: str = "Action:",
) -> Dialect:
    """The dialect that `RolloutConfig.dialect` names, checked against template and tools.

    Raises:
        `ValueError`: if the chat template cannot render or parse tool calls and the tools cannot be called by a fence.
    """
    tokenizer = getattr(processing_class, "tokenizer", processing_class)
    if dialect == "fenced":
        return FencedDialect(schemas, answer_pattern)
    if dialect == "action":
        return ActionDialect(schemas, action_prefix, answer_pattern)
    if not schemas:
        return NativeDialect(tokenizer, schemas, answer_pattern)
    obstacle = None
    if not _upstream.supports_tool_calling(processing_class):
        obstacle = "the chat template leaves out tool calls or tool results when it renders a conversation"
    elif getattr(tokenizer, "response_template", None) is None:
        tokenizer = copy.copy(tokenizer)  # the user's tokenizer stays as it is
        try:
            _upstream.add_response_schema(tokenizer)
        except ValueError:
            obstacle = "the tokenizer has no `response_template`, and TRL knows none for its chat template"
    if obstacle is None:
        return NativeDialect(tokenizer, schemas, answer_pattern)
    if dialect == "auto" and all(_text_parameter(schema) for schema in schemas):
        return FencedDialect(schemas, answer_pattern)
    raise ValueError(
        f"Native tool calls are not possible: {obstacle}. Use a chat template with tool calls and set "
        "`tokenizer.response_template`, or offer one tool with one text argument and `dialect='fenced'`."
    )


def _text_parameter(schema: dict[str, Any]) -> str | None:
    """The name of a tool's only required argument, where that is text."""
    parameters = schema["function"].get("parameters", {})
    required = parameters.get("required", [])
    if len(required) == 1 and parameters.get("properties", {}).get(required[0], {}).get("type") == "string":
        return required[0]
    return None


def _plain(value: Any, levels: int = _MOST_LEVELS) -> Any:
    """
    A value read from JSON, without the half surrogate pairs that JSON can spell and no tokenizer and no file can hold.

    Raises:
        `RecursionError`: if it is nested so deeply that what reads it later, deeper in the stack, could fail.
    """
    if isinstance(value, str):
        return encodable(value)
    if not isinstance(value, (dict, list)):
        return value
    if levels == 0:
        raise RecursionError(f"The value is nested in more than {_MOST_LEVELS} levels.")
    if isinstance(value, list):
        return [_plain(each, levels - 1) for each in value]
    return {_plain(name): _plain(each, levels - 1) for name, each in value.items()}


def _tool_call(call: dict[str, Any]) -> ToolCall:
    function = call.get("function", call)
    return ToolCall(function["name"], function.get("arguments"), call.get("id"))


def _call_opening(tokenizer: PreTrainedTokenizerBase) -> str:
    """The literal text that begins a tool call in this tokenizer's response template."""
    field = (tokenizer.response_template or {}).get("fields", {}).get("tool_calls")
    if not field:
        raise ValueError(
            "The tokenizer's `response_template` has no field `tool_calls`, so no call could ever be read. Add the "
            "field, or use `dialect='fenced'`."
        )
    if "open" in field:
        return field["open"]
    pattern = field["open_pattern"]
    literal = re.match(r"(?:\\\W|[^\\()\[\]{}.*+?|^$])*", pattern)[0]
    unescaped = re.sub(r"\\(\W)", r"\1", literal or pattern)
    if literal:
        return unescaped
    # A pattern that begins with a choice: the special token in it, for its other branches may match prose
    return next((token for token in tokenizer.get_added_vocab() if token in unescaped), "\0")
