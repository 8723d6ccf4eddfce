"""The M-DPO paper's dialect: code in a fence, its output in a user turn."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from ...sandbox.result import ToolResult
from ...tools.base import ToolCall
from .dialect import DialectSettings, Message, Turn, text_parameter


BOXED = r"\\boxed\s*\{"


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
    template_tools: list[dict[str, Any]] | None = None

    def __init__(self, schemas: Sequence[dict[str, Any]], answer_pattern: str | None = None):
        self._parameters: dict[str, str] = {}
        for schema in schemas:
            parameter = text_parameter(schema)
            if parameter is None:
                raise ValueError(
                    f"Tool `{schema['function']['name']}` does not take exactly one required text argument, so a "
                    "fenced block cannot call it. Use `dialect='native'` with a chat template that supports tool "
                    "calls, or give the tool one argument."
                )
            self._parameters[schema["function"]["name"]] = parameter
        self.stop_strings: tuple[str, ...] = ("```output",) if self._parameters else ()
        self._answer = re.compile(answer_pattern or BOXED)
        names = "|".join(map(re.escape, self._parameters)) or r"(?!)"
        # A closing fence stands at the beginning of a line, so that code may hold backticks in its strings
        self._block = re.compile(rf"```({names})[ \t]*\n(.*?)(?P<close>^[ \t]*```|\Z)", re.DOTALL | re.MULTILINE)

    @classmethod
    def from_config(
        cls, processing_class: Any, schemas: Sequence[dict[str, Any]], config: DialectSettings
    ) -> FencedDialect:
        """The dialect that a configuration asks for."""
        return cls(schemas, config.answer_pattern)

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
        outputs = [result.output for result in results] or [turn.problem or ""]
        blocks = [f"```output\n{output.rstrip()}\n```" for output in outputs]
        return [{"role": "user", "content": "\n".join(blocks)}]
