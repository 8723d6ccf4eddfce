"""What the loss of a trainer on outcomes is given."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(kw_only=True)
class OutcomeBatch:
    """
    One batch of trajectories. `(B, T)` unless said; column `t` scores token `t + 1`.

    Args:
        logps (`Tensor`): log-probabilities under the policy, with gradient; 0 outside the mask.
        ref_logps (`Tensor`): the same under the reference.
        action_mask (`Tensor`): bool.
        rewards (`Tensor`): `(B,)`, terminal.
        token_rewards (`Tensor`): per action, process rewards and terminal ones.
        labels (`Tensor`): `(B,)`, bool; for metrics only.
        behavior_logps (`Tensor`, *optional*): log-probabilities under the policy that sampled the rows.
        step_ids (`Tensor`, *optional*): int64.
    """

    logps: Tensor
    ref_logps: Tensor
    action_mask: Tensor
    rewards: Tensor
    token_rewards: Tensor
    labels: Tensor
    behavior_logps: Tensor | None = None
    step_ids: Tensor | None = None

    @property
    def log_ratios(self) -> Tensor:
        """`log π − log π_ref` in nats, per token: the difference of two long sums would lose its digits."""
        return self.logps - self.ref_logps
