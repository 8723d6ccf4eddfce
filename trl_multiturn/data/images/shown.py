"""Images where people look at rows: words and a thumbnail in the place of their tokens."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

from ...images.vision import vision_of
from ...messages import Message
from ...messages.images import open_image, parts_with_images


_THUMBNAIL = (128, 128)


@dataclass(frozen=True)
class ShownImage:
    """An image in words, and as the data URL of a small PNG."""

    words: str
    thumbnail: str


def show_image(value: Any, number: int, tokens: int) -> ShownImage:
    """Image `number` of a sequence, which has so many tokens."""
    image = open_image(value)
    words = f"[image {number}: {image.width}×{image.height}, {tokens} tokens]"
    return ShownImage(words, thumbnail(image))


def thumbnail(value: Any) -> str:
    """The data URL of a PNG of at most 128 by 128 pixels."""
    small = open_image(value).convert("RGB")
    small.thumbnail(_THUMBNAIL)
    buffer = io.BytesIO()
    small.save(buffer, "PNG")
    return f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"


def with_thumbnails(messages: Sequence[Message]) -> list[Message]:
    """Messages whose images are small; one that cannot be read is left out of its part."""
    output = []
    for message in messages:
        if parts_with_images(message):
            message = {**message, "content": [_small(part) for part in message["content"]]}
        output.append(message)
    return output


def _small(part: dict[str, Any]) -> dict[str, Any]:
    if part.get("image") is None:
        return part
    try:
        return {"type": "image", "image": thumbnail(part["image"])}
    except ValueError:
        return {"type": "image"}


class ImageDecoder:
    """Decodes the tokens of one sequence from left to right, its images in words.

    Args:
        processing_class ([`~transformers.PreTrainedTokenizerBase`] or [`~transformers.ProcessorMixin`]):
            Decodes what is no image.
        images (`list`): the images of the sequence, in order.
    """

    def __init__(self, processing_class: Any, images: Sequence[Any] = ()):
        self._processing_class = processing_class
        self._images: list[ShownImage] = []
        self._token_ids: frozenset[int] = frozenset()
        self._begins: dict[int, int] = {}
        self._seen = 0
        if images:
            vision = vision_of(processing_class)
            counts = vision.expand([vision.placeholder * len(images)], images).tokens
            self._token_ids = vision.token_ids
            starts = [0, *accumulate(counts)]
            self._begins = {start: number for number, start in enumerate(starts[:-1])}
            self._images = [
                show_image(image, i + 1, n) for i, (image, n) in enumerate(zip(images, counts, strict=True))
            ]

    def decode(self, ids: Sequence[int]) -> tuple[str, int, tuple[ShownImage, ...]]:
        """The text of the next tokens, how many they are, and the images that begin in them."""
        texts, run, shown = [], [], []
        for token in ids:
            if token not in self._token_ids:
                run.append(token)
                continue
            if self._seen in self._begins:
                image = self._images[self._begins[self._seen]]
                texts += [self._decode(run), image.words]
                shown.append(image)
                run = []
            self._seen += 1
        return "".join([*texts, self._decode(run)]), len(ids), tuple(shown)

    def _decode(self, ids: Sequence[int]) -> str:
        return self._processing_class.decode(list(ids)) if ids else ""
