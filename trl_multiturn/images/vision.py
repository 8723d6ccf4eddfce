"""What a processor makes of images: tokens within a text, types of tokens, and tensors."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase, ProcessorMixin

from ..messages import Message
from ..messages.images import images_in, open_image, parts_with_images


def refuse_unseen_images(
    messages: Sequence[Message],
    processing_class: PreTrainedTokenizerBase | ProcessorMixin,
    column: str = "messages",
) -> None:
    """Raises `ValueError` for images in messages that no policy could see, or would have to sample."""
    for number, message in enumerate(messages):
        if not parts_with_images(message):
            continue
        where = f"`{column}`: message {number} ({message['role']})"
        if message["role"] == "assistant":
            raise ValueError(f"{where} holds an image, which no policy samples. Put it into a turn of another role.")
        if not isinstance(processing_class, ProcessorMixin):
            raise ValueError(
                f"{where} holds an image, but a `{type(processing_class).__name__}` reads text alone, so it would be "
                "left out. Pass the model's processor (`AutoProcessor.from_pretrained`), or write what it shows as "
                "text."
            )
        if None in images_in([message]):
            raise ValueError(
                f"{where} has an image part without an image. Give it one (`{{'type': 'image', 'image': …}}`), or a "
                "column of the row (`images`)."
            )


def refuse_missing_images(config: Any, sequences: Iterable[Sequence[int]]) -> None:
    """Raises `ValueError` for token sequences of conversations with images, where a model is given the ids alone."""
    token = getattr(config, "image_token_id", None) or getattr(config, "image_token_index", None)
    if token is not None and any(token in ids for ids in sequences):
        raise ValueError(
            "A sequence holds image tokens, but what is to score it is given no images, so it would score another "
            "conversation. Leave such sequences out; the trainers score them in their batches."
        )


@dataclass(frozen=True)
class Expansion:
    """A text with images in it, ready to be tokenized.

    Attributes:
        pieces (`list[str]`): the pieces of the text, each placeholder replaced by the image's tokens.
        tokens (`list[int]`): how many image tokens each image has.
    """

    pieces: list[str]
    tokens: list[int]


class Vision:
    """A processor of images and text.

    Args:
        processor ([`~transformers.ProcessorMixin`]): never changed.

    Raises:
        `ValueError`: if it has no image processor, or no token that stands for an image.
    """

    def __init__(self, processor: ProcessorMixin):
        token = getattr(processor, "image_token", None)
        if not isinstance(processor, ProcessorMixin) or not hasattr(processor, "image_processor") or token is None:
            raise ValueError(
                f"The rows hold images, but a `{type(processor).__name__}` has no image processor, or no token that "
                "stands for an image, so they would be left out. Pass the processor of a vision-language model "
                "(`AutoProcessor.from_pretrained`) as `processing_class`."
            )
        self.processor = processor
        self.placeholder = str(token)
        self._tokenizer: PreTrainedTokenizerBase = processor.tokenizer

    def expand(self, pieces: Sequence[str], images: Sequence[Any]) -> Expansion:
        """The pieces of a text with the tokens of its images in the place of their placeholders.

        Raises:
            `ValueError`: if the text does not hold one placeholder per image, or the processor does not tell what it
                puts there.
        """
        text = "".join(pieces)
        found = text.count(self.placeholder)
        if found != len(images):
            raise ValueError(
                f"The chat template renders {len(images)} images as {found} times {self.placeholder!r}, so it is "
                "unknown which tokens are an image's. Where the words of a message hold that text, write it "
                "otherwise; else use a chat template for images."
            )
        if not images:
            return Expansion(list(pieces), [])
        output = self._call([text], [list(map(open_image, images))])
        offsets = output.get("text_replacement_offsets")
        if not offsets or len(offsets[0]) != len(images):
            raise ValueError(
                f"`{type(self.processor).__name__}` does not tell which tokens it puts in the place of an image "
                "(`return_text_replacement_offsets`), so turns after it cannot be masked. Use rows that carry token "
                "ids, or update transformers."
            )
        replaced: list[tuple[int, int, str]] = [
            (int(place["span"][0]), int(place["span"][1]), str(place["replacement"])) for place in offsets[0]
        ]
        return Expansion(list(_with_replacements(pieces, replaced)), [self.count(new) for _, _, new in replaced])

    def collapse(self, ids: Sequence[int], images: Sequence[Any]) -> list[int]:
        """Ids with one placeholder in the place of each image's tokens, for engines that expand images themselves.

        What a processor writes around an image (Gemma 3: empty lines) may be one token with the text beside it; such
        a token becomes those of the text that is left.

        Raises:
            `ValueError`: if the tokens of an image do not stand there.
        """
        output, rest, placeholder = [], list(ids), self._encode(self.placeholder)
        for expanded in self.expand([self.placeholder] * len(images), images).pieces:
            image = expanded.strip()
            before, after = expanded.split(image)
            tokens = self._encode(image)
            start = next((i for i in range(len(rest)) if rest[i : i + len(tokens)] == tokens), None)
            if start is None or not self.token_ids.isdisjoint(rest[:start]):
                raise ValueError(
                    f"The ids do not hold the {len(tokens)} tokens that the processor writes for an image. Read "
                    "images with the engine's own processor, and list every image of the conversation."
                )
            output += [*self._without_end(rest[:start], before), *placeholder]
            rest = self._without_start(rest[start + len(tokens) :], after)
        if not self.token_ids.isdisjoint(rest):
            raise ValueError(
                f"The ids hold more image tokens than those of {len(images)} images. List every image of the "
                "conversation."
            )
        return output + rest

    def _without_end(self, ids: list[int], text: str) -> list[int]:
        """Ids of a text without its end, which the processor wrote."""
        for start in range(len(ids), -1, -1):
            end = self._decode(ids[start:])
            if end.endswith(text):
                return [*ids[:start], *self._encode(end.removesuffix(text))]
        raise ValueError(f"The ids do not hold the {text!r} that the processor writes before an image.")

    def _without_start(self, ids: list[int], text: str) -> list[int]:
        """Ids of a text without its start, which the processor wrote."""
        for end in range(len(ids) + 1):
            start = self._decode(ids[:end])
            if start.startswith(text):
                return [*self._encode(start.removeprefix(text)), *ids[end:]]
        raise ValueError(f"The ids do not hold the {text!r} that the processor writes after an image.")

    def count(self, text: str) -> int:
        """How many image tokens an expanded text holds."""
        return sum(token in self.token_ids for token in self._encode(text))

    @cached_property
    def token_ids(self) -> frozenset[int]:
        """Ids of the tokens whose states the model replaces by an image's: what an image repeats most."""
        offsets = self._probe["text_replacement_offsets"][0]
        ids = Counter(self._encode(offsets[0]["replacement"]))
        typed = [token for token in ids if any(token in values for values in self._types.values())]
        return frozenset(typed or [ids.most_common(1)[0][0]])

    def token_types(self, input_ids: Tensor) -> dict[str, Tensor]:
        """What the processor tells of each token beside its id, such as `mm_token_type_ids`: `(B, L)` each."""
        output = {}
        for name, types in self._types.items():
            output[name] = torch.zeros_like(input_ids)
            for token, kind in types.items():
                output[name][input_ids == token] = kind
        return output

    def tensors(self, images: Sequence[Sequence[Any]]) -> dict[str, Tensor]:
        """Pixels and what belongs to them, of the images of each sequence; nothing where no sequence has any.

        Args:
            images (`list[list]`): the images of each sequence of a batch, in the order in which they stand there.
        """
        return self._tensors(images)[0]

    def inputs(self, input_ids: Tensor, images: Sequence[Sequence[Any]]) -> dict[str, Tensor]:
        """What a model takes beside `input_ids` `(B, L)`, which hold the tokens of the images.

        Raises:
            `ValueError`: if they do not.
        """
        tensors, expected = self._tensors(images)
        found = int(torch.isin(input_ids, torch.tensor(sorted(self.token_ids))).sum())
        if found != expected:
            raise ValueError(
                f"The {sum(map(len, images))} images of a batch make {expected} image tokens, but its ids hold "
                f"{found}. Prepare the rows with the trainer's own processor, and list every image of every row."
            )
        return {**tensors, **self.token_types(input_ids)}

    def _tensors(self, images: Sequence[Sequence[Any]]) -> tuple[dict[str, Tensor], int]:
        given = [list(map(open_image, each)) for each in images if len(each)]
        if not given:
            return {}, 0
        output = self._call([self.placeholder * len(each) for each in given], given, padding=True, return_tensors="pt")
        tokens = int(torch.isin(output["input_ids"], torch.tensor(sorted(self.token_ids))).sum())
        text = {"input_ids", "attention_mask", "text_replacement_offsets", *self._types}
        return {name: value for name, value in output.items() if name not in text}, tokens

    def select(self, batch: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
        """What of a batch a model takes beside ids, mask and labels; with a prefix, what is there under such names."""
        return {name: batch[f"{prefix}{name}"] for name in self._names if f"{prefix}{name}" in batch}

    def _call(self, text: list[str], images: list[list[Any]], **kwargs: Any) -> Any:
        # The template prints the special tokens itself
        told = {} if kwargs else {"return_text_replacement_offsets": True}
        return self.processor(text=text, images=images, add_special_tokens=False, **told, **kwargs)

    def _encode(self, text: str) -> list[int]:
        return self._tokenizer(text, add_special_tokens=False)["input_ids"]

    def _decode(self, ids: Sequence[int]) -> str:
        return str(self._tokenizer.decode(list(ids), clean_up_tokenization_spaces=False))

    @cached_property
    def _probe(self) -> Any:
        from PIL import Image

        return self._call([self.placeholder], [[Image.new("RGB", (64, 64))]])

    @cached_property
    def _names(self) -> list[str]:
        text = {"input_ids", "attention_mask", "text_replacement_offsets"}
        return [name for name in self._probe if name not in text]

    @cached_property
    def _types(self) -> dict[str, dict[int, int]]:
        """Types other than 0 of tokens by id, under the name that the model knows them by."""
        ids = list(self._probe["input_ids"][0])
        types = {}
        for name, values in self._probe.items():
            if name in ("input_ids", "attention_mask", "text_replacement_offsets"):
                continue
            if isinstance(values, list) and len(values) == 1 and _is_row(values[0], len(ids)):
                types[name] = {token: kind for token, kind in zip(ids, values[0], strict=True) if kind}
        return types


@lru_cache(maxsize=8)
def vision_of(processor: ProcessorMixin) -> Vision:
    """The [`Vision`] of a processor, which learns once what its tokens are."""
    return Vision(processor)


def _is_row(value: Any, length: int) -> bool:
    return isinstance(value, list) and len(value) == length and all(isinstance(kind, int) for kind in value)


def _with_replacements(pieces: Sequence[str], replaced: Sequence[tuple[int, int, str]]) -> Iterator[str]:
    """Pieces of a text with `(start, end, replacement)` of the whole text put in, each within one piece."""
    start, rest = 0, list(replaced)
    for piece in pieces:
        end, at, expanded = start + len(piece), start, ""
        while rest and rest[0][0] < end:
            first, last, new = rest.pop(0)
            if last > end:
                raise ValueError("An image stands across the boundary of a turn, so it cannot be masked.")
            expanded += piece[at - start : first - start] + new
            at = last
        yield expanded + piece[at - start :]
        start = end
