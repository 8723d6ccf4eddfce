"""Turns as a chat template prints them, for learning how it prints calls and for trying what reads them."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from typing import Any

from ...templates import TurnTemplate
from .reading import call_of


NAME = "prbtool"
IDS = ("prb1call9", "prb2call9")
VALUE, WORTH, NUMBER, COUNT = "prbvalue", "prbworth", 27182, 31415
SAYS, THINKS = "prbsays", "prbthinks"
SAMPLE: dict[str, Any] = {"prbalpha": VALUE}
# Alphabetical, for templates that sort arguments
PARAMETERS: dict[str, Any] = {
    "prbalpha": {"type": "string", "description": "Probed text."},
    "prbbeta": {"type": "string", "description": "Probed text."},
    "prbcount": {"type": "integer", "description": "Probed number."},
    "prbdigits": {"type": "integer", "description": "Probed number."},
    "prbflag": {"type": "boolean", "description": "Probed flag."},
    "prblist": {"type": "array", "description": "Probed list.", "items": {"type": "integer"}},
    "prbmore": {"type": "object", "description": "Probed object."},
    "prbrate": {"type": "number", "description": "Probed number."},
}
SCHEMA: dict[str, Any] = {
    "type": "function",
    "function": {
        "name": NAME,
        "description": "Probes.",
        "parameters": {"type": "object", "properties": PARAMETERS, "required": []},
    },
}


class Samples:
    """What a policy samples under a chat template when it says or calls something.

    Args:
        processing_class ([`~transformers.PreTrainedTokenizerBase`] or [`~transformers.ProcessorMixin`]):
            With the chat template.
        kwargs (`Mapping[str, Any]`): keyword arguments of the template.

    Raises:
        `ValueError`: if there is no chat template, or none that ends turns.
    """

    def __init__(self, processing_class: Any, kwargs: Mapping[str, Any]):
        self.template = TurnTemplate(processing_class, tools=[SCHEMA], **kwargs)
        self.tokenizer = getattr(processing_class, "tokenizer", processing_class)
        self.chat_template = str(self.template.processing_class.chat_template)
        self.added = sorted(self.tokenizer.get_added_vocab(), key=len, reverse=True)
        self.ends = self.template.end_of_turn_ids
        self.prompt_ids = self.template.prompt_ids([{"role": "user", "content": "probe"}])

    def turn(self, message: Mapping[str, Any]) -> str | None:
        """A turn as it is sampled, without what ends it; `None` where the template cannot print it."""
        return self.template.sampled_text([{"role": "user", "content": "probe"}, dict(message)])

    def calls(self, *arguments: Mapping[str, Any], content: str = "", reasoning: str = "") -> str | None:
        """A turn with a call for each of `arguments`."""
        return self.turn(self.message(*arguments, content=content, reasoning=reasoning))

    def message(self, *arguments: Mapping[str, Any], content: str = "", reasoning: str = "") -> dict[str, Any]:
        """The message of such a turn."""
        message: dict[str, Any] = {"role": "assistant", "content": content}
        if reasoning:
            message[self.reasoning_key] = reasoning
        calls = [call_of(NAME, dict(each), identity) for each, identity in zip(arguments, IDS, strict=False)]
        return {**message, "tool_calls": calls} if calls else message

    @cached_property
    def reasoning_keys(self) -> tuple[str, ...]:
        """The keys under which the template shows the reasoning of an answer, or else of a call."""
        return self.template.reasoning_keys(calls=False) or self.template.reasoning_keys(calls=True)

    @property
    def reasoning_key(self) -> str:
        """The first of them."""
        return self.reasoning_keys[0] if self.reasoning_keys else "reasoning_content"

    @cached_property
    def head(self) -> str:
        """What stands before the words of every answer, such as an empty think block or the name of a channel."""
        answer = self.turn({"role": "assistant", "content": SAYS})
        return answer.partition(SAYS)[0] if answer and SAYS in answer else ""
