"""Values by classification: the loss by hand, and the soft value against the exactly solved agent."""

from __future__ import annotations

import math

import pytest
import torch

from trl_multiturn.losses import outcome_classification_loss, soft_value
from trl_multiturn.tabular import TabularToolMDP


NAN = float("nan")


def test_the_loss_is_the_cross_entropy_of_the_outcome_at_every_action():
    # log-odds log 3 and log(1/4): chances 3/4 and 1/5
    logits = torch.tensor([[math.log(3.0), NAN, -math.log(4.0)], [0.0, NAN, NAN]])
    mask = torch.tensor([[1, 0, 1], [1, 0, 0]])
    loss = outcome_classification_loss(logits, torch.tensor([1.0, 0.0]), mask)
    first = -(math.log(3 / 4) + math.log(1 / 5)) / 2
    assert loss.item() == pytest.approx((first + math.log(2)) / 2)


def test_masked_entries_get_no_gradient():
    logits = torch.tensor([[0.0, 1e30, 1.0]], requires_grad=True)
    outcome_classification_loss(logits, torch.tensor([1.0]), torch.tensor([[1, 0, 1]])).backward()
    # d/dz of −log σ(z) is σ(z) − 1, halved by the mean
    expected = [(0.5 - 1) / 2, 0.0, (torch.tensor(1.0).sigmoid().item() - 1) / 2]
    assert logits.grad[0].tolist() == pytest.approx(expected)


@pytest.mark.parametrize("beta", [0.03, 0.3, 3.0])
def test_the_soft_value_is_the_log_of_the_expected_exponential(beta):
    chances = torch.tensor([1e-6, 0.2, 0.5, 0.999], dtype=torch.float64)
    expected = beta * torch.log(1 - chances + chances * torch.exp(torch.tensor(1 / beta, dtype=torch.float64)))
    torch.testing.assert_close(soft_value(chances.logit(), beta), expected)


def test_the_soft_value_neither_overflows_nor_leaves_the_rewards():
    values = soft_value(torch.tensor([-1e4, -1.0, 0.0, 1e4]), beta=1e-3)
    assert values[0] == 0 and values[-1] == 1 and bool(((values >= 0) & (values <= 1)).all())


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_with_certain_tools_the_soft_value_of_the_references_chance_is_the_optimal_value(seed):
    mdp = TabularToolMDP.random(turns=3, actions=3, observations=2, stochastic=False, seed=seed)
    mdp = type(mdp)(mdp.reference, mdp.observation_probs, mdp.successors, mdp.rewards.round(), mdp.turns)
    is_last = mdp.successors[:, :, 0] < 0
    chances = torch.zeros(len(mdp.reference), dtype=torch.float64)
    for _ in range(mdp.turns):
        chances = (mdp.reference * torch.where(is_last, mdp.rewards, mdp.expected_next(chances))).sum(dim=-1)
    reachable = mdp.paths().states.unique()
    expected = mdp.solve(beta=0.3).values[reachable]
    torch.testing.assert_close(soft_value(chances[reachable].logit(), 0.3), expected)
