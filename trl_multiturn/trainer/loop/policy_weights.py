"""Snapshots of a policy's trainable weights: the previous policy and the initial one without a second model in memory.

Only parameters that train are written, so a LoRA policy's snapshot is its adapter and a full one is the model. A value
model that is trained beside the policy belongs to the snapshot: it knows the values of that policy.
"""

from __future__ import annotations

import hashlib
import json
import os
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from accelerate import PartialState
from accelerate.logging import get_logger
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn

from ...distributed.checksums import DamagedFileError
from ...distributed.durable import written_whole
from ...distributed.main_process import on_main
from ...distributed.sharding import (
    kept_parameters,
    not_finite_parameter,
    trainable_names,
    whole_parameters,
    write_parameters,
)
from ...errors import DivergedError


logger = get_logger(__name__)

_VALUES = "value_model."  # what the names of a value model's parameters begin with


def _trainable(model: nn.Module) -> set[str]:
    names = trainable_names(model)
    if not names:
        raise ValueError(
            "The policy has no trainable parameter, so a snapshot of it would be empty. Unfreeze the model, or load "
            "the adapter with `is_trainable=True`."
        )
    return names


def refuse_diverged(model: nn.Module, everywhere: bool = True) -> None:
    """Raises on all processes where a trainable weight is not finite, before anything of it is written.

    Raises:
        [`DivergedError`]: naming a parameter.
    """
    if name := not_finite_parameter(model, everywhere):
        raise DivergedError(_told(name))


def is_finite_or_half(model: nn.Module) -> bool:
    """Whether all trainable weights are finite; where they are not and all are float16, a warning tells.

    float16 ends at 65504, and AdamW's epsilon is 0 in it, so such weights overflow without a fault in the data. TRL
    trains them to the end.

    Raises:
        [`DivergedError`]: naming a parameter, if trainable weights are of another type.
    """
    name = not_finite_parameter(model)
    if name is None:
        return True
    if any(p.requires_grad and p.dtype != torch.float16 for p in model.parameters()):
        raise DivergedError(_told(name))
    logger.warning(_told(name) + " Training stops here: float16 weights overflow where others do not.")
    return False


def _told(name: str) -> str:
    return (
        f"The weights are not finite (`{name}`, for one), so training has diverged. Nothing of them was saved: "
        "checkpoints and snapshots are of before. Lower `learning_rate` or `max_grad_norm`, train in bfloat16 or "
        "float32, look for rows with extreme rewards or margins, and start again with the same command, which goes "
        "on from the last checkpoint."
    )


def save_policy_weights(model: nn.Module, path: str | os.PathLike) -> None:
    """Writes the trainable parameters of `model` to a safetensors file, atomically, from the main process.

    Where they are sharded over processes all call this, and send what they hold. Where it cannot be written, all raise
    (see [`on_main`]).
    """
    _trainable(model)
    refuse_diverged(model)
    weights = {}
    for name, whole in whole_parameters(model):
        if PartialState().is_main_process:
            weights[name] = whole.cpu().contiguous()

    def write() -> None:
        with written_whole(Path(path)) as partial:
            try:
                save_file(weights, partial, metadata={"crc32": json.dumps(_checksums(weights))})
            except SafetensorError as error:  # such as a full disk
                raise OSError(str(error)) from error

    on_main(write)


def load_policy_weights(model: nn.Module, path: str | os.PathLike, values: bool = True) -> None:
    """Copies a snapshot into `model` in place; with sharded weights every process its part.

    Args:
        model ([`~torch.nn.Module`]):
            A policy.
        path (`str` or `os.PathLike`):
            What [`save_policy_weights`] wrote.
        values (`bool`, *optional*, defaults to `True`):
            Whether the snapshot's value model belongs to `model`, too.

    Raises:
        `ValueError`: the file is damaged, or the snapshot's parameters are not the model's trainable ones.
    """
    names = _trainable(model)
    with _reading(Path(path)), safe_open(path, framework="pt") as snapshot:
        written = {name for name in snapshot.keys() if values or not name.startswith(_VALUES)}
        if differing := written ^ names:
            raise ValueError(
                f"{path} is a snapshot of another model: {len(differing)} parameters differ, for example "
                f"`{sorted(differing)[0]}`. Start from the model and the PEFT configuration that wrote it."
            )
        sums = json.loads((snapshot.metadata() or {}).get("crc32", "{}"))  # none in those of an earlier release

        def value_of(name: str) -> torch.Tensor:
            value = snapshot.get_tensor(name)
            if name in sums and _checksum(value) != sums[name]:
                raise DamagedFileError(_damaged(Path(path), f"the checksum of `{name}` differs"))
            return value

        write_parameters(model, names, value_of)


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    """Has an error of a file that cannot be read name it."""
    try:
        yield
    except (SafetensorError, FileNotFoundError, json.JSONDecodeError) as error:
        raise DamagedFileError(_damaged(path, str(error))) from error


def _damaged(path: Path, reason: str) -> str:
    return (
        f"{path} is not what was written ({reason}), so the policy of that time cannot be put back. Restore the file. "
        "Without it, `previous_policy_generations=0` goes on without the previous policy, `reference='previous'` "
        "without the initial one, and `max_policy_lag=0` with the present one."
    )


def _checksums(weights: dict[str, torch.Tensor]) -> dict[str, int]:
    return {name: _checksum(weight) for name, weight in weights.items()}


def _checksum(weight: torch.Tensor) -> int:
    return zlib.crc32(memoryview(weight.contiguous().reshape(-1).view(torch.uint8).numpy()))


@contextmanager
def policy_weights(model: nn.Module, path: str | os.PathLike) -> Iterator[None]:
    """Runs the body with the snapshot's weights in `model`, then puts the present ones back, bit for bit."""
    with kept_parameters(model):
        load_policy_weights(model, path)
        yield


def policy_revision(model: nn.Module) -> str:
    """A hash of the trainable parameters: the same weights have the same revision, on any device, sharded or not.

    A value model beside the policy does not count: it has no say in what is sampled.
    """
    names = {name for name in _trainable(model) if not name.startswith(_VALUES)}
    digest = hashlib.blake2b(digest_size=8)
    for name, whole in whole_parameters(model, names):
        digest.update(name.encode())
        digest.update(whole.cpu().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def snapshot_revision(path: str | os.PathLike) -> str:
    """[`policy_revision`] of a policy whose snapshot this is, from the file alone."""
    digest = hashlib.blake2b(digest_size=8)
    with _reading(Path(path)), safe_open(path, framework="pt") as snapshot:
        for name in sorted(name for name in snapshot.keys() if not name.startswith(_VALUES)):
            digest.update(name.encode())
            digest.update(snapshot.get_tensor(name).reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()
