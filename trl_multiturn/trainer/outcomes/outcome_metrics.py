"""What a trainer on outcomes logs: collected per batch over all processes, averaged over the logging interval."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

from .outcome_batch import OutcomeBatch


class OutcomeMetrics:
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
    def add(self, mode: str, batch: Any, entropy: Tensor, row_means: dict[str, float | Tensor]) -> None:
        """
        Count a batch.

        Args:
            mode (`str`): `"train"` or `"eval"`.
            batch ([`OutcomeBatch`]): what the loss was given.
            entropy (`Tensor`): `(B, T)`.
            row_means (`dict[str, float | Tensor]`): further numbers that are means over this process's rows.
        """
        sums: dict[str, float | Tensor] = {n: float(mean) * len(batch.rewards) for n, mean in row_means.items()}
        sums |= self._token_sums(batch, entropy) | self._row_sums(batch)
        names = sorted(sums)
        local = torch.tensor([float(sums[name]) for name in names], dtype=torch.float32, device=batch.logps.device)
        totals = self.accelerator.reduce(local, "sum").tolist()
        for name, value in zip(names, totals, strict=True):
            self._sums[mode][name] += value

    def _token_sums(self, batch: Any, entropy: Tensor) -> dict[str, Tensor]:
        return {"_tokens": batch.action_mask.sum(), "_entropy": entropy[batch.action_mask].sum()}

    def _row_sums(self, batch: Any) -> dict[str, Tensor]:
        mask = batch.action_mask
        return {
            "_rows": torch.tensor(len(mask)),
            **self._by_side(batch, "rewards/", self.beta * batch.log_ratios.masked_fill(~mask, 0.0).sum(dim=1)),
            **self._by_side(batch, "logps/", batch.logps.masked_fill(~mask, 0.0).sum(dim=1)),
        }

    @staticmethod
    def _by_side(batch: OutcomeBatch, name: str, values: Tensor) -> dict[str, Tensor]:
        """Sums of a number per row over the good rows and over the others, with the counts of both."""
        sums: dict[str, Tensor] = {}
        for side, rows in (("chosen", batch.labels), ("rejected", ~batch.labels)):
            sums |= {f"_{side}": rows.sum(), f"{name}{side}": values[rows].sum()}
        return sums

    def pop(self, mode: str) -> dict[str, float]:
        """The interval's metrics; the next one starts empty."""
        sums = self._sums.pop(mode, None)
        if not sums or not sums["_tokens"]:
            return {}
        metrics = self._token_means(sums)
        for name, total in sums.items():
            if name.startswith("_"):
                continue
            side = next((side for side in ("chosen", "rejected") if name.endswith(side)), None)
            count = sums[f"_{side}" if side else "_rows"]
            if count:
                metrics[name] = total / count
        if "rewards/chosen" in metrics and "rewards/rejected" in metrics:
            metrics["rewards/margins"] = metrics["rewards/chosen"] - metrics["rewards/rejected"]
        return metrics

    def _token_means(self, sums: dict[str, float]) -> dict[str, float]:
        return {"entropy": sums["_entropy"] / sums["_tokens"]}
