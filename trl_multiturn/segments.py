"""A trajectory that is more than one token sequence, kept as one row of tokens.

A policy does not always read what it read before and more: a chat template strips the thinking of earlier turns, a
long history is summarized, a sub-agent reads a prompt of its own. Each time the next prompt does not continue the
tokens so far, a new *segment* begins. A trajectory is then several sequences that are sampled one after another, and
its log-probability is the sum over all tokens that were sampled, wherever they stand.

A row keeps every token once, in the order of time, and says where it leaves its path:

    segment 0      p p p a a a        p: prompt, a: sampled
    segment 1      p p p c c b b      c: what was read instead of the first `a`s, b: sampled

    columns        0 1 2 3 4 5 6 7 8 9
    tokens         p p p a a a c c b b
    action mask          1 1 1 0 0 1 1
    branches       [[6, 2]]           from column 6 on, the tokens continue the one at column 2

So a token's *path* (all that the policy had read before it) runs to the left, and jumps at a branch to its parent. A
plain trajectory has no branches. The first token of a segment is always context: a token that was sampled stands right
after the token that it was predicted from.

The module needs only the standard library.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass


Branches = Sequence[Sequence[int]]
"""`[start, parent]` of each segment but the first, in columns of `prompt_ids + completion_ids`; parent -1 for none."""


@dataclass(frozen=True)
class Segment:
    """One token sequence of a trajectory.

    Args:
        context_ids (`list[int]`):
            All that the policy read before the first token that it sampled here.
        completion_ids (`list[int]`):
            What follows.
        action_mask (`list[int]`):
            Aligned with `completion_ids`: 1 on the tokens that the policy sampled in this segment.
        logps (`list[float]`, *optional*):
            Their log-probabilities under the policy that sampled them, 0.0 outside the mask.
    """

    context_ids: list[int]
    completion_ids: list[int]
    action_mask: list[int]
    logps: list[float] | None = None


@dataclass(frozen=True)
class SegmentChange:
    """What a new segment reads otherwise than the one before it; columns of the row.

    Args:
        kept (`int`): leading tokens that both read.
        removed (`list[int]`): columns that the segment before read or sampled, and this one does not read.
        added (`list[int]`): columns that are read instead, up to the first sampled one.
    """

    kept: int
    removed: list[int]
    added: list[int]


class RowBuilder:
    """Joins sequences into the tokens and branches of one row; what is read again stands in it once.

    Attributes:
        ids (`list[int]`), action_mask (`list[int]`), logps (`list[float]`): per column of the row.
        branches (`list[list[int]]`): where a sequence does not continue the one before it.
        prompt_length (`int`): columns of the first sequence's context.

    Example:

    ```python
    >>> row = RowBuilder()
    >>> row.add([1, 2, 3], [4, 5])
    >>> row.add([1, 2, 3, 4, 5, 6], [7])  # continues the sequence
    >>> row.add([1, 2, 8, 9], [10])  # does not: a new segment
    >>> row.ids, row.action_mask, row.branches
    ([1, 2, 3, 4, 5, 6, 7, 8, 9, 10], [0, 0, 0, 1, 1, 0, 1, 0, 0, 1], [[7, 1]])
    ```
    """

    def __init__(self) -> None:
        self.ids: list[int] = []
        self.action_mask: list[int] = []
        self.logps: list[float] = []
        self.branches: list[list[int]] = []
        self.prompt_length = 0
        self._paths: list[tuple[list[int], list[int]]] = []  # ids and columns of each segment

    def add(
        self,
        context_ids: Sequence[int],
        completion_ids: Sequence[int],
        action_mask: Sequence[int] | None = None,
        logps: Sequence[float] | None = None,
    ) -> None:
        """Appends what the policy sampled, and of what it read before that the part which is new.

        Args:
            context_ids (`Sequence[int]`): all that it read before.
            completion_ids (`Sequence[int]`): what follows.
            action_mask (`Sequence[int]`, *optional*): which of it was sampled; all of it by default.
            logps (`Sequence[float]`, *optional*): 0.0 by default.

        Raises:
            `ValueError`: if a later sequence has no context.
        """
        context = list(context_ids)
        if not self._paths:
            self.prompt_length = len(context)
            self._paths.append(([], []))
        elif common_prefix(self._paths[-1][0], context) < len(self._paths[-1][0]):
            self._branch(context)
        new = context[len(self._paths[-1][0]) :]
        self._append(new, [0] * len(new), [0.0] * len(new))
        count = len(completion_ids)
        self._append(completion_ids, action_mask or [1] * count, logps or [0.0] * count)

    def _branch(self, context: list[int]) -> None:
        if not context:
            raise ValueError(
                "A segment has no context, so the first token sampled in it is predicted from nothing. Give it at "
                "least one token to continue."
            )
        columns = _read_before(self._paths, context)
        self.branches.append([len(self.ids), columns[-1] if columns else -1])
        self._paths.append((context[: len(columns)], columns))

    def _append(self, ids: Sequence[int], mask: Sequence[int], logps: Sequence[float]) -> None:
        path_ids, columns = self._paths[-1]
        columns.extend(range(len(self.ids), len(self.ids) + len(ids)))
        path_ids.extend(ids)
        self.ids.extend(ids)
        self.action_mask.extend(mask)
        self.logps.extend(logps)


def _read_before(paths: Sequence[tuple[list[int], list[int]]], context: list[int]) -> list[int]:
    """Columns of the longest beginning of a context that one of the paths (ids and columns) has.

    Without the context's last token, as a segment begins with a token that was not sampled.
    """
    shared, columns = max(
        ((common_prefix(ids, context), columns) for ids, columns in reversed(paths)), key=lambda found: found[0]
    )
    return columns[: min(shared, len(context) - 1)]


def find_parent(ids: Sequence[int], branches: Branches, context: list[int]) -> tuple[int, int]:
    """Where a sequence with this context leaves the row: its parent's column, and the tokens up to there.

    Args:
        ids (`list[int]`), branches (`list[list[int]]`): the row.
        context (`list[int]`): what the policy reads next; not empty.
    """
    paths = [path(branches, stop) for _, stop in own_columns(branches, len(ids))]
    columns = _read_before([([ids[column] for column in each], each) for each in paths], context)
    return (columns[-1] if columns else -1), len(columns)


def join_segments(segments: Sequence[Segment]) -> RowBuilder:
    """The row of segments in the order of time."""
    row = RowBuilder()
    for segment in segments:
        row.add(segment.context_ids, segment.completion_ids, segment.action_mask, segment.logps)
    return row


def split_segments(
    prompt_ids: Sequence[int],
    completion_ids: Sequence[int],
    action_mask: Sequence[int],
    branches: Branches = (),
    logps: Sequence[float] | None = None,
) -> list[Segment]:
    """The segments of a row, in the order of time."""
    ids = [*prompt_ids, *completion_ids]
    mask = [*[0] * len(prompt_ids), *action_mask]
    numbers = None if logps is None else [*[0.0] * len(prompt_ids), *logps]
    segments = []
    for number, (start, stop) in enumerate(own_columns(branches, len(ids))):
        first = _first_sampled(mask, start, stop) if number else min(len(prompt_ids), stop)
        segments.append(
            Segment(
                context_ids=[ids[column] for column in path(branches, first)],
                completion_ids=ids[first:stop],
                action_mask=mask[first:stop],
                logps=None if numbers is None else numbers[first:stop],
            )
        )
    return segments


def path(branches: Branches, end: int) -> list[int]:
    """Columns of the sequence that ends before column `end` of a row.

    Example:

    ```python
    >>> path([[6, 2]], 9)
    [0, 1, 2, 6, 7, 8]
    ```
    """
    pieces = []
    for start, parent in reversed(branches):
        if start < end:
            pieces.append(range(start, end))
            end = parent + 1
    pieces.append(range(end))
    return [column for piece in reversed(pieces) for column in piece]


def own_columns(branches: Branches, length: int) -> Iterator[tuple[int, int]]:
    """Half-open spans of the columns that each segment adds to a row of `length` tokens."""
    starts = [0, *(start for start, _ in branches)]
    yield from zip(starts, [*starts[1:], length], strict=True)


def segment_changes(branches: Branches, action_mask: Sequence[int], length: int) -> list[SegmentChange]:
    """What each segment but the first reads otherwise than the one before it.

    Args:
        branches (`list[list[int]]`): of the row.
        action_mask (`list[int]`): of the completion, which ends the row.
        length (`int`): tokens of prompt and completion.
    """
    mask = [0] * (length - len(action_mask)) + list(action_mask)
    changes = []
    for start, stop in list(own_columns(branches, length))[1:]:
        first = _first_sampled(mask, start, stop)
        before, after = path(branches, start), path(branches, first)
        kept = common_prefix(before, after)
        changes.append(SegmentChange(kept, before[kept:], after[kept:]))
    return changes


def drop_segments(branches: Branches, action_mask: Sequence[int], length: int, count: int) -> RowBuilder:
    """A row without its first `count` segments. What later ones read of them stays, as context.

    Args:
        branches (`list[list[int]]`): of the row.
        action_mask (`list[int]`): of the completion, which ends the row.
        length (`int`): tokens of prompt and completion.
        count (`int`): segments to drop.

    Returns:
        [`RowBuilder`]: the new row, whose `ids` are columns of the old one.
    """
    mask = [0] * (length - len(action_mask)) + list(action_mask)
    row = RowBuilder()
    for start, stop in list(own_columns(branches, length))[count:]:
        first = _first_sampled(mask, start, stop)
        row.add(path(branches, first), range(first, stop), mask[first:stop])
    return row


def branches_of(value: Branches | None) -> list[list[int]]:
    """The branches that a column of rows holds: without the first segment's `[0, -1]`, which they may begin with."""
    return [[int(start), int(parent)] for start, parent in value or () if start]


def behind_prompt(branches: Branches, length: int, other_length: int) -> list[list[int]]:
    """Branches of a completion, as they are behind another prompt than its own.

    Segments that read most of the own prompt read the other one, as far to its end. Those that left the own prompt
    early wrote one of their own, and keep it.

    Args:
        branches (`list[list[int]]`): of the row.
        length (`int`), other_length (`int`): tokens of its own prompt, and of the other one.
    """
    moved = []
    for start, parent in branches:
        left = length - 1 - parent  # negative in the completion
        if 2 * left <= length:
            parent = max(other_length - 1 - left, -1)
        else:
            parent = min(parent, other_length - 1)
        moved.append([start - length + other_length, parent])
    return moved


def check_branches(branches: Branches, prompt_length: int, length: int) -> None:
    """Raises `ValueError` where branches do not describe a row of `length` tokens, `prompt_length` of them prompt."""
    last = max(prompt_length, 1) - 1
    for branch in branches:
        if len(branch) != 2 or not (last < branch[0] < length and -1 <= branch[1] < branch[0]):
            raise ValueError(
                f"`branches` holds {list(branch)}, but a row of {prompt_length} prompt and {length - prompt_length} "
                "completion tokens wants pairs `[start, parent]`: increasing starts within the completion, each "
                "continuing a column before it (or -1). Write rows with `join_segments`."
            )
        last = branch[0]


def common_prefix(first: Sequence[int], second: Sequence[int]) -> int:
    """Number of leading entries that two lists share; compares whole slices."""
    low, high = 0, min(len(first), len(second))
    if first[:high] == second[:high]:
        return high
    while low < high - 1:
        middle = (low + high) // 2
        low, high = (middle, high) if first[low:middle] == second[low:middle] else (low, middle)
    return low


def _first_sampled(mask: Sequence[int], start: int, stop: int) -> int:
    return next((column for column in range(start, stop) if mask[column]), stop)
