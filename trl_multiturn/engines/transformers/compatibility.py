"""Which models can be sampled from a shared cache, and with which attention: found out, never assumed.

[`attention_windows`] reads the windows that the model's own code applies; a model whose cached decoding does not give
the logits of its plain forward pass is refused by [`refuse_different_logits`] before its first token.
"""

from __future__ import annotations

import statistics
import sys
from typing import Protocol

import torch
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer


# Tokens of the self-test: more than the smallest prefill, and the last few decoded one by one
_LENGTH, _DECODED = 24, 4
# Largest relative difference of logits, in float32 and in what rounds more
_TOLERANCE, _COARSE_TOLERANCE = 2e-3, 0.2


class CachedDecoder(Protocol):
    """A policy that can decode known tokens from the shared cache."""

    policy: PreTrainedModel
    model: nn.Module

    @property
    def device(self) -> torch.device: ...

    def decode_known(self, token_ids: Tensor, decoded: int) -> Tensor: ...

    def drop_buffers(self) -> None: ...


def attention_windows(policy: PreTrainedModel) -> tuple[list[int | None], int | None]:
    """Window of each layer's attention, in tokens (`None` for full attention), and up to which length that is certain.

    Many configs carry a `sliding_window` that no layer applies (Granite, GLM-4): transformers' caches believe it, but
    the model's forward pass, and so training, attends to everything. What counts is whether the modelling code masks
    by windows. Of code that is not transformers' own that cannot be known, so that nothing is certain beyond the
    smallest window.

    Raises:
        ValueError: if a layer keeps something else than keys and values per token (state-space, convolution, linear
            attention, chunked attention, a cache shared between layers).
    """
    text_config = policy.config.get_text_config(decoder=True)
    windows: list[int | None] = []
    chunked = "chunked_attention" in (getattr(text_config, "layer_types", None) or [])
    chunked = chunked or getattr(text_config, "attention_chunk_size", None) is not None
    for index, layer in enumerate(DynamicCache(config=policy.config).layers):
        if type(layer) is DynamicLayer:
            windows.append(None)
        elif type(layer) is DynamicSlidingWindowLayer and not chunked:
            windows.append(layer.sliding_window)
        else:
            raise ValueError(
                f"Layer {index} of {policy.config.model_type!r} keeps a {type(layer).__name__}"
                f"{' for chunked attention' if chunked else ''}, whose state cannot be gathered row by row from "
                "requests of different lengths, so `TransformersEngine` cannot batch this model. Use an engine with "
                "kernels for it, e.g. `VLLMEngine`."
            )
    applied = _applies_windows(policy)
    if applied is False:
        return [None] * len(windows), None
    smallest = min((window for window in windows if window is not None), default=None)
    return windows, smallest if applied is None else None


def _applies_windows(policy: PreTrainedModel) -> bool | None:
    """Whether the modelling code masks by windows; `None` where it is not transformers' own."""
    models = [module for module in policy.modules() if isinstance(module, PreTrainedModel)]
    classes = {base for model in models for base in type(model).mro() if issubclass(base, PreTrainedModel)}
    # Sharding (FSDP2) derives a class of its own
    modules = {cls.__module__ for cls in classes if not cls.__module__.startswith("torch.")}
    if any(hasattr(sys.modules.get(name), "create_sliding_window_causal_mask") for name in modules):
        return True
    return False if all(name.startswith("transformers.") for name in modules) else None


def refuse_uncertain_window(policy: PreTrainedModel, window: int, length: int) -> None:
    """Raises `ValueError` where `length` tokens pass a window of which it is not known whether it is applied."""
    if length > window:
        raise ValueError(
            f"A conversation has {length} tokens, more than `sliding_window={window}` in the config of "
            f"{type(policy).__name__}, whose code is not part of transformers: whether its layers apply the window is "
            f"unknown, and log-probabilities could be wrong. Set `max_trajectory_tokens={window}`, remove "
            "`sliding_window` from the config if the code ignores it, or use `VLLMEngine`."
        )


def refuse_different_logits(batch: CachedDecoder, precise: bool) -> None:
    """Compares decoding from the shared cache with the model's plain forward pass, before the first request.

    Args:
        batch ([`CachedDecoder`]):
            Without live rows; its buffers are dropped.
        precise (`bool`):
            Whether the model computes in float32 throughout.

    Raises:
        ValueError: if the logits differ by more than rounding, or the model does not take the shared cache at all.
    """
    vocab_size = batch.policy.get_input_embeddings().num_embeddings
    generator = torch.Generator().manual_seed(0)
    token_ids = torch.randint(vocab_size, (1, _LENGTH), generator=generator).to(batch.device)
    positions = torch.arange(_LENGTH, device=batch.device).unsqueeze(0)
    plain = batch.model(input_ids=token_ids, position_ids=positions, use_cache=False).logits[0, -_DECODED:].float()
    try:
        cached = batch.decode_known(token_ids, _DECODED).float()
    except torch.OutOfMemoryError:
        raise
    except (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError) as error:
        raise ValueError(
            f"{type(batch.policy).__name__} does not take a cache that rows of different lengths share "
            f"({type(error).__name__}: {error}), so `TransformersEngine` cannot sample from it. Use an engine with "
            "kernels for it, e.g. `VLLMEngine`, or another model."
        ) from error
    finally:
        batch.drop_buffers()
    spread = (plain - plain.mean(dim=-1, keepdim=True)).norm(dim=-1)
    # The median: a mixture of experts may route one token otherwise where two experts are nearly equal
    difference = statistics.median(((cached - plain).norm(dim=-1) / spread).tolist())
    if difference > (_TOLERANCE if precise else _COARSE_TOLERANCE):  # not where either is NaN: the weights diverged
        raise ValueError(
            f"Sampled step by step, {type(batch.policy).__name__} gives other logits than in its plain forward pass "
            f"(by {difference:.1%} of their spread), so log-probabilities would be wrong: it is no causal decoder, or "
            "its attention needs more than a mask and positions. Use an engine with kernels for it, e.g. `VLLMEngine`."
        )
