"""Images of rows: the columns that they stand in, and their places in the messages.

A row's `images` (or `image`) fill the placeholders of its prompt, or stand before the first user turn, as TRL has it;
those of a completion stand in `completion_images`, `chosen_images` and `rejected_images`. Prepared rows carry the same
columns: a sequence's images are the prompt's and then its side's.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ..messages import Message
from ..messages.images import before_first_user_turn, fill_placeholders, images_in, is_image_part


PROMPT_IMAGES = ("images", "image")
SIDES_WITH_IMAGES = ("chosen", "rejected", "completion")
IMAGE_COLUMNS = (*PROMPT_IMAGES, *(f"{side}_images" for side in SIDES_WITH_IMAGES))


def images_of(row: Mapping[str, Any], side: str = "") -> list[Any]:
    """The images of a row's prompt, or of a side of it (`"chosen"`, `"rejected"`, `"completion"`)."""
    if side:
        return list(row.get(f"{side}_images") or ())
    if row.get("images") is not None:
        return list(row["images"])
    return [] if row.get("image") is None else [row["image"]]


def sequence_images(row: Mapping[str, Any], ids_column: str) -> list[Any]:
    """The images of the sequence of a prepared row whose completion has the ids of a column, in order."""
    return [*images_of(row), *images_of(row, ids_column.removesuffix("_ids"))]


def has_images(row: Mapping[str, Any]) -> bool:
    """Whether a dataset is about images, as far as one of its rows tells: its columns, or parts of its messages."""
    return any(name in row for name in IMAGE_COLUMNS) or any(map(holds_image_parts, row.values()))


def holds_image_parts(messages: Any) -> bool:
    """Whether a value is messages of which one has an image part."""
    if not isinstance(messages, (list, tuple)):
        return False
    contents = (message.get("content") for message in messages if isinstance(message, Mapping))
    return any(is_image_part(part) for content in contents if isinstance(content, (list, tuple)) for part in content)


def holds_own_images(messages: Any) -> bool:
    """Whether an image part of messages holds its image itself, and does not wait for a column's."""
    if not isinstance(messages, (list, tuple)):
        return False
    contents = [message.get("content") for message in messages if isinstance(message, Mapping)]
    parts = [part for content in contents if isinstance(content, (list, tuple)) for part in content]
    labels = ("type", "text")
    return any(v is not None for part in parts if is_image_part(part) for k, v in part.items() if k not in labels)


def place_images(messages: Mapping[str, Any], row: Mapping[str, Any]) -> dict[str, Any]:
    """The conversation of a row (see [`read_row`]) with the images of its columns in their places.

    Raises:
        `ValueError`: if images and placeholders do not match.
    """
    placed = dict(messages)
    if not any(name in row for name in IMAGE_COLUMNS):
        return placed
    for side in (side for side in SIDES_WITH_IMAGES if side in placed and f"{side}_images" in row):
        placed[side] = _fill(placed[side], images_of(row, side), f"{side}_images", side)
    images = images_of(row)
    if not images:
        return placed
    names = ["prompt", *(side for side in SIDES_WITH_IMAGES if side in placed and f"{side}_images" not in row)]
    column = "images" if row.get("images") is not None else "image"
    if (
        len(names) == 3
        and _placeholders(placed["prompt"]) != len(images)
        and any(_placeholders(placed[side]) for side in names[1:])
    ):
        raise ValueError(
            f"`{column}` holds {len(images)} images, and the prompt has {_placeholders(placed['prompt'])} image "
            "parts. Give those of the two sides in the columns `chosen_images` and `rejected_images`."
        )
    names = names[:2] if len(names) == 2 else names[:1]
    conversation = [message for name in names for message in placed[name]]
    if not _placeholders(conversation):
        placed["prompt"] = before_first_user_turn(placed["prompt"], images)
        return placed
    filled = _fill(conversation, images, column, " and ".join(names))
    placed["prompt"], rest = filled[: len(placed["prompt"])], filled[len(placed["prompt"]) :]
    return placed | dict.fromkeys(names[1:], rest)


def _placeholders(messages: Sequence[Message]) -> int:
    return images_in(messages).count(None)


def _fill(messages: Sequence[Message], images: Sequence[Any], column: str, where: str) -> list[Message]:
    if _placeholders(messages) != len(images):
        raise ValueError(
            f"`{column}` holds {len(images)} images, but {where} has {_placeholders(messages)} image parts that are "
            "empty. Give one part (`{'type': 'image'}`) per image."
        )
    return fill_placeholders(messages, images)
