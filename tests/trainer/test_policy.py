"""What a trainer does with its policy: one that cannot learn is refused, an instance is its own reference."""

from __future__ import annotations

import logging

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model

from tests.support import byte_tokenizer, save_tiny, tiny_model
from tests.trainer.helpers import dpo_config, kto_config, logged, move, preference_dataset, unpaired_dataset
from tests.trainer.value_helpers import make_trainer
from trl_multiturn import DQOConfig, DQOTrainer, MultiTurnDPOTrainer, MultiTurnKTOTrainer, OREOConfig, OREOTrainer


TRAINERS = {
    "dpo": (MultiTurnDPOTrainer, dpo_config, preference_dataset),
    "kto": (MultiTurnKTOTrainer, kto_config, unpaired_dataset),
    "oreo": (OREOTrainer, lambda folder, **kw: kto_config(folder, OREOConfig, **kw), unpaired_dataset),
    "dqo": (DQOTrainer, lambda folder, **kw: kto_config(folder, DQOConfig, **kw), unpaired_dataset),
}


@pytest.fixture(params=TRAINERS)
def build(request, tmp_path):
    """Makes the trainer of each kind for a policy."""
    trainer_class, config, rows = TRAINERS[request.param]

    def build(model, peft_config=None, tokenizer=None, **settings):
        return trainer_class(
            model=model,
            args=config(tmp_path / "run", **settings),
            train_dataset=rows(4),
            processing_class=tokenizer or byte_tokenizer("qwen2_5"),
            peft_config=peft_config,
        )

    return build


def lora(**settings):
    return LoraConfig(r=2, lora_alpha=2, target_modules=["q_proj"], task_type="CAUSAL_LM", **settings)


class TestPoliciesThatCannotLearn:
    def test_an_adapter_loaded_for_inference_is_refused(self, build, tmp_path):
        get_peft_model(tiny_model(byte_tokenizer()), lora()).save_pretrained(tmp_path / "adapter")
        frozen = PeftModel.from_pretrained(tiny_model(byte_tokenizer()), tmp_path / "adapter")
        with pytest.raises(ValueError, match="no trainable weight.*is_trainable=True"):
            build(frozen)

    def test_a_merged_adapter_that_stayed_frozen_is_refused(self, build):
        merged = get_peft_model(tiny_model(byte_tokenizer()), lora()).merge_and_unload().requires_grad_(False)
        with pytest.raises(ValueError, match="no trainable weight.*requires_grad_"):
            build(merged)

    def test_a_frozen_base_with_a_new_adapter_trains(self, build):
        assert build(tiny_model(byte_tokenizer()).requires_grad_(False), peft_config=lora()) is not None

    def test_tokens_of_their_own_on_tied_embeddings_name_the_option(self, build):
        tied = tiny_model(byte_tokenizer(), tie_word_embeddings=True)
        with pytest.raises(ValueError, match="trainable_token_indices.*modules_to_save"):
            build(tied, peft_config=lora(trainable_token_indices=[1, 2]))

    def test_tokens_of_their_own_on_untied_embeddings_train(self, build):
        tokens = byte_tokenizer()("is")["input_ids"]
        trainer = build(tiny_model(byte_tokenizer()), peft_config=lora(trainable_token_indices=tokens))
        deltas = {n: p for n, p in trainer.model.named_parameters() if "trainable_tokens_delta.default" in n}
        before = {name: delta.detach().clone() for name, delta in deltas.items()}
        trainer.train()
        assert deltas and all(not torch.equal(delta, before[name]) for name, delta in deltas.items())


class TestAnInstanceIsItsOwnReference:
    @pytest.fixture()
    def moved(self, tmp_path):
        """A policy whose weights are not those of the folder that its config names."""
        folder = save_tiny(tmp_path / "disk")
        model = type(tiny_model(byte_tokenizer())).from_pretrained(folder, dtype=torch.float32)
        move(model, scale=0.1)
        return model

    def test_at_the_start_the_policy_is_its_reference(self, build, moved):
        trainer = build(moved, learning_rate=0.0, max_steps=1)
        reference = trainer.accelerator.unwrap_model(trainer.ref_model) if trainer.ref_model is not None else moved
        for (name, ours), theirs in zip(moved.named_parameters(), reference.parameters(), strict=False):
            assert torch.equal(ours, theirs), name

    def test_the_first_loss_of_m_dpo_is_log_2(self, tmp_path, moved):
        trainer = MultiTurnDPOTrainer(
            moved, args=dpo_config(tmp_path / "run", max_steps=1), train_dataset=preference_dataset(4),
            processing_class=byte_tokenizer("qwen2_5"),
        )  # fmt: skip
        trainer.train()
        assert logged(trainer, "loss")[0] == pytest.approx(0.6931, abs=1e-4)

    def test_the_reference_stays_while_the_policy_moves(self, tmp_path, moved):
        before = {name: value.clone() for name, value in moved.state_dict().items()}
        trainer = MultiTurnDPOTrainer(
            moved, args=dpo_config(tmp_path / "run", max_steps=2), train_dataset=preference_dataset(4),
            processing_class=byte_tokenizer("qwen2_5"),
        )  # fmt: skip
        trainer.train()
        reference = trainer.accelerator.unwrap_model(trainer.ref_model)
        assert all(torch.equal(reference.state_dict()[name], value) for name, value in before.items())
        assert any(not torch.equal(moved.state_dict()[name], value) for name, value in before.items())
        assert not any(parameter.requires_grad for parameter in reference.parameters())

    def test_an_instance_that_an_earlier_trainer_has_had_is_copied_as_well(self, tmp_path, moved):
        losses = []
        for run in "ab":
            trainer = MultiTurnDPOTrainer(
                moved, args=dpo_config(tmp_path / run, max_steps=1), train_dataset=preference_dataset(4),
                processing_class=byte_tokenizer("qwen2_5"),
            )  # fmt: skip
            trainer.train()
            losses += logged(trainer, "loss")
        assert losses == [pytest.approx(0.6931, abs=1e-4)] * 2

    def test_a_policy_that_no_folder_holds_trains(self, build):
        trainer = build(tiny_model(byte_tokenizer("qwen2_5")))
        trainer.train()
        assert trainer.state.global_step == 2


def test_precomputing_draws_no_random_number(tmp_path):
    heads = []
    for precompute in (False, True):
        trainer = make_trainer(tmp_path / str(precompute), precompute_ref_log_probs=precompute)
        heads.append({name: p.detach().clone() for name, p in trainer.value_model.named_parameters()})
    assert heads[0].keys() == heads[1].keys()
    assert all(torch.equal(heads[0][name], heads[1][name]) for name in heads[0])


def test_label_smoothing_of_the_wrong_kind_is_told(build, caplog):
    with caplog.at_level(logging.WARNING, logger="trl_multiturn"):
        build(tiny_model(byte_tokenizer("qwen2_5")), label_smoothing_factor=0.1)
    assert "label_smoothing_factor=0.1" in caplog.text
