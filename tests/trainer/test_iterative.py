"""Epochs whose rows arrive one by one: exactly one pass over each, whatever their number."""

from __future__ import annotations

import pytest
import torch
from datasets import Dataset
from transformers import TrainerCallback

from tests.support import byte_tokenizer, tiny_model
from trl_multiturn.trainer import MultiTurnDPOConfig, MultiTurnDPOTrainer, MultiTurnKTOConfig, MultiTurnKTOTrainer


def preference_rows(n: int, first: int = 0) -> Dataset:
    """Pairs whose prompt names the row: token `10 + row`."""
    return Dataset.from_dict(
        {
            "prompt_ids": [[1, 10 + first + i] for i in range(n)],
            "chosen_ids": [[2, 3, 4]] * n,
            "chosen_action_mask": [[1, 0, 1]] * n,
            "rejected_ids": [[5, 6]] * n,
            "rejected_action_mask": [[1, 1]] * n,
        }
    )


class Rounds(TrainerCallback):
    """Supplies rounds of given sizes and records what was trained."""

    def __init__(self, sizes, lr_schedule="run"):
        self.sizes, self.lr_schedule = sizes, lr_schedule
        self.first_steps, self.trained, self.learning_rates, self.max_steps = [], [], [], []

    def attach(self, trainer):
        self.trainer = trainer

    def position(self, global_step):
        for iteration, first in reversed(list(enumerate(self.first_steps))):
            if first <= global_step:
                return iteration, first
        return 0, 0

    def begin_iteration(self, iteration, resumed_inside):
        assert iteration == len(self.first_steps)
        self.first_steps.append(self.trainer.state.global_step)
        rows = preference_rows(self.sizes[iteration])
        if len(rows):
            rows = self.trainer.compute_reference_columns(self.trainer.prepare_rows(rows))
        return rows

    def on_step_end(self, args, state, control, **kwargs):
        self.learning_rates.append(kwargs["lr_scheduler"].get_last_lr()[0])
        self.max_steps.append(state.max_steps)


def cpu_config(folder, config=MultiTurnDPOConfig, **kwargs):
    return config(
        output_dir=str(folder),
        per_device_train_batch_size=2,
        learning_rate=1e-3,
        report_to="none",
        bf16=False,
        use_cpu=True,
        save_strategy="no",
        disable_tqdm=True,
        gradient_checkpointing=False,
        **kwargs,
    )


def make_trainer(folder, source, cls=MultiTurnDPOTrainer, config=MultiTurnDPOConfig, **kwargs):
    tokenizer = byte_tokenizer()
    args = cpu_config(folder, config, **kwargs)
    return cls(model=tiny_model(tokenizer), args=args, processing_class=tokenizer, callbacks=[source])


class Recording(MultiTurnDPOTrainer):
    """Records the prompts of every batch and the margins of each step."""

    def compute_loss(self, model, inputs, *args, **kwargs):
        self.seen = getattr(self, "seen", [])
        half = inputs["input_ids"].shape[0] // 2
        self.seen.append(sorted((inputs["input_ids"][:half, 1] - 10).tolist()))
        loss = super().compute_loss(model, inputs, *args, **kwargs)
        self.margins = [*getattr(self, "margins", []), self._metrics["train"]["rewards/margins"][-1]]
        return loss


def test_each_iteration_is_exactly_one_pass_over_its_rows(tmp_path):
    source = Rounds([5, 2, 0, 7])
    trainer = make_trainer(tmp_path, source, cls=Recording, num_train_epochs=4)
    trainer.train()
    batches = [3, 1, 0, 4]
    bounds = [sum(batches[:i]) for i in range(5)]
    for size, start, stop in zip(source.sizes, bounds[:-1], bounds[1:], strict=True):
        assert sorted(row for batch in trainer.seen[start:stop] for row in batch) == list(range(size))
    assert source.first_steps == bounds[:-1]
    assert trainer.state.global_step == 8


def test_margins_are_exactly_zero_after_each_reference_refresh(tmp_path):
    trainer = make_trainer(tmp_path, Rounds([2, 2, 2]), cls=Recording, num_train_epochs=3)
    trainer.train()
    assert trainer.margins == [0.0, 0.0, 0.0]
    assert trainer.ref_model is None


def test_leftover_batches_of_an_accumulated_step_are_stepped(tmp_path):
    trainer = make_trainer(tmp_path, Rounds([6, 6]), cls=Recording, num_train_epochs=2, gradient_accumulation_steps=2)
    trainer.train()
    assert trainer.state.global_step == 4  # 3 batches an epoch: one step of two and one of the last


def test_run_schedule_decays_to_zero_at_the_end_of_the_last_iteration(tmp_path):
    source = Rounds([8, 4, 6])
    trainer = make_trainer(tmp_path, source, num_train_epochs=3, lr_scheduler_type="linear", warmup_steps=2)
    trainer.train()
    # re-planned at each iteration: 4 steps × 3, then 4 + 2 × 2, then 6 + 3
    assert source.max_steps == [12] * 4 + [8] * 2 + [9] * 3
    decay = lambda step, total: 1e-3 * min(step / 2, (total - step) / (total - 2))  # noqa: E731
    expected = [decay(s, 12) for s in (1, 2, 3, 4)] + [decay(s, 8) for s in (5, 6)] + [decay(s, 9) for s in (7, 8, 9)]
    torch.testing.assert_close(source.learning_rates, expected)
    assert source.learning_rates[-1] == 0


def test_iteration_schedule_restarts(tmp_path):
    source = Rounds([4, 8], lr_schedule="iteration")
    trainer = make_trainer(tmp_path, source, num_train_epochs=2, lr_scheduler_type="linear", warmup_steps=0)
    trainer.train()
    expected = [1e-3 * x for x in (1 / 2, 0, 3 / 4, 2 / 4, 1 / 4, 0)]
    torch.testing.assert_close(source.learning_rates, expected)


def test_resumes_inside_an_iteration(tmp_path):
    full = make_trainer(tmp_path / "full", Rounds([6, 8]), cls=Recording, num_train_epochs=2)
    full.train()

    stopped = make_trainer(tmp_path / "stopped", Rounds([6, 8]), cls=Recording, num_train_epochs=2)
    stopped.args.save_strategy, stopped.args.save_steps = "steps", 5
    stopped.state.save_steps = 5
    stopped.train()
    source = Rounds([6, 8])
    source.first_steps = [0]  # what a real source reads from its folder: iteration 1 has begun at step 3
    source.position = lambda step: (1, 3)
    resumed = make_trainer(tmp_path / "resumed", source, cls=Recording, num_train_epochs=2)
    rows = stopped.train_dataset
    source.begin_iteration = lambda iteration, resumed_inside: (
        rows if (iteration, resumed_inside) == (1, True) else None
    )
    resumed.train(resume_from_checkpoint=str(tmp_path / "stopped" / "checkpoint-5"))
    assert resumed.seen == full.seen[5:]
    assert resumed.state.global_step == 7
    for name, weight in full.model.named_parameters():
        torch.testing.assert_close(resumed.model.get_parameter(name), weight, rtol=0, atol=0)


def test_max_steps_ends_the_run_but_adds_no_iteration(tmp_path):
    source = Rounds([4, 0, 4])
    trainer = make_trainer(tmp_path, source, num_train_epochs=2, max_steps=5)
    trainer.train()
    assert source.first_steps == [0, 2] and trainer.state.global_step == 2  # two iterations, the second one empty
    source = Rounds([8, 8])
    trainer = make_trainer(tmp_path, source, num_train_epochs=2, max_steps=5)
    trainer.train()
    assert source.first_steps == [0, 4] and trainer.state.global_step == 5
    assert trainer.state.global_step < trainer.iteration_last_step == 8


def test_margins_are_zero_to_rounding_where_rows_differ_in_length(tmp_path):
    class Uneven(Rounds):
        def begin_iteration(self, iteration, resumed_inside):
            lengths = [1, 9, 3, 7, 2, 8]
            rows = preference_rows(6).to_dict()
            rows["chosen_ids"] = [[2 + i % 50 for i in range(n)] for n in lengths]
            rows["chosen_action_mask"] = [[1] * n for n in lengths]
            rows = self.trainer.prepare_rows(Dataset.from_dict(rows))
            return self.trainer.compute_reference_columns(rows)

    trainer = make_trainer(tmp_path, Uneven([6]), cls=Recording, num_train_epochs=1)
    trainer.train()
    assert abs(trainer.margins[0]) < 1e-6


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(ref_model=object()), "`ref_model` has no part"),
        (dict(eval_dataset=preference_rows(1)), "`eval_dataset` has"),
    ],
)
def test_what_has_no_part_in_iterations_is_refused(tmp_path, arguments, message):
    with pytest.raises(ValueError, match=message):
        MultiTurnDPOTrainer("unused", args=cpu_config(tmp_path), callbacks=[Rounds([1])], **arguments)


def test_dropping_the_last_batch_is_refused(tmp_path):
    with pytest.raises(ValueError, match="dataloader_drop_last"):
        args = cpu_config(tmp_path, dataloader_drop_last=True)
        MultiTurnDPOTrainer("unused", args=args, callbacks=[Rounds([1])])


def test_train_dataset_beside_a_row_source_is_refused(tmp_path):
    args = cpu_config(tmp_path)
    with pytest.raises(ValueError, match="Omit `train_dataset`"):
        MultiTurnDPOTrainer("unused", args=args, train_dataset=preference_rows(2), callbacks=[Rounds([1])])


def test_two_row_sources_are_refused(tmp_path):
    with pytest.raises(ValueError, match="2 callbacks supply training rows"):
        MultiTurnDPOTrainer("unused", None, cpu_config(tmp_path), callbacks=[Rounds([1])] * 2)


def test_missing_args_are_refused():
    with pytest.raises(ValueError, match="number of iterations"):
        MultiTurnDPOTrainer("unused", callbacks=[Rounds([1])])


def test_kto_takes_a_row_source(tmp_path):
    class UnpairedRounds(Rounds):
        def begin_iteration(self, iteration, resumed_inside):
            self.first_steps.append(self.trainer.state.global_step)
            rows = Dataset.from_dict(
                {
                    "prompt_ids": [[1, 10]] * 4,
                    "completion_ids": [[2, 3], [4, 5, 6]] * 2,
                    "action_mask": [[1, 1], [1, 0, 1]] * 2,
                    "label": [True, False] * 2,
                }
            )
            return self.trainer.compute_reference_columns(self.trainer.prepare_rows(rows))

    trainer = make_trainer(
        tmp_path, UnpairedRounds([4, 4]), cls=MultiTurnKTOTrainer, config=MultiTurnKTOConfig, num_train_epochs=2
    )
    trainer.train()
    assert trainer.state.global_step == 4
    assert trainer.ref_model is None


@pytest.mark.parametrize(
    ("datasets", "name"),
    [
        (dict(train_dataset=preference_rows(0)), "train_dataset"),
        (dict(train_dataset=preference_rows(1), eval_dataset=preference_rows(0)), "eval_dataset"),
        (
            dict(train_dataset=preference_rows(1), eval_dataset={"a": preference_rows(1), "b": preference_rows(0)}),
            r"eval_dataset\['b'\]",
        ),
    ],
)
def test_a_dataset_without_rows_is_named(tmp_path, datasets, name):
    with pytest.raises(ValueError, match=f"`{name}` has no rows"):
        MultiTurnDPOTrainer("unused", args=cpu_config(tmp_path), **datasets)
