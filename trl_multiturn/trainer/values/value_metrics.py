"""What a value-based trainer logs besides [`OutcomeMetrics`]."""

from __future__ import annotations

import math

from torch import Tensor

from ..outcomes.outcome_metrics import OutcomeMetrics
from .trajectory_batch import TrajectoryBatch


class ValueMetrics(OutcomeMetrics):
    """[`OutcomeMetrics`], and how well the value model knows the outcomes."""

    def _token_sums(self, batch: TrajectoryBatch, entropy: Tensor) -> dict[str, Tensor]:
        mask = batch.action_mask
        log_ratios = batch.log_ratios.float().masked_fill(~mask, 0.0)
        togo = log_ratios.flip(dims=(1,)).cumsum(dim=1).flip(dims=(1,))
        outcomes = batch.rewards.unsqueeze(1).expand_as(togo)[mask]
        values = batch.values[mask].float()
        residuals = values - outcomes + self.beta * togo[mask]
        return {
            **super()._token_sums(batch, entropy),
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
        return super()._row_sums(batch) | self._by_side(batch, "value/final_", final_values)

    def _token_means(self, sums: dict[str, float]) -> dict[str, float]:
        tokens = sums["_tokens"]
        metrics = {
            **super()._token_means(sums),
            "value/mean": sums["_value"] / tokens,
            "value/residual": math.sqrt(sums["_residual2"] / tokens),
        }
        variance = sums["_outcome2"] / tokens - (sums["_outcome"] / tokens) ** 2
        error_variance = sums["_error2"] / tokens - (sums["_error"] / tokens) ** 2
        if variance > 1e-8:  # where all outcomes are equal there is nothing to explain
            metrics["value/explained_variance"] = 1 - error_variance / variance
        return metrics
