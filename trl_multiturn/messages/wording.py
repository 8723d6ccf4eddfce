"""What is written into messages as text before a chat template renders them, because it shows it under no key."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from functools import cached_property
from typing import Any, Protocol

from transformers.utils import get_json_schema

from .conversation import REASONING, Message
from .tool_text import tool_text, with_description, with_thought_as_text, written_as_text


@dataclass(frozen=True)
class RenderingSwitches:
    """How messages of rows become text; each attribute is an argument of [`TurnTemplate`].

    Attributes:
        drop_reasoning (`bool`): without the reasoning of assistant turns.
        training_template (`bool`): by TRL's training template, where there is one.
        tool_dialect (`str`, *optional*): calls, results and tools in the words of this dialect.
        write_reasoning (`bool`): reasoning that the chat template cannot show, as text before the words of its turn.
    """

    drop_reasoning: bool = False
    training_template: bool = False
    tool_dialect: str | None = None
    write_reasoning: bool = False

    @classmethod
    def of(cls, args: Any) -> RenderingSwitches:
        """Those of a trainer's configuration, where it has them."""
        found: dict[str, Any] = {each.name: getattr(args, each.name, each.default) for each in fields(cls)}
        return cls(**found)

    def arguments(self) -> dict[str, Any]:
        """As keyword arguments of [`TurnTemplate`]."""
        return asdict(self)


AS_WRITTEN = RenderingSwitches()


class Shown(Protocol):
    """What a chat template shows, as far as it matters here."""

    @property
    def shows_system(self) -> bool:
        """Whether it shows a system message at the beginning."""
        ...

    @property
    def reasoning_is_text(self) -> bool:
        """Whether a policy's reasoning can only be text of its turns."""
        ...


class Wording:
    """Calls, results and tools in the words of a tool dialect, and reasoning that a template cannot show.

    Args:
        form ([`Shown`]): what the template shows.
        tools (`list[dict | Callable]`, *optional*): what the policy may call.
        switches ([`RenderingSwitches`]): without a tool dialect, messages stay as they are.

    Raises:
        `ValueError`: if there is no such dialect.
    """

    def __init__(self, form: Shown, tools: Sequence[Any] | None, switches: RenderingSwitches):
        self._form = form
        self._tools = tools or ()
        self._words = None if switches.tool_dialect is None else tool_text(switches.tool_dialect)
        self._write_reasoning = switches.write_reasoning

    def written(self, messages: Sequence[Message], opens: bool = True) -> list[Message]:
        """Messages in TRL's form in the dialect's words; those that open a conversation tell of the tools.

        Raises:
            `ValueError`: if the dialect has no words for a call.
        """
        if self._words is None:
            return list(messages)
        written = written_as_text(messages, self._words, self._schemas)
        return with_description(written, self._description, self._form.shows_system) if opens else written

    def with_thoughts(self, messages: Sequence[Message]) -> list[Message] | None:
        """Messages with their reasoning as text; `None` where that is not asked for, or changes nothing."""
        thinking = any(message.get(key) for message in messages for key in REASONING)
        if not thinking or not self._write_reasoning or not self._form.reasoning_is_text:
            return None
        return [with_thought_as_text(message, REASONING) for message in messages]

    @cached_property
    def _schemas(self) -> list[dict[str, Any]]:
        return [get_json_schema(tool) if callable(tool) else tool for tool in self._tools]

    @cached_property
    def _description(self) -> str:
        return "" if self._words is None else self._words.describe(self._schemas)
