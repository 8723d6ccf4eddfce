"""
The least time of a step for `train_step.py`: its necessary arithmetic at the rate of this machine's matrix products.

Necessary are the products of unique tokens with the decoder's matrices, of trained ones with the head, and of queries
with the keys and values of their paths, forward and backward (a frozen matrix has no gradient of its own). The last
feed-forward block is necessary only for tokens that predict a trained one. Norms, activations, softmax, the metrics
and everything that is computed again are not. A value model with a decoder of its own needs the same, but no head.
Products with matrices are timed at these very sizes, in this process; those of attention are taken at their rate.
"""

from __future__ import annotations

import statistics
import time
from collections import Counter
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from trl_multiturn.packing import pack_rows


class Work(NamedTuple):
    """What a batch asks of a model, in tokens."""

    unique: int
    read: int  # those that predict a trained one
    trained: int
    attended: int  # pairs of a token and one on its path


class Limit(NamedTuple):
    """Of one step: its arithmetic and the seconds that its products take, without and for a reference."""

    operations: float
    seconds: float
    reference_operations: float
    reference_seconds: float

    @property
    def rate(self) -> float:
        return self.operations / self.seconds


class Cost(NamedTuple):
    """Of a model on a row: operations and seconds, forward and backward."""

    forward: float
    forward_seconds: float
    backward: float
    backward_seconds: float


def work_of(batch: dict[str, Tensor], prefix: str = "") -> Work:
    row = pack_rows(batch[f"{prefix}input_ids"], batch[f"{prefix}attention_mask"])
    trained = row.cells[:, 1:][batch[f"{prefix}completion_mask"][:, 1:].bool()].unique()
    read = row.parents[trained].unique()
    return Work(len(row), len(read), len(trained), int((row.position_ids + 1).sum()))


def limit_of(model: Any, batch: dict[str, Tensor], dtype: torch.dtype) -> Limit:
    """
    The limit of a step of `model`, a causal LM or one with adapters, and of its value model. KTO's mismatched
    completions go through the policy and the reference once more, forward only.
    """
    device, work = batch["input_ids"].device, work_of(batch)
    causal_lm = model.get_base_model() if hasattr(model, "get_base_model") else model
    policy = _cost(causal_lm, causal_lm.get_output_embeddings(), work, device, dtype)
    parts = [policy[:2], policy[2:]]
    reference = [policy[:2]]
    if "KL_input_ids" in batch:
        mismatched = _cost(causal_lm, causal_lm.get_output_embeddings(), work_of(batch, "KL_"), device, dtype)
        parts.append(mismatched[:2])
        reference.append(mismatched[:2])
    backbone = getattr(getattr(model, "value_model", None), "backbone", None)
    if backbone is not None:
        decoder = backbone.get_base_model() if hasattr(backbone, "get_base_model") else backbone
        value = _cost(decoder, None, work, device, dtype)
        parts += [value[:2], value[2:]]
    totals = [sum(numbers) for part in (parts, reference) for numbers in zip(*part, strict=True)]
    return Limit(*totals)


def _cost(decoder: Any, head: nn.Module | None, work: Work, device: torch.device, dtype: torch.dtype) -> Cost:
    forward = backward = forward_seconds = backward_seconds = 0.0
    for (tokens, inputs, outputs, trained), count in _products(decoder, head, work).items():
        x, w = (torch.randn(n, inputs, device=device).to(dtype) for n in (tokens, outputs))
        g = torch.randn(tokens, outputs, device=device).to(dtype)
        products: list[Callable[[], Tensor]] = [lambda g=g, w=w: g @ w]
        if trained:
            products.append(lambda g=g, x=x: g.t() @ x)
        operations = 2.0 * tokens * inputs * outputs * count
        forward += operations
        forward_seconds += count * _seconds(lambda x=x, w=w: x @ w.t(), device)
        backward += operations * len(products)
        backward_seconds += count * sum(_seconds(product, device) for product in products)
    rate = (forward + backward) / (forward_seconds + backward_seconds)
    attention = 4.0 * work.attended * _attention_width(decoder)
    return Cost(
        forward + attention,
        forward_seconds + attention / rate,
        backward + 2 * attention,
        backward_seconds + 2 * attention / rate,
    )


def _products(decoder: Any, head: nn.Module | None, work: Work) -> Counter[tuple[int, int, int, bool]]:
    """Tokens, inputs, outputs and whether it is trained, of each linear map of a decoder and of its head."""
    body = decoder.base_model
    within_last = {id(module) for module in body.layers[-1].mlp.modules()}
    products: Counter[tuple[int, int, int, bool]] = Counter()
    for module in [*body.modules(), *([] if head is None else head.modules())]:
        if isinstance(module, nn.Linear):
            tokens = work.read if id(module) in within_last else work.unique
            tokens = work.trained if module is head else tokens
            products[(tokens, module.in_features, module.out_features, module.weight.requires_grad)] += 1
    return products


def _attention_width(model: nn.Module) -> int:
    config = model.config.get_text_config()  # type: ignore[operator, union-attr]
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return config.num_hidden_layers * config.num_attention_heads * head_dim


def _seconds(product: Callable[[], Tensor], device: torch.device) -> float:
    on_gpu = device.type == "cuda"
    clock = time.process_time if torch.get_num_threads() == 1 and not on_gpu else time.perf_counter
    times = []
    with torch.no_grad():
        product()
        for _ in range(3):
            if on_gpu:
                torch.cuda.synchronize()
            start = clock()
            product()
            if on_gpu:
                torch.cuda.synchronize()
            times.append(clock() - start)
    return statistics.median(times)


def shares_of_limit(limits: list[Limit], seconds: list[float], compute_reference: list[bool]) -> str:
    """Seconds of the necessary arithmetic, its rate, and what share of each arm's time they are."""
    if not limits:
        return "not computed"
    alone = statistics.median(limit.seconds for limit in limits)
    both = statistics.median(limit.seconds + limit.reference_seconds for limit in limits)
    rate = statistics.median(limit.rate for limit in limits)
    shares = [(both if computes else alone) / s for s, computes in zip(seconds, compute_reference, strict=True)]
    return f"{alone:.3g}, {both:.3g} at {rate / 1e9:.0f} GFLOP/s; {', '.join(f'{share:.2f}' for share in shares)}"
