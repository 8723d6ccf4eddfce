"""OREO's regulariser: the exact KL over the whole vocabulary, without ever holding `(B, T, V)` logits."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from ._masking import check_shapes, row_mean


@dataclass(frozen=True)
class LMHead:
    """
    What turns a hidden state into logits: `softcap(scale * (hidden @ weight.T + bias))`.

    Args:
        weight (`Tensor`): `(V, H)`.
        bias (`Tensor`, *optional*): `(V,)`.
        scale (`float`, *optional*, defaults to `1.0`): factor on the logits (Cohere, Granite, …).
        softcap (`float`, *optional*): `c` of `c * tanh(logits / c)` (Gemma 2).
    """

    weight: Tensor
    bias: Tensor | None = None
    scale: float = 1.0
    softcap: float | None = None

    def log_probs(self, hidden: Tensor) -> Tensor:
        """`(N, H) -> (N, V)` log-probabilities in float32 or wider."""
        logits = torch.nn.functional.linear(hidden.to(self.weight.dtype), self.weight, self.bias)
        logits = logits.float() if logits.dtype in (torch.float16, torch.bfloat16) else logits
        logits = logits * self.scale
        if self.softcap is not None:
            logits = self.softcap * torch.tanh(logits / self.softcap)
        return logits.log_softmax(dim=-1)


def full_vocab_kl(
    hidden: Tensor, head: LMHead, ref_hidden: Tensor, ref_head: LMHead, chunk_size: int = 1024
) -> Tensor:
    r"""
    Exact $KL(\pi(\cdot|s) \| \pi_{ref}(\cdot|s))$ of each state in nats, `(N,)`, with gradient through π.

    Tokens are worked on in chunks and each chunk's logits are computed again in the backward pass, so that at most
    about `4 * chunk_size * V` numbers exist at once, in the forward and in the backward pass.

    Args:
        hidden (`Tensor`): `(N, H)`, the policy's last hidden states; select action columns before, states that do not
            count cost as much as those that do.
        head ([`LMHead`]): the policy's head; its weight and bias get gradients where they require them.
        ref_hidden (`Tensor`): `(N, H')`, the reference's hidden states of the same positions; no gradient.
        ref_head ([`LMHead`]): the reference's head; no gradient.
        chunk_size (`int`, *optional*, defaults to `1024`): states at once.

    Raises:
        `ValueError`: if the numbers of states or the vocabularies differ, or `chunk_size` is not positive.
    """
    if hidden.dim() != 2 or ref_hidden.dim() != 2 or len(hidden) != len(ref_hidden):
        raise ValueError(
            f"`hidden` has shape {tuple(hidden.shape)} and `ref_hidden` {tuple(ref_hidden.shape)}; both must be "
            "`(N, H)` with one row per state. Select the same positions of both."
        )
    if len(head.weight) != len(ref_head.weight):
        raise ValueError(
            f"The policy's head has {len(head.weight)} tokens and the reference's {len(ref_head.weight)}, so their "
            "distributions cannot be compared. Resize the embeddings of both models to one vocabulary."
        )
    if chunk_size < 1:
        raise ValueError(f"`chunk_size={chunk_size}` leaves no state in a chunk; it must be at least 1.")
    with torch.no_grad():  # a frozen copy: a head shared with the policy must not get a gradient as the reference
        ref_head = LMHead(ref_head.weight.detach(), _detached(ref_head.bias), ref_head.scale, ref_head.softcap)
    chunks = [
        checkpoint(_kl_of_chunk, part, head, ref_part.detach(), ref_head, use_reentrant=False)
        for part, ref_part in zip(hidden.split(chunk_size), ref_hidden.split(chunk_size), strict=True)
    ]
    return torch.cat(chunks)


def kl_loss(kl: Tensor, action_mask: Tensor) -> Tensor:
    """
    Mean over a trajectory's actions, then mean over trajectories, of per-token KLs.

    Args:
        kl (`Tensor`): `(B, T)` in nats; entries outside the mask may hold anything.
        action_mask (`Tensor`): `(B, T)`, 1 on action columns. A row without an action contributes 0.
    """
    check_shapes(action_mask, kl=kl)
    return row_mean(kl, action_mask.bool()).mean()


def _detached(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.detach()


def _kl_of_chunk(hidden: Tensor, head: LMHead, ref_hidden: Tensor, ref_head: LMHead) -> Tensor:
    with torch.no_grad():
        ref_log_probs = ref_head.log_probs(ref_hidden)
    log_probs = head.log_probs(hidden)
    probs = log_probs.exp()
    # A token of probability zero under π adds nothing, whatever its log-ratio (-inf - x, or -inf + inf)
    differences = (log_probs - ref_log_probs).where(probs > 0, 0.0)
    return (probs * differences).sum(dim=-1)
