"""M-KTO: the equation with masks on completions and on the KL rows, and every option of `KTOTrainer`."""

from __future__ import annotations

import inspect

import pytest
import torch
from datasets import Dataset, IterableDataset, load_from_disk
from peft import LoraConfig
from trl import KTOConfig, KTOTrainer

from tests.support import TOOLS, byte_tokenizer, preference_rows, save_tiny, tiny_model
from tests.trainer.helpers import (
    batch_loss,
    batch_of,
    kto_config,
    log_ratio,
    logged,
    move,
    one_turn_dataset,
    preference_dataset,
    reference_model,
    unpaired_dataset,
)
from trl_multiturn.data import tokenize_trajectory
from trl_multiturn.data.collators import DataCollatorForMultiTurnUnpairedPreference
from trl_multiturn.trainer import MultiTurnKTOTrainer


BETA = 0.2
LORA = LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
TOKEN_COLUMNS = ["prompt_ids", "completion_ids", "action_mask", "label"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_tiny(tmp_path_factory.mktemp("policy"))


def make(folder, tmp_path, dataset=None, cls=MultiTurnKTOTrainer, **kwargs):
    passed = {key: kwargs.pop(key) for key in ("peft_config", "eval_dataset") if key in kwargs}
    dataset = unpaired_dataset() if dataset is None else dataset
    args = kto_config(tmp_path, **{"beta": BETA, "per_device_train_batch_size": 4, **kwargs})
    return cls(folder, args=args, train_dataset=dataset, **passed)


def written_out(model, reference, rows, desirable=1.0, undesirable=1.0, kl=True):
    """Equation 13 with the temperature applied once, over one batch whose completions rotate by one."""
    losses, mismatched = [], []
    for index, row in enumerate(rows):
        other = rows[index - 1]
        mismatched.append(
            log_ratio(model, reference, row["prompt_ids"], other["completion_ids"], other["action_mask"]).detach()
        )
    z0 = torch.stack(mismatched).mean().clamp(min=0) if kl else torch.tensor(0.0)
    for row in rows:
        u = log_ratio(model, reference, row["prompt_ids"], row["completion_ids"], row["action_mask"])
        sign, weight = (1, desirable) if row["label"] else (-1, undesirable)
        losses.append(weight * (1 - torch.sigmoid(sign * BETA * (u - z0))))
    return torch.stack(losses).mean(), z0


def assert_matches(trainer, reference, **kwargs):
    with torch.no_grad():
        expected, _ = written_out(trainer.model, reference, list(trainer.train_dataset), **kwargs)
        torch.testing.assert_close(batch_loss(trainer), expected, rtol=1e-4, atol=1e-5)


@pytest.fixture(scope="module")
def seed(folder, tmp_path_factory):
    """A seed for the policy's move at which the unclamped KL estimate is positive."""
    reference = reference_model(folder)
    rows = list(make(folder, tmp_path_factory.mktemp("seed")).train_dataset)
    for seed in range(50):
        model = reference_model(folder)
        move(model, seed=seed)
        with torch.no_grad():
            if written_out(model, reference, rows)[1] > 0.5:
                return seed
    pytest.fail("no move of the policy makes the KL estimate positive")


def test_logged_loss_of_a_real_step_is_equation_13(folder, tmp_path, seed):
    trainer = make(folder, tmp_path, max_steps=1)
    move(trainer.model, seed=seed)
    with torch.no_grad():
        expected, z0 = written_out(trainer.model, reference_model(folder), list(trainer.train_dataset))
    trainer.train()
    assert logged(trainer, "loss")[0] == pytest.approx(expected.item(), rel=1e-4)
    assert logged(trainer, "kl")[0] == pytest.approx(z0.item(), rel=1e-3) and z0 > 0


def test_gradient_does_not_pass_through_the_kl_estimate(folder, tmp_path, seed):
    trainer = make(folder, tmp_path)
    move(trainer.model, seed=seed)
    batch_loss(trainer).backward()
    model = reference_model(folder)
    model.load_state_dict(trainer.model.state_dict())
    written_out(model, reference_model(folder), list(trainer.train_dataset))[0].backward()
    for (name, ours), theirs in zip(trainer.model.named_parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-3, atol=1e-5, msg=name)


def test_weights_of_the_sides(folder, tmp_path, seed):
    trainer = make(folder, tmp_path, desirable_weight=1.5, undesirable_weight=0.5)
    move(trainer.model, seed=seed)
    assert_matches(trainer, reference_model(folder), desirable=1.5, undesirable=0.5)


def test_apo_zero_unpaired_has_no_kl_rows(folder, tmp_path):
    trainer = make(folder, tmp_path, loss_type="apo_zero_unpaired")
    assert not [name for name in trainer.train_dataset.column_names if name.startswith("KL_")]
    move(trainer.model)
    assert_matches(trainer, reference_model(folder), kl=False)


# Rows


def test_text_rows_become_token_rows_of_the_contract(folder, tmp_path):
    dataset = unpaired_dataset(2).add_column("tools", [TOOLS] * 2)
    trainer = make(folder, tmp_path, dataset)
    for row, text in zip(trainer.train_dataset, dataset, strict=True):
        expected = tokenize_trajectory(byte_tokenizer(), text["prompt"], text["completion"], tools=TOOLS)
        assert {name: row[name] for name in expected} == expected


def test_token_rows_and_their_kl_rows(folder, tmp_path):
    rows = {
        "prompt_ids": [[5], [6], [7]],
        "completion_ids": [[8, 9, 10], [11], [12, 13]],
        "action_mask": [[1, 0, 1], [1], [0, 1]],
        "label": [True, False, True],
        "behavior_logps": [[-1.0, 0.0, -2.0], [-1.0], [0.0, -1.0]],
    }
    trainer = make(folder, tmp_path, Dataset.from_dict(rows), per_device_train_batch_size=3)
    batch = batch_of(trainer)
    assert batch["completion_mask"].tolist() == [[0, 1, 0, 1], [0, 1, 0, 0], [0, 0, 1, 0]]
    # Ids and mask of the row before, together
    assert batch["KL_input_ids"].tolist()[0][:3] == [5, 12, 13]
    assert batch["KL_completion_mask"].tolist() == [[0, 0, 1, 0], [0, 1, 0, 1], [0, 1, 0, 0]]
    trainer.train()
    assert logged(trainer, "kl")[0] == 0


def test_pairs_give_alternating_labels_and_mismatched_kl_rows(folder, tmp_path):
    trainer = make(folder, tmp_path, preference_dataset(6), per_device_train_batch_size=4)
    rows = list(trainer.train_dataset)
    assert [row["label"] for row in rows] == [True, False] * 6
    prompts = [row["prompt_ids"] for row in make(folder, tmp_path, unpaired_dataset(6)).train_dataset]
    assert sorted((row["prompt_ids"], row["label"]) for row in rows) == sorted(
        (p, s) for p in prompts for s in (False, True)
    )
    for start in range(0, 12, 4):
        batch = rows[start : start + 4]
        for index, row in enumerate(batch):
            before = batch[index - 1]
            assert row["KL_completion_ids"] == before["completion_ids"]
            assert row["KL_action_mask"] == before["action_mask"]
            assert row["prompt_ids"] != before["prompt_ids"]


def test_last_batch_of_one_row_borrows_from_the_batch_before(folder, tmp_path):
    trainer = make(folder, tmp_path, unpaired_dataset(5), per_device_train_batch_size=2)
    rows = list(trainer.train_dataset)
    assert rows[4]["KL_completion_ids"] == rows[3]["completion_ids"]


def test_kl_rows_do_not_depend_on_the_number_of_processes(folder, tmp_path):
    kl = [
        make(folder, tmp_path, unpaired_dataset(8), dataset_num_proc=n).train_dataset["KL_completion_ids"][:]
        for n in (None, 2)
    ]
    assert kl[0] == kl[1]


def test_preparing_twice_changes_nothing(folder, tmp_path):
    trainer = make(folder, tmp_path)
    assert trainer.prepare_rows(trainer.train_dataset).to_dict() == trainer.train_dataset.to_dict()


def test_truncation_cuts_masks_of_kl_rows_too(folder, tmp_path):
    trainer = make(folder, tmp_path, max_length=150)
    batch = batch_of(trainer)
    assert batch["KL_input_ids"].shape[1] <= 150 and batch["input_ids"].shape[1] <= 150
    move(trainer.model)
    assert batch_loss(trainer).isfinite()


def test_one_turn_and_plain_rows_equal_stock_but_for_the_newline(folder, tmp_path):
    rows = one_turn_dataset(4)
    unpaired = Dataset.from_list(
        [{"prompt": r["prompt"], "completion": r["chosen"], "label": i % 2 == 0} for i, r in enumerate(rows)]
    )
    plain = Dataset.from_dict(
        {"prompt": ["a b", "c"] * 2, "completion": [" yes", " y", " no", " n"], "label": [True, False] * 2}
    )
    for dataset, newline in ((unpaired, True), (plain, False)):
        ours, stock = make(folder, tmp_path, dataset), make(folder, tmp_path, dataset, KTOTrainer)
        for trainer in (ours, stock):
            move(trainer.model)
        prepared = ours.train_dataset
        if newline:
            assert all(row["action_mask"] == [1] * (len(row["completion_ids"]) - 1) + [0] for row in prepared)
            prepared = prepared.map(
                lambda row: {
                    "action_mask": [1] * len(row["completion_ids"]),
                    "KL_action_mask": [1] * len(row["KL_completion_ids"]),
                }
            )
        torch.testing.assert_close(batch_loss(ours, prepared), batch_loss(stock))


def test_mask_observations_false_is_stock_kto_on_trajectories(folder, tmp_path):
    ours, stock = make(folder, tmp_path, mask_observations=False), make(folder, tmp_path, cls=KTOTrainer)
    for trainer in (ours, stock):
        move(trainer.model)
    torch.testing.assert_close(batch_loss(ours), batch_loss(stock))


# References and options


@pytest.mark.parametrize("on_disk", [False, True])
def test_precomputed_reference_equals_the_one_computed_on_the_fly(folder, tmp_path, on_disk, seed):
    dataset = unpaired_dataset()
    if on_disk:
        dataset.save_to_disk(tmp_path / "rows")
        dataset = load_from_disk(tmp_path / "rows")
    trainer = make(folder, tmp_path, dataset, precompute_ref_log_probs=True)
    assert trainer.ref_model is None
    move(trainer.model, seed=seed)
    assert_matches(trainer, reference_model(folder))


@pytest.mark.parametrize("lora", [False, True])
def test_rewards_restart_at_exactly_zero_after_a_reference_refresh(folder, tmp_path, lora):
    kwargs = {"peft_config": LORA} if lora else {}
    trainer = make(folder, tmp_path, precompute_ref_log_probs=True, max_steps=1, **kwargs)
    move(trainer.model)
    trainer.train_dataset = trainer.compute_reference_columns(trainer.train_dataset)
    trainer.train()
    for key in ("rewards/chosen", "rewards/rejected", "rewards/margins", "kl"):
        assert logged(trainer, key) == [0.0]
    assert logged(trainer, "loss") == [0.5]


def test_new_adapter(folder, tmp_path, seed):
    trainer = make(folder, tmp_path, peft_config=LORA)
    assert trainer.ref_model is None
    assert_matches(trainer, reference_model(folder))
    trainer.train()


def test_sync_ref_model(folder, tmp_path):
    trainer = make(folder, tmp_path, sync_ref_model=True, ref_model_sync_steps=1, ref_model_mixup_alpha=1.0)
    trainer.train()
    assert batch_loss(trainer).item() == pytest.approx(0.5, abs=1e-6)


def test_iterable_dataset_trains_like_a_map_style_one(folder, tmp_path):
    rows = list(unpaired_dataset(8))
    losses = []
    for dataset in (IterableDataset.from_generator(lambda: iter(rows)), unpaired_dataset(8)):
        trainer = make(folder, tmp_path, dataset)
        trainer.train()
        losses.append(logged(trainer, "loss"))
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_streamed_pairs(folder, tmp_path):
    rows = preference_rows(4)
    trainer = make(folder, tmp_path, IterableDataset.from_generator(lambda: iter(rows)))
    trainer.train()
    assert logged(trainer, "rewards/margins")  # every batch holds both labels


def test_dict_of_eval_sets_and_evaluate_on_new_rows(folder, tmp_path):
    evals = {"a": unpaired_dataset(4), "b": preference_dataset(2)}
    trainer = make(folder, tmp_path, eval_dataset=evals, eval_strategy="steps", eval_steps=2)
    trainer.train()
    assert len(logged(trainer, "eval_a_loss")) == 1 and len(logged(trainer, "eval_b_loss")) == 1
    assert 0 < trainer.evaluate(unpaired_dataset(4))["eval_loss"] < 1


def test_constructor_and_config_are_the_parents(folder, tmp_path):
    assert inspect.signature(MultiTurnKTOTrainer) == inspect.signature(KTOTrainer)
    tokenizer = byte_tokenizer()
    model, ref_model = tiny_model(tokenizer), tiny_model(tokenizer)
    args = kto_config(tmp_path, KTOConfig)
    trainer = MultiTurnKTOTrainer(model, ref_model, args, None, unpaired_dataset(), None, tokenizer)
    assert type(trainer.args) is KTOConfig
    assert type(trainer.data_collator) is DataCollatorForMultiTurnUnpairedPreference
    trainer.train()
    assert {"trl", "kto"} <= set(trainer.model.model_tags)


def test_unbalanced_labels_are_told(folder, tmp_path, caplog):
    rows = unpaired_dataset(6)
    with caplog.at_level("WARNING"):
        make(folder, tmp_path, rows.select([0, 2, 4, 1]))
    assert "3 desirable and 1 undesirable rows" in caplog.text and "about 0.33" in caplog.text
    caplog.clear()
    with caplog.at_level("WARNING"):
        make(folder, tmp_path, rows)
    assert "desirable and" not in caplog.text
