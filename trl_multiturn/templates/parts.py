"""The parts of messages, and whether a rendering shows each of them: no word of a conversation is lost in silence.

A part that stands in the rendering as it was written is shown. Another may be escaped, an image, or left out: then it
is changed, and where the rendering stays the same, it was left out. Since a short word can stand in a rendering by
chance, each kind of message in each surrounding is once rendered with words that stand nowhere else.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from ..messages import REASONING, Message


Kind = Literal["content", "image", "reasoning", "name", "argument"]
Path = tuple[str | int, ...]


@dataclass(frozen=True)
class Part:
    """A part of a message: what it is, its value, and the way to it in the message."""

    kind: Kind
    value: Any
    path: Path

    def describe(self) -> str:
        """The part as an error names it."""
        if self.kind == "image":
            return f"the image in part {self.path[-1]} of its content"
        text = repr(self.value)
        text = text if len(text) <= 70 else f"{text[:69]}…"
        if self.kind == "argument":
            return f"the argument `{self.path[-1]}` ({text}) of its tool call {_number(self.path)}"
        if self.kind == "name":
            return f"its tool call {_number(self.path)}, {text}"
        return f"its {'reasoning' if self.kind == 'reasoning' else 'text'} ({text})"


def parts_of(message: Message) -> Iterator[Part]:
    """Everything in a message that somebody said."""
    content = message.get("content")
    if isinstance(content, str) and content.strip():
        yield Part("content", content, ("content",))
    elif isinstance(content, list):
        yield from _content_parts(content)
    if message["role"] != "assistant":
        return
    for key in REASONING:
        if message.get(key):
            yield Part("reasoning", message[key], (key,))
    for number, call in enumerate(message.get("tool_calls") or ()):
        way: Path = ("tool_calls", number, "function")
        yield Part("name", call["function"]["name"], (*way, "name"))
        for path, value in _leaves(call["function"]["arguments"], (*way, "arguments")):
            yield Part("argument", value, path)


def _content_parts(content: list[Message]) -> Iterator[Part]:
    """Text and images of a content in parts (see `messages.images`)."""
    for number, part in enumerate(content):
        if part.get("type") == "image":
            yield Part("image", part, ("content", number))
        elif str(part.get("text") or "").strip():
            yield Part("content", part["text"], ("content", number, "text"))


def is_verbatim(part: Part, text: str) -> bool:
    """Whether a part stands in a text as it was written, or as JSON or Python write it."""
    value = part.value
    if part.kind == "image":
        return False
    if isinstance(value, str):
        stripped = value.strip()
        if stripped in text:
            return True
        return part.kind != "reasoning" and any(form in text for form in _escaped(stripped))
    return any(form in text for form in _scalars(value))


def replaced(message: Message, part: Part, value: Any) -> Message:
    """A message with another value for one part."""
    return _replaced(message, part.path, value)


def changes(part: Part) -> list[Any]:
    """Other values for a part, of its type: a rendering that stays the same with one of them leaves something out."""
    value = part.value
    if part.kind == "image":
        return [{"type": "text", "text": ""}]
    if isinstance(value, bool):
        return [not value]
    if isinstance(value, (int, float)):
        return [value + 1]
    if part.kind == "name":
        return [f"{value}changed"]
    return [f"changed {value}", f"{value} changed"]  # some templates keep what stands behind a marker


def unmistakable(messages: Sequence[Message]) -> list[Message]:
    """The conversation with words that stand nowhere else, of the same kinds in the same places."""
    numbered = iter(range(len(messages) * 1000))
    return [_unmistakable(message, lambda: f"prb{next(numbered)}word") for message in messages]


def surroundings(messages: Sequence[Message], first: int) -> list[tuple[Any, ...]]:
    """What a template may look at when it decides what to show of each message; turns are trained from `first` on."""
    roles = [message["role"] for message in messages]
    last_user = max((i for i, role in enumerate(roles) if role == "user"), default=-1)
    return [
        (
            *_features(message),
            roles[i - 1] if i else None,
            roles[i + 1] if i + 1 < len(roles) else None,
            i == 1 and roles[0] in ("system", "developer"),
            i > last_user,
            i >= first,
        )
        for i, message in enumerate(messages)
    ]


def _features(message: Message) -> tuple[Any, ...]:
    calls = tuple(
        (
            "id" in call,
            tuple(sorted({type(value).__name__ for value in call["function"]["arguments"].values()})),
        )
        for call in message.get("tool_calls") or ()
    )
    keys = tuple(key for key in REASONING if message.get(key))
    content = message.get("content") or ""
    images = isinstance(content, list) and sum(part.get("type") == "image" for part in content)
    return message["role"], bool(str(content).strip()), images, keys, calls


def _leaves(value: Any, path: Path) -> Iterator[tuple[Path, Any]]:
    if isinstance(value, Mapping):
        for key, inner in value.items():
            yield from _leaves(inner, (*path, key))
    elif isinstance(value, (list, tuple)):
        for place, inner in enumerate(value):
            yield from _leaves(inner, (*path, place))
    elif value != "" and value is not None:
        yield path, value


def _escaped(text: str) -> Iterator[str]:
    yield json.dumps(text, ensure_ascii=False)[1:-1]
    yield json.dumps(text)[1:-1]
    yield repr(text)[1:-1]


def _scalars(value: Any) -> tuple[str, ...]:
    if isinstance(value, bool):
        return (str(value), str(value).lower())
    return (str(value), json.dumps(value, default=str))


def _replaced(value: Any, path: Path, new: Any) -> Any:
    if not path:
        return new
    copied = dict(value) if isinstance(value, Mapping) else list(value)
    copied[path[0]] = _replaced(value[path[0]], path[1:], new)  # type: ignore[index]
    return copied


def _unmistakable(message: Message, word: Callable[[], str]) -> Message:
    for part in list(parts_of(message)):
        if isinstance(part.value, str) and part.kind != "name":
            message = replaced(message, part, word())
    return message


def _number(path: Path) -> int:
    return int(path[1]) + 1
