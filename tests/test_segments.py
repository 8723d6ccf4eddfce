"""Trajectories that are more than one token sequence: their row, their segments, and what is left when some go.

The row of the examples, a turn `a a`, an observation `o`, a turn `b`, then a rewritten history `s` and a turn `c c`:

    columns        0 1 2 3 4 5 6 7 8 9
    tokens         p p a a o b p s c c
    action mask        1 1 0 1 0 0 1 1
    branches       [[6, 0]]    (the second `p` begins the segment, so that it begins with context)
"""

from __future__ import annotations

import json

import pytest

from trl_multiturn import StopReason, Trajectory
from trl_multiturn.segments import (
    RowBuilder,
    Segment,
    behind_prompt,
    check_branches,
    common_prefix,
    drop_segments,
    join_segments,
    path,
    segment_changes,
    split_segments,
)


SEGMENTS = [
    Segment([1, 2], [11, 12, 3, 13], [1, 1, 0, 1], [-0.5, -0.25, 0.0, -1.0]),
    Segment([1, 4, 5], [14, 15], [1, 1], [-2.0, -3.0]),
]


def trajectory(segments=SEGMENTS, **changes):
    fields = dict(prompt=[], completion=[], stop_reason=StopReason.ANSWERED)
    return Trajectory.from_segments(segments, **{**fields, **changes})


def test_what_is_read_again_stands_in_the_row_once():
    row = trajectory()
    assert row.prompt_ids + row.completion_ids == [1, 2, 11, 12, 3, 13, 4, 5, 14, 15]
    assert row.action_mask == [1, 1, 0, 1, 0, 0, 1, 1]
    assert row.logps == [-0.5, -0.25, 0.0, -1.0, 0.0, 0.0, -2.0, -3.0]
    assert row.branches == [[6, 0]]
    assert list(row.turn_spans()) == [(0, 2), (3, 4), (6, 8)]


def test_segments_come_back_as_they_were():
    assert trajectory().segments == SEGMENTS


def test_a_sequence_that_continues_the_one_before_is_the_same_segment():
    whole = trajectory([Segment([1, 2], [11, 12, 3, 13], [1, 1, 0, 1])])
    assert trajectory([Segment([1, 2], [11, 12], [1, 1]), Segment([1, 2, 11, 12, 3], [13], [1])]) == whole
    assert whole.branches == []


def test_a_segment_begins_with_context_although_it_reads_nothing_new():
    row = RowBuilder()
    row.add([1, 2], [11])
    row.add([1, 2], [12])  # the same prompt again
    assert (row.ids, row.action_mask, row.branches) == ([1, 2, 11, 2, 12], [0, 0, 1, 0, 1], [[3, 0]])


def test_a_segment_may_go_on_where_an_earlier_one_ended():
    row = RowBuilder()
    row.add([1, 2], [11])
    row.add([7, 8], [12])  # a sub-agent
    row.add([1, 2, 11, 9], [13])
    assert (row.ids, row.branches) == ([1, 2, 11, 7, 8, 12, 9, 13], [[3, -1], [6, 2]])
    assert [row.ids[column] for column in path(row.branches, 8)] == [1, 2, 11, 9, 13]


def test_a_segment_needs_context():
    row = RowBuilder()
    row.add([1], [2])
    with pytest.raises(ValueError, match="no context"):
        row.add([], [3])


def test_survives_json_and_a_plain_trajectory_is_written_as_before():
    assert Trajectory.from_dict(json.loads(json.dumps(trajectory().to_dict()))) == trajectory()
    assert "branches" not in trajectory(SEGMENTS[:1]).to_dict()
    assert Trajectory.from_dict({**trajectory(SEGMENTS[:1]).to_dict(), "branches": None}).branches == []


@pytest.mark.parametrize("branches", [[[1, 0]], [[10, 0]], [[6, 6]], [[6, -2]], [[7, 0], [6, 0]], [[6]]])
def test_branches_that_describe_no_row_are_refused(branches):
    with pytest.raises(ValueError, match="wants pairs"):
        trajectory().__class__(**{**trajectory().to_dict(), "branches": branches})
    with pytest.raises(ValueError, match="wants pairs"):
        check_branches(branches, 2, 10)


def test_what_a_segment_reads_otherwise():
    row = trajectory()
    (change,) = segment_changes(row.branches, row.action_mask, 10)
    assert (change.kept, change.removed, change.added) == (1, [1, 2, 3, 4, 5], [6, 7])


def test_dropping_segments_keeps_what_later_ones_read():
    row = RowBuilder()
    row.add([1, 2], [11, 12])
    row.add([1, 2, 11, 3], [13])  # reads a token that the first segment sampled
    row.add([1, 2, 11, 3, 4], [14])
    dropped = drop_segments(row.branches, row.action_mask[2:], len(row.ids), 1)
    assert [row.ids[column] for column in dropped.ids] == [1, 2, 11, 3, 13, 4, 14]
    assert dropped.action_mask == [0, 0, 0, 0, 1, 0, 1]
    assert (dropped.prompt_length, dropped.branches) == (4, [[5, 3]])


def test_behind_another_prompt():
    branches = [[10, 3], [14, 8], [20, 0]]  # the whole prompt is kept; a sampled token too; nearly nothing
    assert behind_prompt(branches, 4, 7) == [[13, 6], [17, 11], [23, 0]]
    assert behind_prompt([[10, 2]], 4, 7) == [[13, 5]]  # all but the generation prompt's last token


def test_common_prefix():
    numbers = list(range(100))
    assert all(common_prefix(numbers, [*numbers[:n], -1, *numbers[n:]]) == n for n in range(100))
    assert common_prefix(numbers, numbers[:7]) == 7
    assert split_segments([1], [2], [1]) == [Segment([1], [2], [1])]
    assert join_segments(SEGMENTS).branches == [[6, 0]]
