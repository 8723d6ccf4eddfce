"""Draws by inverse CDF: on an even grid of uniform numbers the counts are the probabilities, without chance."""

from __future__ import annotations

import math

import pytest
import torch
from transformers import MinPLogitsWarper, TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from trl_multiturn.engines.engine import SamplingParams
from trl_multiturn.engines.transformers.sampler import TokenSampler, truncate_logits


CPU = torch.device("cpu")


def draw(logits: torch.Tensor, params: list[SamplingParams], uniforms: torch.Tensor):
    return TokenSampler(params, CPU)(logits, uniforms)


def test_draws_follow_the_softmax():
    probs = torch.tensor([0.5, 0.25, 0.0, 0.125, 0.125])
    uniforms = (torch.arange(1000) + 0.5) / 1000
    tokens, logps = draw(probs.log().expand(1000, 5), [SamplingParams(1)] * 1000, uniforms)
    assert torch.bincount(tokens, minlength=5).tolist() == [500, 250, 0, 125, 125]
    torch.testing.assert_close(logps, probs.log()[tokens])


@pytest.mark.parametrize("size", [255, 256, 700])
def test_a_vocabulary_of_any_size_is_drawn_from_in_order(size):
    weights = torch.randint(4, (size,), generator=torch.Generator().manual_seed(size)).float()
    total = int(weights.sum())
    uniforms = (torch.arange(total) + 0.5) / total
    tokens, logps = draw(weights.log().expand(total, size), [SamplingParams(1)] * total, uniforms)
    assert tokens.tolist() == torch.arange(size).repeat_interleave(weights.long()).tolist()
    torch.testing.assert_close(logps, (weights / total).log()[tokens])


def test_a_large_vocabulary_costs_log_probabilities_no_accuracy():
    logits = torch.randn(4, 200_000, generator=torch.Generator().manual_seed(5)) * 3
    tokens, logps = draw(logits, [SamplingParams(1)] * 4, torch.tensor([0.1, 0.4, 0.6, 0.9]))
    expected = logits.double().log_softmax(-1).gather(1, tokens[:, None])[:, 0]
    assert logps.tolist() == pytest.approx(expected.tolist(), abs=3e-6)


def test_extreme_uniforms_never_draw_a_token_without_mass():
    logits = torch.tensor([-math.inf, 0.0, 3.0, -math.inf]).repeat(2, 1)
    tokens, _ = draw(logits, [SamplingParams(1)] * 2, torch.tensor([0.0, 1 - 2**-24]))
    assert tokens.tolist() == [1, 2]


def test_temperature_zero_takes_the_mode_and_reports_the_policys_own_probability():
    logits = torch.tensor([[1.0, 2.0, 0.5]])
    tokens, logps = draw(logits, [SamplingParams(1, temperature=0, top_k=1)], torch.tensor([0.99]))
    assert tokens.tolist() == [1]
    torch.testing.assert_close(logps, logits.log_softmax(-1)[:, 1])


@pytest.mark.parametrize(
    "kwargs",
    [
        {"temperature": 0.3},
        {"temperature": 2.0},
        {"top_k": 3},
        {"top_k": 1000},
        {"top_p": 0.6},
        {"top_p": 1e-6},
        {"min_p": 0.2},
        {"min_p": 1.0},
        {"temperature": 0.7, "top_k": 12, "top_p": 0.8, "min_p": 0.05},
    ],
    ids=str,
)
def test_the_distribution_is_that_of_transformers(kwargs):
    params = SamplingParams(1, **kwargs)
    logits = torch.randn(6, 20, generator=torch.Generator().manual_seed(1)) * 2
    expected = TemperatureLogitsWarper(params.temperature)(None, logits) if params.temperature != 1 else logits
    if params.top_k:
        expected = TopKLogitsWarper(params.top_k)(None, expected)
    if params.top_p < 1:
        expected = TopPLogitsWarper(params.top_p)(None, expected)
    if params.min_p:
        expected = MinPLogitsWarper(params.min_p)(None, expected)
    expected = expected.softmax(-1)
    grid = (torch.arange(400) + 0.5) / 400
    for row in range(6):
        tokens, logps = draw(logits[row].expand(400, 20), [params] * 400, grid)
        frequencies = torch.bincount(tokens, minlength=20) / 400
        torch.testing.assert_close(frequencies, expected[row], atol=1.01 / 400, rtol=0)
        torch.testing.assert_close(logps, expected[row].log()[tokens])


def test_a_nucleus_of_any_size_is_found_whoever_shares_the_batch():
    sizes, total = (1, 511, 512, 513, 8191, 8192, 8193, 20_000), 40_000
    # The first tokens share 90 % of the mass, in some order
    probs = torch.full((len(sizes), total), 0.1)
    order = torch.randperm(total, generator=torch.Generator().manual_seed(4))
    for row, size in enumerate(sizes):
        probs[row] /= total - size
        probs[row, order[:size]] = 0.9 / size
    kept = truncate_logits(probs.log(), *(torch.full((len(sizes), 1), value) for value in (0, 0.85, -math.inf)))
    assert kept.isfinite().sum(-1).tolist() == list(sizes)
    assert all(kept[row, order[:size]].isfinite().all() for row, size in enumerate(sizes))


def test_rows_keep_their_own_settings():
    params = [
        SamplingParams(1),
        SamplingParams(1, temperature=0),
        SamplingParams(1, temperature=0.5, top_k=2),
        SamplingParams(1, min_p=0.5),
    ]
    logits = torch.randn(4, 9, generator=torch.Generator().manual_seed(2))
    uniforms = torch.tensor([0.9, 0.9, 0.9, 0.9])
    tokens, logps = draw(logits, params, uniforms)
    for row, param in enumerate(params):
        token, logp = draw(logits[row : row + 1], [param], uniforms[:1])
        assert (tokens[row], logps[row]) == (token[0], logp[0])


def test_logits_that_are_not_finite_show():
    logits = torch.tensor([[0.0, math.nan, 1.0], [0.0, 0.0, math.inf]])
    _, logps = draw(logits, [SamplingParams(1)] * 2, torch.tensor([0.5, 0.5]))
    assert logps.isnan().all()


def test_half_precision_logits_are_scored_in_float32():
    logits = torch.randn(3, 50, generator=torch.Generator().manual_seed(3)).bfloat16()
    tokens, logps = draw(logits, [SamplingParams(1)] * 3, torch.tensor([0.2, 0.5, 0.8]))
    assert logps.dtype == torch.float32
    torch.testing.assert_close(logps, logits.float().log_softmax(-1).gather(1, tokens[:, None])[:, 0])
