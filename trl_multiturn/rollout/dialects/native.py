"""The chat template's own tool calls, parsed by TRL."""

from __future__ import annotations

import copy
import re
from collections.abc import Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase

from ... import _upstream
from ...sandbox.result import ToolResult, encodable
from ...tools.base import ToolCall
from .dialect import DialectSettings, Message, Turn


_MOST_LEVELS = 64


class NativeCallsImpossible(ValueError):
    """The chat template cannot render or parse tool calls."""


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
    stop_strings: tuple[str, ...] = ()

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

    @classmethod
    def from_config(
        cls, processing_class: Any, schemas: Sequence[dict[str, Any]], config: DialectSettings
    ) -> NativeDialect:
        """The dialect with the response template that TRL knows, where the tokenizer has none.

        Raises:
            [`NativeCallsImpossible`]: if the chat template cannot render or parse tool calls.
        """
        tokenizer = getattr(processing_class, "tokenizer", processing_class)
        if not schemas:
            return cls(tokenizer, schemas, config.answer_pattern)
        obstacle = None
        if not _upstream.supports_tool_calling(processing_class):
            obstacle = "the chat template leaves out tool calls or tool results when it renders a conversation"
        elif getattr(tokenizer, "response_template", None) is None:
            tokenizer = copy.copy(tokenizer)  # the user's tokenizer stays as it is
            try:
                _upstream.add_response_schema(tokenizer)
            except ValueError:
                obstacle = "the tokenizer has no `response_template`, and TRL knows none for its chat template"
        if obstacle is not None:
            raise NativeCallsImpossible(
                f"Native tool calls are not possible: {obstacle}. Use a chat template with tool calls and set "
                "`tokenizer.response_template`, or offer one tool with one text argument and `dialect='fenced'`."
            )
        return cls(tokenizer, schemas, config.answer_pattern)

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
        message["content"] = message["content"].removesuffix(self._tokenizer.decode(list(sampled_ids))[len(text) :])
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
    match = re.match(r"(?:\\\W|[^\\()\[\]{}.*+?|^$])*", pattern)
    literal = match[0] if match else ""
    unescaped = re.sub(r"\\(\W)", r"\1", literal or pattern)
    if literal:
        return unescaped
    # A pattern that begins with a choice: the special token in it, for its other branches may match prose
    return next((token for token in tokenizer.get_added_vocab() if token in unescaped), "\0")
