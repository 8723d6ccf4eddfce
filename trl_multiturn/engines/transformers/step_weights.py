"""Linear layers' weights in the layout that a decoding step is fastest with."""

from __future__ import annotations

import threading
from typing import Any

import torch
from torch import Tensor, nn


# From 192 rows on, kernels sum in another order, so a row's last bits would depend on how many rows share its step
MAX_ROWS = 128

# While a call lasts, the model holds the copies. Two engines over one model, on their threads, would otherwise put
# back each other's copies as its weights.
_HOLDS_COPIES = threading.RLock()


class StepWeights:
    """Copies of weights, `(out, in)` as ever but transposed in memory.

    A linear layer multiplies its inputs by the transpose of its weight. With a few rows, as in a decoding step, a
    CPU's matrix kernels spend a part of their time on rearranging a weight that lies in memory row by row; with the
    many rows of a training step it does not matter. So steps get copies, and everything else the weights themselves.

    Only what is known to be alike is copied: weights of plain `nn.Linear` layers (those in and below adapters too), in
    float32 on a CPU with MKL. A copy is as good as the weight when it was made: [`drop`] it wherever caches of keys
    and values are dropped.

    Args:
        model (`torch.nn.Module`):
            What is called.
        limit_bytes (`int`):
            Most bytes held; layers that do not fit keep multiplying with their own weights. 0 copies nothing.
        max_rows (`int`):
            Most rows of a step. Nothing is copied above 128.
    """

    def __init__(self, model: nn.Module, limit_bytes: int, max_rows: int) -> None:
        self._model = model
        self._limit_bytes = limit_bytes if max_rows <= MAX_ROWS and torch.backends.mkl.is_available() else 0
        self._copies: dict[str, Tensor] | None = None

    @property
    def nbytes(self) -> int:
        return sum(copy.nbytes for copy in (self._copies or {}).values())

    def call(self, **inputs: Any) -> Any:
        """The model's output, computed with the copies, which are made the first time."""
        with _HOLDS_COPIES:
            if self._copies is None:
                self._copies = self._copied()
            if self._copies:
                # Weights that are tied to a head stay in their own layout where they embed tokens
                return torch.func.functional_call(self._model, self._copies, (), inputs, tie_weights=False)
        return self._model(**inputs)

    def drop(self) -> None:
        """Frees the copies."""
        self._copies = None

    def _copied(self) -> dict[str, Tensor]:
        copies: dict[str, Tensor] = {}
        room = self._limit_bytes
        for name, module in self._model.named_modules():
            if type(module) is nn.Linear and _is_plain(module.weight) and module.weight.nbytes <= room:
                copies[f"{name}.weight"] = module.weight.detach().t().contiguous().t()
                room -= module.weight.nbytes
        return copies


def _is_plain(weight: Tensor) -> bool:
    stored_as_it_is = (
        type(weight) in (nn.Parameter, Tensor) and weight.is_contiguous() and not hasattr(weight, "ds_id")
    )
    return stored_as_it_is and weight.device.type == "cpu" and weight.dtype == torch.float32 and weight.dim() == 2
