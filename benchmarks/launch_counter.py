"""
Counts of the operators that a step launches; also as on a CUDA device, without one.

Inside [`counted`] every tensor says that it is on a GPU while it holds a CPU's values, so that code takes its branches
for CUDA, shapes that depend on data are known, and losses are compared.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from trl.kernels import chunked_logprob


_DEVICE = torch.device("cuda", 0)
_NO_LAUNCH = {"empty", "new_empty", "empty_like", "empty_strided", "new_empty_strided", "detach", "detach_", "alias",
              "_unsafe_view", "lift_fresh", "_reshape_alias", "resize_", "set_"}  # fmt: skip
_WAITS = {"_local_scalar_dense", "nonzero", "equal", "masked_select", "_unique2"}


class LaunchCounter(TorchDispatchMode):
    """
    Counts the operators that are called inside.

    Attributes:
        operators (`Counter`): launches by operator.
        waits (`int`): how often the host waited for the device.
    """

    def __init__(self) -> None:
        super().__init__()
        self.operators: Counter[str] = Counter()
        self.waits = 0
        self._quiet = 0

    @property
    def launches(self) -> int:
        return sum(self.operators.values())

    @contextmanager
    def as_one(self, name: str) -> Iterator[None]:
        """What runs inside counts as one launch."""
        self.operators[name] += not self._quiet
        self._quiet += 1
        try:
            yield
        finally:
            self._quiet -= 1

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        if not self._quiet:
            # A mask as an index is turned into numbers first
            masks = name == "index" and any(x is not None and x.dtype == torch.bool for x in args[1])
            self.waits += name in _WAITS or masks
            if name not in _NO_LAUNCH and name != "_local_scalar_dense" and not function.is_view:
                self.operators[name] += 1
        return function(*args, **kwargs or {})


class OnDevice(TorchFunctionMode):
    """Every tensor says that it is on a GPU; what PyTorch has kernels for only there is computed otherwise."""

    def __init__(self, counter: LaunchCounter) -> None:
        super().__init__()
        self.counter = counter

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function == Tensor.device.__get__:
            return _DEVICE
        if function == Tensor.is_cuda.__get__:
            return True
        if function in (Tensor.cpu, Tensor.numpy):
            self.counter.waits += 1
        elif function is F.scaled_dot_product_attention:
            tensors = _as_autocast(args[:3])
            return _Kernel.apply(self.counter, "sdpa", lambda *x: function(*x, **kwargs), *tensors)
        elif function is F.rms_norm:
            x, shape = args
            scaled = lambda x, weight: function(x, shape, weight, kwargs["eps"])  # noqa: E731
            return _Kernel.apply(self.counter, "rms_norm", scaled, x, kwargs["weight"])
        elif "out_dtype" in kwargs:
            return self.product(function, args, kwargs)
        args, kwargs = ([_on_cpu(x) for x in args], {name: _on_cpu(x) for name, x in kwargs.items()})
        return function(*args, **kwargs)

    def product(self, function: Callable, args: tuple, kwargs: dict[str, Any]) -> Tensor:
        """One that accumulates in float32, which a CPU has not."""
        with self.counter.as_one(function.__name__), torch.autocast("cpu", enabled=False):
            result = function(*(x.float() for x in args))
            return kwargs["out"].copy_(result) if "out" in kwargs else result

    def varlen(self, query, key, value, cu_q, cu_k, max_q, max_k, scale=None, window_size=(-1, -1), enable_gqa=False):
        """`torch.nn.attention.varlen.varlen_attn` without windows: the causal diagonal ends at the bottom right."""
        bounds = [(*q, *k) for q, k in zip(*(x.unfold(0, 2, 1).tolist() for x in (cu_q, cu_k)), strict=True)]

        def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            outputs = []
            for a, b, c, d in bounds:
                mask = torch.ones(b - a, d - c, dtype=torch.bool).tril(d - c - (b - a))
                parts = (x.transpose(0, 1)[None] for x in (q[a:b], k[c:d], v[c:d]))
                with torch._C.DisableTorchFunction():
                    output = F.scaled_dot_product_attention(*parts, attn_mask=mask, scale=scale, enable_gqa=True)
                outputs.append(output[0].transpose(0, 1))
            return torch.cat(outputs)

        return _Kernel.apply(self.counter, "varlen", attend, query, key, value)


class _Kernel(torch.autograd.Function):
    """Some computation as one launch forward and one backward."""

    @staticmethod
    def forward(ctx, counter, name, function, *tensors):
        ctx.counter, ctx.name = counter, name
        ctx.inputs = [x.detach().requires_grad_() for x in tensors]
        with counter.as_one(name), torch.enable_grad(), torch._C.DisableTorchFunction():
            ctx.output = function(*ctx.inputs)
            return ctx.output.detach()

    @staticmethod
    def backward(ctx, grad):
        with ctx.counter.as_one(f"{ctx.name}_backward"):
            return None, None, None, *torch.autograd.grad(ctx.output, ctx.inputs, grad)


class _Tile:
    """A Triton kernel of TRL's head, as one launch."""

    def __init__(self, counter: LaunchCounter, fold: Callable) -> None:
        self.counter, self.fold = counter, fold

    def __getitem__(self, grid: object) -> Callable:
        def launch(*args: Any, **kwargs: Any) -> None:
            with self.counter.as_one(self.fold.__name__):
                self.fold(*args, **kwargs)

        return launch


def _on_cpu(argument: Any) -> Any:
    is_device = isinstance(argument, torch.device) or (isinstance(argument, str) and argument.startswith("cuda"))
    return torch.device("cpu") if is_device else argument


def _as_autocast(tensors: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    enabled = torch.is_autocast_enabled("cpu")
    return tuple(x.to(torch.get_autocast_dtype("cpu")) for x in tensors) if enabled else tensors


@contextmanager
def counted() -> Iterator[LaunchCounter]:
    """Inside, tensors compute as on a GPU, and launches are counted."""
    counter = LaunchCounter()
    device = OnDevice(counter)
    triton = dict(
        _use_triton=lambda device: device.type == "cuda",
        _forward_kernel=_Tile(counter, chunked_logprob._forward_tile),
        _backward_kernel=_Tile(counter, chunked_logprob._backward_tile),
        triton=SimpleNamespace(cdiv=lambda a, b: -(-a // b)),
    )
    with ExitStack() as stack:
        stack.enter_context(mock.patch.multiple(chunked_logprob, create=True, **triton))
        stack.enter_context(mock.patch("trl.trainer.utils._use_triton", triton["_use_triton"]))
        stack.enter_context(mock.patch("torch.nn.attention.varlen.varlen_attn", device.varlen))
        stack.enter_context(counter)
        stack.enter_context(device)
        yield counter


@contextmanager
def autocast() -> Iterator[None]:
    """bfloat16 as on a GPU: what is asked of either device says so."""
    before = torch.is_autocast_enabled("cuda"), torch.get_autocast_dtype("cuda")
    torch.set_autocast_enabled("cuda", True)
    torch.set_autocast_dtype("cuda", torch.bfloat16)
    try:
        with torch.autocast("cpu", torch.bfloat16):
            yield
    finally:
        torch.set_autocast_enabled("cuda", before[0])
        torch.set_autocast_dtype("cuda", before[1])
