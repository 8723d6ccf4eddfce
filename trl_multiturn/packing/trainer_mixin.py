"""The packed path in a trainer: decided once, at the first loss, for the policy and for its reference."""

from __future__ import annotations

from collections.abc import Iterable

from accelerate.logging import get_logger
from torch import nn

from .eligibility import reason_against_hooks, reason_against_packing, self_test
from .forward import PackedForward
from .plan import PlanCache


logger = get_logger(__name__)


class PackedTrainerMixin:
    """
    Runs a TRL trainer's models on packed rows; to be listed before the TRL trainer among a class's bases.

    `args.packed` decides: `"auto"` (also where the config has no such field) packs the batches for which it pays on
    models that passed the self-test, and falls back with one logged reason elsewhere; `True` packs every batch and
    raises `ValueError` where that is impossible; `False` leaves the trainer as it is.

    The trainer's losses, metrics and data path are not touched: see [`PackedForward`] for where it sits.
    """

    def compute_loss(self, model, inputs, *args, **kwargs):
        self._seat_packed_forwards()
        return super().compute_loss(model, inputs, *args, **kwargs)

    def compute_ref_log_probs(self, model, inputs):
        # Precomputation asks for these inside the parent's constructor
        self._seat_packed_forwards()
        return super().compute_ref_log_probs(model, inputs)

    def _seat_packed_forwards(self) -> None:
        if getattr(self, "_packed_forwards", None) is not None:
            return
        self._packed_forwards: list[PackedForward] = []
        packed = getattr(self.args, "packed", "auto")
        if packed is False:
            return
        models, plans = self._packable_models(), PlanCache()
        reason = self._reason_against_hooks() or _first(reason_against_hooks(model) for model, _ in models)
        if reason is None:
            reason = _first(reason_against_packing(model) for model, _ in models)
            pack = False if reason else packed
            self._packed_forwards = [PackedForward(m, fields, pack, plans).install() for m, fields in models]
            if reason is None:
                reason = _first(self_test(forward) for forward in self._packed_forwards)
        if reason is None:
            logger.info("Trajectories are packed with shared prefixes where their shapes say that it pays.")
            return
        for forward in self._packed_forwards:
            forward.stop_packing()
        if packed is True:
            raise ValueError(
                f"`packed=True`, but this run cannot be packed: {reason}. Remove the cause, or set `packed='auto'` to "
                "train padded where packing is not proven equal."
            )
        scored = ", the LM head on trained tokens only" if self._packed_forwards else ""
        logger.warning(f"Batches stay padded{scored}: {reason}.")

    def _packable_models(self) -> list[tuple[nn.Module, tuple[str, ...]]]:
        fields = ("entropy", "mean_logits", "is_top1")
        if getattr(self, "use_weighting", False):
            fields += ("log_sum_sq_probs",)
        models = [(self.accelerator.unwrap_model(self.model), fields)]
        if getattr(self, "ref_model", None) is not None:
            models.append((self.accelerator.unwrap_model(self.ref_model), ()))
        return models

    def _reason_against_hooks(self) -> str | None:
        if self.is_fsdp_enabled or self.is_deepspeed_enabled:
            return "not proven equal with sharded parameters (FSDP, DeepSpeed)"
        if getattr(self.accelerator, "parallelism_config", None) is not None:
            return "not proven equal with tensor, context or sequence parallelism"
        if self.args.torch_compile:
            return "compiled models would be compiled again for every row length"
        if getattr(self, "_is_vlm", False):
            return "the processing class is multimodal"
        return None


def _first(reasons: Iterable[str | None]) -> str | None:
    return next((reason for reason in reasons if reason is not None), None)
