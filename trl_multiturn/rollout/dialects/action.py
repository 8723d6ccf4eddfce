"""The dialect of text environments: every turn is an action."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from ...sandbox.result import ToolResult
from ...tools.base import ToolCall
from .dialect import DialectSettings, Message, Turn, text_parameter


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
    stop_strings: tuple[str, ...] = ()
    template_tools: list[dict[str, Any]] | None = None

    def __init__(self, schemas: Sequence[dict[str, Any]], prefix: str = "Action:", answer_pattern: str | None = None):
        parameter = text_parameter(schemas[0]) if len(schemas) == 1 else None
        if parameter is None:
            names = ", ".join(schema["function"]["name"] for schema in schemas) or "none"
            raise ValueError(
                "`dialect='action'` needs exactly one tool with one required text argument, to which every turn goes; "
                f"the tools are: {names}. Use an environment with one such method, or another dialect."
            )
        self._tool, self._parameter, self._prefix = schemas[0]["function"]["name"], parameter, prefix
        self._answer = re.compile(answer_pattern) if answer_pattern else None

    @classmethod
    def from_config(
        cls, processing_class: Any, schemas: Sequence[dict[str, Any]], config: DialectSettings
    ) -> ActionDialect:
        """The dialect that a configuration asks for."""
        return cls(schemas, config.action_prefix, config.answer_pattern)

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
