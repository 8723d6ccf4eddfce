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

from typing import NamedTuple

import torch
from torch import Tensor


TILE_TOKENS = 128
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
        device = hidden.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else weight.dtype
        h, w = hidden.to(dtype), weight.to(dtype)
        b = None if bias is None else bias.to(dtype)
        n, vocab = len(h), len(w)
        mode = _backward_mode(ctx.needs_input_grad, n * vocab * h.element_size(), softcap, keep_bytes)

        log_probs, log_z = (torch.empty(n, dtype=torch.float32, device=h.device) for _ in range(2))
        out = {name: torch.empty_like(log_probs) for name in fields}
        if "is_top1" in out:
            out["is_top1"] = torch.empty(n, dtype=torch.bool, device=h.device)
        kept = torch.empty(n, vocab, dtype=dtype, device=h.device) if mode == "keep" else None
        grad_h = torch.empty_like(h) if mode == "frozen" else None
        scratch = torch.empty(min(TILE_TOKENS, n), vocab, dtype=torch.float32, device=h.device)

        for start in range(0, n, TILE_TOKENS):
            tile = slice(start, min(start + TILE_TOKENS, n))
            rows, target = h[tile], targets[tile, None]
            z = _logits(rows, w, b, scale, softcap)
            top = z.amax(dim=-1, keepdim=True)
            # Exponentials stay unnormalised: 1 / sum goes into the tokens' factors instead of a pass over the tile
            exp_out = kept[tile] if kept is not None and dtype == torch.float32 else scratch[: len(rows)]
            exp = torch.exp(torch.sub(z, top, out=exp_out), out=exp_out)
            total = exp.sum(dim=-1, keepdim=True)
            log_z[tile] = (top + total.log())[:, 0]
            z_target = z.gather(1, target)
            log_probs[tile] = z_target[:, 0] - log_z[tile]
            _fill_fields(out, tile, z, exp, total, top, z_target, target, log_z[tile])
            if mode == "keep" and exp_out.dtype != dtype:
                kept[tile] = exp
            elif mode == "frozen":
                grad_h[tile] = _grad_of_log_prob(z, exp.div_(total), w, target, scale, softcap)
        if mode == "keep":
            ctx.save_for_backward(h, w, targets, kept, kept.sum(dim=-1, keepdim=True, dtype=torch.float32))
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


def _backward_mode(needs: tuple[bool, ...], kept_bytes: int, softcap: float | None, keep_bytes: int) -> str | None:
    if not any(needs[:3]):
        return None
    if not any(needs[1:3]):
        return "frozen"
    return "keep" if softcap is None and kept_bytes <= keep_bytes else "recompute"


def _logits(h: Tensor, w: Tensor, b: Tensor | None, scale: float, softcap: float | None) -> Tensor:
    """`(n, V)` float32 in a buffer of their own, so that callers may work in place."""
    z = (torch.mm(h, w.t()) if b is None else torch.addmm(b, h, w.t())).float()
    if scale != 1.0:
        z.mul_(scale)
    return z if softcap is None else z.div_(softcap).tanh_().mul_(softcap)


def _fill_fields(out, tile, z, exp, total, top, z_target, target, log_z) -> None:
    if "entropy" in out:
        out["entropy"][tile] = log_z - torch.linalg.vecdot(exp, z) / total[:, 0]
    if "log_sum_sq_probs" in out:
        out["log_sum_sq_probs"][tile] = torch.linalg.vecdot(exp, exp).log() - 2 * total[:, 0].log()
    if "mean_logits" in out:
        out["mean_logits"][tile] = z.mean(dim=-1)
    if "is_top1" in out:
        is_top = z_target[:, 0] == top[:, 0]
        # A tie goes to the first of the most likely tokens; only the few candidates are searched
        is_top[is_top.clone()] = z[is_top].argmax(dim=-1) == target[is_top, 0]
        out["is_top1"][tile] = is_top


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
    for start in range(0, len(h), TILE_TOKENS):
        tile = slice(start, start + TILE_TOKENS)
        rows = h[tile]
        z = _logits(rows, w, b, scale, softcap)
        factor = (grad[tile] * scale)[:, None]
        grad_z = torch.exp(z - log_z[tile, None]).mul_(-factor).scatter_add_(1, targets[tile, None], factor)
        if softcap is not None:
            grad_z.mul_(1 - (z / softcap).square_())
        if grad_b is not None:
            grad_b += grad_z.sum(dim=0)
        if grad_w is not None:
            grad_w.addmm_(grad_z.t(), rows.float())
        if grad_h is not None:
            grad_h[tile] = torch.mm(grad_z.to(w.dtype), w)
    return grad_h, grad_w, grad_b
