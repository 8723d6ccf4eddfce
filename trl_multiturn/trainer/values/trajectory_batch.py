"""What the losses of a value-based trainer are given."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor

from ..outcomes.outcome_batch import OutcomeBatch


@dataclass(kw_only=True)
class TrajectoryBatch(OutcomeBatch):
    """
    An [`OutcomeBatch`] with what a value model says of it. `(B, T)` unless said.

    Args:
        values (`Tensor`): `V` of the state in which each token was chosen; with gradient. By classification, the soft
            value that follows from `value_logits`.
        kl (`Tensor`, *optional*): exact KL to the reference, with gradient.
        value_logits (`Tensor`, *optional*): log-odds of the reward 1 under the policy that sampled the rows, with
            gradient; of a value model that learns by classification.
        prompts (`list[tuple[int, ...]]`): token ids before each row's first action; empty in training.
    """

    values: Tensor
    kl: Tensor | None = None
    value_logits: Tensor | None = None
    prompts: list[tuple[int, ...]] = field(default_factory=list)

    @property
    def predictions(self) -> Tensor:
        """What the value model says of the outcome."""
        return self.values if self.value_logits is None else self.value_logits.sigmoid()
