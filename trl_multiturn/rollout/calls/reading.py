"""A sampled turn, taken apart."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol


Call = dict[str, Any]


class UnreadableCallError(ValueError):
    """A call was begun and cannot be read: the policy's mistake."""


@dataclass(frozen=True)
class Reading:
    """A sampled turn, taken apart.

    Attributes:
        content (`str`): what it says.
        calls (`list[dict]`): its calls in TRL's form.
        reasoning (`str`): what it thinks.
        reasoning_key (`str`): the key under which the chat template shows reasoning.
    """

    content: str
    calls: list[Call] = field(default_factory=list)
    reasoning: str = ""
    reasoning_key: str = "reasoning_content"

    def message(self) -> dict[str, Any]:
        """The assistant's message."""
        message: dict[str, Any] = {"role": "assistant", "content": self.content}
        if self.reasoning:
            message[self.reasoning_key] = self.reasoning
        return {**message, "tool_calls": self.calls} if self.calls else message


@dataclass(frozen=True)
class Sampled:
    """A turn as it was sampled.

    Attributes:
        text (`str`): its text, without the token that ended it.
        ids (`Sequence[int]`): its token ids, with that token.
        prefix_ids (`Sequence[int]`): what the policy had read, from the generation prompt at least.
        tools (`Sequence[dict]`): JSON schemas of the tools, which decide what is text and what a number.
    """

    text: str
    ids: Sequence[int] = ()
    prefix_ids: Sequence[int] = ()
    tools: Sequence[dict[str, Any]] = ()


class CallReader(Protocol):
    """Takes sampled turns apart.

    Attributes:
        name (`str`): what reads: a response template of TRL, a parser of vLLM, the format that was learned.
    """

    name: str

    def read(self, turn: Sampled) -> Reading:
        """Reads a turn.

        Raises:
            [`UnreadableCallError`]: if a call was begun and cannot be read.
        """
        ...


def call_of(name: str, arguments: Any, identity: str | None = None) -> Call:
    """A call in TRL's form."""
    call: Call = {"type": "function", "function": {"name": name, "arguments": arguments}}
    return call if identity is None else {"id": identity, **call}
