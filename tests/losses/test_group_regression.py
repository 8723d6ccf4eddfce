"""Group regression: numbers by hand, junk under the mask, and what splitting a group does."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from trl_multiturn.losses import (
    group_means,
    group_regression_loss,
    group_soft_means,
    group_variance_loss,
)

from .batches import JUNK, random_batch


GROUPS = torch.tensor([7, 3, 7, 3, 7])


def float64(*numbers):
    return torch.tensor(numbers, dtype=torch.float64)


def test_group_means_by_hand():
    assert group_means(float64(1, 10, 2, 20, 6), GROUPS).tolist() == [3, 15, 3, 15, 3]


def test_soft_means_by_hand_and_without_overflow():
    soft = group_soft_means(float64(1, 0, 0), torch.tensor([0, 0, 1]), beta=0.5)
    expected = 0.5 * math.log((math.exp(2) + 1) / 2)
    torch.testing.assert_close(soft, float64(expected, expected, 0))
    tiny = group_soft_means(float64(1, 0, 0), torch.tensor([0, 0, 1]), beta=1e-4)
    torch.testing.assert_close(tiny, float64(1 - 1e-4 * math.log(2), 1 - 1e-4 * math.log(2), 0))


def test_regression_by_hand():
    """β Σ ℓ = 0.5 · (1 + 2) and 0.5 · 4; R − b = 1 − 0.25 and 0 − 0.25: residuals 0.75 and 2.25."""
    log_ratios, mask = float64([1, 9, 2], [9, 4, 9]).view(2, 3), torch.tensor([[1, 0, 1], [0, 1, 0]])
    loss = group_regression_loss(log_ratios, float64(1, 0), float64(0.25, 0.25), mask, beta=0.5)
    assert loss.item() == pytest.approx((0.75**2 + 2.25**2) / 2)


def test_variance_by_hand():
    """x = R − β Σ ℓ = 0, 2 and 4 in one group (sample variance 4), and a row alone, which counts as 0."""
    log_ratios, mask = float64([2], [0], [-2], [5]).view(4, 1), torch.ones(4, 1)
    loss = group_variance_loss(log_ratios, float64(1, 2, 3, 9), torch.tensor([0, 0, 0, 1]), mask, beta=0.5)
    assert loss.item() == pytest.approx(3 * 4 / 4)


LOSSES = {
    "regression": lambda b: group_regression_loss(b.log_ratios, b.rewards, b.rewards.flip(0), b.action_mask, 0.3),
    "variance": lambda b: group_variance_loss(b.log_ratios, b.rewards, GROUPS, b.action_mask, 0.3),
}


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("junk", JUNK)
def test_junk_under_the_mask_moves_nothing(name, junk):
    results = []
    for batch in (random_batch(1, empty_row=False), random_batch(1, empty_row=False).with_junk(junk)):
        batch.log_ratios.requires_grad_()
        loss = LOSSES[name](batch)
        loss.backward()
        results.append((loss.detach(), batch.log_ratios.grad))
    torch.testing.assert_close(*results, rtol=0, atol=0)


def test_the_gradient_is_that_of_the_variance_through_its_mean():
    """The mean is detached, and yet the gradient is that of the sample variance, in which it is not."""
    batch = random_batch(2, empty_row=False)
    logits = batch.log_ratios.clone().requires_grad_()
    groups = torch.zeros(5, dtype=torch.long)
    loss = group_variance_loss(logits, batch.rewards, groups, batch.action_mask, 0.3)
    (gradient,) = torch.autograd.grad(loss, logits)
    x = batch.rewards - 0.3 * torch.where(batch.action_mask.bool(), logits, 0.0).sum(dim=1)
    (expected,) = torch.autograd.grad(x.var(), logits)
    torch.testing.assert_close((loss, gradient), (x.var(), expected))


def test_parts_of_a_group_have_its_variance_on_average():
    """Over all ways to halve a group of four: the reason for n − 1."""
    log_ratios, returns = torch.randn(4, 1, dtype=torch.float64), float64(0, 1, 0, 5)
    whole = group_variance_loss(log_ratios, returns, torch.zeros(4), torch.ones(4, 1), 0.3)
    parts = [
        group_variance_loss(log_ratios[list(part)], returns[list(part)], torch.zeros(2), torch.ones(2, 1), 0.3)
        for part in itertools.combinations(range(4), 2)
    ]
    torch.testing.assert_close(torch.stack(parts).mean(), whole)


def test_shapes_are_checked():
    batch = random_batch(3)
    with pytest.raises(ValueError, match="`baselines` has shape"):
        group_regression_loss(batch.log_ratios, batch.rewards, batch.rewards[:2], batch.action_mask, 0.3)
    with pytest.raises(ValueError, match="one entry per trajectory"):
        group_means(batch.rewards, GROUPS[:2])
