"""The form in which a chat template wants messages: what one names `reasoning_content`, another names `thinking`."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Sequence
from functools import cached_property
from os.path import commonprefix
from typing import Any

from ..messages import REASONING, Message, arguments_as_strings
from ..messages.nulls import tell_once
from .probes import ANSWER, CALL_ID, USER, call_turn, result, tool_name
from .remedies import switch_names
from .rendering import Renderer


_NINE = re.compile(r"[A-Za-z0-9]{9}")
_LONG_ID = "call_probe0123456789"


class Form:
    """How a template wants content, reasoning, arguments, call ids and the developer's role; found by rendering.

    Args:
        render ([`Renderer`]):
            The template, with tools if rows have some.
    """

    def __init__(self, render: Renderer):
        self._render = render
        self._tool = tool_name(render.tools)

    def fit(self, messages: Sequence[Message]) -> list[Message]:
        """Messages in TRL's form as this template wants them; what needs no change stays the same object."""
        fitted = [self._fit_message(message) for message in self.label(messages)]
        if any(message.get("tool_calls") for message in fitted) and self.arguments_as_strings:
            fitted = arguments_as_strings(fitted)
        return list(map(_in_parts, fitted)) if self._content_in_parts else fitted

    def label(self, messages: Sequence[Message]) -> list[Message]:
        """Messages whose calls have ids that this template accepts."""
        if any(message.get("tool_calls") for message in messages) and (self._demands_ids or self._demands_short_ids):
            return with_short_ids(messages)
        return list(messages)

    def _fit_message(self, message: Message) -> Message:
        if message["role"] == "developer" and self._developer_is_system:
            tell_once(
                "The chat template does not show the role 'developer': such messages are rendered with the role "
                "'system', which it shows."
            )
            return {**message, "role": "system"}
        key = next((key for key in REASONING if key in message), None) if message["role"] == "assistant" else None
        if key is None:
            return message
        known = self.reasoning_keys(calls=bool(message.get("tool_calls")))
        if not known or key in known:
            return message
        return {known[0] if name == key else name: value for name, value in message.items()}

    def reasoning_keys(self, calls: bool) -> tuple[str, ...]:
        """The keys under which a turn's reasoning is shown, in a turn that calls a tool or in an answer."""
        return self._call_reasoning_keys if calls else self._answer_reasoning_keys

    @cached_property
    def shows_system(self) -> bool:
        """Whether a system message at the beginning is shown."""
        return self._shows([{"role": "system", "content": "probed thought"}, USER])

    @cached_property
    def reasoning_is_text(self) -> bool:
        """Whether a policy's reasoning can only be text of its turns: the template shows it under no key, with no
        switch of its own, and its prompts say nothing of thinking."""
        switches = [{}, *({name: value} for name in switch_names(self._render.template) for value in (False, True))]
        forms = (Form(self._render.with_kwargs(**switch)) for switch in switches)
        if any(form.reasoning_keys(calls) for form in forms for calls in (False, True)):
            return False
        asked, prompt = (self._attempt([USER], generation_prompt) for generation_prompt in (False, True))
        return asked is not None and prompt is not None and "think" not in prompt[len(commonprefix([asked, prompt])) :]

    def thinking_turns(self) -> list[Message]:
        """Turns whose reasoning this template shows: an answer and a call, as far as it does."""
        turns = (dict(ANSWER), self._call({"value": "probe"}))
        keys = (self._answer_reasoning_keys, self._call_reasoning_keys)
        return [{**turn, known[0]: "probed thought"} for turn, known in zip(turns, keys, strict=True) if known]

    @cached_property
    def _answer_reasoning_keys(self) -> tuple[str, ...]:
        return tuple(key for key in REASONING if self._shows([USER, {**ANSWER, key: "probed thought"}]))

    @cached_property
    def _call_reasoning_keys(self) -> tuple[str, ...]:
        turn = self._call({"value": "probe"})
        return tuple(
            key
            for key in REASONING
            if self._shows(self._written([USER, {**turn, key: "probed thought"}, result(self._tool)]))
        )

    @cached_property
    def _content_in_parts(self) -> bool:
        """Whether content is wanted as a list of parts: templates of vision models print no text."""
        as_text, in_parts = (self._render.attempt(m) for m in ([USER, ANSWER], [_in_parts(USER), _in_parts(ANSWER)]))
        if as_text is not None and str(ANSWER["content"]) in as_text:
            return False
        return in_parts is not None and str(ANSWER["content"]) in in_parts

    @cached_property
    def _developer_is_system(self) -> bool:
        shown = [{"role": role, "content": "probed thought"} for role in ("developer", "system")]
        developer, system = (self._shows([message, USER]) for message in shown)
        return system and not developer

    @cached_property
    def arguments_as_strings(self) -> bool:
        """Whether a call's arguments are wanted as a JSON string: the object raises, or is shown in Python's way."""
        arguments = {"probe": "probed value"}
        as_object = self._attempt_call(arguments)
        if as_object is not None and repr(arguments) not in as_object:
            return False
        as_string = self._attempt_call(json.dumps(arguments))
        return as_string is not None and (as_object is None or json.dumps(arguments) in as_string)

    @cached_property
    def _demands_ids(self) -> bool:
        return self._attempt_ids(None) is None and self._attempt_ids(CALL_ID) is not None

    @cached_property
    def _demands_short_ids(self) -> bool:
        return self._attempt_ids(_LONG_ID) is None and self._attempt_ids(CALL_ID) is not None

    def _attempt_ids(self, identity: str | None) -> str | None:
        turn = call_turn(self._tool, {"value": "probe"}, identity=identity)
        messages: list[Message] = [USER, turn, result(self._tool, identity=identity), ANSWER]
        return self._attempt(self._written(messages))

    def _attempt_call(self, arguments: Any) -> str | None:
        return self._attempt([USER, call_turn(self._tool, arguments), result(self._tool), ANSWER])

    def _call(self, arguments: dict[str, Any]) -> Message:
        return call_turn(self._tool, arguments)

    def _written(self, messages: list[Message]) -> list[Message]:
        return arguments_as_strings(messages) if self.arguments_as_strings else messages

    def _shows(self, messages: list[Message]) -> bool:
        text = self._attempt(messages)
        return text is not None and "probed thought" in text

    def _attempt(self, messages: list[Message], generation_prompt: bool = False) -> str | None:
        messages = list(map(_in_parts, messages)) if self._content_in_parts else messages
        return self._render.attempt(messages, generation_prompt)


def _in_parts(message: Message) -> Message:
    content = message.get("content")
    return {**message, "content": [{"type": "text", "text": content}]} if isinstance(content, str) else message


def with_short_ids(messages: Sequence[Message]) -> list[Message]:
    """Messages whose calls, and the results that answer them, have ids of nine letters and digits.

    An id is a label, and which one is all the same; those that fit stay.
    """
    fitted: list[Message] = []
    open_calls: list[tuple[str | None, str]] = []
    for number, message in enumerate(messages):
        if message.get("tool_calls"):
            calls = [_with_id(call, f"{number}.{place}") for place, call in enumerate(message["tool_calls"])]
            open_calls = [(old.get("id"), new["id"]) for old, new in zip(message["tool_calls"], calls, strict=True)]
            message = {**message, "tool_calls": calls}
        elif message["role"] == "tool" and open_calls:
            old = message.get("tool_call_id")
            answered = next((call for call in open_calls if call[0] == old), open_calls[0])
            open_calls.remove(answered)
            message = {**message, "tool_call_id": answered[1]}
        fitted.append(message)
    return fitted


def _with_id(call: dict[str, Any], place: str) -> dict[str, Any]:
    if _NINE.fullmatch(str(call.get("id", ""))):
        return call
    seed = json.dumps([place, call], sort_keys=True, default=str)
    return {**call, "id": hashlib.sha256(seed.encode()).hexdigest()[:9]}
