"""Snapshots of a policy's trainable weights: the previous policy and the initial one without a second model in memory.

Only parameters that train are written, so a LoRA policy's snapshot is its adapter and a full one is the model. A value
model that is trained beside the policy belongs to the snapshot: it knows the values of that policy.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn


def _trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    if not parameters:
        raise ValueError(
            "The policy has no trainable parameter, so a snapshot of it would be empty. Unfreeze the model, or load "
            "the adapter with `is_trainable=True`."
        )
    return parameters


def save_policy_weights(model: nn.Module, path: str | os.PathLike) -> None:
    """Writes the trainable parameters of `model` to a safetensors file, atomically."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    save_file({name: p.detach().cpu().contiguous() for name, p in _trainable(model).items()}, partial)
    os.replace(partial, path)


@torch.no_grad()
def load_policy_weights(model: nn.Module, path: str | os.PathLike) -> None:
    """Copies a snapshot into `model` in place.

    Raises:
        `ValueError`: the snapshot's parameters are not the model's trainable ones.
    """
    parameters = _trainable(model)
    with safe_open(path, framework="pt") as snapshot:
        names = set(snapshot.keys())
        if differing := names ^ set(parameters):
            raise ValueError(
                f"{path} is a snapshot of another model: {len(differing)} parameters differ, for example "
                f"`{sorted(differing)[0]}`. Start from the model and the PEFT configuration that wrote it."
            )
        for name in names:
            parameters[name].copy_(snapshot.get_tensor(name))


@contextmanager
def policy_weights(model: nn.Module, path: str | os.PathLike) -> Iterator[None]:
    """Runs the body with the snapshot's weights in `model`, then puts the present ones back, bit for bit."""
    present = {name: p.detach().cpu().clone() for name, p in _trainable(model).items()}
    load_policy_weights(model, path)
    try:
        yield
    finally:
        with torch.no_grad():
            for name, p in _trainable(model).items():
                p.copy_(present[name])


def policy_revision(model: nn.Module) -> str:
    """A hash of the trainable parameters: the same weights have the same revision, on any device.

    A value model beside the policy does not count: it has no say in what is sampled.
    """
    value_model = getattr(model, "value_model", None)
    others = set() if value_model is None else {id(p) for p in value_model.parameters()}
    digest = hashlib.blake2b(digest_size=8)
    for name, p in sorted(_trainable(model).items()):
        if id(p) in others:
            continue
        digest.update(name.encode())
        digest.update(p.detach().cpu().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()
