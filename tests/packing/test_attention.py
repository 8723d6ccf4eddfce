"""Attention along the row's paths, and the index arithmetic of the CUDA kernels under their documented semantics."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from tests.packing.families import branching_batch
from trl_multiturn.packing.attention import packed_attention, poison_mask
from trl_multiturn.packing.path_attention import path_attention
from trl_multiturn.packing.row import pack_rows
from trl_multiturn.packing.slices import RowSlice, cut
from trl_multiturn.packing.varlen import varlen_index


HEADS, GROUPS, DIM, SCALE = 4, 2, 8, 0.3
MODULE = SimpleNamespace(is_causal=True, layer_idx=0)


def a_row():
    batch = branching_batch()
    return pack_rows(batch["input_ids"], batch["attention_mask"], min_shared=1)


def tensors(row, seed=0):
    generator = torch.Generator().manual_seed(seed)
    shapes = [(1, heads, len(row), DIM) for heads in (HEADS, HEADS // GROUPS, HEADS // GROUPS)]
    return [torch.randn(shape, generator=generator).requires_grad_() for shape in shapes]


def softmax_over(q, k, v, allowed, softcap):
    k, v = k.repeat_interleave(GROUPS, 1), v.repeat_interleave(GROUPS, 1)
    scores = q @ k.transpose(2, 3) * SCALE
    scores = scores if softcap is None else softcap * torch.tanh(scores / softcap)
    return scores.masked_fill(~allowed, -torch.inf).softmax(-1) @ v


def tree_attention(q, k, v, row, window, softcap):
    """Attention under the dense T x T mask of ancestors within the window by depth."""
    allowed = torch.zeros(len(row), len(row), dtype=torch.bool)
    for token in range(len(row)):
        ancestor = token
        while ancestor >= 0:
            allowed[token, ancestor] = True
            ancestor = row.parents[ancestor].item()
    depth = row.position_ids[0]
    if window is not None:
        allowed &= depth[:, None] - depth < window
    return softmax_over(q, k, v, allowed, softcap).transpose(1, 2)


def documented_kernel(query, key, value, index, scaling, left, softcap):
    """
    What variable-length kernels document: sequences cut at `cu_seq`, the causal diagonal aligned at the bottom right,
    `left` tokens to the left of the diagonal visible (all for -1).
    """
    outputs = []
    for i in range(len(index.cu_seq_q) - 1):
        q = query[index.cu_seq_q[i] : index.cu_seq_q[i + 1]]
        k, v = (x[index.cu_seq_k[i] : index.cu_seq_k[i + 1]] for x in (key, value))
        assert len(q) <= index.max_q and len(k) <= index.max_k
        distance = torch.arange(len(k) - len(q), len(k))[:, None] - torch.arange(len(k))
        allowed = (distance >= 0) & ((distance <= left) if left >= 0 else True)
        q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))
        outputs.append(softmax_over(q, k, v, allowed, softcap)[0].transpose(0, 1))
    return torch.cat(outputs)


def whole(q, k, v, row, window, softcap):
    return packed_attention(MODULE, q, k, v, row, SCALE, sliding_window=window, softcap=softcap)


def sliced(q, k, v, row, window, softcap):
    """Slice by slice, each with the keys and values of its path."""
    outputs, spans = [], cut(row, 4)
    for span in spans:
        path = [i for n, length in span.path for i in range(spans[n].start, spans[n].start + length)]
        part = RowSlice({0: (k[:, :, path], v[:, :, path])} if path else {}, len(path))
        own = [x[:, :, span.start : span.end] for x in (q, k, v)]
        outputs.append(packed_attention(MODULE, *own, part, SCALE, sliding_window=window, softcap=softcap))
    return torch.cat(outputs, dim=1)


@pytest.fixture(params=["masks", "two calls", "variable length"])
def kernel(request, monkeypatch):
    """How new tokens attend to their path: under a mask, in two calls without one, or as on a GPU."""
    least = 1 if request.param == "two calls" else 1000
    monkeypatch.setattr("trl_multiturn.packing.path_attention.LEAST_NEW_TOKENS", least)
    if request.param == "variable length":
        monkeypatch.setattr("trl_multiturn.packing.attention.varlen_kernel", lambda *_: documented_kernel)


@pytest.mark.usefixtures("kernel")
@pytest.mark.parametrize("attention", [whole, sliced])
@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("window", [None, 1, 7, 1000])
def test_each_token_sees_its_own_path(attention, window, softcap):
    row = a_row()
    ours, theirs = tensors(row), tensors(row)
    output, expected = attention(*ours, row, window, softcap), tree_attention(*theirs, row, window, softcap)
    torch.testing.assert_close(output, expected, atol=2e-6, rtol=1e-5)
    weights = torch.randn(output.shape, generator=torch.Generator().manual_seed(1))
    (output * weights).sum().backward()
    (expected * weights).sum().backward()
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a.grad, b.grad, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-12), (torch.bfloat16, 2e-2)])
def test_attention_to_path_and_new_tokens_is_that_to_both_at_once(dtype, tolerance):
    generator = torch.Generator().manual_seed(0)
    shapes = [(1, HEADS, 5, DIM)] + [(1, HEADS // GROUPS, length, DIM) for length in (5, 5, 3, 3)]
    exact = [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype).double() for shape in shapes]
    weights = torch.randn(1, HEADS, 5, DIM, generator=generator, dtype=torch.float64).to(dtype)
    ours, theirs = ([x.to(kind).requires_grad_() for x in exact] for kind in (dtype, torch.float64))
    q, k, v, path_k, path_v = theirs
    allowed = torch.ones(5, 8, dtype=torch.bool).tril(3)
    expected = softmax_over(q, torch.cat([path_k, k], 2), torch.cat([path_v, v], 2), allowed, None)
    output = path_attention(*ours, SCALE)
    torch.testing.assert_close(output.double(), expected, atol=tolerance, rtol=tolerance)
    (output * weights).sum().backward()
    (expected * weights).sum().backward()
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a.grad.double(), b.grad, atol=tolerance, rtol=tolerance)


def test_the_kernel_gathers_each_path_once_per_chunk():
    row = pack_rows(torch.tensor([[1, 2, 3, 4], [1, 2, 9, 5], [1, 2, 9, 6]]), min_shared=1)
    index = varlen_index(row)
    assert row.input_ids.tolist() == [[1, 2, 3, 4, 9, 5, 6]]
    assert index.kv_index.tolist() == [0, 1, 2, 3] + [0, 1, 4, 5] + [0, 1, 4, 6]
    assert index.cu_seq_q.tolist() == [0, 4, 6, 7]
    assert index.cu_seq_k.tolist() == [0, 4, 8, 12]
    assert (index.max_q, index.max_k) == (4, 4)
    assert index.cu_seq_q.dtype == index.cu_seq_k.dtype == torch.int32


@pytest.mark.parametrize("variant", [{"dropout": 0.1}, {"s_aux": torch.zeros(4)}, {"position_bias": torch.zeros(1)}])
def test_variants_that_are_not_computed_are_refused(variant):
    row = a_row()
    with pytest.raises(NotImplementedError):
        packed_attention(MODULE, *tensors(row), row, **variant)


def test_the_mask_of_a_packed_call_poisons_whoever_reads_it():
    row = a_row()
    q, k, v = tensors(row)
    mask = poison_mask(row, torch.float32)
    k, v = (x.repeat_interleave(GROUPS, 1) for x in (k, v))
    assert torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask).isnan().all()
