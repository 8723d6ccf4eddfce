"""Random multi-turn batches in float64, with junk under the mask on request."""

from __future__ import annotations

from dataclasses import dataclass

import torch


JUNK = [0.0, 1e30, float("inf"), float("-inf"), float("nan")]


@dataclass
class Batch:
    values: torch.Tensor
    log_ratios: torch.Tensor
    token_rewards: torch.Tensor
    action_mask: torch.Tensor
    step_ids: torch.Tensor
    rewards: torch.Tensor

    def actions(self, row: int, *names: str) -> list[list[float]]:
        """The row's action entries of the named tensors, as lists."""
        return [getattr(self, name)[row][self.action_mask[row].bool()].tolist() for name in names]

    def with_junk(self, junk: float) -> Batch:
        mask = self.action_mask.bool()
        ids = torch.where(mask, self.step_ids, torch.full_like(self.step_ids, -7))
        floats = (torch.where(mask, x, junk) for x in (self.values, self.log_ratios, self.token_rewards))
        return Batch(*floats, self.action_mask, ids, self.rewards)

    def steps(self, row: int) -> list[tuple[int, int]]:
        (ids,) = self.actions(row, "step_ids")
        cuts = [i for i in range(len(ids)) if i == 0 or ids[i] != ids[i - 1]]
        return list(zip(cuts, [*cuts[1:], len(ids)], strict=True))


def random_batch(seed: int, rows: int = 5, columns: int = 17, empty_row: bool = True) -> Batch:
    """Rows of a few turns with prompt, observations and padding masked; the last row has no action at all."""
    generator = torch.Generator().manual_seed(seed)
    mask = (torch.rand(rows, columns, generator=generator) < 0.6).long()
    mask[:, 3] = 1
    if empty_row:
        mask[-1] = 0
    floats = [torch.randn(rows, columns, generator=generator, dtype=torch.float64) for _ in range(3)]
    ids = torch.randint(0, 3, (rows, columns), generator=generator).cumsum(dim=1) - 4  # gaps, repeats, negatives
    rewards = torch.randn(rows, generator=generator, dtype=torch.float64)
    return Batch(*floats, mask, ids, rewards)
