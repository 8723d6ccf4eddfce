"""Images in messages: the parts of a content that hold one, and how they get there from the columns of a row.

The form: a content with images is a list of `{"type": "text", "text": …}` and `{"type": "image", "image": …}`, where
`image` is a PIL image, a path, or `{"bytes": …, "path": …}` as `datasets` stores it. A part without the key `image` is
a placeholder, which a column of the row fills.
"""

from __future__ import annotations

import base64
import binascii
import io
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any


Message = dict[str, Any]

_KINDS = ("image", "image_url", "input_image")
_KEYS = ("image", "image_url", "url", "path", "base64", "source", "data")


def is_image_part(part: Any) -> bool:
    """Whether a part of a content is an image, whoever wrote it."""
    return isinstance(part, Mapping) and part.get("type") in _KINDS


def read_image_part(part: Mapping[str, Any], where: str) -> Message:
    """An image part in the form above.

    Raises:
        `ValueError`: where the image is at an address, or is no image.
    """
    value = next((part[key] for key in _KEYS if part.get(key) is not None), None)
    for key in ("url", "data"):  # OpenAI's `image_url`, Anthropic's `source`
        if isinstance(value, Mapping) and value.get(key) is not None:
            value = value[key] if key == "url" else f"data:;base64,{value[key]}"
    if value is None:
        return {"type": "image"}
    if isinstance(value, str) and (part.get("base64") == value or value.startswith("data:")):
        value = _decoded(value, where)
    if isinstance(value, str) and value.startswith(("http://", "https://")):
        raise ValueError(
            f"{where}: the image is at an address ({value[:60]}), and rows must not change with what a server sends. "
            "Download it, and give the image or its path."
        )
    if not is_image(value):
        raise ValueError(
            f"{where}: the image is a `{type(value).__name__}`, but it is a PIL image, a path, a data URL, or "
            "`{'bytes': …, 'path': …}`. Give one of these."
        )
    return {"type": "image", "image": value}


def _decoded(value: str, where: str) -> dict[str, Any]:
    try:
        return {"bytes": base64.b64decode(value.partition(",")[2] or value, validate=True), "path": None}
    except binascii.Error as error:
        raise ValueError(f"{where}: the image is no valid base64 ({error}). Mend or drop the row.") from error


def is_image(value: Any) -> bool:
    """Whether a value is an image, as far as its type tells."""
    if isinstance(value, Mapping):
        return value.get("bytes") is not None or isinstance(value.get("path"), str)
    return isinstance(value, (str, Path)) or is_picture(value)


def open_image(value: Any) -> Any:
    """The PIL image of a value.

    Raises:
        `ValueError`: if there is none.
    """
    if is_picture(value):
        return value
    from PIL import Image

    source = value
    if isinstance(value, str) and value.startswith("data:"):
        value = source = _decoded(value, "The image")
    if isinstance(value, Mapping):
        source = io.BytesIO(value["bytes"]) if value.get("bytes") is not None else value["path"]
    try:
        image = Image.open(source)
        image.load()
    except (OSError, Image.DecompressionBombError) as error:
        name = value.get("path") if isinstance(value, Mapping) else value
        raise ValueError(f"The image {name or '(bytes)'} cannot be read: {error}. Mend or drop the row.") from error
    return image


def portable(value: Any) -> str:
    """The image as a data URL, which messages hold as text: its own bytes where they are known, else a PNG."""
    if isinstance(value, str) and value.startswith("data:"):
        return value
    if isinstance(value, Mapping) and value.get("bytes") is not None:
        content = value["bytes"]
    else:
        buffer = io.BytesIO()
        open_image(value).save(buffer, "PNG")
        content = buffer.getvalue()
    return f"data:image;base64,{base64.b64encode(content).decode()}"


def is_picture(value: Any) -> bool:
    """Whether a value is a PIL image."""
    return hasattr(value, "mode") and hasattr(value, "convert")


def as_blocks(output: Any) -> Any:
    """What a tool or an environment returned as blocks, if pictures are in it; else as it is."""
    if is_picture(output):
        output = [output]
    if isinstance(output, (list, tuple)) and any(map(is_picture, output)):
        return [_block(each) for each in output]
    return output


def _block(value: Any) -> Message:
    if is_picture(value):
        return {"type": "image", "image": value}
    return value if isinstance(value, dict) and "type" in value else {"type": "text", "text": str(value)}


def content_of(text: str, images: Sequence[str]) -> str | list[Message]:
    """A content of images and a text after them; the text alone where there are none."""
    return (
        [*({"type": "image", "image": image} for image in images), {"type": "text", "text": text}] if images else text
    )


def with_portable_images(messages: Sequence[Message]) -> list[Message]:
    """Messages whose images are text, which JSON holds."""
    output = []
    for message in messages:
        if parts_with_images(message):
            content = [
                {"type": "image", "image": portable(part["image"])} if part.get("image") is not None else part
                for part in message["content"]
            ]
            message = {**message, "content": content}
        output.append(message)
    return output


def parts_with_images(message: Mapping[str, Any]) -> list[Message]:
    """The image parts of a message in the form above."""
    content = message.get("content")
    return [part for part in content if part.get("type") == "image"] if isinstance(content, list) else []


def images_in(messages: Iterable[Mapping[str, Any]]) -> list[Any]:
    """The images of messages, in order; `None` for a placeholder."""
    return [part.get("image") for message in messages for part in parts_with_images(message)]


def text_in(message: Mapping[str, Any], image: str = "") -> str:
    """The words of a message in the form above, with a text in the place of each image."""
    content = message.get("content")
    if isinstance(content, list):
        return "".join(image if part.get("type") == "image" else str(part.get("text", "")) for part in content)
    return content if isinstance(content, str) else ""


def fill_placeholders(messages: Sequence[Message], images: Iterable[Any]) -> list[Message]:
    """Messages whose placeholders hold the images, in order."""
    return list(_filled(messages, iter(images)))


def _filled(messages: Sequence[Message], images: Iterator[Any]) -> Iterator[Message]:
    for message in messages:
        if any("image" not in part for part in parts_with_images(message)):
            content = [
                {"type": "image", "image": next(images)}
                if part.get("type") == "image" and "image" not in part
                else part
                for part in message["content"]
            ]
            message = {**message, "content": content}
        yield message


def before_first_user_turn(messages: Sequence[Message], images: Sequence[Any]) -> list[Message]:
    """Messages with images before the words of the first user turn, where TRL puts those of a row without
    placeholders."""
    output = list(messages)
    for index, message in enumerate(output):
        if message["role"] == "user":
            content = message["content"]
            words = [{"type": "text", "text": content}] if isinstance(content, str) else content
            parts = [{"type": "image", "image": image} for image in images]
            output[index] = {**message, "content": [*parts, *words]}
            return output
    raise ValueError(
        f"{len(images)} images belong to the row, but its prompt has no user turn before whose words they could "
        "stand. Put image parts (`{'type': 'image'}`) where they belong."
    )
