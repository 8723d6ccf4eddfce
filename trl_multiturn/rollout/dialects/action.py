"""The dialect of text environments: every turn is an action."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from ...messages.images import content_of
from ...sandbox.result import ToolResult
from ...tools.base import ToolCall
from .dialect import DialectSettings, Message, Turn, text_parameter


class ActionDialect:
    """Text environments in ALFWorld's manner: a turn is an action, its observation a user turn.

    The first action of a turn counts, and the turn ends with its line: what a policy writes after it (an invented
    observation, the next action) is taken off, as if sampling had stopped there.

    Args:
        schemas (`list[dict]`):
            The environment's one tool, with one required text argument.
        prefix (`str`, *optional*, defaults to `"Action:"`):
            What stands before the action; the rest of that line is the action, and what stands before is thought.
            Marks of emphasis and code (`**Action:** look`) belong to neither. Empty: the whole turn is the action.
        answer_pattern (`str`, *optional*):
            Regular expression of a final answer. By default there is none: the environment ends the episode.
    """

    name = "action"
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
        self._action = _action_pattern(prefix) if prefix else None
        self.stop_strings: tuple[str, ...] = ("\nObservation:",) if prefix else ()

    @classmethod
    def from_config(
        cls, processing_class: Any, schemas: Sequence[dict[str, Any]], config: DialectSettings
    ) -> ActionDialect:
        """The dialect that a configuration asks for."""
        return cls(schemas, config.action_prefix, config.answer_pattern)

    def turn_end(self, text: str) -> int | None:
        """Where a turn is over: at the end of the line of its first action."""
        line = self._first_action(text)
        return line.end() if line else None

    def read(self, text: str, sampled_ids: Sequence[int], prefix_ids: Sequence[int]) -> Turn:
        message = {"role": "assistant", "content": text}
        if self._answer is not None and self._answer.search(text[: self.turn_end(text)]):
            return Turn(message, [], answered=True)
        line = self._first_action(text)
        action = _unmarked(line["action"]) if line else "" if self._action else text.strip()
        if not action:
            problem = f"SyntaxError: write `{self._prefix}` and one action after it."
            return Turn(message, [], answered=False, problem=problem)
        return Turn(message, [ToolCall(self._tool, {self._parameter: action})], answered=False)

    def _first_action(self, text: str) -> re.Match[str] | None:
        line = self._action.search(text) if self._action is not None else None
        return line if line and _unmarked(line["action"]) and not line["action"].startswith("Observation:") else None

    def observe(self, turn: Turn, results: Sequence[ToolResult]) -> list[Message]:
        content = content_of(results[0].output, results[0].images) if results else turn.problem
        return [{"role": "user", "content": content}]


def _action_pattern(prefix: str) -> re.Pattern[str]:
    """What follows the prefix on its line, or on the next one with something on it, without marks of emphasis."""
    word, colon = re.escape(prefix.rstrip().removesuffix(":")), ":" if prefix.rstrip().endswith(":") else ""
    return re.compile(rf"{word}[*`]*{colon}[\s*`]*(?P<action>[^\n]*)")


def _unmarked(action: str) -> str:
    return action.rstrip("*` \t\r")
