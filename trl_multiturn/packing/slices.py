"""
A long packed row in slices: scores and gradients with the activations of one slice in memory at a time.

Every slice of a row sees its path through the keys and values that earlier slices left in each layer. The forward pass
goes through the slices in the row's order, which is depth-first, and keeps nothing but those. The backward pass goes
through them in the opposite order and computes each again, now with its graph: by then all that branches off a slice
has given it the gradient of its keys and values, and what it kept itself is dropped. That is the work of gradient
checkpointing, which computes every layer again, in another order:

    checkpointed    every layer's input of the whole row, and one layer of the whole row
    in slices       keys and values of the row, their gradients along one path, and all layers of one slice
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .plan import Plan
from .row import PackedRow
from .scored_head import TokenScores
from .varlen import VarlenIndex, last_tokens_index


LEAST_TOKENS, MOST_TOKENS = 256, 2048

States = tuple[Tensor, Tensor]  # keys and values of a slice in one layer, `(1, heads, tokens, head_dim)` each


class Span(NamedTuple):
    """Where a slice is in the row, and its path: earlier slices, and how many of each one's first tokens."""

    start: int
    end: int
    path: tuple[tuple[int, int], ...]


def slice_tokens(row_tokens: int, layers: int) -> int:
    """Tokens of a slice whose activations, in all layers, are a third of those of the whole row in one."""
    return max(LEAST_TOKENS, min(MOST_TOKENS, row_tokens // (3 * layers)))


def cut(row: PackedRow, most: int) -> list[Span]:
    """The row in slices of at most `most` tokens, each within one chunk."""
    spans: list[Span] = []
    for chunk in row.chunks:
        lengths: dict[int, int] = {}
        for start, end in row.path_before(chunk):
            for number, span in enumerate(spans):
                if start < span.end and span.start < end:  # a path enters a slice at its first token
                    lengths[number] = min(end, span.end) - span.start
        pieces = tuple(lengths.items())
        for start in range(chunk.start, chunk.end, most):
            end = min(start + most, chunk.end)
            spans.append(Span(start, end, pieces))
            pieces += ((len(spans) - 1, end - start),)
    return spans


@dataclass
class RowSlice:
    """
    What attention gets in place of a row: the keys and values of the path, and where to leave its own.

    Args:
        prefix (`dict[int, tuple[Tensor, Tensor]]`): by layer, keys and values of the path; empty at its start.
        length (`int`): tokens of the path before the slice.
        own (`dict[int, tuple[Tensor, Tensor]]`): by layer, those of the slice, once the layer was there.
    """

    prefix: dict[int, States]
    length: int
    own: dict[int, States] = field(default_factory=dict)
    masks: dict[int | None, Tensor] = field(default_factory=dict)
    _index: VarlenIndex | None = None

    def varlen_index(self, new: int, device: torch.device) -> VarlenIndex:
        """What a variable-length kernel needs to know of the slice's `new` tokens, in every layer the same."""
        if self._index is None:
            self._index = last_tokens_index(new, self.length + new, device)
        return self._index

    def causal_mask(self, new: int, window: int | None, device: torch.device) -> Tensor:
        """`(1, 1, new, length + new)`, true where a token may attend."""
        if window not in self.masks:
            queries = torch.arange(self.length, self.length + new, device=device)[:, None]
            keys = torch.arange(self.length + new, device=device)
            mask = keys <= queries if window is None else (keys <= queries) & (keys > queries - window)
            self.masks[window] = mask[None, None]
        return self.masks[window]


class SlicedScores:
    """
    Scores of a plan's tokens, slice by slice.

    Args:
        plan ([`Plan`]): with a row.
        most (`int`): tokens of a slice.
        run (`Callable`): `(ids, positions, row_slice) -> (tokens, H)`, the decoder on a slice.
        score (`Callable`): `(hidden, targets, fields) ->` [`TokenScores`], with or without the other fields.
        as_now (`Callable`): makes the context that the decoder runs in, in the backward pass too.
    """

    def __init__(
        self,
        plan: Plan,
        most: int,
        run: Callable[[Tensor, Tensor, RowSlice], Tensor],
        score: Callable[[Tensor, Tensor, bool], TokenScores],
        as_now: Callable[[], AbstractContextManager[Any]],
    ) -> None:
        assert plan.row is not None
        self.plan, self.row, self.spans = plan, plan.row, cut(plan.row, most)
        self._run, self._score, self._as_now = run, score, as_now
        self._states: list[dict[int, States]] = []

    def __call__(self) -> TokenScores:
        """All scores, in the plan's order; a backward pass through them adds to the parameters' `.grad`."""
        if torch.is_grad_enabled():
            anchor = torch.zeros((), device=self.row.input_ids.device, requires_grad=True)
            return TokenScores(*_Scores.apply(anchor, self))
        results = self.forward()
        self._states = []
        return results

    def forward(self) -> TokenScores:
        """The pass that keeps keys and values alone."""
        scores: list[TokenScores] = []
        order: list[Tensor] = []
        with torch.no_grad():
            for span in self.spans:
                part = RowSlice(self._prefix(span), sum(length for _, length in span.path))
                chosen = self._chosen(span)
                with self._as_now():
                    hidden = self._hidden(span, part, chosen)
                    self._states.append(part.own)
                    if len(chosen):
                        order.append(chosen)
                        scores.append(self._score(hidden, self.plan.targets[chosen], True))
            places = torch.cat(order).argsort()
            fields = [None if parts[0] is None else torch.cat(parts)[places] for parts in zip(*scores, strict=True)]
            return TokenScores._make(fields)

    def backward(self, grad: Tensor) -> None:
        """Adds the gradient of `(scores * grad).sum()` to the parameters."""
        gradients: list[dict[int, States]] = [{} for _ in self.spans]
        for number in reversed(range(len(self.spans))):
            span, chosen = self.spans[number], self._chosen(self.spans[number])
            if not len(chosen) and not gradients[number]:  # nothing reads it
                continue
            prefix = self._prefix(span)
            for states in prefix.values():
                for tensor in states:
                    tensor.requires_grad_()
            part = RowSlice(prefix, sum(length for _, length in span.path))
            outputs: list[Tensor] = []
            wanted: list[Tensor] = []
            with torch.enable_grad(), self._as_now():
                hidden = self._hidden(span, part, chosen)
                if len(chosen):
                    log_probs = self._score(hidden, self.plan.targets[chosen], False).log_probs
                    outputs, wanted = [log_probs], [grad[chosen]]
            for layer, received in gradients[number].items():
                outputs += part.own[layer]
                wanted += received
            pairs = [pair for pair in zip(outputs, wanted, strict=True) if pair[0].requires_grad]
            if pairs:
                torch.autograd.backward([output for output, _ in pairs], [gradient for _, gradient in pairs])
            self._pass_on(span, prefix, gradients)
            gradients[number], self._states[number] = {}, {}
        self._states = []

    def _chosen(self, span: Span) -> Tensor:
        """Which of the plan's scored tokens a slice predicts."""
        sources = self.plan.sources
        return ((sources >= span.start) & (sources < span.end)).nonzero()[:, 0]

    def _hidden(self, span: Span, part: RowSlice, chosen: Tensor) -> Tensor:
        """The hidden states that predict them, `(n, H)`."""
        ids, positions = (x[:, span.start : span.end] for x in (self.row.input_ids, self.row.position_ids))
        return self._run(ids, positions, part).index_select(0, self.plan.sources[chosen] - span.start)

    def _prefix(self, span: Span) -> dict[int, States]:
        """By layer, keys and values of a slice's path, in tensors of their own."""
        if not span.path:
            return {}
        layers = self._states[span.path[0][0]]
        return {layer: (self._along(span, layer, 0), self._along(span, layer, 1)) for layer in layers}

    def _along(self, span: Span, layer: int, which: int) -> Tensor:
        return torch.cat([self._states[n][layer][which][:, :, :length] for n, length in span.path], dim=2)

    def _pass_on(
        self, span: Span, prefix: dict[int, States], gradients: list[dict[int, tuple[Tensor, Tensor]]]
    ) -> None:
        """Adds the gradient of a path's keys and values to that of the slices that it consists of."""
        for layer, states in prefix.items():
            if any(tensor.grad is None for tensor in states):
                continue
            start = 0
            for number, length in span.path:
                held = gradients[number].get(layer)
                if held is None:
                    keys, values = self._states[number][layer]
                    held = gradients[number][layer] = torch.zeros_like(keys), torch.zeros_like(values)
                for total, tensor in zip(held, states, strict=True):
                    assert tensor.grad is not None
                    total[:, :, :length] += tensor.grad[:, :, start : start + length]
                start += length


class _Scores(torch.autograd.Function):
    """Ties the scores to a backward pass that is not recorded."""

    @staticmethod
    def forward(ctx: Any, anchor: Tensor, scores: SlicedScores) -> tuple[Tensor | None, ...]:
        ctx.scores = scores
        ctx.set_materialize_grads(False)
        results = tuple(scores.forward())
        ctx.mark_non_differentiable(*(x for x in results[1:] if x is not None))
        return results

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[None, None]:
        scores, ctx.scores = ctx.scores, None
        if scores is None:
            raise RuntimeError("A row in slices was computed again and dropped: its backward pass runs once.")
        if grads[0] is not None:
            scores.backward(grads[0])
        return None, None
