"""The M-DPO paper's dialect: code in a fence, its output in a user turn."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from ...messages.images import content_of
from ...messages.tool_text import TOOL_DIALECTS, joined_results
from ...sandbox.result import ToolResult
from ...tools.base import ToolCall
from ...verify.answers import boxed_answers
from ...verify.fences import Block, FenceReader, after, has_fence
from .dialect import DialectSettings, Message, Turn, text_parameter


class FencedDialect:
    r"""The M-DPO paper's format: code in a fence, its output in a user turn, the answer in `\boxed{}`.

    A fence named after a tool is a call of it; its text is the tool's one required argument. What chat models write
    instead of ```` ```python ```` is read as well: `py`, `Python`, `python3`, tildes, a block on one line or indented.
    A block that is not closed, or whose language no tool runs, is answered by a hint.

    A final answer is a box with something in it after the last block. The box of a turn that goes on to write code is
    no answer (nor is "I will put the answer in \boxed{}"), and code before an answer is not run, as in the authors'
    code.

    Args:
        schemas (`list[dict]`):
            Tools with one required text argument, such as [`PythonTool`].
        answer_pattern (`str`, *optional*):
            Regular expression of a final answer, in place of the box.
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
        self.stop_strings: tuple[str, ...] = ("```output", "~~~output") if self._parameters else ()
        self._answers = re.compile(answer_pattern).search if answer_pattern else boxed_answers
        self._fences = FenceReader(self._parameters)

    @classmethod
    def from_config(
        cls, processing_class: Any, schemas: Sequence[dict[str, Any]], config: DialectSettings
    ) -> FencedDialect:
        """The dialect that a configuration asks for."""
        return cls(schemas, config.answer_pattern)

    def read(self, text: str, sampled_ids: Sequence[int], prefix_ids: Sequence[int]) -> Turn:
        message = {"role": "assistant", "content": text}
        blocks = list(self._fences.blocks(text))
        if self._answers(after(text, blocks)):
            return Turn(message, [], answered=True)
        problem = self._problem(text, blocks)
        calls = [ToolCall(block.tool, {self._parameters[block.tool]: block.text}) for block in blocks]
        return Turn(message, [] if problem else calls, answered=False, problem=problem)

    def _problem(self, text: str, blocks: Sequence[Block]) -> str | None:
        if blocks and not blocks[-1].closed:
            return "SyntaxError: the code block is not closed by a line ```"
        if not blocks and self._parameters and has_fence(text):
            names = " or ".join(f"```{name}" for name in self._parameters)
            return f"SyntaxError: nothing was run, because no code block begins with a line {names}"
        return None

    def observe(self, turn: Turn, results: Sequence[ToolResult]) -> list[Message]:
        outputs = [content_of(result.output, result.images) for result in results] or [turn.problem or ""]
        return [{"role": "user", "content": joined_results(outputs, TOOL_DIALECTS["fenced"])}]
