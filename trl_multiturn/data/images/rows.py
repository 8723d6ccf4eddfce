"""Datasets with images: from messages to token rows whose images stand in columns of their own.

A sequence's images are those of its row's prompt (`images`, or TRL's `image`) and then those of its side
(`completion_images`, `chosen_images`, `rejected_images`). Where only prompts show images, TRL's column stays as it is
and nothing is copied.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from typing import Any

from datasets import Dataset, Features, Image, IterableDataset, List, Value

from ...formats import IMAGE_COLUMNS, PROMPT_IMAGES, SIDES_WITH_IMAGES, holds_image_parts, holds_own_images, images_of
from ...images.vision import Vision, vision_of
from ...messages.wording import AS_WRITTEN, RenderingSwitches
from ..tokenization import Tokenize, row_tokenization_kwargs, tokenize_numbered_row
from ..turns import branches_column, columns_of_turns


Sides = tuple[tuple[str, str], ...]


def tokenize_image_rows(
    dataset: Dataset | IterableDataset,
    processing_class: Any,
    tokenize: Tokenize,
    sides: Sides,
    all_tokens: bool = False,
    rendering: RenderingSwitches = AS_WRITTEN,
    **map_kwargs: Any,
) -> Dataset | IterableDataset:
    """Tokenizes rows of messages with images, each expanded to its tokens; see [`tokenize_numbered_row`].

    Args:
        dataset ([`~datasets.Dataset`] or [`~datasets.IterableDataset`]):
            Rows of messages.
        processing_class ([`~transformers.ProcessorMixin`]):
            Processor.
        tokenize (`Callable`), all_tokens (`bool`), rendering ([`RenderingSwitches`]):
            As in [`row_tokenization_kwargs`].
        sides (`tuple[tuple[str, str], ...]`):
            `(ids, mask)` column names.
    """
    moves = moves_images(dataset)
    tokenize = partial(_tokenize_with_images, tokenize=tokenize, sides=sides, moves=moves)
    options = all_tokens, rendering
    fn_kwargs = row_tokenization_kwargs(dataset, processing_class, tokenize, *options)
    if moves:
        dataset = undecoded(dataset)
        map_kwargs["features"] = token_features(dataset, sides)
        if "image" in (dataset.column_names or ()):
            map_kwargs |= {"remove_columns": ["image"], "features": _without(map_kwargs["features"], "image")}
    return dataset.map(tokenize_numbered_row, with_indices=True, fn_kwargs=fn_kwargs, **map_kwargs)


def _without(features: Features | None, name: str) -> Features | None:
    return features and Features({key: value for key, value in features.items() if key != name})


def _tokenize_with_images(
    example: dict[str, Any], *args: Any, tokenize: Tokenize, sides: Sides, moves: bool
) -> dict[str, Any]:
    """The token columns of a row, those of images in every row or in none."""
    output = tokenize(example, *args)
    names = [ids.removesuffix("_ids") for ids, _ in sides]
    added = ["images", *(f"{name}_{kind}" for name in names for kind in ("images", "image_tokens"))]
    found = {name: output.pop(name, []) for name in added}
    return output | found if moves else output


def moves_images(dataset: Dataset | IterableDataset) -> bool:
    """Whether images must get columns of their own; else TRL's column holds what a prompt shows, and is not copied."""
    if isinstance(dataset, IterableDataset) or not set(PROMPT_IMAGES) & set(dataset.column_names):
        return True
    if any(f"{side}_images" in dataset.column_names for side in SIDES_WITH_IMAGES):
        return True
    texts = dataset.select_columns([name for name in dataset.column_names if name not in IMAGE_COLUMNS])
    sides = [name for name in dataset.column_names if name not in (*IMAGE_COLUMNS, "prompt")]
    return any(
        holds_own_images(row.get("prompt")) or any(holds_image_parts(row[name]) for name in sides) for row in texts
    )


def undecoded(dataset: Dataset | IterableDataset) -> Dataset | IterableDataset:
    """The rows with images as they are stored: what is copied from column to column stays the same bytes."""
    image = Image(decode=False)
    for name, feature in (dataset.features or {}).items():
        if name == "image" and isinstance(feature, Image):
            dataset = dataset.cast_column(name, image)
        elif name in IMAGE_COLUMNS and isinstance(feature, List):
            dataset = dataset.cast_column(name, List(image))
    return dataset


def token_features(dataset: Dataset | IterableDataset, sides: Iterable[tuple[str, str]]) -> Features | None:
    """The features of rows of messages with images once they are tokenized; what the first rows hold would not tell
    (they may have no image)."""
    if dataset.features is None:
        return None
    numbers, images = List(Value("int64")), List(Image(decode=False))
    added: dict[str, Any] = {"prompt_ids": numbers, "images": images}
    for ids, mask in sides:
        side = ids.removesuffix("_ids")
        added |= dict.fromkeys((ids, mask, *columns_of_turns(ids)), numbers)
        added |= {f"{side}_images": images, f"{side}_image_tokens": numbers, branches_column(ids): List(numbers)}
    return Features({**dataset.features, **added})


def read_token_rows(
    dataset: Dataset | IterableDataset, processing_class: Any, sides: Sides, **map_kwargs: Any
) -> Dataset | IterableDataset:
    """Token rows with images, with the columns `…_image_tokens`; ids that do not fit the images are refused."""
    vision = vision_of(processing_class)
    fn_kwargs = {"sides": sides, "vision": vision}
    return undecoded(dataset).map(_read_numbered_row, with_indices=True, fn_kwargs=fn_kwargs, **map_kwargs)


def _read_numbered_row(row: Mapping[str, Any], index: int, sides: Sides, vision: Vision) -> dict[str, list[int]]:
    try:
        return read_token_row(row, sides, vision)
    except ValueError as error:
        raise ValueError(f"Row {index}: {error}") from error


def read_token_row(row: Mapping[str, Any], sides: Sides, vision: Vision) -> dict[str, list[int]]:
    """The columns `…_image_tokens` of a token row with images.

    Raises:
        `ValueError`: if its ids do not hold the tokens of its images.
    """
    _counts(row["prompt_ids"], images_of(row), vision, "prompt_ids", "images")
    output = {}
    for ids, _ in sides:
        side = ids.removesuffix("_ids")
        output[f"{side}_image_tokens"] = _counts(row[ids], images_of(row, side), vision, ids, f"{side}_images")
    return output


def _counts(ids: Sequence[int], images: Sequence[Any], vision: Vision, column: str, images_column: str) -> list[int]:
    counts = vision.expand([vision.placeholder * len(images)], images).tokens
    found = sum(token in vision.token_ids for token in ids)
    if found != sum(counts):
        raise ValueError(
            f"`{column}` holds {found} image tokens, but the {len(images)} images in `{images_column}` make "
            f"{sum(counts)}. Write the ids that the processor makes of the images, and list every image."
        )
    return counts


def tokenize_numbered_text(row: Mapping[str, Any], index: int, sides: Sides, processing_class: Any) -> dict[str, Any]:
    """[`tokenize_image_text`]; what it refuses is refused with the row's number."""
    try:
        return tokenize_image_text(row, sides, processing_class)
    except ValueError as error:
        raise ValueError(f"Row {index}: {error}") from error


def tokenize_image_text(row: Mapping[str, Any], sides: Sides, processing_class: Any) -> dict[str, Any]:
    """Token columns of a row of text whose prompt holds a placeholder per image, as TRL tokenizes it.

    Raises:
        `ValueError`: if images and placeholders do not match.
    """
    vision, encode = vision_of(processing_class), processing_class.tokenizer
    prompt = vision.expand([row["prompt"]], images_of(row)).pieces[0]
    output = {"prompt_ids": encode(prompt, add_special_tokens=False)["input_ids"]}
    for ids, mask in sides:
        output[ids] = encode(row[ids.removesuffix("_ids")], add_special_tokens=False)["input_ids"]
        output[mask] = [1] * len(output[ids])
    return output
