"""Calls as JSON in tags, for chat templates that show none."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from .dialect import DialectSettings, Turn
from .native import NativeDialect


_CALL, _RESULT = "<tool_call>", "<tool_response>"


class HermesDialect(NativeDialect):
    """Calls as JSON in `<tool_call>` tags under any chat template, results in `<tool_response>` tags in a user turn.

    The tools, with any arguments, are described in the system message (in the first user message where the chat
    template has no system role). Messages are as in [`NativeDialect`]; how they become text is said once, for rollouts
    and for rows of messages with `tool_dialect="hermes"`. Calls are read as the template's own would be.

    Args:
        reader, schemas, answer_pattern, parallel: as in [`NativeDialect`].
    """

    name = "hermes"
    tool_dialect = "hermes"
    stop_strings: tuple[str, ...] = (_RESULT,)

    def read(self, text: str, sampled_ids: Sequence[int], prefix_ids: Sequence[int]) -> Turn:
        # Where the policy began to write the result of a call itself, it was stopped there
        turn = super().read(text.rstrip().removesuffix(_RESULT), sampled_ids, prefix_ids)
        if not turn.calls:
            return super().read(text, sampled_ids, prefix_ids)
        said = text.partition(_CALL)[0]
        if not said.strip() or said.strip() != turn.message["content"]:
            return turn
        # With its blanks, so that the message is written as the turn was
        return replace(turn, message={**turn.message, "content": said.lstrip().removesuffix("\n")})

    @classmethod
    def _template_kwargs(cls, config: DialectSettings) -> dict[str, Any]:
        return {**super()._template_kwargs(config), "tool_dialect": cls.tool_dialect}
