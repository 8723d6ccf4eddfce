"""What a value-based trainer logs besides [`OutcomeMetrics`]."""

from __future__ import annotations

import math
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor

from ...models.value_quality import NUM_BINS, auc_within, calibration_error, calibration_sums
from ..outcomes.outcome_metrics import OutcomeMetrics
from .trajectory_batch import TrajectoryBatch


class ValueMetrics(OutcomeMetrics):
    """[`OutcomeMetrics`], and how well the value model knows the outcomes."""

    def __init__(self, accelerator: Accelerator, beta: float):
        super().__init__(accelerator, beta)
        self._final_states = FinalStates()

    def add(self, mode: str, batch: Any, entropy: Tensor, row_means: dict[str, float | Tensor]) -> None:
        super().add(mode, batch, entropy, row_means)
        if mode == "eval":
            values = final_values(batch.predictions, batch.action_mask)
            self._final_states.add(batch.prompts, values, batch.labels)

    def pop(self, mode: str) -> dict[str, float]:
        metrics = super().pop(mode)
        return metrics | self._final_states.pop() if metrics and mode == "eval" else metrics

    def _token_sums(self, batch: TrajectoryBatch, entropy: Tensor) -> dict[str, Tensor]:
        mask = batch.action_mask
        log_ratios = batch.log_ratios.float().masked_fill(~mask, 0.0)
        togo = log_ratios.flip(dims=(1,)).cumsum(dim=1).flip(dims=(1,))
        outcomes = batch.rewards.unsqueeze(1).expand_as(togo)[mask]
        values = batch.predictions[mask].float()
        residuals = batch.values[mask].float() - outcomes + self.beta * togo[mask]
        return {
            **({} if batch.value_logits is None else _calibration(values, outcomes)),
            **super()._token_sums(batch, entropy),
            "_value": values.sum(),
            "_residual2": residuals.square().sum(),
            "_outcome": outcomes.sum(),
            "_outcome2": outcomes.square().sum(),
            "_error": (outcomes - values).sum(),
            "_error2": (outcomes - values).square().sum(),
        }

    def _row_sums(self, batch: TrajectoryBatch) -> dict[str, Tensor]:
        values = final_values(batch.predictions, batch.action_mask)
        return super()._row_sums(batch) | self._by_side(batch, "value/final_", values)

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
        if "_bins0_0" in sums:
            bins = torch.tensor([[sums[f"_bins{row}_{column}"] for column in range(NUM_BINS)] for row in range(3)])
            metrics["value/calibration_error"] = calibration_error(bins)
        return metrics


def final_values(values: Tensor, action_mask: Tensor) -> Tensor:
    """`(B,)` of `(B, T)`: the values of the states in which the last tokens, which end the rows, were chosen."""
    last = action_mask.size(1) - 1 - action_mask.flip(dims=(1,)).float().argmax(dim=1, keepdim=True)
    return values.gather(1, last).squeeze(1)


class FinalStates:
    """The values of held-out trajectories' last states, collected over an evaluation and over all processes."""

    def __init__(self) -> None:
        self._entries: list[tuple[tuple[int, ...], float, bool]] = []

    def add(self, prompts: list[tuple[int, ...]], values: Tensor, labels: Tensor) -> None:
        """Count a batch: prompts as token ids, values `(B,)` and labels `(B,)`."""
        self._entries += zip(prompts, values.float().tolist(), labels.bool().tolist(), strict=True)

    def pop(self) -> dict[str, float]:
        """`value/auc_within_prompt`, where some prompt has good and bad trajectories; then starts anew."""
        entries = gather_object(self._entries)
        self._entries = []
        prompts, values, labels = zip(*entries, strict=True) if entries else ((), (), ())
        auc = auc_within(prompts, values, labels)
        return {} if auc is None else {"value/auc_within_prompt": auc}


def _calibration(predictions: Tensor, outcomes: Tensor) -> dict[str, Tensor]:
    bins = calibration_sums(predictions, outcomes)
    return {f"_bins{row}_{column}": bins[row, column] for row in range(3) for column in range(NUM_BINS)}
