"""The chat template's own tool calls."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from ...messages.images import content_of
from ...sandbox.result import ToolResult, encodable
from ...tools.base import ToolCall
from ..calls import CallReader, Reading, Sampled, UnreadableCallError, UnreadableTemplateError, choose_reader
from .dialect import DialectSettings, Message, Turn


_MOST_LEVELS = 64
_UNREADABLE = str({"error": "The tool call could not be read."})
_ONE_AT_A_TIME = str({"error": "Only one tool call per turn is possible, so none was run. Call one tool at a time."})


class NativeCallsImpossible(ValueError):
    """The chat template cannot render tool calls, or what it renders cannot be read."""


class NativeDialect:
    """The chat template's own tool calls; results are messages of role `tool`.

    Args:
        reader ([`CallReader`], *optional*):
            Reads calls; not needed without tools.
        schemas (`list[dict]`):
            The tools.
        answer_pattern (`str`, *optional*):
            Regular expression of a final answer; any text without a call by default, as in [`~trl.GRPOTrainer`].
        parallel (`bool`, *optional*, defaults to `True`):
            Whether the chat template shows several calls in one turn. Where it does not, a turn with several is
            answered by a hint.
    """

    name = "native"
    stop_strings: tuple[str, ...] = ()

    def __init__(
        self,
        reader: CallReader | None,
        schemas: Sequence[dict[str, Any]],
        answer_pattern: str | None = None,
        parallel: bool = True,
    ):
        self.reader = reader
        self.parallel = parallel
        self.template_tools = list(schemas) or None
        self._answer = re.compile(answer_pattern or r"\S")

    @classmethod
    def from_config(
        cls, processing_class: Any, schemas: Sequence[dict[str, Any]], config: DialectSettings
    ) -> NativeDialect:
        """The dialect with the reader that fits the chat template.

        Raises:
            [`NativeCallsImpossible`]: if the chat template cannot render tool calls, or no reader gives them back.
            `ValueError`: if `tool_parser` does not.
        """
        if not schemas:
            return cls(None, schemas, config.answer_pattern)
        try:
            fit = choose_reader(processing_class, cls._template_kwargs(config), config.tool_parser)
        except UnreadableTemplateError as error:
            raise NativeCallsImpossible(
                f"Native tool calls are not possible: {error}. Use a chat template with tool calls, set "
                "`tokenizer.response_template`, take `dialect='hermes'`, which writes calls as text, or offer one "
                "tool with one text argument and `dialect='fenced'`."
            ) from error
        return cls(fit.reader, schemas, config.answer_pattern, fit.parallel)

    @classmethod
    def _template_kwargs(cls, config: DialectSettings) -> dict[str, Any]:
        """Arguments of the [`TurnTemplate`] that prints the calls to be read."""
        return dict(config.chat_template_kwargs or {})

    def read(self, text: str, sampled_ids: Sequence[int], prefix_ids: Sequence[int]) -> Turn:
        written = {"role": "assistant", "content": text}
        if self.reader is None or not sampled_ids:
            return Turn(written, [], answered=self._answer.search(text) is not None)
        try:
            reading = self._plainly(Sampled(text, sampled_ids, prefix_ids, self.template_tools or ()))
        except UnreadableCallError:
            return Turn(written, [], answered=False, problem=_UNREADABLE)
        if len(reading.calls) > 1 and not self.parallel:
            return Turn(written, [], answered=False, problem=_ONE_AT_A_TIME)
        if reading.calls:
            return Turn(reading.message(), [_tool_call(call) for call in reading.calls], answered=False)
        answered = self._answer.search(reading.content) is not None
        # Readers trim blanks; what they take apart (reasoning, channels) must stay apart to render again
        return Turn(written if text.strip() == reading.content.strip() else reading.message(), [], answered)

    def _plainly(self, turn: Sampled) -> Reading:
        assert self.reader is not None
        reading = self.reader.read(turn)
        try:
            return Reading(
                encodable(reading.content), _plain(reading.calls), encodable(reading.reasoning), reading.reasoning_key
            )
        except RecursionError as error:
            raise UnreadableCallError(str(error)) from error

    def observe(self, turn: Turn, results: Sequence[ToolResult]) -> list[Message]:
        if not results:  # strict templates accept a tool message only after a call
            return [{"role": "user", "content": turn.problem}]
        messages = []
        for call, result in zip(turn.calls, results, strict=True):
            message = {"role": "tool", "name": call.name, "content": content_of(result.output, result.images)}
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
