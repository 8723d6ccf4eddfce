from __future__ import annotations

import pytest
import torch

from trl_multiturn.losses import oreo_policy_loss, oreo_value_loss, turn_ids

from . import reference
from .batches import JUNK, random_batch


BETA = 0.3


def value_and_gradients(loss_fn, batch, **kwargs):
    values = batch.values.clone().requires_grad_()
    log_ratios = batch.log_ratios.clone().requires_grad_()
    loss = loss_fn(values, log_ratios, batch.rewards, batch.action_mask, BETA, **kwargs)
    gradients = torch.autograd.grad(loss, [values, log_ratios], allow_unused=True)
    return loss.detach(), *gradients


def levels(batch):
    return {"token": {}, "step": {"step_ids": batch.step_ids}, "response": {}}


class TestByHand:
    """
    column       0      1      2      3      4
    token        prompt act    obs    act    act
    V            -      0.5    -      0.25   1
    log-ratio    -      1      -      2      -1       beta = 0.5, R = 1

    residuals: t=1: 0.5 - 1 + 0.5 * ( 1 + 2 - 1) =  0.5
               t=3: 0.25 - 1 + 0.5 * (2 - 1)     = -0.25
               t=4: 1 - 1 + 0.5 * (-1)           = -0.5
    """

    nan = float("nan")
    values = torch.tensor([[nan, 0.5, nan, 0.25, 1.0]], dtype=torch.float64)
    log_ratios = torch.tensor([[nan, 1.0, nan, 2.0, -1.0]], dtype=torch.float64)
    mask = torch.tensor([[0, 1, 0, 1, 1]])
    rewards = torch.tensor([1.0], dtype=torch.float64)

    def test_value_loss_is_the_mean_of_squared_residuals(self):
        loss = oreo_value_loss(self.values, self.log_ratios, self.rewards, self.mask, 0.5)
        assert loss.item() == pytest.approx((0.25 + 0.0625 + 0.25) / 3)

    def test_token_level(self):
        log_ratios = self.log_ratios.clone().requires_grad_()
        loss = oreo_policy_loss(self.values, log_ratios, self.rewards, self.mask, 0.5)
        loss.backward()
        assert loss.item() == pytest.approx(0.5625 / 3)
        # 2/3 * residual * beta, own residual only: later log-ratios are detached
        assert log_ratios.grad[0].tolist() == pytest.approx([0, 1 / 6, 0, -1 / 12, -1 / 6])

    def test_step_level_with_turns_as_steps(self):
        log_ratios = self.log_ratios.clone().requires_grad_()
        ids = turn_ids(self.mask)
        assert ids[0, [1, 3, 4]].tolist() == [0, 1, 1]
        loss = oreo_policy_loss(self.values, log_ratios, self.rewards, self.mask, 0.5, "step", ids)
        loss.backward()
        assert loss.item() == pytest.approx((0.25 + 0.0625) / 2)  # a mean over two steps, V read at t=1 and t=3
        assert log_ratios.grad[0].tolist() == pytest.approx([0, 1 / 4, 0, -1 / 8, -1 / 8])

    def test_response_level(self):
        log_ratios = self.log_ratios.clone().requires_grad_()
        loss = oreo_policy_loss(self.values, log_ratios, self.rewards, self.mask, 0.5, "response")
        loss.backward()
        assert loss.item() == pytest.approx(0.25)
        assert log_ratios.grad[0].tolist() == pytest.approx([0, 1 / 2, 0, 1 / 2, 1 / 2])


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("level", ["token", "step", "response"])
def test_policy_loss_equals_the_plain_python_reference(seed, level):
    batch = random_batch(seed)
    loss, d_values, d_log_ratios = value_and_gradients(
        oreo_policy_loss, batch.with_junk(float("nan")), level=level, **levels(batch)[level]
    )
    assert d_values is None

    expected, rows = 0.0, len(batch.rewards)
    for row in range(rows - 1):  # the last row is empty and contributes nothing
        values, log_ratios = batch.actions(row, "values", "log_ratios")
        n = len(values)
        steps = {"token": [(i, i + 1) for i in range(n)], "step": batch.steps(row), "response": [(0, n)]}[level]
        row_loss, _, row_gradient = reference.oreo(values, log_ratios, batch.rewards[row].item(), BETA, steps)
        expected += row_loss / rows
        actual = d_log_ratios[row][batch.action_mask[row].bool()] * rows
        torch.testing.assert_close(actual, torch.tensor(row_gradient, dtype=torch.float64), rtol=1e-10, atol=1e-14)
    assert loss.item() == pytest.approx(expected, rel=1e-10)
    assert d_log_ratios[batch.action_mask == 0].eq(0).all()


@pytest.mark.parametrize("seed", range(4))
def test_value_loss_equals_the_plain_python_reference(seed):
    batch = random_batch(seed)
    loss, d_values, d_log_ratios = value_and_gradients(oreo_value_loss, batch.with_junk(float("-inf")))
    assert d_log_ratios is None

    expected, rows = 0.0, len(batch.rewards)
    for row in range(rows - 1):
        values, log_ratios = batch.actions(row, "values", "log_ratios")
        steps = [(i, i + 1) for i in range(len(values))]
        row_loss, row_gradient, _ = reference.oreo(values, log_ratios, batch.rewards[row].item(), BETA, steps)
        expected += row_loss / rows
        actual = d_values[row][batch.action_mask[row].bool()] * rows
        torch.testing.assert_close(actual, torch.tensor(row_gradient, dtype=torch.float64), rtol=1e-10, atol=1e-14)
    assert loss.item() == pytest.approx(expected, rel=1e-10)


def test_value_and_token_policy_losses_are_one_number_with_different_gradients():
    batch = random_batch(0)
    value_loss, d_values, none = value_and_gradients(oreo_value_loss, batch)
    policy_loss, none_too, d_log_ratios = value_and_gradients(oreo_policy_loss, batch)
    assert value_loss == policy_loss and none is None and none_too is None
    torch.testing.assert_close(d_log_ratios, BETA * d_values)


@pytest.mark.parametrize("junk", JUNK)
def test_junk_under_the_mask_moves_nothing(junk):
    batch = random_batch(1)
    for level, kwargs in levels(batch).items():
        clean = value_and_gradients(oreo_policy_loss, batch, level=level, **kwargs)
        dirty_batch = batch.with_junk(junk)
        dirty = value_and_gradients(oreo_policy_loss, dirty_batch, level=level, **levels(dirty_batch)[level])
        assert torch.equal(clean[0], dirty[0]) and torch.equal(clean[2], dirty[2]), level
    clean = value_and_gradients(oreo_value_loss, batch)
    dirty = value_and_gradients(oreo_value_loss, batch.with_junk(junk))
    assert torch.equal(clean[0], dirty[0]) and torch.equal(clean[1], dirty[1])


def test_a_batch_of_empty_rows_is_a_differentiable_zero():
    batch = random_batch(2, rows=1)
    assert batch.action_mask.sum() == 0
    for level, kwargs in levels(batch).items():
        loss, _, gradient = value_and_gradients(oreo_policy_loss, batch, level=level, **kwargs)
        assert loss == 0 and gradient.eq(0).all()
    loss, gradient, _ = value_and_gradients(oreo_value_loss, batch)
    assert loss == 0 and gradient.eq(0).all()


def test_half_precision_is_accumulated_in_float32():
    log_ratios = torch.full((1, 4096), 0.01, dtype=torch.bfloat16)
    mask, rewards = torch.ones(1, 4096), torch.zeros(1)
    loss = oreo_policy_loss(torch.zeros_like(log_ratios), log_ratios, rewards, mask, 1.0, "response")
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx((4096 * log_ratios[0, 0].item()) ** 2, rel=1e-5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"values": torch.zeros(2, 4)}, "`values` has shape"),
        ({"rewards": torch.zeros(2, 3)}, "`rewards` has shape"),
        ({"action_mask": torch.ones(3)}, "`action_mask` has shape"),
        ({"level": "turn"}, "is unknown"),
        ({"level": "step"}, "no `step_ids`"),
        ({"level": "step", "step_ids": torch.tensor([[0, 1, 0], [0, 0, 0]])}, "decreases"),
        ({"level": "step", "step_ids": torch.zeros(2, 3)}, "integers"),
    ],
)
def test_wrong_arguments_are_refused(change, message):
    arguments = {"values": torch.zeros(2, 3), "log_ratios": torch.zeros(2, 3), "rewards": torch.zeros(2)}
    arguments |= {"action_mask": torch.ones(2, 3), "beta": 0.1}
    assert oreo_policy_loss(**arguments) == 0
    with pytest.raises(ValueError, match=message):
        oreo_policy_loss(**(arguments | change))


def test_step_ids_may_decrease_where_the_mask_is_empty():
    ids = torch.tensor([[5, 0, 5, 9]])
    mask = torch.tensor([[1, 0, 1, 1]])
    log_ratios = torch.tensor([[1.0, 99.0, 2.0, 4.0]])
    loss = oreo_policy_loss(torch.zeros(1, 4), log_ratios, torch.zeros(1), mask, 1.0, "step", ids)
    assert loss.item() == (7**2 + 4**2) / 2  # {1, 2} is one step across the observation, {4} another
