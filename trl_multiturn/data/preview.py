"""See a mask: the tokens of a trajectory colored by what the loss does with them, in a terminal or a notebook."""

from __future__ import annotations

import html
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import accumulate, groupby
from typing import Any, Literal

from rich.console import Console, Group
from rich.panel import Panel
from rich.text import Text
from transformers import PreTrainedTokenizerBase, ProcessorMixin

from ..formats import column_shapes, columns_read, sequence_images
from ..messages.terminal import visible
from ..messages.wording import RenderingSwitches
from ..segments import Branches, branches_of, segment_changes
from ..trajectory import Trajectory
from .images.shown import ImageDecoder, ShownImage
from .segments import TokenRow, fit_segments
from .tokenization import tokenize_preference_row, tokenize_unpaired_row
from .truncation import PREFERENCE_SIDES, UNPAIRED_SIDES, completion_cut
from .turns import branches_column, choose_tokens


Kind = Literal["context", "trained", "truncated", "rewritten"]

_TERMINAL = {"context": "dim", "trained": "bold green", "truncated": "strike red", "rewritten": "strike yellow"}
_CSS = {
    "context": "color:#777",
    "trained": "background:#b7e4c7;color:#081c15;font-weight:600",
    "truncated": "color:#c1121f;text-decoration:line-through",
    "rewritten": "color:#b08900;text-decoration:line-through",
}


@dataclass(frozen=True)
class Segment:
    """Consecutive tokens with one fate; `turn` numbers the assistant turns from 1, 0 outside them. An image stands in
    the text with its size and tokens, and in `images` with a thumbnail beside these words.

    `"rewritten"` holds no tokens of the row: it begins a token sequence that does not continue the one before, and its
    text is what the policy had read or written until then and no longer reads.
    """

    kind: Kind
    turn: int
    text: str
    num_tokens: int
    images: tuple[ShownImage, ...] = ()


@dataclass(frozen=True)
class MaskPreview:
    """Sequences with their masks; prints itself in a terminal (`rich`) and in a notebook (HTML).

    Attributes:
        sequences (`list[tuple[str, list[Segment]]]`): a title and the segments of each sequence.
    """

    sequences: list[tuple[str, list[Segment]]]

    def __rich__(self) -> Group:
        return Group(
            *(Panel(_text(segments), title=Text(title), title_align="left") for title, segments in self.sequences)
        )

    def _repr_html_(self) -> str:
        blocks = (
            f'<div style="border:1px solid #ccc;margin:6px 0;padding:6px;white-space:pre-wrap;font-family:monospace">'
            f"<b>{html.escape(title)}</b>\n{''.join(map(_span, segments))}\n<i>{_count(segments)}</i></div>"
            for title, segments in self.sequences
        )
        legend = " ".join(f'<span style="{style}">{kind}</span>' for kind, style in _CSS.items())
        return f"<div>{legend}{''.join(blocks)}</div>"

    def __str__(self) -> str:
        console = Console(width=100, color_system=None)
        with console.capture() as capture:
            console.print(self)
        return capture.get()


def preview_masks(
    source: Any,
    num_rows: int = 1,
    processing_class: PreTrainedTokenizerBase | ProcessorMixin | None = None,
    max_length: int | None = None,
    show: bool = True,
    **rendering: Any,
) -> MaskPreview:
    """Shows which tokens are trained (the policy's own), which are context, and which a `max_length` cuts off.

    Args:
        source:
            A trainer (its training rows, as they are trained on), a dataset of text or token rows, or a
            [`Trajectory`] or a list of them.
        num_rows (`int`, *optional*, defaults to `1`):
            Rows to show; a preference row shows both of its sides.
        processing_class ([`~transformers.PreTrainedTokenizerBase`], *optional*):
            Tokenizer; a trainer brings its own.
        max_length (`int`, *optional*):
            Tokens beyond it are shown as truncated, cut where the trainers would cut.
        show (`bool`, *optional*, defaults to `True`):
            Print at once: in colors in a terminal, as HTML in a notebook.
        **rendering:
            How rows of messages are rendered, as in the trainers' configurations (`tool_dialect`, `write_reasoning`,
            `drop_reasoning`, `training_template`).

    Returns:
        [`MaskPreview`]
    """
    processing_class = processing_class or getattr(source, "processing_class", None)
    if processing_class is None:
        raise ValueError("Token ids are shown as text, which needs a tokenizer. Pass `processing_class=`.")
    if hasattr(source, "train_dataset"):
        source = source.train_dataset
    switches = RenderingSwitches(**rendering)
    sequences = [
        (
            title,
            list(_segments(prompt, completion, mask, branches, max_length, ImageDecoder(processing_class, images))),
        )
        for title, prompt, completion, mask, branches, images in _sequences(
            source, num_rows, processing_class, switches
        )
    ]
    preview = MaskPreview(sequences)
    if show:
        show_preview(preview)
    return preview


def _sequences(
    source: Any, num_rows: int, processing_class: Any, rendering: RenderingSwitches
) -> Iterator[tuple[str, list, list, list, Branches, list]]:
    if isinstance(source, Trajectory):
        source = [source]
    rows = source.take(num_rows) if not isinstance(source, list) else source[:num_rows]
    shapes = {} if isinstance(source, list) else column_shapes(source)
    for index, row in enumerate(rows):
        if isinstance(row, Trajectory):
            title = f"trajectory {index} · {row.stop_reason.value} · {row.verdict.value}"
            yield title, row.prompt_ids, row.completion_ids, row.action_mask, row.branches, []
            continue
        paired = "chosen_ids" in row or columns_read(row) >= {"chosen", "rejected"}
        sides = PREFERENCE_SIDES if paired else UNPAIRED_SIDES
        if sides[0][1] not in row:
            tokenize = tokenize_preference_row if paired else tokenize_unpaired_row
            row = row | tokenize(row, processing_class, shapes, rendering=rendering)
        for ids, mask in sides:
            side = ids.removesuffix("_ids")
            label = f" · label {row['label']}" if "label" in row else ""
            trained = choose_tokens(row, ids, row[mask])
            branches = branches_of(row.get(branches_column(ids)))
            yield (
                f"row {index} · {side}{label}",
                row["prompt_ids"],
                row[ids],
                trained,
                branches,
                sequence_images(row, ids),
            )


def _segments(
    prompt: list[int],
    completion: list[int],
    mask: list[int],
    branches: Branches,
    max_length: int | None,
    decoder: ImageDecoder,
) -> Iterator[Segment]:
    begins = {start for start, _ in branches}
    removed = [change.removed for change in segment_changes(branches, mask, len(prompt) + len(completion))]
    kept, first = len(completion), 0  # of the completion, what stands before `kept` and not before `first`
    if max_length is not None and branches:
        row = TokenRow(prompt, completion, mask, [list(branch) for branch in branches], {})
        dropped = fit_segments(row, max_length)[1]
        first = branches[dropped - 1][0] - len(prompt) if dropped else 0
    elif max_length is not None:
        kept = completion_cut(mask, max_length - len(prompt))
    shown: list[str] = []
    kinds: list[tuple[Kind, int]] = [("context", 0)] * len(prompt)
    turn, before = 0, 0
    for position, bit in enumerate(mask):
        turn += bit and not before
        before = bit
        kind: Kind = "trained" if bit else "context"
        kinds.append((kind if first <= position < kept else "truncated", turn if bit else 0))
    ids = [*prompt, *completion]
    numbers = list(accumulate(int(column in begins) for column in range(len(ids))))
    tokens = zip(numbers, kinds, ids, strict=True)
    for (begun, (kind, number)), group in groupby(tokens, key=lambda item: item[:2]):
        if begun > len(shown):
            gone, _, images = decoder.decode([ids[column] for column in removed[begun - 1]])
            shown.append(gone)
            yield Segment("rewritten", 0, gone, 0, images)
        part = [token for _, _, token in group]
        yield Segment(kind, number, *decoder.decode(part))


def _text(segments: list[Segment]) -> Text:
    text = Text()
    for segment in segments:
        # Also readable without colors: in a log, a pipe, or as a string
        text.append(f"▌{_label(segment)}▐", style=f"{_TERMINAL[segment.kind]} reverse")
        text.append(" ")
        text.append(visible(segment.text), style=_TERMINAL[segment.kind])
    text.append(f"\n{_count(segments)}", style="italic")
    return text


def _label(segment: Segment) -> str:
    """What a segment is, in words: `turn 1` is trained, `context` and `truncated` are not."""
    if segment.kind == "truncated" and segment.turn:
        return f"turn {segment.turn}, truncated"
    if segment.kind == "rewritten":
        return "new segment, no longer read"
    return f"turn {segment.turn}" if segment.turn else segment.kind


def _count(segments: list[Segment]) -> str:
    trained = sum(segment.num_tokens for segment in segments if segment.kind == "trained")
    return f"{trained} of {sum(segment.num_tokens for segment in segments)} tokens trained"


def _span(segment: Segment) -> str:
    told = segment.turn or segment.kind == "rewritten"
    label = f'<sub style="color:#777">{_label(segment)} </sub>' if told else ""
    text = html.escape(visible(segment.text))
    for image in segment.images:
        text = text.replace(html.escape(image.words), f'<img alt="{image.words}" src="{image.thumbnail}">', 1)
    return f'{label}<span style="{_CSS[segment.kind]}">{text}</span>'


def show_preview(preview: Any) -> None:
    """Shows what prints itself: as HTML in a notebook, with `rich` elsewhere."""
    try:
        from IPython import get_ipython
        from IPython.display import display
    except ImportError:
        get_ipython = None
    if get_ipython is not None and getattr(get_ipython(), "kernel", None) is not None:
        display(preview)
    else:
        Console().print(preview)
