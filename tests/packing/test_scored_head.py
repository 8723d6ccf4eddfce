"""The scored head against full logits in float64: every field, every gradient, in each way of going backward."""

from __future__ import annotations

import pytest
import torch

from trl_multiturn.packing import scored_head
from trl_multiturn.packing.scored_head import FIELDS, score_tokens


TOKENS, HIDDEN, VOCAB = 21, 8, 50


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch):
    monkeypatch.setattr(scored_head, "TILE_TOKENS", 4)  # five tiles and a rest


def case(dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    hidden, weight, bias = (
        torch.randn(*n, generator=generator) for n in ((TOKENS, HIDDEN), (VOCAB, HIDDEN), (VOCAB,))
    )
    targets = torch.randint(0, VOCAB, (TOKENS,), generator=generator)
    logits = hidden @ weight.t() + bias
    targets[::3] = logits.argmax(-1)[::3]  # some hits
    return hidden.to(dtype), weight.to(dtype), bias.to(dtype), targets


def written_out(hidden, weight, bias, targets, scale, softcap):
    logits = (hidden @ weight.t() + (0 if bias is None else bias)) * scale
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    log_p = logits.log_softmax(-1)
    p = log_p.exp()
    return {
        "log_probs": log_p.gather(1, targets[:, None])[:, 0],
        "entropy": -(p * log_p).sum(-1),
        "log_sum_sq_probs": p.square().sum(-1).log(),
        "mean_logits": logits.mean(-1),
        "is_top1": logits.argmax(-1) == targets,
    }


@pytest.mark.parametrize("way", ["keep", "recompute", "frozen", "no_grad"])
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize(("scale", "softcap"), [(1.0, None), (0.7, None), (1.3, 4.0)])
def test_fields_and_gradients(way, with_bias, scale, softcap):
    hidden, weight, bias, targets = case()
    bias = bias if with_bias else None
    trained = {"keep": 3, "recompute": 3, "frozen": 1, "no_grad": 0}[way]
    inputs = [hidden, weight, bias]
    ours = [None if x is None else x.clone().requires_grad_(i < trained) for i, x in enumerate(inputs)]
    theirs = [None if x is None else x.double().requires_grad_(i < trained) for i, x in enumerate(inputs)]
    keep_bytes = 0 if way == "recompute" else scored_head.KEEP_BYTES
    scores = score_tokens(*ours, targets, scale, softcap, FIELDS, keep_bytes)._asdict()
    expected = written_out(*theirs, targets, scale, softcap)
    for name, value in expected.items():
        torch.testing.assert_close(scores[name], value.to(scores[name].dtype), atol=2e-5, rtol=1e-5, msg=name)
    assert [name for name in scores if scores[name].requires_grad] == (["log_probs"] if trained else [])
    if trained:
        factors = torch.randn(TOKENS, generator=torch.Generator().manual_seed(1))
        (scores["log_probs"] * factors).sum().backward()
        (expected["log_probs"] * factors).sum().backward()
    for ours_x, theirs_x in zip(ours, theirs, strict=True):
        if ours_x is not None and ours_x.requires_grad:
            torch.testing.assert_close(ours_x.grad, theirs_x.grad.float(), atol=2e-5, rtol=1e-5)
        elif ours_x is not None:
            assert ours_x.grad is None


def test_a_tie_goes_to_the_first_of_the_most_likely():
    weight = torch.tensor([[1.0], [2.0], [2.0], [0.0]])
    top = score_tokens(torch.ones(4, 1), weight, None, torch.arange(4), fields=("is_top1",)).is_top1
    assert top.tolist() == [False, True, False, False]


def test_no_token_is_a_differentiable_zero():
    hidden, weight, *_ = case()
    hidden, weight = hidden[:0].requires_grad_(), weight.requires_grad_()
    score_tokens(hidden, weight, None, torch.empty(0, dtype=torch.long), fields=FIELDS).log_probs.sum().backward()
    assert not weight.grad.any()


def test_backward_twice_gives_the_same_gradient_twice():
    hidden, weight, _, targets = case()
    weight.requires_grad_()
    total = score_tokens(hidden, weight, None, targets).log_probs.sum()
    total.backward(retain_graph=True)
    once = weight.grad.clone()
    total.backward()
    torch.testing.assert_close(weight.grad, 2 * once)


def test_autocast_computes_in_bfloat16_and_returns_float32():
    hidden, weight, _, targets = case()
    hidden.requires_grad_(), weight.requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        log_probs = score_tokens(hidden, weight, None, targets).log_probs
    log_probs.sum().backward()
    exact = score_tokens(hidden.detach(), weight.detach(), None, targets).log_probs
    assert log_probs.dtype == hidden.grad.dtype == weight.grad.dtype == torch.float32
    assert 0 < (log_probs - exact).abs().max() < 0.1


@pytest.mark.parametrize("keep_bytes", [0, scored_head.KEEP_BYTES])
def test_bfloat16_gradients_do_not_drift_with_the_number_of_tiles(keep_bytes):
    # Rounding each tile's product to bfloat16 before the sum would show here
    hidden, weight, _, targets = (x.repeat(20, 1) if x.shape == (TOKENS, HIDDEN) else x for x in case(torch.bfloat16))
    targets = targets.repeat(20)
    weight.requires_grad_()
    score_tokens(hidden, weight, None, targets, keep_bytes=keep_bytes).log_probs.sum().backward()
    exact = weight.detach().double().requires_grad_()
    written_out(hidden.double(), exact, None, targets, 1.0, None)["log_probs"].sum().backward()
    error = (weight.grad.double() - exact.grad).abs().max() / exact.grad.abs().max()
    assert error < 2**-7
