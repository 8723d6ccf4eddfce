"""What a value-based trainer logs: collected per batch over all processes, averaged over the logging interval."""

from __future__ import annotations

import math
from collections import defaultdict

import torch
from accelerate import Accelerator
from torch import Tensor

from .trajectory_batch import TrajectoryBatch


class ValueMetrics:
    """
    Sums over a logging interval, so that a mean weighs every row or token alike whatever the batches were.

    Args:
        accelerator ([`~accelerate.Accelerator`]): adds up the processes.
        beta (`float`): reward per nat.
    """

    def __init__(self, accelerator: Accelerator, beta: float):
        self.accelerator = accelerator
        self.beta = beta
        self._sums: dict[str, dict[str, float]] = defaultdict(lambda: defaultdict(float))

    @torch.no_grad()
    def add(self, mode: str, batch: TrajectoryBatch, entropy: Tensor, row_means: dict[str, float | Tensor]) -> None:
        """
        Count a batch.

        Args:
            mode (`str`): `"train"` or `"eval"`.
            batch ([`TrajectoryBatch`]): what the losses were given.
            entropy (`Tensor`): `(B, T)`.
            row_means (`dict[str, float | Tensor]`): further numbers that are means over this process's rows.
        """
        sums: dict[str, float | Tensor] = {n: float(mean) * len(batch.rewards) for n, mean in row_means.items()}
        sums |= self._token_sums(batch, entropy) | self._row_sums(batch)
        names = sorted(sums)
        local = torch.tensor([float(sums[name]) for name in names], dtype=torch.float32, device=batch.values.device)
        totals = self.accelerator.reduce(local, "sum").tolist()
        for name, value in zip(names, totals, strict=True):
            self._sums[mode][name] += value

    def _token_sums(self, batch: TrajectoryBatch, entropy: Tensor) -> dict[str, Tensor]:
        mask = batch.action_mask
        log_ratios = batch.log_ratios.float().masked_fill(~mask, 0.0)
        togo = log_ratios.flip(dims=(1,)).cumsum(dim=1).flip(dims=(1,))
        outcomes = batch.rewards.unsqueeze(1).expand_as(togo)[mask]
        values = batch.values[mask].float()
        residuals = values - outcomes + self.beta * togo[mask]
        return {
            "_tokens": mask.sum(),
            "_entropy": entropy[mask].sum(),
            "_value": values.sum(),
            "_residual2": residuals.square().sum(),
            "_outcome": outcomes.sum(),
            "_outcome2": outcomes.square().sum(),
            "_error": (outcomes - values).sum(),
            "_error2": (outcomes - values).square().sum(),
        }

    def _row_sums(self, batch: TrajectoryBatch) -> dict[str, Tensor]:
        mask = batch.action_mask
        last = mask.size(1) - 1 - mask.flip(dims=(1,)).float().argmax(dim=1, keepdim=True)
        final_values = batch.values.gather(1, last).squeeze(1)
        rewards = self.beta * batch.log_ratios.masked_fill(~mask, 0.0).sum(dim=1)
        logps = batch.logps.masked_fill(~mask, 0.0).sum(dim=1)
        sums: dict[str, Tensor] = {"_rows": torch.tensor(len(mask))}
        for side, chosen in (("chosen", batch.labels), ("rejected", ~batch.labels)):
            sums |= {
                f"_{side}": chosen.sum(),
                f"rewards/{side}": rewards[chosen].sum(),
                f"logps/{side}": logps[chosen].sum(),
                f"value/final_{side}": final_values[chosen].sum(),
            }
        return sums

    def pop(self, mode: str) -> dict[str, float]:
        """The interval's metrics; the next one starts empty."""
        sums = self._sums.pop(mode, None)
        if not sums or not sums["_tokens"]:
            return {}
        tokens, rows = sums["_tokens"], sums["_rows"]
        metrics = {
            "entropy": sums["_entropy"] / tokens,
            "value/mean": sums["_value"] / tokens,
            "value/residual": math.sqrt(sums["_residual2"] / tokens),
        }
        variance = sums["_outcome2"] / tokens - (sums["_outcome"] / tokens) ** 2
        error_variance = sums["_error2"] / tokens - (sums["_error"] / tokens) ** 2
        if variance > 1e-8:  # where all outcomes are equal there is nothing to explain
            metrics["value/explained_variance"] = 1 - error_variance / variance
        for name, total in sums.items():
            if name.startswith("_"):
                continue
            side = name.rsplit("_" if name.startswith("value/final") else "/", 1)[-1]
            count = sums[f"_{side}"] if side in ("chosen", "rejected") else rows
            if count:
                metrics[name] = total / count
        if "rewards/chosen" in metrics and "rewards/rejected" in metrics:
            metrics["rewards/margins"] = metrics["rewards/chosen"] - metrics["rewards/rejected"]
        return metrics
