"""What every dialect shares: a turn that was read, and what a dialect has to offer."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

from ...messages.tool_text import text_parameter as text_parameter
from ...sandbox.result import ToolResult
from ...tools.base import ToolCall


Message = dict[str, Any]


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


@runtime_checkable
class Dialect(Protocol):
    """Reads turns and words observations. One dialect serves all trajectories with the same tools.

    One that ends turns by itself is an [`EndsTurns`] too.

    Attributes:
        name (`str`): kept with every trajectory.
        stop_strings (`tuple[str, ...]`): strings that end a turn.
        template_tools (`list[dict]`, *optional*): the schemas that the chat template shows to the policy; `None` where
            the dialect has no need of the template's own tool calls.
    """

    name: str
    stop_strings: tuple[str, ...]
    template_tools: list[dict[str, Any]] | None

    def read(self, text: str, sampled_ids: Sequence[int], prefix_ids: Sequence[int]) -> Turn:
        """Reads a turn that was sampled after `prefix_ids`; `text` is the turn without the token that ended it.

        What the policy wrote badly is data ([`Turn.problem`]) and raises nothing.
        """
        ...

    def observe(self, turn: Turn, results: Sequence[ToolResult]) -> list[Message]:
        """The messages that answer a turn's calls, or its problem where there are no `results`."""
        ...


@runtime_checkable
class WritesTools(Protocol):
    """A dialect with messages like the chat template's own (`tool_calls`, role `tool`), whose calls are text all the
    same: `tool_dialect` names the words, as in [`TurnTemplate`]."""

    tool_dialect: str


@runtime_checkable
class EndsTurns(Protocol):
    """A dialect that ends turns by itself."""

    def turn_end(self, text: str) -> int | None:
        """Where in its text a turn is over, `None` where it is not. The tokens that the policy sampled after that are
        taken off, as if it had been stopped there."""
        ...


class DialectSettings(Protocol):
    """What a dialect reads of its configuration, which is a [`RolloutConfig`] in a rollout."""

    answer_pattern: str | None
    action_prefix: str
    chat_template_kwargs: Any
    tool_parser: Any


DialectFactory = Callable[[Any, Sequence[dict[str, Any]], Any], Dialect]
"""Makes a dialect of the policy's processing class, the JSON schemas of the tools and the [`RolloutConfig`]. The class
of a dialect is one, if its constructor takes these three, or if it is a [`FromConfig`]."""

# Parsers of command lines take a union's second member, if one of the others is `None`
DialectLike = Dialect | str | None | DialectFactory
"""What `RolloutConfig.dialect` may be; see [`~trl_multiturn.rollout.dialects.resolve_dialect`]."""


@runtime_checkable
class FromConfig(Protocol):
    """The class of a dialect whose constructor takes other arguments, as those of this package do."""

    def from_config(
        self, processing_class: Any, schemas: Sequence[dict[str, Any]], config: DialectSettings
    ) -> Dialect:
        """A class method: the dialect that a configuration asks for."""
        ...
