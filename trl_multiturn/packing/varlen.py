"""
The packed row on CUDA: one variable-length flash-attention call per layer, keys and values gathered along the paths.

Queries are the row as it is, one sequence per chunk. A chunk's keys are its whole path, so they are longer than its
queries, and the kernels align the causal diagonal at the bottom right, which is what a path needs. PyTorch does not
say so of its own kernel; tests/packing/test_cuda.py checks it, and the windows, against the dense definition on a GPU
(passed on an H200 with PyTorch 2.11; flash-attn has not been run). Without a GPU the index arithmetic is checked.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import lru_cache
from importlib.util import find_spec
from typing import NamedTuple

import torch
from torch import Tensor
from transformers.utils import is_flash_attn_2_available

from .row import PackedRow


# What the kernels compute in
KERNEL_DTYPES = (torch.float16, torch.bfloat16)


class VarlenIndex(NamedTuple):
    """What a variable-length kernel needs to know of a row."""

    kv_index: Tensor | None  # (K,) row indices of all chunks' keys, chunk after chunk; `None` where those are given
    cu_seq_q: Tensor  # (chunks + 1,) int32, cumulative numbers of queries
    cu_seq_k: Tensor  # (chunks + 1,) int32, cumulative numbers of keys
    max_q: int
    max_k: int


def varlen_index(row: PackedRow) -> VarlenIndex:
    """The row's gather indices and cumulative lengths, computed once per row."""
    if row._varlen_index is not None:
        return row._varlen_index
    starts = torch.tensor([0, *row.segment_lengths]).cumsum(0).tolist()
    pieces, lengths = [], []
    for chunk in row.chunks:
        pieces += [torch.arange(starts[s], starts[s + 1]) for s in chunk.prefix_segments]
        pieces.append(torch.arange(chunk.start, chunk.end))
        lengths.append(chunk.prefix_length + chunk.end - chunk.start)
    device = row.input_ids.device
    row._varlen_index = VarlenIndex(
        kv_index=torch.cat(pieces).to(device) if row.shares else None,
        cu_seq_q=torch.tensor([0, *row.chunk_lengths]).cumsum(0).to(device, torch.int32),
        cu_seq_k=torch.tensor([0, *lengths]).cumsum(0).to(device, torch.int32),
        max_q=max(row.chunk_lengths),
        max_k=max(lengths),
    )
    return row._varlen_index


def last_tokens_index(new: int, total: int, device: torch.device) -> VarlenIndex:
    """That of the `new` last tokens of one path of `total`, whose keys are given."""
    queries, keys = (torch.tensor([0, length], dtype=torch.int32, device=device) for length in (new, total))
    return VarlenIndex(None, queries, keys, new, total)


def varlen_kernel(query: Tensor, softcap: float | None) -> Callable | None:
    """The kernel for these queries: flash-attention where installed, else PyTorch's own; `None` off CUDA."""
    head_dim = query.shape[-1]
    if query.device.type != "cuda" or query.dtype not in KERNEL_DTYPES or head_dim > 256 or head_dim % 8:
        return None
    if is_flash_attn_2_available():
        return _flash_attn
    # Versions before `window_size` cannot cut a window
    if softcap is None and "window_size" in _arguments_of_torch_varlen():
        return _torch_varlen
    return None


@lru_cache(maxsize=1)
def _arguments_of_torch_varlen() -> frozenset[str]:
    """What PyTorch's `varlen_attn` takes; empty where there is none."""
    if find_spec("torch.nn.attention.varlen") is None:
        return frozenset()
    from torch.nn.attention.varlen import varlen_attn

    return frozenset(inspect.signature(varlen_attn).parameters)


def varlen_attention(
    kernel: Callable,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    index: VarlenIndex,
    scaling: float,
    window: int | None,
    softcap: float | None,
) -> Tensor:
    """Attention along paths in one kernel call, `(1, T, heads, head_dim)`."""
    query, key, value = (tensor.squeeze(0).transpose(0, 1) for tensor in (query, key, value))
    if index.kv_index is not None:
        key, value = key.index_select(0, index.kv_index), value.index_select(0, index.kv_index)
    # A window counts the token itself here, and the tokens to its left there
    left = -1 if window is None else window - 1
    # All that the kernels want is that a head's numbers stand side by side
    query, key, value = (x if x.stride(-1) == 1 else x.contiguous() for x in (query, key, value))
    return kernel(query, key, value, index, scaling, left, softcap).unsqueeze(0)


def _torch_varlen(query, key, value, index: VarlenIndex, scaling: float, left: int, softcap: None) -> Tensor:
    from torch.nn.attention.varlen import varlen_attn

    # PyTorch 2.11 groups heads without being asked; later versions want to be asked
    grouped = {"enable_gqa": query.shape[1] != key.shape[1]} if "enable_gqa" in _arguments_of_torch_varlen() else {}
    output = varlen_attn(
        query,
        key,
        value,
        index.cu_seq_q,
        index.cu_seq_k,
        index.max_q,
        index.max_k,
        scale=scaling,
        window_size=(left, 0),
        **grouped,
    )
    return output[0] if isinstance(output, tuple) else output


def _flash_attn(query, key, value, index: VarlenIndex, scaling: float, left: int, softcap: float | None) -> Tensor:
    from flash_attn import flash_attn_varlen_func

    return flash_attn_varlen_func(
        query,
        key,
        value,
        index.cu_seq_q,
        index.cu_seq_k,
        index.max_q,
        index.max_k,
        softmax_scale=scaling,
        causal=True,
        window_size=(left, 0),
        softcap=softcap or 0.0,
    )
