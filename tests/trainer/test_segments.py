"""Training on trajectories that are more than one token sequence: the equations, segment by segment."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from datasets import Dataset

from tests.support import save_tiny
from tests.trainer import test_dqo_trainer, test_oreo_trainer
from tests.trainer.helpers import batch_loss, dpo_config, kto_config, move, reference_model, token_logps
from tests.trainer.value_helpers import make_trainer, whole_batch
from trl_multiturn import DQOTrainer, MultiTurnDPOTrainer, MultiTurnKTOTrainer
from trl_multiturn.packing.sequences import sequences_of
from trl_multiturn.segments import RowBuilder, split_segments


def tokens(count: int, seed: int) -> list[int]:
    return torch.randint(60, 120, (count,), generator=torch.Generator().manual_seed(seed)).tolist()


def builder(prompt: list[int], seed: int) -> RowBuilder:
    """Two turns; one after most of the history was rewritten; one after nothing but a summary; one that goes on."""
    row = RowBuilder()
    first, summary = tokens(6, seed), tokens(9, seed + 5)
    row.add(prompt, first)
    row.add(prompt + first + tokens(3, seed + 1), tokens(4, seed + 2))
    row.add(prompt + first[:2] + tokens(3, seed + 3), tokens(5, seed + 4))
    row.add(summary, tokens(3, seed + 6))
    row.add(summary + tokens(3, seed + 6) + tokens(2, seed + 7), tokens(4, seed + 8))
    assert len(row.branches) == 2
    return row


def side(row: RowBuilder, name: str, mask: str, branches: str) -> dict:
    start = row.prompt_length
    return {
        "prompt_ids": row.ids[:start],
        name: row.ids[start:],
        mask: row.action_mask[start:],
        branches: row.branches,
    }


def pairs(n: int = 3) -> Dataset:
    rows = []
    for number in range(n):
        prompt = tokens(12 + number, 100 + number)
        row = side(builder(prompt, 10 * number), "chosen_ids", "chosen_action_mask", "chosen_branches")
        plain = {"rejected_ids": tokens(8, 50 + number), "rejected_action_mask": [1, 1, 0, 0, 1, 1, 1, 1]}
        if number:
            plain |= side(
                builder(prompt, 10 * number + 40), "rejected_ids", "rejected_action_mask", "rejected_branches"
            )
        rows.append({"rejected_branches": [], **row, **plain})
    return Dataset.from_list(rows)


def trajectories(n: int = 4, **columns: list) -> Dataset:
    rows = []
    for number in range(n):
        row = builder(tokens(12 + number, 100 + number // 2), 10 * number)
        rows.append(side(row, "completion_ids", "action_mask", "branches"))
        rows[-1] |= {"reward": [1.0, 0.0, 0.25, -0.5][number % 4], "label": number % 2 == 0}
    dataset = Dataset.from_list(rows)
    for name, values in columns.items():
        dataset = dataset.add_column(name, values)
    return dataset


def segment_logps(model, row, ids, mask, branches) -> torch.Tensor:
    """Log-probabilities of all sampled tokens of a row, in the order of time: one pass per segment."""
    segments = split_segments(row["prompt_ids"], row[ids], row[mask], row.get(branches) or ())
    return torch.cat([token_logps(model, s.context_ids, s.completion_ids, s.action_mask) for s in segments])


def log_ratios(trainer, reference) -> torch.Tensor:
    """`(2, rows)`: chosen, rejected."""
    sums = []
    for name in ("chosen", "rejected"):
        columns = f"{name}_ids", f"{name}_action_mask", f"{name}_branches"
        for row in trainer.train_dataset:
            with torch.no_grad():
                ref = segment_logps(reference, row, *columns).double()
            sums.append((segment_logps(trainer.model, row, *columns).double() - ref).sum())
    return torch.stack(sums).view(2, -1)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_tiny(tmp_path_factory.mktemp("policy"))


def dpo(folder, tmp_path, dataset=None, **kwargs):
    args = dpo_config(tmp_path, beta=0.2, **kwargs)
    trainer = MultiTurnDPOTrainer(folder, args=args, train_dataset=pairs() if dataset is None else dataset)
    move(trainer.model)
    return trainer


PACKED = pytest.mark.parametrize("packed", [True, False])


@PACKED
@pytest.mark.parametrize("precompute", [False, True])
def test_m_dpo_sums_over_segments(folder, tmp_path, packed, precompute):
    trainer = dpo(folder, tmp_path, packed=packed, precompute_ref_log_probs=precompute)
    loss = batch_loss(trainer)
    chosen, rejected = log_ratios(trainer, reference_model(folder))
    assert loss.item() == pytest.approx(-F.logsigmoid(0.2 * (chosen - rejected)).mean().item(), rel=1e-5)


@PACKED
def test_the_gradient_is_that_of_the_sum_over_segments(folder, tmp_path, packed):
    trainer = dpo(folder, tmp_path, packed=packed)
    batch_loss(trainer).backward()
    gradients = {name: p.grad.clone() for name, p in trainer.model.named_parameters()}
    trainer.model.zero_grad()
    chosen, rejected = log_ratios(trainer, reference_model(folder))
    (-F.logsigmoid(0.2 * (chosen - rejected)).mean()).backward()
    norm = torch.stack([p.grad.norm() for p in trainer.model.parameters()]).norm()
    for name, parameter in trainer.model.named_parameters():
        assert (gradients[name] - parameter.grad).norm() < 1e-4 * norm, name


@PACKED
@pytest.mark.parametrize(
    "loss", [dict(loss_type=["sft"]), dict(loss_type=["ipo"]), dict(loss_type=["sigmoid", "sft"]), dict(ld_alpha=0.5)]
)
def test_means_and_cuts_count_sampled_tokens(folder, tmp_path, packed, loss):
    """Losses that count tokens see those that were sampled, over all segments, and no context that is read again."""
    trainer = dpo(folder, tmp_path, packed=packed, **loss)
    value, reference = batch_loss(trainer).item(), reference_model(folder)
    logps = {}
    for name in ("chosen", "rejected"):
        columns = f"{name}_ids", f"{name}_action_mask", f"{name}_branches"
        with torch.no_grad():
            logps[name] = [
                [segment_logps(model, row, *columns).double() for model in (trainer.model, reference)]
                for row in trainer.train_dataset
            ]
    count = [[len(policy) for policy, _ in logps[name]] for name in logps]
    nll = -torch.cat([policy for policy, _ in logps["chosen"]]).mean()
    if "ld_alpha" in loss:
        kept = [min(both) for both in zip(*count, strict=True)]
        cut = [
            torch.stack([(p - r)[:k].sum() + 0.5 * (p - r)[k:].sum() for (p, r), k in zip(rows, kept, strict=True)])
            for rows in logps.values()
        ]
        expected = -F.logsigmoid(0.2 * (cut[0] - cut[1])).mean()
    else:
        ratios = [torch.stack([(p - r).sum() for p, r in rows]) for rows in logps.values()]
        means = [ratio / torch.tensor(n) for ratio, n in zip(ratios, count, strict=True)]
        expected = {
            ("sft",): nll,
            ("ipo",): ((means[0] - means[1] - 1 / (2 * 0.2)) ** 2).mean(),
            ("sigmoid", "sft"): -F.logsigmoid(0.2 * (ratios[0] - ratios[1])).mean() + nll,
        }[tuple(loss["loss_type"])]
    assert value == pytest.approx(expected.item(), rel=1e-5)


@PACKED
def test_a_margin_and_segments(folder, tmp_path, packed):
    trainer = dpo(folder, tmp_path, pairs().add_column("margin", [0.5, -1.0, 0.25]), packed=packed)
    chosen, rejected = log_ratios(trainer, reference_model(folder))
    margin = torch.tensor([0.5, -1.0, 0.25])
    expected = -F.logsigmoid(0.2 * (chosen - rejected) + margin).mean().item()
    assert batch_loss(trainer).item() == pytest.approx(expected, rel=1e-5)


@PACKED
def test_m_kto_and_its_kl_sum_over_segments(folder, tmp_path, packed):
    """A mismatched completion is read behind the other prompt in every segment that reads the prompt."""
    args = kto_config(tmp_path, beta=0.2, packed=packed, per_device_train_batch_size=4)
    trainer = MultiTurnKTOTrainer(folder, args=args, train_dataset=trajectories())
    move(trainer.model)
    loss = batch_loss(trainer)
    reference, rows = reference_model(folder), list(trainer.train_dataset)
    ratios, mismatched = [], []
    for number, row in enumerate(rows):
        ratios.append(difference(trainer.model, reference, row))
        first, middle, last = split_segments(*(rows[number - 1][c] for c in COLUMNS))
        own = len(rows[number - 1]["prompt_ids"])
        other = {"prompt_ids": row["prompt_ids"], "completion_ids": first.completion_ids}
        mismatched.append(difference(trainer.model, reference, other | {"action_mask": first.action_mask}))
        for segment, context in (
            (middle, row["prompt_ids"] + middle.context_ids[own:]),
            (last, last.context_ids),
        ):
            plain = {"prompt_ids": context, "completion_ids": segment.completion_ids}
            mismatched[-1] = mismatched[-1] + difference(
                trainer.model, reference, plain | {"action_mask": segment.action_mask}
            )
    u, z = torch.stack(ratios), torch.stack(mismatched).mean().clamp(min=0)
    good = torch.tensor([row["label"] for row in rows])
    expected = torch.where(good, 1 - F.sigmoid(0.2 * (u - z)), 1 - F.sigmoid(0.2 * (z - u))).mean()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)


COLUMNS = "prompt_ids", "completion_ids", "action_mask", "branches"


def difference(model, reference, row) -> torch.Tensor:
    with torch.no_grad():
        both = [segment_logps(m, row, *COLUMNS[1:]).double() for m in (model, reference)]
    return (both[0] - both[1]).sum()


# Each level, each value model, and both ways of computing; not all of their combinations
VALUE_CASES = [
    ("token", "full", False, True),
    ("step", "full", False, True),
    ("response", "full", False, True),
    ("step", "full", False, False),
    ("response", "adapter", True, True),
    ("token", "head", False, True),
]


@pytest.mark.parametrize(("level", "value_model", "lora", "packed"), VALUE_CASES)
def test_oreo_runs_through_the_segments(tmp_path, level, value_model, lora, packed):
    """Time runs on from segment to segment; values are those of the states in which tokens were sampled."""
    trainer = make_trainer(
        tmp_path, dataset=trajectories(), level=level, value_model=value_model, lora=lora, packed=packed, kl_coef=0.7
    )
    loss = trainer.compute_loss(trainer.model, whole_batch(trainer))
    value_loss, policy_loss, kl = test_oreo_trainer.reference_losses(trainer, level)
    assert loss.item() == pytest.approx(value_loss + policy_loss + 0.7 * kl, rel=1e-5)


@pytest.mark.parametrize(("horizon", "packed"), [("token", True), ("turn", True), ("response", True), ("turn", False)])
def test_dqo_runs_through_the_segments(tmp_path, horizon, packed):
    rows = trajectories(turn_rewards=[[0.5, 0.0, 0.25, 0.0, -0.5]] * 4)
    trainer = make_trainer(
        tmp_path,
        DQOTrainer,
        rows,
        value_model="full",
        horizon=horizon,
        lam=0.9,
        importance_weights=False,
        packed=packed,
    )
    loss = trainer.compute_loss(trainer.model, whole_batch(trainer))
    expected = sum(test_dqo_trainer.reference_losses(trainer, horizon, 0.9, weighted=False))
    assert loss.item() == pytest.approx(expected, rel=1e-5)


def test_reference_columns_are_those_of_the_segments(tmp_path):
    trainer = make_trainer(tmp_path, dataset=trajectories(), kl_coef=0.0, precompute_ref_log_probs=True)
    for row in trainer.train_dataset:
        expected = segment_logps(reference_model(f"{tmp_path}/model"), row, *COLUMNS[1:])
        sampled = [logp for logp, bit in zip(row["ref_logps"], row["action_mask"], strict=True) if bit]
        torch.testing.assert_close(torch.tensor(sampled), expected, atol=1e-5, rtol=1e-5)


def cut(row: dict) -> dict:
    """A plain row as one segment per turn, each with all of its context: sequences that extend one another."""
    ids, mask = row["prompt_ids"] + row["completion_ids"], [0] * len(row["prompt_ids"]) + row["action_mask"]
    sampled = [t for t, bit in enumerate(mask) if bit and not mask[t - 1]]
    cut_ids, cut_mask, branches = ids[: sampled[1]], mask[: sampled[1]], []
    for start, stop in zip(sampled[1:], [*sampled[2:], len(ids)], strict=True):
        branches.append([len(cut_ids), -1])
        cut_ids = cut_ids + ids[:stop]
        cut_mask = cut_mask + [0] * start + mask[start:stop]
    start = len(row["prompt_ids"])
    columns = {"completion_ids": cut_ids[start:], "action_mask": cut_mask[start:], "branches": branches}
    return row | columns


@PACKED
@pytest.mark.parametrize("cls", ["oreo", "dqo"])
def test_segments_that_extend_one_another_are_the_uncut_trajectory(tmp_path, cls, packed):
    mask = [1] * 5 + [0] * 3 + [1] * 6 + [0] * 2 + [1] * 4
    whole = [
        {"prompt_ids": tokens(9 + i, i), "completion_ids": tokens(20, 30 + i), "action_mask": mask, "reward": float(i)}
        for i in range(3)
    ]
    steps = []
    for rows in (whole, list(map(cut, whole))):
        settings = {
            "value_model": "full",
            "packed": packed,
            **({"cls": DQOTrainer} if cls == "dqo" else {"kl_coef": 0.5}),
        }
        trainer = make_trainer(tmp_path, dataset=Dataset.from_list(rows), **settings)
        loss = trainer.compute_loss(trainer.model, whole_batch(trainer))
        loss.backward()
        steps.append((loss.detach(), {n: p.grad for n, p in trainer.model.named_parameters() if p.grad is not None}))
        unique = [forward.last_plan for forward in trainer._packed_forwards[:1]]
    torch.testing.assert_close(steps[1][0], steps[0][0], atol=1e-6, rtol=1e-6)
    for name, gradient in steps[0][1].items():
        torch.testing.assert_close(steps[1][1][name], gradient, atol=2e-6, rtol=1e-4, msg=name)
    if packed:  # the shared prefixes are computed once
        assert len(unique[0].row) == sum(len(row["prompt_ids"] + row["completion_ids"]) for row in whole)


def test_a_long_row_loses_whole_segments_from_its_front(folder, tmp_path):
    before = list(trajectories())
    args = kto_config(tmp_path, loss_type="apo_zero_unpaired", max_length=45)
    trainer = MultiTurnKTOTrainer(folder, args=args, train_dataset=trajectories())
    assert trainer.row_statistics["data/rows_cut_at_segment"] == 4
    for row, old in zip(trainer.train_dataset, before, strict=True):
        segments, whole = (split_segments(*(each[c] for c in COLUMNS)) for each in (row, old))
        assert segments == whole[1:]
        assert len(row["prompt_ids"]) + len(row["completion_ids"]) <= 45


@pytest.mark.parametrize("side_length", [30, 45])
def test_a_long_side_of_a_pair_loses_its_front_and_the_other_stays(folder, tmp_path, side_length):
    trainer = dpo(folder, tmp_path, pairs().select([0]), max_length=side_length)
    (row,), old = trainer.train_dataset, pairs()[0]
    kept = split_segments(*(row[c] for c in ("prompt_ids", "chosen_ids", "chosen_action_mask")),
                          row.get("chosen_branches") or ())  # fmt: skip
    whole = split_segments(*(old[c] for c in ("prompt_ids", "chosen_ids", "chosen_action_mask", "chosen_branches")))
    assert [(s.context_ids + s.completion_ids) for s in kept] == [
        (s.context_ids + s.completion_ids) for s in whole[-len(kept) :]
    ]
    assert row["prompt_ids"] + row["rejected_ids"] == old["prompt_ids"] + old["rejected_ids"]
    assert sum(row["rejected_action_mask"]) == sum(old["rejected_action_mask"])


def test_returns_of_later_states_do_not_depend_on_dropped_segments(tmp_path):
    """Of a long trajectory the last segments train, towards the same return."""
    rows = trajectories(turn_rewards=[[0.5, 0.0, 0.25, 0.0, -0.5]] * 4)
    trainer = make_trainer(tmp_path, DQOTrainer, rows, value_model="head", max_length=45)
    row = trainer.train_dataset[0]
    paid = [reward for reward, bit in zip(row["token_rewards"], row["action_mask"], strict=True) if bit]
    assert paid == [0.0] * 4 + [0.25] + [0.0] * 6 + [0.5]
    assert trainer.row_statistics["data/rows_cut_at_segment"] == 4


def test_a_batch_that_was_moved_is_the_batch(tmp_path):
    """Under DDP without a GPU TRL's KTO moves each batch to `cpu:0`, which copies it."""
    trainer = make_trainer(tmp_path, dataset=trajectories(), value_model="head")
    earlier, batch = (trainer.note_branches(whole_batch(trainer)) for _ in range(2))
    assert torch.equal(earlier["input_ids"], batch["input_ids"])
    moved = batch["input_ids"].to("cpu:0")
    assert moved is not batch["input_ids"] and sequences_of(moved) is sequences_of(batch["input_ids"])
    assert sequences_of(moved + 1) is None


def test_all_tokens_of_several_segments_cannot_be_trained(folder, tmp_path):
    with pytest.raises(ValueError, match="Row 0: the trajectory is more than one token sequence"):
        dpo(folder, tmp_path, mask_observations=False)


@PACKED
def test_parts_of_a_batch_have_its_gradient(tmp_path, packed):
    weights = []
    for budget in (None, 60):
        trainer = make_trainer(
            tmp_path, dataset=trajectories(), value_model="full", packed=packed, max_tokens_per_batch=budget,
            per_device_train_batch_size=4, max_steps=1, optim="sgd", max_grad_norm=0.0, value_max_grad_norm=0.0,
        )  # fmt: skip
        trainer.train()
        weights.append({name: p.detach().clone() for name, p in trainer.model.named_parameters()})
    for name, expected in weights[0].items():
        torch.testing.assert_close(weights[1][name], expected, atol=2e-6, rtol=1e-4, msg=name)
