"""Logits and one uniform number per row → one token and its log-probability per row."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from ..engine import SamplingParams


# Entries whose sum is drawn from before one of them is: a pass over all of them costs more than a few over some
BLOCK = 256
# Most nuclei are no larger, and the largest logits are found in a tenth of the time of sorting all
CANDIDATES = 512


class TokenSampler:
    """Samples one token per row, each row under its own [`SamplingParams`].

    A token is drawn by inverting the cumulative distribution at a uniform number that the caller brings, so the draw
    of a row depends on nothing but its logits and its number. Truncation follows Transformers' order (temperature,
    `top_k`, `top_p`, `min_p`); tokens whose logits tie with the last one kept are kept too.

    Args:
        params (sequence of [`SamplingParams`]):
            One entry per row.
        device (`torch.device`):
            Device of the logits.
    """

    def __init__(self, params: Sequence[SamplingParams], device: torch.device) -> None:
        def column(values: list, dtype: torch.dtype) -> torch.Tensor:
            return torch.tensor(values, dtype=dtype, device=device).unsqueeze(1)

        self._temperature = self._greedy = self._truncated = None
        temperatures = [param.temperature for param in params]
        if any(value not in (0, 1) for value in temperatures):
            self._temperature = column([value or 1.0 for value in temperatures], torch.float32)
        if 0 in temperatures:
            self._greedy = column([value == 0 for value in temperatures], torch.bool)
        truncated = [
            (row, param)
            for row, param in enumerate(params)
            if param.temperature and (param.top_k or param.top_p < 1 or param.min_p)
        ]
        if truncated:
            self._truncated = torch.tensor([row for row, _ in truncated], device=device)
            self._top_k = column([param.top_k for _, param in truncated], torch.long)
            self._top_p = column([param.top_p for _, param in truncated], torch.float32)
            self._log_min_p = column(
                [math.log(param.min_p) if param.min_p else -math.inf for _, param in truncated], torch.float32
            )

    def __call__(self, logits: torch.Tensor, uniforms: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Draws one token per row.

        Args:
            logits (`torch.Tensor` of shape `(N, V)`):
                Next-token logits in any floating type.
            uniforms (`torch.Tensor` of shape `(N,)`):
                Numbers in [0, 1), float32.

        Returns:
            Token ids `(N,)` and their log-probabilities `(N,)` in float32: under the distribution drawn from (after
            temperature and truncation), and at temperature 0 under the untruncated softmax. A row whose logits are
            not finite gets a NaN log-probability.
        """
        logits = logits.float()
        if self._temperature is not None:
            logits = logits / self._temperature
        if self._truncated is not None:
            kept = truncate_logits(logits[self._truncated], self._top_k, self._top_p, self._log_min_p)
            logits = logits.index_copy(0, self._truncated, kept)
        probs = logits.softmax(-1)
        sums = block_sums(probs)
        tokens = invert_cdf(probs, sums, uniforms.unsqueeze(1))
        if self._greedy is not None:
            tokens = torch.where(self._greedy, logits.argmax(-1, keepdim=True), tokens)
        # Over 100,000 float32 numbers a softmax is only normalized to some 1e-5; a sum of sums is closer.
        return tokens.squeeze(1), (probs.gather(1, tokens) / sums.sum(-1, keepdim=True)).log().squeeze(1)


def block_sums(weights: torch.Tensor) -> torch.Tensor:
    """Sums `(N, B)` of 256 neighbors each of `(N, V)`, of fewer in the last."""
    count = weights.shape[1]
    whole = count - count % BLOCK
    sums = weights[:, :whole].unflatten(1, (-1, BLOCK)).sum(-1)
    return sums if whole == count else torch.cat([sums, weights[:, whole:].sum(-1, keepdim=True)], dim=1)


def invert_cdf(weights: torch.Tensor, sums: torch.Tensor, uniforms: torch.Tensor) -> torch.Tensor:
    """Draws one entry per row, with probabilities that are as its weights: first a block, then an entry of it.

    Args:
        weights (`torch.Tensor` of shape `(N, V)`):
            Not negative. An entry without weight is never drawn.
        sums (`torch.Tensor` of shape `(N, B)`):
            Their [`block_sums`].
        uniforms (`torch.Tensor` of shape `(N, 1)`):
            Numbers in [0, 1].

    Returns:
        Indices `(N, 1)`; of rows with a NaN they mean nothing.
    """
    block, within = _invert(sums, uniforms)
    entries = block * BLOCK + torch.arange(BLOCK, device=weights.device)
    beyond = entries >= weights.shape[1]
    inside = weights.gather(1, entries.masked_fill(beyond, 0)).masked_fill(beyond, 0)
    return block * BLOCK + _invert(inside, within)[0]


def _invert(weights: torch.Tensor, uniforms: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The entry that the number falls on, and where on it, from 0 to 1; both `(N, 1)`."""
    cdf = weights.cumsum(-1)
    total = cdf[:, -1:]
    # Rounding may carry u · total up to total itself, above which no entry lies.
    threshold = torch.minimum(uniforms * total, torch.nextafter(total, torch.zeros_like(total)))
    # A parallel scan need not be monotone to the last bit: an entry without weight must not win by a rounding error.
    above = (cdf > threshold) & (weights > 0)
    entry = above.to(torch.uint8).argmax(-1, keepdim=True)
    weight = weights.gather(1, entry)
    start = cdf.gather(1, entry) - weight
    return entry, ((threshold - start) / weight).clamp(0, 1)


def truncate_logits(
    logits: torch.Tensor, top_k: torch.Tensor, top_p: torch.Tensor, log_min_p: torch.Tensor
) -> torch.Tensor:
    """Sets the logits that top-k, nucleus and min-p sampling leave out to -inf.

    Args:
        logits (`torch.Tensor` of shape `(N, V)`):
            Logits after temperature, float32.
        top_k (`torch.Tensor` of shape `(N, 1)`):
            Per row; 0 truncates nothing.
        top_p (`torch.Tensor` of shape `(N, 1)`):
            Per row; 1 truncates nothing.
        log_min_p (`torch.Tensor` of shape `(N, 1)`):
            Logarithm of `min_p`, per row; -inf truncates nothing.

    Returns:
        `(N, V)` logits. The most probable token is always kept.
    """
    cut = logits.amax(-1, keepdim=True) + log_min_p
    if (most := int(top_k.max())) > 0:
        largest = logits.topk(min(most, logits.shape[-1])).values
        last = largest.gather(1, (top_k - 1).clamp(0, largest.shape[1] - 1))
        last = last.masked_fill(top_k == 0, -math.inf)
        cut, logits = torch.maximum(cut, last), logits.masked_fill(logits < last, -math.inf)
    if (nuclei := (top_p < 1).squeeze(1)).any():
        cut[nuclei] = torch.maximum(cut[nuclei], nucleus_cut(logits[nuclei], top_p[nuclei], CANDIDATES))
    return logits.masked_fill(logits < cut, -math.inf)


def nucleus_cut(logits: torch.Tensor, top_p: torch.Tensor, candidates: int) -> torch.Tensor:
    """The least logit `(N, 1)` of each row's nucleus: of every token before which less than `top_p` of the mass lies.

    Only the largest `candidates` of a row are sorted, and 16 times as many where its nucleus may be larger.
    """
    count = logits.shape[-1]
    ordered = logits.topk(min(candidates, count)).values
    probs = (ordered - logits.logsumexp(-1, keepdim=True)).exp()
    in_nucleus = (probs.cumsum(-1) - probs < top_p).sum(-1, keepdim=True).clamp(min=1)
    cut = ordered.gather(1, in_nucleus - 1)
    if candidates < count and (larger := (in_nucleus == candidates).squeeze(1)).any():
        cut[larger] = nucleus_cut(logits[larger], top_p[larger], 16 * candidates)
    return cut
