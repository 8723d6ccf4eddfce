from __future__ import annotations

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from trl_multiturn.losses import LMHead, full_vocab_kl, kl_loss


def setup(n=10, hidden=6, vocab=50, bias=True, dtype=torch.float64):
    torch.manual_seed(0)
    tensors = [torch.randn(n, hidden, dtype=dtype), torch.randn(vocab, hidden, dtype=dtype)]
    return [*tensors, torch.randn(vocab, dtype=dtype) if bias else None]


def dense_kl(hidden, weight, bias, ref_hidden, ref_weight, ref_bias, scale=1.0, softcap=None):
    """The textbook formula on whole `(N, V)` logits, through probabilities and torch's own KL."""

    def probs(h, w, b):
        logits = scale * (h @ w.T + (0 if b is None else b))
        logits = logits if softcap is None else softcap * (logits / softcap).tanh()
        return logits.exp() / logits.exp().sum(dim=-1, keepdim=True)

    pi = torch.distributions.Categorical(probs=probs(hidden, weight, bias))
    ref = torch.distributions.Categorical(probs=probs(ref_hidden, ref_weight, ref_bias))
    return torch.distributions.kl_divergence(pi, ref)


@pytest.mark.parametrize("chunk_size", [1, 3, 10, 1000])
@pytest.mark.parametrize("options", [{}, {"scale": 0.5}, {"softcap": 3.0}])
def test_value_and_gradients_equal_the_dense_formula(chunk_size, options):
    hidden, weight, bias = (x.requires_grad_() for x in setup())
    ref = [x + 0.3 * torch.randn_like(x) for x in setup()]
    upstream = torch.randn(10, dtype=torch.float64)
    kl = full_vocab_kl(hidden, LMHead(weight, bias, **options), ref[0], LMHead(ref[1], ref[2], **options), chunk_size)
    expected = dense_kl(hidden, weight, bias, *ref, **options)
    torch.testing.assert_close(kl, expected, rtol=1e-10, atol=1e-12)
    assert (kl > 0).all()
    actual = torch.autograd.grad((kl * upstream).sum(), [hidden, weight, bias])
    for a, b in zip(actual, torch.autograd.grad((expected * upstream).sum(), [hidden, weight, bias]), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)


def test_two_tokens_by_hand():
    # logits (log 3, 0) against (0, 0): 3/4 log(3/4 * 2) + 1/4 log(1/4 * 2)
    head = LMHead(torch.eye(2))
    kl = full_vocab_kl(torch.tensor([[3.0, 1.0]]).log(), head, torch.zeros(1, 2), head)
    assert kl.item() == pytest.approx(0.75 * torch.tensor(1.5).log().item() + 0.25 * torch.tensor(0.5).log().item())


def test_a_shared_head_gets_its_gradient_from_the_policys_side_only():
    hidden, weight, _ = setup(bias=False)
    ref_hidden = hidden + 0.5
    shared, own = weight.clone().requires_grad_(), weight.clone().requires_grad_()
    full_vocab_kl(hidden, LMHead(shared), ref_hidden, LMHead(shared)).sum().backward()
    full_vocab_kl(hidden, LMHead(own), ref_hidden, LMHead(weight)).sum().backward()
    assert own.grad.abs().sum() > 0
    torch.testing.assert_close(shared.grad, own.grad)


def test_a_token_of_probability_zero_adds_nothing():
    bias = torch.tensor([0.0, 0.0, float("-inf")])
    hidden = torch.zeros(1, 1, requires_grad=True)
    head = LMHead(torch.ones(3, 1), bias)
    for ref_bias in (bias, torch.zeros(3)):
        kl = full_vocab_kl(hidden, head, torch.zeros(1, 1), LMHead(torch.ones(3, 1), ref_bias))
        assert kl.item() == pytest.approx(0.0 if ref_bias is bias else torch.tensor(1.5).log().item())
        assert torch.autograd.grad(kl.sum(), hidden)[0].isfinite().all()


class LargestTensor(TorchDispatchMode):
    """Remembers the number of elements of the largest tensor that any operation returned."""

    numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (list, tuple)) else [out]:
            if isinstance(tensor, torch.Tensor):
                self.numel = max(self.numel, tensor.numel())
        return out


def test_no_tensor_of_all_positions_times_the_vocabulary_ever_exists():
    hidden, weight, _ = setup(n=64, vocab=500, bias=False, dtype=torch.float32)
    hidden.requires_grad_(), weight.requires_grad_()
    with LargestTensor() as largest:
        full_vocab_kl(hidden, LMHead(weight), hidden + 0.1, LMHead(weight), chunk_size=8).sum().backward()
    assert 8 * 500 <= largest.numel < 16 * 500  # of 64 * 500


def test_reduction_is_a_mean_over_actions_then_over_rows():
    kl = torch.tensor([[1.0, float("nan"), 3.0], [5.0, 7.0, float("inf")], [1.0, 1.0, 1.0]], requires_grad=True)
    mask = torch.tensor([[1, 0, 1], [1, 0, 0], [0, 0, 0]])
    loss = kl_loss(kl, mask)
    assert loss.item() == pytest.approx((2 + 5 + 0) / 3)
    loss.backward()
    assert kl.grad.tolist() == [pytest.approx(row) for row in [[1 / 6, 0, 1 / 6], [1 / 3, 0, 0], [0, 0, 0]]]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((torch.zeros(2, 3, 4), LMHead(torch.zeros(5, 4)), torch.zeros(2, 3, 4), LMHead(torch.zeros(5, 4))), "shape"),
        (
            (torch.zeros(2, 4), LMHead(torch.zeros(5, 4)), torch.zeros(3, 4), LMHead(torch.zeros(5, 4))),
            "same positions",
        ),
        ((torch.zeros(2, 4), LMHead(torch.zeros(5, 4)), torch.zeros(2, 4), LMHead(torch.zeros(6, 4))), "vocabulary"),
    ],
)
def test_wrong_arguments_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        full_vocab_kl(*arguments)
