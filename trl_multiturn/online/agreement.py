"""Whether the engine samples from the policy that is trained: its log-probabilities beside the trainer's own."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from ..messages.images import images_in
from ..rollout.config import RolloutConfig
from ..segments import Segment
from ..trajectory import Trajectory
from .sampling import unwrapped_policy


logger = logging.getLogger(__name__)

TRAJECTORIES = 32  # scored per iteration: the first of each prompt
QUARTERS = 4
MAX_KL = 0.02  # nats per token; a bfloat16 engine beside a bfloat16 trainer stays well below
_POSITIONS = 256  # whose distributions over the vocabulary exist at once in float32

See = Callable[[Trajectory, str | None], None]


class SamplerAgreement:
    """
    Collects some of an iteration's trajectories and scores them with the policy that is trained, which sampled them.

    Engines record the log-probabilities of the distribution that they drew from. They differ from the trainer's by
    rounding alone, unless the engine has other weights, another precision or another kernel; then importance weights,
    references and the on-policy assumption are off by as much. Estimated is KL(sampler ‖ trainer) per sampled token,
    by the mean of `exp(d) − 1 − d` with `d` the trainer's log-probability less the sampler's: unbiased, and no term is
    negative.

    Args:
        config ([`RolloutConfig`]):
            How the rollouts were sampled. Nothing is measured where what was drawn from is not the policy's own
            distribution (`top_p`, `top_k`, `min_p`, several temperatures, or 0).
        see (`Callable`, *optional*):
            Called with every trajectory, too.
    """

    def __init__(self, config: RolloutConfig, see: See | None = None):
        self._temperature = config.temperature
        own = config.temperature > 0 and not config.temperature_variants
        self._measures = own and config.top_p == 1 and config.top_k == 0 and config.min_p == 0
        self._see = see
        self._chosen: dict[int, Trajectory] = {}

    def see(self, trajectory: Trajectory, dropped: str | None) -> None:
        """Takes a trajectory, and why it was dropped, into account."""
        if self._see is not None:
            self._see(trajectory, dropped)
        prompt = trajectory.info.get("prompt_index", 0)
        if prompt not in self._chosen and len(self._chosen) < TRAJECTORIES and self._comparable(trajectory):
            self._chosen[prompt] = trajectory

    def _comparable(self, trajectory: Trajectory) -> bool:
        recorded = trajectory.logps is not None and any(trajectory.logps)  # scripted engines give zeros
        current = trajectory.info.get("policy") == "current"
        return self._measures and recorded and current and not images_in(trajectory.prompt + trajectory.completion)

    def measure(self, trainer: Any, sampling_weights: AbstractContextManager[None] | None = None) -> dict[str, float]:
        """
        Scores the trajectories, warns where the two do not agree, and returns the metrics.

        Empty where there is nothing to compare, and where the weights are in parts (FSDP, DeepSpeed), which one
        process cannot read.

        Not collective: the main process calls it.

        Args:
            trainer ([`~transformers.Trainer`]):
                Whose policy sampled.
            sampling_weights (`AbstractContextManager`, *optional*):
                Puts the weights that sampled into the policy, where it has others by now (`max_policy_lag`). How far
                it is from them is then measured, too.
        """
        if not self._chosen or trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled:
            return {}
        trajectories = list(self._chosen.values())
        with sampling_weights or nullcontext():
            differences = _differences(trainer, trajectories, self._temperature)
        metrics = agreement_metrics(differences)
        if sampling_weights is not None:
            metrics["sampling/lag_kl"] = _kl(torch.cat(_differences(trainer, trajectories, self._temperature)))
        if not metrics["sampling/kl"] <= MAX_KL:
            logger.warning(
                "The engine's log-probabilities are not those of the policy that is trained: KL %.3g nats per sampled "
                "token (%.3g in the last quarter of the trajectories), where rounding gives less than %g. Its "
                "rollouts are off-policy by that much. Check that the engine has the same weights (`refresh`), the "
                "same precision (`dtype`, no quantization) and reports log-probabilities of what it draws from "
                "(vLLM: `logprobs_mode='processed_logprobs'`).",
                metrics["sampling/kl"],
                metrics[f"sampling/kl_quarter_{QUARTERS}"],
                MAX_KL,
            )
        return metrics


def agreement_metrics(differences: list[Tensor]) -> dict[str, float]:
    """
    The metrics of log-probability differences, trainer less sampler, in nats.

    Args:
        differences (`list[Tensor]`): per trajectory, `(tokens,)`, of its sampled tokens in their order.
    """
    every = torch.cat(differences)
    metrics = {
        "sampling/kl": _kl(every),
        "sampling/sampling_logp_difference/mean": float(every.abs().mean()),
        "sampling/sampling_logp_difference/max": float(every.abs().max()),
    }
    parts = [values.tensor_split(QUARTERS) for values in differences]
    for quarter in range(QUARTERS):
        metrics[f"sampling/kl_quarter_{quarter + 1}"] = _kl(torch.cat([part[quarter] for part in parts]))
    return metrics


def _kl(differences: Tensor) -> float:
    return float((torch.expm1(differences) - differences).mean()) if len(differences) else math.nan


@torch.no_grad()
def _differences(trainer: Any, trajectories: list[Trajectory], temperature: float) -> list[Tensor]:
    policy = unwrapped_policy(trainer)
    training = policy.training
    policy.eval()
    try:
        with trainer.accelerator.autocast():
            return [
                torch.cat([_difference(policy, segment, temperature) for segment in trajectory.segments])
                for trajectory in trajectories
            ]
    finally:
        policy.train(training)


def _difference(policy: nn.Module, segment: Segment, temperature: float) -> Tensor:
    assert segment.logps is not None
    ids = torch.tensor([segment.context_ids + segment.completion_ids], device=next(policy.parameters()).device)
    sampled = torch.tensor(segment.action_mask, dtype=torch.bool).nonzero().squeeze(1)
    targets = sampled + len(segment.context_ids)
    logits = policy(input_ids=ids, use_cache=False).logits[0]
    own = [
        (logits[part - 1].float() / temperature).log_softmax(-1).gather(1, ids[0, part, None]).squeeze(1).cpu()
        for part in targets.to(ids.device).split(_POSITIONS)
    ]
    return torch.cat(own) - torch.tensor(segment.logps)[sampled]
