"""The packed row on a GPU: kernels against the dense definition, and every family against its padded batch."""

from __future__ import annotations

import pytest
import torch

from tests.packing.families import FAMILIES, branching_batch, tiny
from tests.packing.test_attention import a_row, tensors, tree_attention
from tests.packing.test_forward import assert_same, run
from trl_multiturn._upstream import add_fused_lm_head
from trl_multiturn.packing import varlen as varlen_module
from trl_multiturn.packing.attention import packed_attention
from trl_multiturn.packing.forward import PackedForward
from trl_multiturn.packing.row import PackedRow
from trl_multiturn.packing.scored_head import FIELDS


pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


class OnAnyDevice(torch.nn.Module):
    is_causal = True


def on_cuda(row: PackedRow) -> PackedRow:
    return PackedRow(
        row.input_ids.cuda(),
        row.position_ids.cuda(),
        row.parents.cuda(),
        row.cells.cuda(),
        row.chunks,
        row.segment_lengths,
        row.raw_tokens,
    )


@pytest.fixture
def kernel_calls(monkeypatch):
    """How often a variable-length kernel ran."""
    calls, kernel = [], varlen_module._torch_varlen

    def counted(*args):
        calls.append(args[5])
        return kernel(*args)

    monkeypatch.setattr(varlen_module, "_torch_varlen", counted)
    return calls


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("window", [None, 1, 7, 1000])
def test_each_token_sees_its_own_path(window, dtype):
    """Half precision may round as the kernel does; a wrong token or window is off by a hundred times that."""
    row = a_row()
    rounded = [x.detach().to(dtype) for x in tensors(row)]
    theirs = [x.clone().float().requires_grad_() for x in rounded]
    ours = [x.cuda().requires_grad_() for x in rounded]
    expected = tree_attention(*theirs, row, window, None)
    output = packed_attention(OnAnyDevice(), *ours, on_cuda(row), 0.3, sliding_window=window)
    tolerance = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 3e-3}[dtype]
    torch.testing.assert_close(output.cpu().float(), expected, atol=tolerance, rtol=tolerance)
    weights = torch.randn(output.shape, generator=torch.Generator().manual_seed(1))
    (output * weights.cuda()).sum().backward()
    (expected * weights).sum().backward()
    for a, b in zip(ours, theirs, strict=True):
        # With a window of one token there is nothing to weigh, so scores have no gradient
        assert (a.grad.cpu().float() - b.grad).norm() <= tolerance * b.grad.norm() + 1e-5


def on_gpu(family: str):
    model = tiny(family).cuda()
    add_fused_lm_head(model, outputs=("log_probs", *FIELDS))
    return model, {name: x.cuda() for name, x in branching_batch().items()}


@pytest.fixture(autouse=True)
def weights_on_the_gpu(monkeypatch):
    """`test_forward.run` draws its weights on the CPU."""
    from tests.packing import test_forward

    drawn = test_forward.weights_of
    monkeypatch.setattr(test_forward, "weights_of", lambda batch: drawn(batch).to(batch["input_ids"].device))


@pytest.mark.parametrize("family", FAMILIES)
def test_float32_equals_the_padded_batch(family):
    model, batch = on_gpu(family)
    stock = run(model, batch)
    forward = PackedForward(model, fields=FIELDS, pack=True).install()
    ours = run(model, batch)
    assert forward.calls == {"packed": 1, "padded": 0}
    assert_same(ours, stock, atol=1e-4)


@pytest.mark.parametrize("family", [name for name in FAMILIES if "moe" not in name and name != "mixtral"])
def test_bfloat16_is_as_close_to_float32_as_the_padded_batch(family, kernel_calls):
    """Experts are left out: rounding sends a token to another expert, packed or not."""
    model, batch = on_gpu(family)
    exact = run(model, batch)
    with torch.autocast("cuda", torch.bfloat16):
        stock = run(model, batch)
        PackedForward(model, fields=FIELDS, pack=True).install()
        ours = run(model, batch)
    if family != "gemma2":  # soft-capped scores, which PyTorch's kernel does not know
        assert len(kernel_calls) == model.config.num_hidden_layers
    distance = {}
    for name, result in (("stock", stock), ("ours", ours)):
        scores = (result[0].log_probs.float() - exact[0].log_probs).norm() / exact[0].log_probs.norm()
        norm = torch.stack([g.norm() for g in exact[1].values()]).norm()
        gradients = torch.stack([(result[1][n] - g).norm() for n, g in exact[1].items()]).norm() / norm
        distance[name] = torch.stack([scores, gradients])
    assert (distance["ours"] <= 1.5 * distance["stock"] + 1e-3).all(), distance
