"""M-DPO's numbers against the equations, written out one row at a time without padding or a fused head."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from datasets import Dataset
from trl import DPOTrainer

from tests.support import byte_tokenizer, save_tiny
from tests.trainer.helpers import (
    batch_loss,
    batch_of,
    dpo_config,
    logged,
    move,
    one_turn_dataset,
    pair_log_ratios,
    preference_dataset,
    reference_model,
    token_logps,
)
from trl_multiturn.trainer import MultiTurnDPOTrainer


BETA = 0.2


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_tiny(tmp_path_factory.mktemp("policy"))


def make(folder, tmp_path, dataset=None, cls=MultiTurnDPOTrainer, **kwargs):
    kwargs = {"beta": BETA, **kwargs}
    dataset = preference_dataset() if dataset is None else dataset
    trainer = cls(folder, args=dpo_config(tmp_path, **kwargs), train_dataset=dataset)
    move(trainer.model)
    return trainer


def test_logged_loss_of_a_real_step_is_equation_12(folder, tmp_path):
    trainer = make(folder, tmp_path, per_device_train_batch_size=4, max_steps=1)
    with torch.no_grad():
        chosen, rejected = pair_log_ratios(trainer.model, reference_model(folder), trainer.train_dataset)
    trainer.train()
    assert logged(trainer, "loss")[0] == pytest.approx(
        -F.logsigmoid(BETA * (chosen - rejected)).mean().item(), rel=1e-5
    )
    assert logged(trainer, "rewards/chosen")[0] == pytest.approx(BETA * chosen.mean().item(), abs=1e-4)
    assert logged(trainer, "rewards/margins")[0] == pytest.approx(BETA * (chosen - rejected).mean().item(), abs=1e-4)


def test_gradient_is_that_of_equation_12(folder, tmp_path):
    trainer = make(folder, tmp_path)
    batch_loss(trainer).backward()
    written_out = reference_model(folder)
    written_out.load_state_dict(trainer.model.state_dict())
    chosen, rejected = pair_log_ratios(written_out, reference_model(folder), trainer.train_dataset)
    (-F.logsigmoid(BETA * (chosen - rejected)).mean()).backward()
    for (name, ours), theirs in zip(trainer.model.named_parameters(), written_out.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-3, atol=1e-5, msg=name)


def written_out(loss_type: str, c: torch.Tensor, r: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
    """The losses of TRL's documentation, of summed log-ratios `c`, `r` and trained lengths `(2, rows)`."""
    d, sigmoid, log = BETA * (c - r), torch.sigmoid, F.logsigmoid
    means = c / lengths[0] - r / lengths[1]
    eps = 0.1
    aot = torch.sort(c).values - torch.sort(r).values
    return {
        "sigmoid": lambda: -log(d),
        "hinge": lambda: torch.relu(1 - d),
        "ipo": lambda: (means - 1 / (2 * BETA)) ** 2,
        "robust": lambda: (-log(d) * (1 - eps) + log(-d) * eps) / (1 - 2 * eps),
        "exo_pair": lambda: sigmoid(d) * (log(d) - math.log(1 - eps)) + sigmoid(-d) * (log(-d) - math.log(eps)),
        "bco_pair": lambda: -log(BETA * c) - log(-BETA * r),
        "sppo_hard": lambda: (c - 0.5 / BETA) ** 2 + (r + 0.5 / BETA) ** 2,
        "nca_pair": lambda: -log(BETA * c) - 0.5 * log(-BETA * c) - 0.5 * log(-BETA * r),
        "aot_unpaired": lambda: -log(BETA * aot) * (1 - eps) - log(-BETA * aot) * eps,
        "apo_zero": lambda: 1 - sigmoid(BETA * c) + sigmoid(BETA * r),
        "apo_down": lambda: sigmoid(BETA * c) + 1 - sigmoid(d),
        "sigmoid_norm": lambda: -log(BETA * means),
    }[loss_type]().mean()


LOSSES = (
    "sigmoid hinge ipo robust exo_pair bco_pair sppo_hard nca_pair aot_unpaired apo_zero apo_down sigmoid_norm"
).split()


@pytest.mark.parametrize("loss_type", LOSSES)
def test_every_loss_sees_the_policys_tokens_only(folder, tmp_path, loss_type):
    smoothing = 0.1 if loss_type in ("robust", "exo_pair", "aot_unpaired") else 0.0
    trainer = make(folder, tmp_path, loss_type=[loss_type], label_smoothing=smoothing)
    rows = list(trainer.train_dataset)
    with torch.no_grad():
        chosen, rejected = pair_log_ratios(trainer.model, reference_model(folder), rows)
        lengths = torch.tensor([[float(sum(row[f"{s}_action_mask"])) for row in rows] for s in ("chosen", "rejected")])
        expected = written_out(loss_type, chosen, rejected, lengths)
        torch.testing.assert_close(batch_loss(trainer), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("loss_type", ["aot", "discopop"])
def test_remaining_losses_equal_stock_where_every_token_is_the_policys(folder, tmp_path, loss_type):
    rows = without_newline(make(folder, tmp_path, one_turn_dataset()).train_dataset)
    ours = make(folder, tmp_path, rows, loss_type=[loss_type])
    stock = make(folder, tmp_path, one_turn_dataset(), DPOTrainer, loss_type=[loss_type])
    stock_rows = rows.select_columns(["prompt_ids", "chosen_ids", "rejected_ids"])
    torch.testing.assert_close(batch_loss(ours), batch_loss(stock, stock_rows))


def without_newline(prepared: Dataset) -> Dataset:
    """One-turn token rows that end with the end-of-turn token."""
    columns = ["chosen_ids", "chosen_action_mask", "rejected_ids", "rejected_action_mask"]
    rows = [{"prompt_ids": row["prompt_ids"], **{name: row[name][:-1] for name in columns}} for row in prepared]
    assert all(set(row["chosen_action_mask"]) == {1} for row in rows)
    return Dataset.from_list(rows)


def test_nll_term_of_a_multi_loss(folder, tmp_path):
    trainer = make(folder, tmp_path, loss_type=["sigmoid", "sft"], loss_weights=[1.0, 0.5])
    rows = list(trainer.train_dataset)
    with torch.no_grad():
        chosen, rejected = pair_log_ratios(trainer.model, reference_model(folder), rows)
        columns = ("prompt_ids", "chosen_ids", "chosen_action_mask")
        nll = -torch.cat([token_logps(trainer.model, *(row[name] for name in columns)) for row in rows]).mean()
        expected = -F.logsigmoid(BETA * (chosen - rejected)).mean() + 0.5 * nll
        torch.testing.assert_close(batch_loss(trainer), expected, rtol=1e-4, atol=1e-5)


def test_ld_alpha_counts_the_policys_tokens(folder, tmp_path):
    trainer = make(folder, tmp_path, ld_alpha=0.5)
    with torch.no_grad():
        chosen, rejected = pair_log_ratios(trainer.model, reference_model(folder), trainer.train_dataset, alpha=0.5)
        torch.testing.assert_close(
            batch_loss(trainer), -F.logsigmoid(BETA * (chosen - rejected)).mean(), rtol=1e-4, atol=1e-5
        )


@pytest.mark.parametrize(
    ("divergence", "score"),
    [
        ("forward_kl", lambda u: 1 - torch.exp(-u)),
        ("js_divergence", lambda u: math.log(2) + F.logsigmoid(u)),
        ("alpha_divergence", lambda u: (torch.exp(-0.5 * u) - 1) / -0.5),
    ],
)
def test_f_divergences_see_the_policys_tokens_only(folder, tmp_path, divergence, score):
    trainer = make(folder, tmp_path, f_divergence_type=divergence, f_alpha_divergence_coef=0.5)
    with torch.no_grad():
        chosen, rejected = pair_log_ratios(trainer.model, reference_model(folder), trainer.train_dataset)
        expected = -F.logsigmoid(BETA * (score(chosen) - score(rejected))).mean()
        torch.testing.assert_close(batch_loss(trainer), expected, rtol=1e-3, atol=1e-5)


def test_wpo_weights_come_from_the_policys_tokens(folder, tmp_path):
    trainer = make(folder, tmp_path, use_weighting=True)
    rows = list(trainer.train_dataset)
    with torch.no_grad():
        chosen, rejected = pair_log_ratios(trainer.model, reference_model(folder), rows)
        weights = torch.stack(
            [wpo_weight(trainer.model, r, "chosen") * wpo_weight(trainer.model, r, "rejected") for r in rows]
        )
        expected = (-F.logsigmoid(BETA * (chosen - rejected)) * weights).mean()
        torch.testing.assert_close(batch_loss(trainer), expected, rtol=1e-4, atol=1e-6)


def wpo_weight(model, row, side) -> torch.Tensor:
    """exp of the mean over trained tokens of log π − log Σ π² (WPO, eq. 2)."""
    tokens = torch.tensor([row["prompt_ids"] + row[f"{side}_ids"]])
    logps = model(input_ids=tokens).logits[0, :-1].float().log_softmax(-1)
    mask = torch.tensor(([0] * len(row["prompt_ids"]) + row[f"{side}_action_mask"])[1:]).bool()
    own = logps.gather(-1, tokens[0, 1:, None])[:, 0]
    return (own - (2 * logps).logsumexp(-1))[mask].mean().exp()


def test_targets_are_the_policys_tokens(folder, tmp_path, monkeypatch):
    """What the model is asked to predict, decoded: calls and answers, no result, no header, no newline."""
    trainer = make(folder, tmp_path, preference_dataset(1), packed=False)
    targets = []
    forward = trainer.model.forward

    def recorded(*args, labels=None, **kwargs):
        targets.append(labels)
        return forward(*args, labels=labels, **kwargs)

    monkeypatch.setattr(trainer.model, "forward", recorded)
    batch_loss(trainer)
    decoded = [byte_tokenizer().decode(row[row != -100]) for row in targets[0]]
    call = '<tool_call>\n{"name": "add", "arguments": {"a": 0, "b": %d}}\n</tool_call><|im_end|>'
    assert decoded == [call % 0 + "It is 0.<|im_end|>", call % 1 + "No idea<|im_end|>"]


def test_relabelled_tool_text_changes_nothing(folder, tmp_path, monkeypatch):
    """Whatever the targets at positions of tool text are called, loss and gradients are the same bit for bit."""
    trainer = make(folder, tmp_path, packed=False)
    batch = batch_of(trainer)
    trained = torch.zeros_like(batch["input_ids"])
    for side, offset in (("chosen", 0), ("rejected", len(trainer.train_dataset))):
        for index, row in enumerate(trainer.train_dataset):
            mask = torch.tensor(row[f"{side}_action_mask"])
            trained[offset + index, len(row["prompt_ids"]) :][: len(mask)] = mask

    def run():
        trainer.model.zero_grad()
        loss = trainer.compute_loss(trainer.model, batch)
        loss.backward()
        return loss, [parameter.grad.clone() for parameter in trainer.model.parameters()]

    loss, gradients = run()
    forward = trainer.model.forward

    def relabelled(*args, input_ids=None, labels=None, **kwargs):
        # Targets from scratch: the trained tokens' own ids, and junk that the loss must not look at elsewhere
        junk = (input_ids + 7) % trainer.model.config.vocab_size
        targets = torch.where(trained.bool(), input_ids, torch.where(labels == -100, labels, junk))
        return forward(*args, input_ids=input_ids, labels=targets, **kwargs)

    monkeypatch.setattr(trainer.model, "forward", relabelled)
    again, regradients = run()
    assert torch.equal(loss, again)
    assert all(torch.equal(a, b) for a, b in zip(gradients, regradients, strict=True))


@pytest.mark.parametrize("precompute", [False, True])
def test_margin_is_added_inside_sigma(folder, tmp_path, precompute):
    margins = [0.5, -1.0, 0.0, 2.0]
    dataset = preference_dataset(4, margin=margins)
    trainer = make(folder, tmp_path, dataset, precompute_ref_log_probs=precompute)
    with torch.no_grad():
        chosen, rejected = pair_log_ratios(trainer.model, reference_model(folder), trainer.train_dataset)
        expected = -F.logsigmoid(BETA * (chosen - rejected) + torch.tensor(margins)).mean()
        torch.testing.assert_close(batch_loss(trainer), expected, rtol=1e-4, atol=1e-5)
    metrics = trainer._metrics["train" if trainer.model.training else "eval"]
    assert metrics["rewards/margins"][-1] == pytest.approx(BETA * (chosen - rejected).mean().item(), abs=1e-4)
    assert metrics["rewards/rejected"][-1] == pytest.approx(BETA * rejected.mean().item(), abs=1e-4)
    assert trainer.precompute_ref_logps is precompute


def test_margin_needs_a_loss_that_has_one(folder, tmp_path):
    trainer = make(folder, tmp_path, preference_dataset(4, margin=[0.1] * 4), loss_type=["ipo"])
    with pytest.raises(ValueError, match="The rows have a `margin`"):
        batch_loss(trainer)


def test_one_turn_loss_is_stock_but_for_the_newline(folder, tmp_path):
    ours = make(folder, tmp_path, one_turn_dataset())
    stock = make(folder, tmp_path, one_turn_dataset(), DPOTrainer)
    for mine, theirs in zip(ours.train_dataset, stock.train_dataset, strict=True):
        for side in ("chosen", "rejected"):
            assert mine["prompt_ids"] == theirs["prompt_ids"] and mine[f"{side}_ids"] == theirs[f"{side}_ids"]
            assert mine[f"{side}_action_mask"] == [1] * (len(mine[f"{side}_ids"]) - 1) + [0]
    torch.testing.assert_close(batch_loss(ours, with_full_masks(ours.train_dataset)), batch_loss(stock))


def test_mask_observations_false_is_stock_dpo_on_trajectories(folder, tmp_path):
    dataset = preference_dataset()
    ours = make(folder, tmp_path, dataset, mask_observations=False)
    stock = make(folder, tmp_path, dataset, DPOTrainer)
    torch.testing.assert_close(batch_loss(ours), batch_loss(stock))


def with_full_masks(prepared: Dataset) -> Dataset:
    return prepared.map(lambda row: {f"{s}_action_mask": [1] * len(row[f"{s}_ids"]) for s in ("chosen", "rejected")})


class LogisticLoss(MultiTurnDPOTrainer):
    """DPO once more, as a user would write it."""

    def loss(self, batch):
        return -F.logsigmoid(batch.beta * (batch.chosen_log_ratios - batch.rejected_log_ratios)).mean()


class LengthNormalizedLoss(MultiTurnDPOTrainer):
    """SimPO's kind: mean log-probabilities of the sampled tokens, no reference."""

    def loss(self, batch):
        chosen = batch.chosen_logps.sum(dim=1) / batch.chosen_mask.sum(dim=1)
        rejected = batch.rejected_logps.sum(dim=1) / batch.rejected_mask.sum(dim=1)
        return -F.logsigmoid(batch.beta * (chosen - rejected) - 0.5).mean()


@pytest.mark.parametrize("settings", [{}, {"packed": True}, {"precompute_ref_log_probs": True}, {"packed": False}])
def test_a_loss_of_the_users_own_is_a_method(folder, tmp_path, settings):
    trainers = [
        make(folder, tmp_path / cls.__name__, cls=cls, **settings) for cls in (MultiTurnDPOTrainer, LogisticLoss)
    ]
    for trainer in trainers:
        trainer.train()
    for key in ("loss", "grad_norm", "rewards/margins", "rewards/accuracies", "logps/chosen"):
        stock, own = (logged(trainer, key) for trainer in trainers)
        assert own == pytest.approx(stock, rel=1e-4, abs=1e-5), key


def test_a_loss_of_the_users_own_reads_tokens_and_masks(folder, tmp_path):
    trainer = make(folder, tmp_path, cls=LengthNormalizedLoss)
    move(trainer.model)
    expected = []
    for row in trainer.train_dataset:
        sides = []
        for side in ("chosen", "rejected"):
            ids, mask = row[f"{side}_ids"], row[f"{side}_action_mask"]
            sides.append(token_logps(trainer.model, row["prompt_ids"], ids, mask).sum() / sum(mask))
        expected.append(-F.logsigmoid(BETA * (sides[0] - sides[1]) - 0.5))
    assert batch_loss(trainer).item() == pytest.approx(torch.stack(expected).mean().item(), rel=1e-4)
