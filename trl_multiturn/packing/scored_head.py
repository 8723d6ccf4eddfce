r"""
The LM head on trained targets only, in tiles of tokens, for devices without TRL's Triton kernel.

Per token, with logits $z = \text{softcap}(s (W h + b))$ and $p = \text{softmax}(z)$:

$$\log p_t = z_t - \text{logsumexp}(z), \qquad
\frac{\partial \log p_t}{\partial h} = d \odot (W_t - W^\top p), \qquad
\frac{\partial \log p_t}{\partial W} = d \odot (e_t - p) h^\top$$

with $d = s$, or $s (1 - \tanh^2)$ per logit under a softcap. What is kept for the backward pass depends on what needs
a gradient and what fits:

- head frozen (LoRA): the gradient with respect to `h` is formed at once, so that the backward pass is one multiply;
- head trained, probabilities within `keep_bytes`: they are kept, and the backward pass is two products;
- otherwise tiles are computed again.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor


# Tokens whose logits are computed in one product, where they need not all be kept
TILE_TOKENS = 256
# Of logits that a core turns into scores at a time: near what its own cache holds, and few enough parallel regions
_CACHED_BYTES = 4 * 2**20
KEEP_BYTES = 512 * 2**20

FIELDS = ("entropy", "log_sum_sq_probs", "mean_logits", "is_top1")


class TokenScores(NamedTuple):
    """Per scored token, `(N,)` each; fields that were not asked for are `None`. Only `log_probs` has a gradient."""

    log_probs: Tensor
    entropy: Tensor | None = None
    log_sum_sq_probs: Tensor | None = None
    mean_logits: Tensor | None = None
    is_top1: Tensor | None = None


def score_tokens(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    scale: float = 1.0,
    softcap: float | None = None,
    fields: tuple[str, ...] = (),
    keep_bytes: int = KEEP_BYTES,
) -> TokenScores:
    """
    Log-probability of each target given its hidden state, in float32, with the definitions of TRL's fused head.

    Args:
        hidden (`Tensor`): `(N, H)`, last hidden state of the token before each target.
        weight (`Tensor`): `(V, H)`.
        bias (`Tensor`, *optional*): `(V,)`.
        targets (`Tensor`): `(N,)`.
        scale (`float`, *optional*, defaults to `1.0`): factor on the logits.
        softcap (`float`, *optional*): `c` of `c * tanh(logits / c)`, after the scale.
        fields (`tuple[str]`, *optional*): further fields, among `FIELDS`: the distribution's entropy in nats, log of
            the sum of its squared probabilities, mean logit, and whether the target is the first of the most likely.
        keep_bytes (`int`, *optional*): how much the backward pass may keep for speed.
    """
    return TokenScores(*_ScoreTokens.apply(hidden, weight, bias, targets, scale, softcap, fields, keep_bytes))


class _ScoreTokens(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, bias, targets, scale, softcap, fields, keep_bytes):
        dtype = _dtype_of_products(weight)
        h, w = hidden.to(dtype), weight.to(dtype)
        b = None if bias is None else bias.to(dtype)
        n, vocab = len(h), len(w)
        mode = _backward_mode(ctx.needs_input_grad, n * vocab * h.element_size(), softcap, keep_bytes)

        log_probs, log_z, totals = (torch.empty(n, dtype=torch.float32, device=h.device) for _ in range(3))
        out = {name: torch.empty_like(log_probs) for name in fields}
        if "is_top1" in out:
            out["is_top1"] = torch.empty(n, dtype=torch.bool, device=h.device)
        kept = torch.empty(n, vocab, dtype=dtype, device=h.device) if mode == "keep" else None
        # In float32 what is kept takes the place of the logits, so that one product makes them all
        at_once = kept is not None and dtype == torch.float32
        grad_h = torch.empty_like(h) if mode == "frozen" else None

        for tile in _slices(n, n if at_once else TILE_TOKENS):
            z = _logits(h[tile], w, b, scale, softcap, out=kept if at_once else None)
            exps = None if kept is None else kept[tile]
            if mode == "frozen":
                exps = z if softcap is None else torch.empty_like(z)
            for rows in _slices(len(z), _cached_rows(vocab)):
                here = slice(tile.start + rows.start, tile.start + rows.stop)
                exp, totals[here] = _score(z[rows], targets[here, None], here, log_probs, log_z, out)
                if exps is not None:
                    exps[rows] = exp
            if mode == "frozen":
                probs = exps.div_(totals[tile, None])
                grad_h[tile] = _grad_of_log_prob(z, probs, w, targets[tile, None], scale, softcap)
        if mode == "keep":
            # Of what was kept, which bfloat16 rounds
            totals = totals if at_once else kept.sum(dim=-1, dtype=torch.float32)
            ctx.save_for_backward(h, w, targets, kept, totals[:, None])
        elif mode == "frozen":
            ctx.save_for_backward(grad_h)
        elif mode == "recompute":
            ctx.save_for_backward(h, w, b, targets, log_z)
        ctx.mode, ctx.scale, ctx.softcap = mode, scale, softcap
        ctx.dtypes = hidden.dtype, weight.dtype
        ctx.set_materialize_grads(False)
        results = [out.get(name) for name in FIELDS]
        ctx.mark_non_differentiable(*(x for x in results if x is not None))
        return log_probs, *results

    @staticmethod
    def backward(ctx, grad, *_):
        none = (None,) * 8
        if grad is None or ctx.mode is None:
            return none
        hidden_dtype, weight_dtype = ctx.dtypes
        if ctx.mode == "frozen":
            return (ctx.saved_tensors[0] * grad[:, None]).to(hidden_dtype), *none[1:]
        if ctx.mode == "keep":
            grads = _backward_kept(*ctx.saved_tensors, grad * ctx.scale, ctx.needs_input_grad)
        else:
            grads = _backward_recomputed(*ctx.saved_tensors, grad, ctx.scale, ctx.softcap, ctx.needs_input_grad)
        grad_h, grad_w, grad_b = grads
        return (
            None if grad_h is None else grad_h.to(hidden_dtype),
            None if grad_w is None else grad_w.to(weight_dtype),
            None if grad_b is None else grad_b.to(weight_dtype),
            *none[3:],
        )


def _dtype_of_products(weight: Tensor) -> torch.dtype:
    device = weight.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else weight.dtype


def _backward_mode(needs: tuple[bool, ...], kept_bytes: int, softcap: float | None, keep_bytes: int) -> str | None:
    if not any(needs[:3]):
        return None
    if not any(needs[1:3]):
        return "frozen"
    return "keep" if softcap is None and kept_bytes <= keep_bytes else "recompute"


def _logits(
    h: Tensor, w: Tensor, b: Tensor | None, scale: float, softcap: float | None, out: Tensor | None = None
) -> Tensor:
    """`(n, V)` float32 in a buffer of their own, or in `out`, so that callers may work in place."""
    z = (torch.mm(h, w.t(), out=out) if b is None else torch.addmm(b, h, w.t(), out=out)).float()
    if scale != 1.0:
        z.mul_(scale)
    return z if softcap is None else z.div_(softcap).tanh_().mul_(softcap)


def _slices(n: int, size: int) -> Iterator[slice]:
    for start in range(0, n, max(size, 1)):
        yield slice(start, min(start + size, n))


def _cached_rows(vocab: int) -> int:
    """Rows of float32 logits that the cores in use hold in their own caches."""
    return max(8, _CACHED_BYTES // (4 * vocab)) * torch.get_num_threads()


def _score(
    z: Tensor, target: Tensor, here: slice, log_probs: Tensor, log_z: Tensor, out: dict[str, Tensor]
) -> tuple[Tensor, Tensor]:
    """
    Fills the scores of a few tokens from their logits `(n, V)`.

    Returns the exponentials `(n, V)`, of logits less the largest, and their sums `(n,)`: dividing one by the other is
    left to the tokens' factors, which spares a pass.
    """
    top = z.amax(dim=-1, keepdim=True)
    exp = torch.sub(z, top).exp_()
    total = exp.sum(dim=-1)
    log_z[here] = top[:, 0] + total.log()
    z_target = z.gather(1, target)
    log_probs[here] = z_target[:, 0] - log_z[here]
    if "entropy" in out:
        out["entropy"][here] = log_z[here] - torch.linalg.vecdot(exp, z) / total
    if "log_sum_sq_probs" in out:
        out["log_sum_sq_probs"][here] = torch.linalg.vecdot(exp, exp).log() - 2 * total.log()
    if "mean_logits" in out:
        out["mean_logits"][here] = z.mean(dim=-1)
    if "is_top1" in out:
        is_top = z_target[:, 0] == top[:, 0]
        # A tie goes to the first of the most likely tokens; only the few candidates are searched
        is_top[is_top.clone()] = z[is_top].argmax(dim=-1) == target[is_top, 0]
        out["is_top1"][here] = is_top
    return exp, total


def _grad_of_log_prob(z, probs, w, target, scale, softcap) -> Tensor:
    """d log p_target / d h of a tile; works in `probs`' memory."""
    grad_z = probs.neg_().scatter_add_(1, target, torch.ones_like(target, dtype=probs.dtype))
    if softcap is not None:
        grad_z.mul_(1 - (z / softcap).square_())
    grad_h = torch.mm(grad_z.to(w.dtype), w)
    return grad_h if scale == 1.0 else grad_h * scale


def _backward_kept(h, w, targets, kept, total, grad, needs):
    by_total = (-grad[:, None] / total).to(h.dtype)
    grad = grad[:, None].to(h.dtype)
    grad_h = grad_w = grad_b = None
    if needs[0]:
        grad_h = torch.mm(kept, w).mul_(by_total).addcmul_(w.index_select(0, targets), grad)
    if needs[1]:
        # One product over all tokens accumulates in float32 inside; rounding per tile would bias bfloat16 training
        grad_w = torch.mm(kept.t(), h * by_total)
        grad_w = grad_w.float().index_add_(0, targets, (h * grad).float())
    if needs[2]:
        grad_b = torch.mv(kept.t().float(), by_total[:, 0].float()).index_add_(0, targets, grad[:, 0].float())
    return grad_h, grad_w, grad_b


def _backward_recomputed(h, w, b, targets, log_z, grad, scale, softcap, needs):
    grad_h = torch.empty_like(h) if needs[0] else None
    grad_w = torch.zeros(w.shape, dtype=torch.float32, device=w.device) if needs[1] else None
    grad_b = torch.zeros(len(w), dtype=torch.float32, device=w.device) if needs[2] else None
    for tile in _slices(len(h), TILE_TOKENS):
        rows = h[tile]
        z = _logits(rows, w, b, scale, softcap)
        factor = (grad[tile] * scale)[:, None]
        grad_z = torch.sub(z, log_z[tile, None], out=z if softcap is None else None)
        grad_z.exp_().mul_(-factor).scatter_add_(1, targets[tile, None], factor)
        if softcap is not None:
            grad_z.mul_(1 - (z / softcap).square_())
        if grad_b is not None:
            grad_b += grad_z.sum(dim=0)
        if grad_w is not None:
            grad_w.addmm_(grad_z.t(), rows.float())
        if grad_h is not None:
            grad_h[tile] = torch.mm(grad_z.to(w.dtype), w)
    return grad_h, grad_w, grad_b
