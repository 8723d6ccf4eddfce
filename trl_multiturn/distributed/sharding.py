"""
Weights that are sharded over processes: read whole, written, and gathered for as long as a rollout needs them.

FSDP and DeepSpeed ZeRO-3 leave each process a part of every weight. Three things of the online loop need more: a
snapshot of the policy, putting one back, and sampling, where each process rolls out its share independently of the
others. All functions here are collective (every process calls them, in the same order) and do nothing special where
weights are whole (one process, DDP, ZeRO-1 and 2).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from operator import itemgetter
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel
from torch.distributed.tensor import DTensor, distribute_tensor

from .. import _upstream


# What wrappers put into the names of parameters
_WRAPPERS = ("_fsdp_wrapped_module.", "_checkpoint_wrapped_module.")


def weights_of(trainer: Any) -> nn.Module:
    """The module to hand to the functions below: the policy, below wrappers that hold no weights themselves."""
    if isinstance(trainer.model, FullyShardedDataParallel):  # owns what its children do not
        return trainer.model
    return trainer.accelerator.unwrap_model(trainer.model)


def whole_parameters(model: nn.Module, names: set[str] | None = None) -> Iterator[tuple[str, Tensor]]:
    """
    `(name, tensor)` of the trainable parameters, or of those in `names`: whole, without gradient, ordered by name.

    Names carry no wrapper. With FSDP2 and ZeRO-3 one parameter at a time is gathered.
    """
    with _in_place(model):
        for name, parameter in sorted(_named(model), key=itemgetter(0)):
            if not (parameter.requires_grad if names is None else name in names):
                continue
            with _gathered_for_zero([parameter]):
                whole = parameter.detach()
                if isinstance(whole, DTensor):
                    whole = whole.full_tensor()
                elif _is_zero_3(parameter) or isinstance(model, FullyShardedDataParallel):
                    whole = whole.to("cpu", copy=True)  # its memory goes with the context
            yield name, whole


def plain_name(name: str) -> str:
    """A parameter's name without what wrappers put into it."""
    for wrapper in _WRAPPERS:
        name = name.replace(wrapper, "")
    return name


def trainable_names(model: nn.Module) -> set[str]:
    """Names of the trainable parameters, without wrappers."""
    with _in_place(model):
        return {name for name, parameter in _named(model) if parameter.requires_grad}


@torch.no_grad()
def write_parameters(model: nn.Module, names: set[str], value_of: Callable[[str], Tensor]) -> None:
    """Sets parameters to whole tensors, which every process can read; each keeps its shard."""
    with _in_place(model, write=True):
        for name, parameter in _named(model):
            if name not in names:
                continue
            with _gathered_for_zero([parameter], write=True):
                value = value_of(name)
                if isinstance(parameter, DTensor):
                    value = value.to(parameter.to_local())
                    mesh, placements = parameter.device_mesh, parameter.placements
                    parameter.copy_(distribute_tensor(value, mesh, placements, src_data_rank=None))
                else:
                    parameter.copy_(value)


@torch.no_grad()
def copy_parameters(source: nn.Module, target: nn.Module) -> None:
    """Copies what `source` holds into `target`, a model of the same kind that is sharded (FSDP2) in the same way."""
    _settle(source)
    _settle(target)
    present = dict(_named(source))
    for name, parameter in _named(target):
        _local(parameter).copy_(_local(present[name]))


@contextmanager
def kept_parameters(model: nn.Module) -> Iterator[None]:
    """Puts the trainable parameters back on exit, bit for bit; meanwhile a copy lies in host memory, of this process's
    shard where it can be (not with FSDP1)."""
    _settle(model)
    if isinstance(model, FullyShardedDataParallel):
        whole = {name: p.cpu().clone() for name, p in whole_parameters(model)}
        try:
            yield
        finally:
            write_parameters(model, set(whole), whole.__getitem__)
        return
    shards = [(p, _local(p).cpu().clone()) for _, p in _named(model) if p.requires_grad]
    try:
        yield
    finally:
        _settle(model)
        with torch.no_grad():
            for parameter, shard in shards:
                _local(parameter).copy_(shard)


def not_finite_parameter(model: nn.Module, everywhere: bool = True) -> str | None:
    """Name of a trainable parameter that holds NaN or infinity, on any process. Nothing is gathered but names.

    With `everywhere=False` on this process alone, and without the others.
    """
    with _in_place(model):
        here = (name for name, p in _named(model) if p.requires_grad and not torch.isfinite(_local(p)).all())
        found = [next(here, None)]
    if everywhere and PartialState().num_processes > 1:
        found = gather_object(found)
    return next((name for name in found if name is not None), None)


@contextmanager
def gathered_for_sampling(trainer: Any) -> Iterator[None]:
    """
    The policy's weights whole and in place on every process inside the body, so that each samples without the others.

    Costs the memory of one whole policy (in the dtype of the forward pass) beside the shards, on every process, and
    nothing afterwards. A value model's own layers stay sharded where they can. Nothing in the body is collective; the
    weights are read only, and what is written to them is lost.
    """
    model = weights_of(trainer)
    if isinstance(model, FullyShardedDataParallel):
        with FullyShardedDataParallel.summon_full_params(model, writeback=False), _without_wrappers(model):
            yield
    elif isinstance(model, FSDPModule):
        with _unsharded(model):
            yield
    elif any(_is_zero_3(p) for p in model.parameters()):
        with _upstream.unwrap_model_for_generation(
            trainer.model_wrapped,
            trainer.accelerator,
            gradient_checkpointing_kwargs=trainer.args.gradient_checkpointing_kwargs,
        ):
            yield
    else:
        yield


def whole_state_dict(trainer: Any) -> dict[str, Tensor] | None:
    """The policy's whole state dict in host memory, on every process; `None` where it is whole anyway."""
    model = weights_of(trainer)
    policy = trainer.accelerator.unwrap_model(trainer.model)
    if isinstance(model, FSDPModule):
        _settle(model)
        state = {key: v.full_tensor() if isinstance(v, DTensor) else v for key, v in policy.state_dict().items()}
    elif isinstance(model, FullyShardedDataParallel) or any(_is_zero_3(p) for p in model.parameters()):
        with gathered_for_sampling(trainer):
            return {key: value.detach().cpu().clone() for key, value in policy.state_dict().items()}
    else:
        return None
    return {key: value.detach().cpu() for key, value in state.items()}


# FSDP2: parameters are DTensors, except where a forward pass has left a module gathered


def _settle(model: nn.Module) -> None:
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


@contextmanager
def _unsharded(model: nn.Module) -> Iterator[None]:
    """Gathers what the policy's forward pass needs, and keeps it through any number of passes."""
    skipped = {id(m) for m in model.value_model.modules()} if hasattr(model, "value_model") else set()
    modules = [m for m in model.modules() if isinstance(m, FSDPModule) and id(m) not in skipped]
    # `set_reshard_after_forward` has no counterpart that reads; both attributes are what it sets
    states = [module._get_fsdp_state() for module in modules]
    groups = [group for state in states for group in state._fsdp_param_groups]
    before = [state._auto_reshard_after_forward for state in states], [g.post_forward_mesh_info for g in groups]
    for module in modules:
        module.set_reshard_after_forward(False, recurse=False)
        module.unshard()
    try:
        yield
    finally:
        for module in modules:
            module.reshard()
        for state, automatic in zip(states, before[0], strict=True):
            state._auto_reshard_after_forward = automatic
        for group, mesh in zip(groups, before[1], strict=True):
            group.post_forward_mesh_info = mesh


# FSDP1: wrappers hold flat parameters; the modules below them own nothing unless summoned


@contextmanager
def _without_wrappers(model: FullyShardedDataParallel) -> Iterator[None]:
    """Takes the wrappers out of the module tree: in every forward pass they gather and free, together with others."""
    replaced = []
    for parent in list(model.modules()):
        for name, child in list(parent._modules.items()):
            if isinstance(child, FullyShardedDataParallel) and not isinstance(parent, FullyShardedDataParallel):
                replaced.append((parent, name, child))
    for parent, name, child in replaced:
        parent._modules[name] = child.module
    try:
        yield
    finally:
        for parent, name, child in replaced:
            parent._modules[name] = child


# DeepSpeed ZeRO-3


def _is_zero_3(parameter: nn.Parameter) -> bool:
    return hasattr(parameter, "ds_id")


@contextmanager
def _gathered_for_zero(parameters: list[nn.Parameter], write: bool = False) -> Iterator[None]:
    if not any(_is_zero_3(p) for p in parameters):
        yield
        return
    import deepspeed

    with deepspeed.zero.GatheredParameters(parameters, modifier_rank=0 if write else None):
        yield


# All of them


@contextmanager
def _in_place(model: nn.Module, write: bool = False) -> Iterator[None]:
    """Parameters can be read one by one inside the body, and written where `write` says so."""
    with ExitStack() as stack:
        if isinstance(model, FullyShardedDataParallel):
            stack.enter_context(FullyShardedDataParallel.summon_full_params(model, writeback=write))
        _settle(model)
        yield


def _named(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    for name, parameter in model.named_parameters():
        yield plain_name(name), parameter


def _local(parameter: nn.Parameter) -> Tensor:
    """What this process holds of a parameter."""
    if _is_zero_3(parameter):
        return parameter.ds_tensor
    return parameter.detach().to_local() if isinstance(parameter, DTensor) else parameter.detach()
