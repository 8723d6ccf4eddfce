"""Images of rows that `max_length` cuts: those whose tokens are gone go with them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import accumulate
from typing import Any

from datasets import Dataset, IterableDataset

from ...formats import images_of
from ...images.vision import Vision


def drop_cut_images(
    dataset: Dataset | IterableDataset, sides: Iterable[tuple[str, str]], vision: Vision
) -> Dataset | IterableDataset:
    """Prepared rows without the images of their completions whose tokens are not there any more."""
    fn_kwargs = {"sides": tuple(sides), "token_ids": sorted(vision.token_ids)}
    return dataset.map(_drop_cut_images, fn_kwargs=fn_kwargs, features=dataset.features)


def fit_images(
    ids: list[int], mask: list[int], images: list[Any], counts: Sequence[int], token_ids: Iterable[int]
) -> tuple[list[int], list[int], list[Any]]:
    """A completion that `max_length` has cut, with the images that it still shows; one that is cut through goes."""
    token_ids = set(token_ids)
    places = [place for place, token in enumerate(ids) if token in token_ids]
    ends = list(accumulate(counts))
    kept = sum(end <= len(places) for end in ends)
    shown = ends[kept - 1] if kept else 0
    stop = places[shown] if shown < len(places) else len(ids)
    return ids[:stop], mask[:stop], images[:kept]


def _drop_cut_images(
    row: Mapping[str, Any], sides: Iterable[tuple[str, str]], token_ids: Iterable[int]
) -> dict[str, Any]:
    """The columns of a row whose completions may have lost images to `max_length`."""
    output: dict[str, Any] = {}
    for ids, mask in sides:
        side = ids.removesuffix("_ids")
        images, counts = images_of(row, side), row.get(f"{side}_image_tokens") or []
        output[ids], output[mask], output[f"{side}_images"] = fit_images(
            row[ids], row[mask], images, counts, token_ids
        )
        output[f"{side}_image_tokens"] = counts[: len(output[f"{side}_images"])]
    return output


def fit_mismatched_images(row: Mapping[str, Any], max_length: int | None, token_ids: Iterable[int]) -> dict[str, Any]:
    """A row of KTO whose mismatched completion fits `max_length` with its images whole."""
    ids = row["KL_completion_ids"]
    room = len(ids) if max_length is None else max(max_length - len(row["prompt_ids"]), 0)
    if len(ids) <= room or not row.get("KL_completion_images"):
        return dict(row)
    images, counts = images_of(row, "KL_completion"), row["KL_completion_image_tokens"]
    ids, mask, images = fit_images(ids[:room], row["KL_action_mask"][:room], images, counts, token_ids)
    return {**row, "KL_completion_ids": ids, "KL_action_mask": mask, "KL_completion_images": images}
