from __future__ import annotations

import math

import pytest
import torch

from trl_multiturn.losses import (
    dqo_policy_loss,
    dqo_value_loss,
    dro_policy_loss,
    dro_value_loss,
    importance_weights,
    lambda_returns,
    merge_segments,
    oreo_policy_loss,
    oreo_value_loss,
    terminal_rewards,
    turn_ids,
)

from . import reference
from .batches import JUNK, random_batch


BETA = 0.3
LAMBDAS = [0.0, 0.5, 0.95, 1.0]


def gradients(loss, *tensors):
    return torch.autograd.grad(loss, tensors, allow_unused=True)


class TestByHand:
    """
    column       0      1      2      3
    token        act    obs    act    act
    V            0.5    -      0.25   1
    log-ratio    1      -      2      -1
    reward       0      -      0.5    1        beta = 0.5

    deltas r - beta * log-ratio: -0.5, -0.5, 1.5
    """

    nan = float("nan")
    values = torch.tensor([[0.5, nan, 0.25, 1.0]], dtype=torch.float64)
    log_ratios = torch.tensor([[1.0, nan, 2.0, -1.0]], dtype=torch.float64)
    rewards = torch.tensor([[0.0, nan, 0.5, 1.0]], dtype=torch.float64)
    mask = torch.tensor([[1, 0, 1, 1]])

    def returns(self, lam, literal=False):
        arguments = (self.values, self.log_ratios, self.rewards, self.mask)
        return lambda_returns(*arguments, 0.5, lam, literal).tolist()

    def test_one_step_returns_jump_over_the_observation(self):
        assert self.returns(0.0) == [[-0.5 + 0.25, 0, -0.5 + 1.0, 1.5]]

    def test_monte_carlo_returns(self):
        assert self.returns(1.0) == [[0.5, 0, 1.0, 1.5]]

    def test_half_way(self):
        # G_3 = 1.5;  G_2 = -0.5 + 0.5 * 1 + 0.5 * 1.5 = 0.75;  G_0 = -0.5 + 0.5 * 0.25 + 0.5 * 0.75 = 0
        assert self.returns(0.5) == [[0.0, 0, 0.75, 1.5]]

    def test_the_printed_sum_does_not_reach_one(self):
        # one action left: (1 - 0.5) * 1.5;  two: 0.5 * 0.5 + 0.25 * 1.0;  three: 0.5 * -0.25 + 0.25 * 0 + 0.125 * 0.5
        assert self.returns(0.5, literal=True) == [[-0.0625, 0, 0.5, 0.75]]
        assert self.returns(1.0, literal=True) == self.returns(1.0)

    def test_losses(self):
        arguments = (self.values, self.log_ratios, self.rewards, self.mask, 0.5, 0.5)
        assert dqo_value_loss(*arguments).item() == pytest.approx((0 - 0.5) ** 2 + 0.5**2 + 0.5**2)
        # beta * lr - (r + G_next - V): 0.5 - (0 + 0.75 - 0.5); 1 - (0.5 + 1.5 - 0.25); -0.5 - (1 + 0 - 1)
        assert dqo_policy_loss(*arguments).item() == pytest.approx(0.25**2 + 0.75**2 + 0.5**2)


@pytest.mark.parametrize("literal", [False, True])
@pytest.mark.parametrize("lam", LAMBDAS)
def test_lambda_returns_equal_the_sum_over_n_step_returns(lam, literal):
    batch = random_batch(3, columns=40)
    junk = batch.with_junk(float("nan"))
    actual = lambda_returns(junk.values, junk.log_ratios, junk.token_rewards, junk.action_mask, BETA, lam, literal)
    assert actual[batch.action_mask == 0].eq(0).all()
    for row in range(len(actual)):
        lists = batch.actions(row, "values", "log_ratios", "token_rewards")
        expected = [reference.lambda_return(*lists, BETA, lam, t, literal) for t in range(len(lists[0]))]
        torch.testing.assert_close(
            actual[row][batch.action_mask[row].bool()], torch.tensor(expected, dtype=torch.float64)
        )


@pytest.mark.parametrize("lam", LAMBDAS)
@pytest.mark.parametrize("weighted", [False, True])
def test_losses_equal_the_plain_python_reference(lam, weighted):
    batch = random_batch(4)
    rows = len(batch.rewards)
    weights = torch.rand(rows, dtype=torch.float64) if weighted else None
    junk = batch.with_junk(float("inf"))
    values, log_ratios = junk.values.requires_grad_(), junk.log_ratios.requires_grad_()
    arguments = (values, log_ratios, junk.token_rewards, junk.action_mask, BETA, lam, weights)
    value_loss, policy_loss = dqo_value_loss(*arguments), dqo_policy_loss(*arguments)
    d_values, none = gradients(value_loss, values, log_ratios)
    none_too, d_log_ratios = gradients(policy_loss, values, log_ratios)
    assert none is None and none_too is None

    expected_value, expected_policy = 0.0, 0.0
    for row in range(rows - 1):
        mask = batch.action_mask[row].bool()
        weight = weights[row].item() if weighted else 1.0
        lists = batch.actions(row, "values", "log_ratios", "token_rewards")
        row_value, row_d_values, row_policy, row_d_log_ratios = reference.dqo(*lists, BETA, lam, weight)
        expected_value += row_value / rows
        expected_policy += row_policy / rows
        for actual, expected in [(d_values, row_d_values), (d_log_ratios, row_d_log_ratios)]:
            expected = torch.tensor(expected, dtype=torch.float64)
            torch.testing.assert_close(actual[row][mask] * rows, expected, rtol=1e-10, atol=1e-14)
    assert value_loss.item() == pytest.approx(expected_value, rel=1e-10)
    assert policy_loss.item() == pytest.approx(expected_policy, rel=1e-10)


def test_at_lambda_one_the_gradients_are_oreos_times_the_number_of_actions():
    batch = random_batch(5)
    values, log_ratios = batch.values.requires_grad_(), batch.log_ratios.requires_grad_()
    count = batch.action_mask.sum(dim=1, keepdim=True)
    rewards = terminal_rewards(batch.rewards, batch.action_mask)
    for dqo, oreo, trained in [
        (dqo_policy_loss, oreo_policy_loss, log_ratios),
        (dqo_value_loss, oreo_value_loss, values),
    ]:
        (dqo_gradient,) = gradients(dqo(values, log_ratios, rewards, batch.action_mask, BETA, 1.0), trained)
        (oreo_gradient,) = gradients(oreo(values, log_ratios, batch.rewards, batch.action_mask, BETA), trained)
        torch.testing.assert_close(dqo_gradient, oreo_gradient * count)
        assert not torch.allclose(dqo_gradient, oreo_gradient)


@pytest.mark.parametrize("junk", JUNK)
@pytest.mark.parametrize("lam", LAMBDAS)
def test_junk_under_the_mask_moves_nothing(junk, lam):
    batch = random_batch(6)
    outcomes = []
    for variant in (batch, batch.with_junk(junk)):
        values, log_ratios = variant.values.clone().requires_grad_(), variant.log_ratios.clone().requires_grad_()
        weights = importance_weights(variant.log_ratios, variant.values, variant.action_mask)
        arguments = (values, log_ratios, variant.token_rewards, variant.action_mask, BETA, lam, weights)
        value_loss, policy_loss = dqo_value_loss(*arguments), dqo_policy_loss(*arguments)
        d_values, d_log_ratios = gradients(value_loss, values)[0], gradients(policy_loss, log_ratios)[0]
        outcomes.append([weights, value_loss, policy_loss, d_values, d_log_ratios])
    for clean, dirty in zip(*outcomes, strict=True):
        assert clean.isfinite().all() and torch.equal(clean, dirty)


def test_importance_weights_are_capped_above_and_detached():
    logps = torch.tensor([[-1.0, -2.0, float("nan")], [-1.0, -1.0, -1.0], [-9.0, -9.0, -9.0]], requires_grad=True)
    behavior = torch.tensor([[-1.5, -1.75, float("inf")], [-9.0, -9.0, -9.0], [-1.0, -1.0, -1.0]])
    mask = torch.tensor([[1, 1, 0], [1, 1, 1], [0, 0, 0]])
    weights = importance_weights(logps, behavior, mask)
    # 0.5 - 0.25 nats; 24 nats, capped at 1; no action
    assert weights.tolist() == pytest.approx([math.exp(0.25), math.e, 1.0])
    assert not weights.requires_grad
    assert importance_weights(logps, behavior, mask, log_cap=0.0).tolist() == [1.0, 1.0, 1.0]
    assert importance_weights(behavior, logps, torch.ones_like(mask))[2] == pytest.approx(math.e)


def test_a_row_of_weight_zero_cannot_poison_the_batch():
    values = torch.tensor([[1.0], [torch.finfo(torch.float32).max]])
    arguments = (values, torch.zeros(2, 1), torch.zeros(2, 1), torch.ones(2, 1), 1.0, 1.0, torch.tensor([1.0, 0.0]))
    assert dqo_value_loss(*arguments) == 0.5


class TestDRO:
    def test_by_hand(self):
        log_ratios = torch.tensor([[1.0, float("nan"), 2.0], [4.0, 1.0, 1.0], [1.0, 1.0, 1.0]], requires_grad=True)
        mask = torch.tensor([[1, 0, 1], [0, 1, 1], [0, 0, 0]])
        values = torch.tensor([0.25, 0.5, 3.0], requires_grad=True)
        rewards = torch.tensor([1.0, 0.0, 7.0])
        # 0.5 * 3 - (1 - 0.25) = 0.75;  0.5 * 2 - (0 - 0.5) = 1.5;  the empty row counts in the mean only
        loss = dro_policy_loss(values, log_ratios, rewards, mask, 0.5)
        assert loss.item() == pytest.approx((0.5625 + 2.25) / 3)
        d_values, d_log_ratios = gradients(loss, values, log_ratios)
        assert d_values is None and d_log_ratios.tolist() == [[0.25, 0, 0.25], [0, 0.5, 0.5], [0, 0, 0]]

        value_loss = dro_value_loss(values, log_ratios, rewards, mask, 0.5)
        assert value_loss.item() == loss.item()
        d_values, d_log_ratios = gradients(value_loss, values, log_ratios)
        assert d_values.tolist() == [0.5, 1.0, 0] and d_log_ratios is None

    @pytest.mark.parametrize("junk", JUNK)
    def test_a_row_without_an_action_may_hold_anything(self, junk):
        mask = torch.tensor([[1, 1], [0, 0]])
        log_ratios = torch.tensor([[1.0, 2.0], [junk, junk]], requires_grad=True)
        values = torch.tensor([0.25, junk], requires_grad=True)
        rewards = torch.tensor([1.0, junk])
        for loss_fn, trained, gradient in [
            (dro_policy_loss, log_ratios, [[0.375, 0.375], [0, 0]]),
            (dro_value_loss, values, [0.75, 0]),
        ]:
            loss = loss_fn(values, log_ratios, rewards, mask, 0.5)
            assert loss.item() == pytest.approx(0.75**2 / 2)
            assert gradients(loss, trained)[0].tolist() == gradient

    def test_it_is_dqo_and_oreo_with_the_response_as_one_action(self):
        batch = random_batch(7)
        mask = batch.action_mask
        rewards = terminal_rewards(batch.rewards, mask)
        merged = merge_segments(batch.values, batch.log_ratios, rewards, mask, torch.zeros_like(mask))
        first = merged.values[:, 0]
        expected = dro_policy_loss(first, batch.log_ratios, batch.rewards, mask, BETA)
        arguments = (merged.values, merged.log_ratios, merged.rewards, merged.action_mask, BETA)
        torch.testing.assert_close(dqo_policy_loss(*arguments, lam=0.3), expected)
        response = oreo_policy_loss(batch.values, batch.log_ratios, batch.rewards, mask, BETA, level="response")
        torch.testing.assert_close(response, expected)


def test_merged_turns_by_hand():
    mask = torch.tensor([[0, 1, 1, 0, 1, 0], [1, 0, 0, 0, 0, 0]])
    values = torch.arange(12.0).view(2, 6)
    merged = merge_segments(values, values + 100, values + 200, mask, turn_ids(mask))
    assert merged.values.tolist() == [[1, 4], [6, 0]]
    assert merged.log_ratios.tolist() == [[203, 104], [106, 0]]
    assert merged.rewards.tolist() == [[403, 204], [206, 0]]
    assert merged.action_mask.tolist() == [[True, True], [True, False]]


def test_terminal_rewards_are_paid_at_the_last_action():
    mask = torch.tensor([[0, 1, 0, 1, 0], [0, 0, 0, 0, 0]])
    assert terminal_rewards(torch.tensor([2.0, 3.0]), mask).tolist() == [[0, 0, 0, 2, 0], [0, 0, 0, 0, 0]]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda x, m: lambda_returns(x, x, x, m, 0.1, 1.5), "must lie in"),
        (lambda x, m: lambda_returns(x, x, x[:, 0], m, 0.1, 1.0), "`rewards` has shape"),
        (lambda x, m: dqo_policy_loss(x, x, x[:, 0], m, 0.1), "`rewards` has shape"),
        (lambda x, m: dqo_value_loss(x, x, x, m, 0.1, weights=x), "`weights` has shape"),
        (lambda x, m: importance_weights(x, x[:, 1:], m), "`behavior_logps` has shape"),
        (lambda x, m: dro_policy_loss(x, x, x[:, 0], m, 0.1), "`values` has shape"),
        (lambda x, m: terminal_rewards(x, m), "`rewards` has shape"),
    ],
)
def test_wrong_shapes_are_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call(torch.zeros(2, 3), torch.ones(2, 3))
