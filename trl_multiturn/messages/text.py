"""The words of a message as one text."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from .images import is_image_part, read_image_part
from .nulls import not_json


_TEXT_PARTS = ("text", "input_text", "output_text")
_OTHER_PARTS = ("image", "audio", "video", "file", "document", "refusal", "thinking", "reasoning", "tool_use", "tool_")


def brief(value: Any) -> str:
    """A value for an error: its beginning."""
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:80]}…"


def find_content(message: Mapping[str, Any], where: str) -> tuple[Any, str]:
    """The content of a message without nulls, and the key it stands under."""
    if "content" in message and message.get("value", message["content"]) != message["content"]:
        raise ValueError(
            f"{where} has a `content` and another `value` ({brief(message['value'])}), so nobody knows which was "
            f"said. "
            "Keep one of them."
        )
    key = next((key for key in ("content", "value") if key in message), "content")
    return message.get(key), key


def read_content(content: Any, role: str, where: str) -> str | list[dict[str, Any]]:
    """As [`read_text`]; a content with images is a list of text and image parts (see `messages.images`)."""
    if not isinstance(content, (list, tuple)) or not any(map(is_image_part, content)):
        return read_text(content, role, where)
    parts = []
    for number, part in enumerate(part for part in content if part is not None):
        if is_image_part(part):
            parts.append(read_image_part(part, f"{where}: part {number}"))
            continue
        text = read_text([part], role, where)
        if text:
            parts.append({"type": "text", "text": text})
    return parts


def read_text(content: Any, role: str, where: str) -> str:
    """Text as it is, text parts joined, and what a tool returned as JSON.

    Raises:
        `ValueError`: where a template would print it in Python's spelling, or not at all.
    """
    if content is None:
        return ""
    if isinstance(content, str):
        return content
    if isinstance(content, (list, tuple)):
        parts = [_part(part) for part in content if part is not None]
        data = role == "tool" and any(isinstance(part, str) for part in content)  # a list of words that it returned
        if None not in parts and not data:
            return "".join(part for part in parts if part is not None)
        for number, part in enumerate(content):
            _refuse_other_part(part, number, where)
    if role == "tool" and not_json(content) is None:
        return json.dumps(content, ensure_ascii=False)
    raise ValueError(
        f"{where}: the content is {brief(content)}, which chat templates print in Python's spelling or not at all. "
        "Write text (`json.dumps` for data), or a list of text parts."
    )


def _part(part: Any) -> str | None:
    """The text of a part, or `None` where it is none."""
    if isinstance(part, str):
        return part
    if isinstance(part, Mapping) and (part.get("type") or "text") in _TEXT_PARTS:
        text = part.get("text")
        others = {key for key, value in part.items() if value is not None} - {"type", "text", "annotations"}
        return text if isinstance(text, str) and not others - {"cache_control", "index", "logprobs"} else None
    return None


def _refuse_other_part(part: Any, number: int, where: str) -> None:
    kind = part.get("type") if isinstance(part, Mapping) else None
    if isinstance(kind, str) and kind.startswith(_OTHER_PARTS):
        raise ValueError(
            f"{where}: part {number} of the content is of the type {kind!r} ({brief(dict(part))}), and only text and "
            "images can be read here. Write what it says as text, or drop the row."
        )
