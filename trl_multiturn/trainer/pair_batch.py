"""What a loss of the user's own on pairs is given, and how a trainer computes it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..packing.sequences import check_branches_were_read
from .host import TrainerHost


@dataclass(frozen=True)
class PairBatch:
    """
    A batch of pairs. `(B,)` unless said; column `t` of a `(B, T)` tensor scores token `t + 1`.

    Args:
        chosen_logps (`Tensor`): `(B, T)`, log-probabilities under the policy, with gradient; 0 outside the mask.
        rejected_logps (`Tensor`): the same of the other side.
        chosen_mask (`Tensor`): `(B, T)` bool, tokens that the policy sampled.
        rejected_mask (`Tensor`): the same of the other side.
        ref_chosen_logps (`Tensor`): summed log-probability under the reference.
        ref_rejected_logps (`Tensor`): the same of the other side.
        beta (`float`): the configuration's.
        margin (`Tensor`, *optional*): of the rows, where they have one.
    """

    chosen_logps: Tensor
    rejected_logps: Tensor
    chosen_mask: Tensor
    rejected_mask: Tensor
    ref_chosen_logps: Tensor
    ref_rejected_logps: Tensor
    beta: float
    margin: Tensor | None = None

    @property
    def chosen_log_ratios(self) -> Tensor:
        """Summed `log π − log π_ref` of the chosen side, in nats."""
        return self.chosen_logps.sum(dim=1) - self.ref_chosen_logps

    @property
    def rejected_log_ratios(self) -> Tensor:
        """The same of the rejected side."""
        return self.rejected_logps.sum(dim=1) - self.ref_rejected_logps


class OwnPairLossMixin(TrainerHost):
    """Lets a subclass of a preference trainer define `loss(batch)`; see [`MultiTurnDPOTrainer`]."""

    _part_weight: float

    def loss(self, batch: PairBatch) -> Tensor:
        """A scalar, the mean over the batch's pairs. Override it to train with a loss of your own."""
        raise TypeError("The base class trains with TRL's losses (`loss_type`). Override `loss` in a subclass.")

    @property
    def has_own_loss(self) -> bool:
        """Whether a subclass defines [`loss`](OwnPairLossMixin.loss)."""
        return type(self).loss is not OwnPairLossMixin.loss

    def own_loss(self, model: Any, inputs: dict[str, Any], return_outputs: bool = False) -> Any:
        """The loss of a padded batch, packed where the trainer packs; logs TRL's metrics of log-ratios."""
        if getattr(self, "ld_alpha", None) is not None:
            raise ValueError("`ld_alpha` weighs tokens of TRL's own losses. Leave it out and weigh them in `loss`.")
        margin = inputs.get("margin")
        known = {"completion_mask", "ref_chosen_logps", "ref_rejected_logps", "margin"}
        labels = inputs["input_ids"].masked_fill(inputs["completion_mask"] == 0, -100)
        if "ref_chosen_logps" in inputs:
            reference = inputs["ref_chosen_logps"], inputs["ref_rejected_logps"]
        else:
            scorer = model if self.ref_model is None else self.ref_model
            reference = self.compute_ref_log_probs(scorer, {k: v for k, v in inputs.items() if k != "margin"})
        outputs = model(
            **{name: value for name, value in inputs.items() if name not in known},
            use_cache=False,
            labels=labels,
            fused_lm_head=True,
        )
        check_branches_were_read(inputs["input_ids"])
        mask = inputs["completion_mask"][:, 1:].bool()
        chosen, rejected = outputs.log_probs[:, -mask.size(1) :].chunk(2)
        (chosen_mask, rejected_mask), (ref_chosen, ref_rejected) = mask.chunk(2), reference
        batch = PairBatch(
            chosen, rejected, chosen_mask, rejected_mask, ref_chosen, ref_rejected, beta=self.beta, margin=margin
        )
        loss = self.loss(batch) * self._part_weight
        self._log_pairs(batch)
        return (loss, outputs) if return_outputs else loss

    @torch.no_grad()
    def _log_pairs(self, batch: PairBatch) -> None:
        metrics = self._metrics["train" if self.model.training else "eval"]
        chosen, rejected = batch.beta * batch.chosen_log_ratios, batch.beta * batch.rejected_log_ratios
        for name, values in {
            "rewards/chosen": chosen,
            "rewards/rejected": rejected,
            "rewards/margins": chosen - rejected,
            "rewards/accuracies": (chosen > rejected).float(),
            "logps/chosen": batch.chosen_logps.sum(dim=1),
            "logps/rejected": batch.rejected_logps.sum(dim=1),
        }.items():
            metrics[name].append(self.accelerator.gather(values.float()).mean().item())
