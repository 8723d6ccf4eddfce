"""Which checkpoint a stopped run goes on from."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from datasets import Dataset
from transformers import TrainerCallback

from tests.support import byte_tokenizer, tiny_model
from trl_multiturn import MultiTurnDPOConfig, MultiTurnDPOTrainer
from trl_multiturn.trainer.loop.checkpoints import is_complete, last_checkpoint


TOKENIZER = byte_tokenizer()


class Rows(TrainerCallback):
    """Two pairs per iteration."""

    lr_schedule = "run"

    def attach(self, trainer):
        self.trainer, self.iterations = trainer, []

    def begin_iteration(self, iteration, resumed_inside):
        self.iterations.append(iteration)
        columns = {"chosen_ids": [[4, 5], [6]], "rejected_ids": [[7], [8, 9]]}
        masks = {f"{name[:-3]}action_mask": [[1] * len(ids) for ids in rows] for name, rows in columns.items()}
        rows = Dataset.from_dict({"prompt_ids": [[1, 2], [3]], **columns, **masks})
        return self.trainer.compute_reference_columns(self.trainer.prepare_rows(rows), reference="policy")

    def position(self, global_step):
        return global_step // 2, global_step // 2 * 2


def make_trainer(folder, iterations=2, **settings):
    args = MultiTurnDPOConfig(
        str(folder), num_train_epochs=iterations, per_device_train_batch_size=1, save_strategy="epoch",
        report_to="none", bf16=False, use_cpu=True, disable_tqdm=True, gradient_checkpointing=False, **settings,
    )  # fmt: skip
    return MultiTurnDPOTrainer(tiny_model(TOKENIZER), args=args, processing_class=TOKENIZER, callbacks=[Rows()])


def checkpoint(folder, step, state="{}", torn=False):
    path = Path(folder, f"checkpoint-{step}")
    path.mkdir(parents=True)
    if state:
        (path / "trainer_state.json").write_text(state)
    if torn:
        Path(folder, f"checkpoint-{step}.incomplete").touch()
    return str(path)


def test_the_last_complete_one_is_found(tmp_path, caplog):
    assert last_checkpoint(tmp_path) is None
    checkpoint(tmp_path, 9)
    expected = checkpoint(tmp_path, 10)
    checkpoint(tmp_path, 11, torn=True)
    checkpoint(tmp_path, 12, state="")
    (tmp_path / "checkpoint-final").mkdir()
    assert last_checkpoint(tmp_path) == expected
    assert "checkpoint-12 is passed over" in caplog.text and "checkpoint-11 is passed over" in caplog.text


def test_the_same_call_starts_a_run_and_takes_it_up_again(tmp_path):
    first = make_trainer(tmp_path, iterations=1)
    first.train(resume_from_checkpoint=True)
    assert first._row_source.iterations == [0] and last_checkpoint(tmp_path) == str(tmp_path / "checkpoint-2")
    second = make_trainer(tmp_path)
    second.train(resume_from_checkpoint=True)
    assert second._row_source.iterations == [1] and second.state.global_step == 4


def test_one_that_was_never_finished_is_passed_over_or_refused(tmp_path):
    make_trainer(tmp_path, iterations=1).train()
    torn = checkpoint(tmp_path, 4, torn=True)
    trainer = make_trainer(tmp_path)
    with pytest.raises(ValueError, match="not a complete checkpoint.*Pass `True`"):
        trainer.train(resume_from_checkpoint=torn)
    trainer.train(resume_from_checkpoint=True)
    assert trainer._row_source.iterations == [1]
    assert is_complete(torn)  # written anew, at the same step


def test_the_older_one_goes_only_when_the_newer_one_stands(tmp_path):
    trainer, present = make_trainer(tmp_path, save_total_limit=1), []
    write_state = trainer._save_rng_state

    def look(folder):
        present.append({path.name: is_complete(path) for path in tmp_path.glob("checkpoint-?")})
        write_state(folder)

    trainer._save_rng_state = look
    trainer.train()
    assert present == [{"checkpoint-2": False}, {"checkpoint-2": True, "checkpoint-4": False}]
    assert [path.name for path in tmp_path.glob("checkpoint-*")] == ["checkpoint-4"]
    assert trainer.args.save_total_limit == 1
    saved = torch.load(tmp_path / "checkpoint-4" / "training_args.bin", weights_only=False)
    assert saved.save_total_limit == 1
