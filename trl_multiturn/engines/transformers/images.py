"""Sampling after images: one conversation at a time, with the model's own `generate`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import LogitsProcessor, StoppingCriteria

from ...images.vision import Vision
from ..engine import Generation
from .decoding import DecodingRequest
from .sampler import TokenSampler
from .stop_strings import StopStringMatcher


def sample_after_images(
    model: nn.Module, vision: Vision, request: DecodingRequest, matcher: StopStringMatcher
) -> Generation:
    """One turn after a prompt with images.

    The model's `generate` feeds pixels and places positions, which differ from family to family; the tokens are drawn
    as everywhere in this engine.
    """
    device = next(model.parameters()).device
    ids = torch.tensor([request.prompt_ids], device=device)
    inputs = {name: value.to(device) for name, value in vision.inputs(ids.cpu(), [request.images]).items()}
    draw = _Draw(request, matcher)
    generate: Any = model.generate
    generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        **inputs,
        max_new_tokens=request.sampling.max_new_tokens,
        do_sample=False,
        use_cache=True,
        logits_processor=[draw],
        stopping_criteria=[_IsOver(draw)],
        eos_token_id=None,
    )
    return request.generation()


class _Draw(LogitsProcessor):
    """Draws a token, and leaves the greedy choice nothing but it."""

    def __init__(self, request: DecodingRequest, matcher: StopStringMatcher):
        self.request = request
        self.is_over = False
        self._matcher = matcher
        self._sampler: TokenSampler | None = None

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        sampler = self._sampler = self._sampler or TokenSampler([self.request.sampling], scores.device)
        uniform = torch.tensor([self.request.rng.random()], dtype=torch.float32, device=scores.device)
        token, logp = sampler(scores, uniform)
        self.is_over = self.request.accept(int(token), float(logp), self._matcher)
        return torch.full_like(scores, -torch.inf).scatter(1, token.unsqueeze(1), 0.0)


class _IsOver(StoppingCriteria):
    """Whether the turn is over."""

    def __init__(self, draw: _Draw):
        self._draw = draw

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        return torch.full((len(input_ids),), self._draw.is_over, device=input_ids.device)
