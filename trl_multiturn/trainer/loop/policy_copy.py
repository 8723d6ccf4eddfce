"""A second policy in memory, for what samples while the first one is trained: trained weights twice, others shared."""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from types import MethodType
from typing import Any

from torch import nn


_HOOKS = (
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
    "_backward_hooks",
    "_backward_pre_hooks",
)
_PATCHES = ("forward", "_original_forward")  # of TRL, Accelerate and this package: they call the model they are of


def copy_for_sampling(trainer: Any) -> nn.Module:
    """
    A copy of the policy that shares nothing with it but the weights that are not trained.

    Another thread can sample from it while the policy is trained. For a LoRA policy it costs the memory of an adapter,
    else that of the model's weights (no gradients, no optimizer). What trainers attach to a policy stays away: hooks,
    patched forward passes and a value model. Mixed precision is that of the trainer.

    Args:
        trainer ([`~transformers.Trainer`]):
            Whose policy to copy.

    Raises:
        `ValueError`: if the policy's layers are spread over devices.
    """
    policy = trainer.accelerator.unwrap_model(trainer.model)
    refuse_spread(policy)
    shared: dict[int, Any] = {id(p): p for p in policy.parameters() if not p.requires_grad}
    with _bare(policy):
        copied = copy.deepcopy(policy, shared).eval()
    if trainer.accelerator.native_amp:
        _cast_automatically(copied, trainer.accelerator)
    return copied


def refuse_spread(policy: nn.Module) -> None:
    """Refuses a policy whose layers are on several devices, between which hooks carry the states.

    Raises:
        `ValueError`: naming the remedy.
    """
    devices = set(getattr(policy, "hf_device_map", None) or {}.values())
    if len(devices) > 1:
        raise ValueError(
            f"`device_map` spreads the policy over the devices {sorted(map(str, devices))}, so it cannot be copied "
            "for sampling while it is trained. Load it on one device, or sample with a vLLM server."
        )


@contextmanager
def _bare(policy: nn.Module) -> Iterator[None]:
    """Inside the body no module has a hook or a forward pass that is not its class's, and there is no value model."""
    value_model = policy._modules.pop("value_model", None)
    taken = [(module, _taken(module)) for module in policy.modules()]
    try:
        yield
    finally:
        for module, kept in taken:
            vars(module).update(kept)
        if value_model is not None:
            policy._modules["value_model"] = value_model


def _taken(module: nn.Module) -> dict[str, Any]:
    attributes = vars(module)
    kept = {name: attributes[name] for name in _HOOKS if name in attributes}
    attributes.update({name: OrderedDict() for name in kept})
    return kept | {name: attributes.pop(name) for name in _PATCHES if name in attributes}


def _cast_automatically(model: nn.Module, accelerator: Any) -> None:
    """What Accelerate does to the model that is trained: a forward pass in mixed precision."""
    original_forward = model.forward

    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        with accelerator.autocast():
            return original_forward(*args, **kwargs)

    vars(model)["_original_forward"] = original_forward
    vars(model)["forward"] = MethodType(forward, model)
