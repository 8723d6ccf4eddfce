"""The packed row, written out by hand and against a trie built token by token."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings, strategies as st

from trl_multiturn.packing.row import Chunk, pack_rows


def padded(rows, pad=0):
    width = max(map(len, rows))
    ids = torch.tensor([row + [pad] * (width - len(row)) for row in rows])
    return ids, torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows])


def test_layout_by_hand():
    #   a b c d          a b c d
    #   a b x       ->       x        a b c d x y z
    #   y z               y z
    row = pack_rows(*padded([[1, 2, 3, 4], [1, 2, 9], [7, 8]]), min_shared=1)
    assert row.input_ids.tolist() == [[1, 2, 3, 4, 9, 7, 8]]
    assert row.position_ids.tolist() == [[0, 1, 2, 3, 2, 0, 1]]
    assert row.parents.tolist() == [-1, 0, 1, 2, 1, -1, 5]
    assert row.cells.tolist() == [[0, 1, 2, 3], [0, 1, 4, -1], [5, 6, -1, -1]]
    assert row.segment_lengths == [2, 2, 1, 2]  # cut after `a b`, where the second path leaves
    assert row.chunks == [Chunk(0, 4, (), 0), Chunk(4, 5, (0,), 2), Chunk(5, 7, (), 0)]
    assert row.raw_tokens == 9


def test_a_duplicate_adds_nothing_and_a_prefix_is_extended():
    row = pack_rows(*padded([[5, 6, 7], [5, 6], [5, 6, 7]]), min_shared=1)
    assert row.input_ids.tolist() == [[5, 6, 7]]
    assert row.cells.tolist() == [[0, 1, 2], [0, 1, -1], [0, 1, 2]]
    assert row.chunks == [Chunk(0, 2, (), 0), Chunk(2, 3, (0,), 2)]


def test_padding_is_read_from_the_mask_and_never_from_ids():
    ids, mask = padded([[3, 3, 3], [3]], pad=3)
    assert pack_rows(ids, mask, min_shared=1).cells.tolist() == [[0, 1, 2], [0, -1, -1]]


def test_ids_sort_as_numbers_beyond_one_byte():
    rows = [[256, 1, 5], [1, 300, 2], [256, 1, 6], [1, 300, 3]]
    assert len(pack_rows(*padded(rows), min_shared=1)) == 3 + 1 + 3 + 1


def test_without_sharing_the_row_is_the_batch_without_padding():
    row = pack_rows(*padded([[1, 2, 3], [1, 2]]), share=False)
    assert row.input_ids.tolist() == [[1, 2, 3, 1, 2]]
    assert not row.shares


@pytest.mark.parametrize("mask", [[[0, 1, 1]], [[1, 0, 1]], [[0, 0, 0]]])
def test_other_padding_is_refused(mask):
    with pytest.raises(ValueError, match="Pad on the right"):
        pack_rows(torch.tensor([[1, 2, 3]]), torch.tensor(mask))


rows_of_tokens = st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=12), min_size=1, max_size=9)


@settings(max_examples=200, deadline=None)
@given(rows_of_tokens, st.integers(1, 4))
def test_every_sequence_can_be_read_back_along_its_path(rows, min_shared):
    row = pack_rows(*padded(rows, pad=1), min_shared=min_shared)
    starts = torch.tensor([0, *row.segment_lengths]).cumsum(0).tolist()
    for tokens, cells in zip(rows, row.cells.tolist(), strict=True):
        path = cells[: len(tokens)]
        assert row.input_ids[0, path].tolist() == tokens
        assert row.position_ids[0, path].tolist() == list(range(len(tokens)))
        assert row.parents[path].tolist() == [-1, *path[:-1]]
        assert cells[len(tokens) :] == [-1] * (len(cells) - len(tokens))
    # What attention reads for a chunk, prefix segments then itself, is the path to its last token
    for chunk in row.chunks:
        keys = [t for s in chunk.prefix_segments for t in range(starts[s], starts[s + 1])]
        keys += range(chunk.start, chunk.end)
        token, path = chunk.end - 1, []
        while token >= 0:
            path.append(token)
            token = row.parents[token].item()
        assert keys == path[::-1]
        assert len(keys) == chunk.prefix_length + chunk.end - chunk.start
    assert row.raw_tokens == sum(map(len, rows)) == len(row.paths)
    if min_shared == 1:
        assert len(row) == len({tuple(tokens[: i + 1]) for tokens in rows for i in range(len(tokens))})
