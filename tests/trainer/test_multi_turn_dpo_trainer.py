"""Every option of `DPOTrainer` with masks on."""

from __future__ import annotations

import inspect

import pytest
import torch
import torch.nn.functional as F
from datasets import Dataset, IterableDataset, load_from_disk
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, ProcessorMixin
from trl import DPOConfig, DPOTrainer
from trl.trainer.dpo_trainer import DataCollatorForPreference

from tests.support import (
    TOOLS,
    assistant,
    byte_tokenizer,
    preference_rows,
    save_tiny,
    template_text,
    tiny_model,
    user,
)
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
)
from trl_multiturn.data import tokenize_trajectory
from trl_multiturn.data.collators import DataCollatorForMultiTurnPreference
from trl_multiturn.trainer import MultiTurnDPOTrainer


LORA = LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
TOKEN_COLUMNS = ["prompt_ids", "chosen_ids", "chosen_action_mask", "rejected_ids", "rejected_action_mask"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_tiny(tmp_path_factory.mktemp("policy"))


def make(folder, tmp_path, dataset=None, cls=MultiTurnDPOTrainer, **kwargs):
    trainer_keys = {"peft_config", "eval_dataset", "data_collator", "ref_model", "callbacks", "processing_class"}
    passed = {key: kwargs.pop(key) for key in list(kwargs) if key in trainer_keys}
    dataset = preference_dataset() if dataset is None else dataset
    return cls(folder, args=dpo_config(tmp_path, **kwargs), train_dataset=dataset, **passed)


def expected_loss(trainer, reference, beta=0.1):
    with torch.no_grad():
        chosen, rejected = pair_log_ratios(trainer.model, reference, trainer.train_dataset)
        return -F.logsigmoid(beta * (chosen - rejected)).mean()


def assert_matches(trainer, reference):
    torch.testing.assert_close(batch_loss(trainer), expected_loss(trainer, reference), rtol=1e-4, atol=1e-5)


# Rows


def test_text_rows_become_token_rows_of_the_contract(folder, tmp_path):
    dataset = preference_dataset(2, tools=[TOOLS] * 2, provenance=["a", "b"])
    trainer = make(folder, tmp_path, dataset)
    tokenizer = byte_tokenizer()
    for row, text in zip(trainer.train_dataset, preference_rows(2), strict=True):
        for side in ("chosen", "rejected"):
            expected = tokenize_trajectory(tokenizer, text["prompt"], text[side], tools=TOOLS)
            assert row["prompt_ids"] == expected["prompt_ids"]
            assert row[f"{side}_ids"] == expected["completion_ids"]
            assert row[f"{side}_action_mask"] == expected["action_mask"]


def test_token_rows_are_used_as_they_are(folder, tmp_path):
    rows = {
        "prompt_ids": [[5, 6], [5, 7]],
        "chosen_ids": [[8, 9, 10, 11], [8]],
        "chosen_action_mask": [[1, 0, 0, 1], [1]],
        "rejected_ids": [[12], [13, 14]],
        "rejected_action_mask": [[1], [0, 1]],
        "iteration": [1, 1],
    }
    trainer = make(folder, tmp_path, Dataset.from_dict(rows))
    assert trainer.train_dataset.select_columns(TOKEN_COLUMNS).to_dict() == {k: rows[k] for k in TOKEN_COLUMNS}
    batch = batch_of(trainer)
    assert batch["completion_mask"].tolist() == [
        [0, 0, 1, 0, 0, 1], [0, 0, 1, 0, 0, 0], [0, 0, 1, 0, 0, 0], [0, 0, 0, 1, 0, 0],
    ]  # fmt: skip
    trainer.train()
    assert all(loss > 0 for loss in logged(trainer, "loss"))


def test_preparing_twice_changes_nothing(folder, tmp_path):
    trainer = make(folder, tmp_path)
    again = trainer.prepare_rows(trainer.train_dataset)
    assert again.to_dict() == trainer.train_dataset.to_dict()


def test_prepared_rows_come_from_the_cache_the_second_time(folder, tmp_path):
    preference_dataset().save_to_disk(tmp_path / "rows")
    prepared = [make(folder, tmp_path, load_from_disk(tmp_path / "rows")).train_dataset for _ in range(2)]
    assert prepared[0].cache_files and prepared[0].cache_files == prepared[1].cache_files


def test_mask_not_aligned_with_its_ids_names_the_row(folder, tmp_path):
    rows = {
        "prompt_ids": [[5], [5]],
        "chosen_ids": [[8, 9], [8, 9]],
        "chosen_action_mask": [[1, 1], [1]],
        "rejected_ids": [[7], [7]],
        "rejected_action_mask": [[1], [1]],
    }
    with pytest.raises(ValueError, match="Row 1: `chosen_action_mask` has 1 entries but `chosen_ids` has 2"):
        make(folder, tmp_path, Dataset.from_dict(rows))


def test_only_the_last_turn(folder, tmp_path):
    trainer = make(folder, tmp_path, preference_dataset(1), train_on_turns="last")
    row = trainer.train_dataset[0]
    kept = [t for t, m in zip(row["chosen_ids"], row["chosen_action_mask"], strict=True) if m]
    assert byte_tokenizer().decode(kept) == "It is 0.<|im_end|>"


def test_implicit_prompts_and_plain_text_rows(folder, tmp_path):
    rows = [preference_rows(3)[i] for i in (0, 2)]  # whose first turns differ
    implicit = [{side: row["prompt"] + row[side] for side in ("chosen", "rejected")} for row in rows]
    trainer = make(folder, tmp_path, Dataset.from_list(implicit, on_mixed_types="use_json"))
    explicit = make(folder, tmp_path, preference_dataset(3).select([0, 2]))
    assert trainer.train_dataset.select_columns(TOKEN_COLUMNS).to_dict() == (
        explicit.train_dataset.select_columns(TOKEN_COLUMNS).to_dict()
    )
    plain = Dataset.from_dict({"prompt": ["a b", "c"], "chosen": [" yes", " y"], "rejected": [" no", " n"]})
    ours, stock = make(folder, tmp_path, plain), make(folder, tmp_path, plain, DPOTrainer)
    torch.testing.assert_close(batch_loss(ours), batch_loss(stock))


def test_plain_rows_without_a_prompt(folder, tmp_path):
    plain = Dataset.from_dict(
        {"chosen": ["Sky is blue.", "Sun is hot."], "rejected": ["Sky is green.", "Sun is ice."]}
    )
    ours, stock = make(folder, tmp_path, plain), make(folder, tmp_path, plain, DPOTrainer)
    torch.testing.assert_close(batch_loss(ours), batch_loss(stock))


def test_templates_that_prove_nothing_serve_where_every_token_trains(tmp_path):
    text = template_text("qwen2_5")
    header = text.rindex("<|im_start|>assistant\\n")  # the generation prompt's, which no finished turn has
    tokenizer = byte_tokenizer(text[:header] + "Now:" + text[header + len("<|im_start|>assistant\\n") :])
    path = save_tiny(tmp_path / "model", tokenizer)
    rows = [
        {"prompt": [user("Q")], "chosen": [assistant("A"), user("R"), assistant("B")], "rejected": [assistant("C")]}
    ]
    with pytest.raises(ValueError, match="`chosen`: Assistant turn 0"):
        make(path, tmp_path, Dataset.from_list(rows))
    everything = {"mask_observations": False}
    ours, stock = (
        make(path, tmp_path, Dataset.from_list(rows), **everything),
        make(path, tmp_path, Dataset.from_list(rows), DPOTrainer),
    )
    torch.testing.assert_close(batch_loss(ours), batch_loss(stock))


def test_multimodal_processor_on_text(folder, tmp_path):
    """Only a tokenizer and a template matter where a row holds no image."""

    class Processor(ProcessorMixin):
        def __init__(self, tokenizer, chat_template=None):
            super().__init__(tokenizer, chat_template=chat_template)

    # Templates of such processors print content blocks
    blocks = (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{% for c in m.content %}{{ c.text }}{% endfor %}<|im_end|>\n"
        "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    processor = Processor(byte_tokenizer(), chat_template=blocks)
    dataset = Dataset.from_list(
        [{"prompt": [user("Q")], "chosen": [assistant("A"), user("R"), assistant("B")], "rejected": [assistant("C")]}]
    )
    trainer = make(folder, tmp_path, dataset, processing_class=processor)
    row = trainer.train_dataset[0]
    trained = [t for t, m in zip(row["chosen_ids"], row["chosen_action_mask"], strict=True) if m]
    assert byte_tokenizer().decode(trained) == "A<|im_end|>B<|im_end|>"
    trainer.train()


def test_a_shared_first_turn_becomes_context(folder, tmp_path):
    """TRL takes the messages that both sides share for the prompt, turns of the policy included."""
    row = preference_rows(2)[1]
    assert row["chosen"][0] == row["rejected"][0]
    implicit = {side: row["prompt"] + row[side] for side in ("chosen", "rejected")}
    prepared = make(folder, tmp_path, Dataset.from_list([implicit], on_mixed_types="use_json")).train_dataset[0]
    kept = [t for t, m in zip(prepared["chosen_ids"], prepared["chosen_action_mask"], strict=True) if m]
    assert byte_tokenizer().decode(kept) == "It is 2.<|im_end|>"
    assert byte_tokenizer().decode(prepared["prompt_ids"]).count("<tool_call>") == 1


# Truncation


def test_truncation_tells_the_truth(folder, tmp_path, caplog):
    first, second = [1, 1, 1], [1, 1, 1, 1]
    mask = [*first, 0, 0, *second]  # two turns with an observation between them
    ids = list(range(20, 29))
    rows = {
        "prompt_ids": [[5, 6]] * 4,
        # whole; cut after the first turn; differing in the second turn only; untrained within the limit
        "chosen_ids": [ids[:5], ids, ids, ids],
        "chosen_action_mask": [mask[:5], mask, mask, [0] * 8 + [1]],
        "rejected_ids": [[30, 31], [30, 31], [*ids[:-1], 40], [30]],
        "rejected_action_mask": [[1, 1], [1, 1], mask, [1]],
    }
    with caplog.at_level("WARNING"):
        trainer = make(folder, tmp_path, Dataset.from_dict(rows), max_length=9)
    assert "Dropped 2 of 4 rows of the train dataset: 1 without a trained token" in caplog.text
    assert "95th percentile of lengths in the train dataset is 11 tokens" in caplog.text
    assert trainer.train_dataset["chosen_ids"][:] == [ids[:5], ids[:3]]
    assert trainer.train_dataset["chosen_action_mask"][:] == [mask[:5], first]
    assert batch_of(trainer)["input_ids"].shape[1] <= 9
    trainer.train()
    statistics = {key: values[0] for key in trainer.state.log_history[0] if (values := logged(trainer, key))}
    assert statistics["data/rows"] == 2 and statistics["data/rows_cut_at_turn"] == 1
    assert statistics["data/rows_dropped_untrained"] == 1 and statistics["data/rows_dropped_identical"] == 1
    assert statistics["data/length_p95"] == pytest.approx(11.0)
    assert len(logged(trainer, "data/rows")) == 1  # counts of a set of rows are logged once


def test_no_row_left_says_why(folder, tmp_path):
    with pytest.raises(
        ValueError, match="No row is left to train on: of 4 rows, 4 have no token sampled.*`max_length"
    ):
        make(folder, tmp_path, max_length=8)


def test_keep_end_keeps_masks_aligned(folder, tmp_path):
    trainer = make(folder, tmp_path, max_length=40, truncation_mode="keep_end")
    batch = batch_of(trainer)
    row = trainer.train_dataset[0]
    mask = [0] * len(row["prompt_ids"]) + row["chosen_action_mask"]
    assert batch["completion_mask"][0].tolist() == mask[-40:]
    assert batch["input_ids"][0].tolist() == (row["prompt_ids"] + row["chosen_ids"])[-40:]


# References


@pytest.mark.parametrize("on_disk", [False, True])
def test_precomputed_reference_equals_the_one_computed_on_the_fly(folder, tmp_path, on_disk):
    dataset = preference_dataset()
    if on_disk:
        dataset.save_to_disk(tmp_path / "rows")
        dataset = load_from_disk(tmp_path / "rows")
    trainer = make(folder, tmp_path, dataset, precompute_ref_log_probs=True)
    assert trainer.ref_model is None
    move(trainer.model)
    assert_matches(trainer, reference_model(folder))


def test_cached_reference_is_not_reused_for_another_ld_alpha(folder, tmp_path):
    preference_dataset().save_to_disk(tmp_path / "rows")
    values = []
    for ld_alpha in (None, 0.5, None):
        dataset = load_from_disk(tmp_path / "rows")
        trainer = make(folder, tmp_path, dataset, precompute_ref_log_probs=True, ld_alpha=ld_alpha)
        values.append(trainer.train_dataset["ref_chosen_logps"][:])
    assert values[0] != values[1] and values[0] == values[2]


@pytest.mark.parametrize("lora", [False, True])
@pytest.mark.parametrize("shuffled", [False, True])
def test_margins_restart_at_exactly_zero_after_a_reference_refresh(folder, tmp_path, lora, shuffled):
    sampling = "random" if shuffled else "sequential"
    kwargs = {"peft_config": LORA} if lora else {}
    trainer = make(
        folder, tmp_path, precompute_ref_log_probs=True, max_steps=1, train_sampling_strategy=sampling, **kwargs
    )
    move(trainer.model)
    trainer.train_dataset = trainer.compute_reference_columns(trainer.train_dataset, reference="policy")
    trainer.train()
    for key in ("rewards/chosen", "rewards/rejected", "rewards/margins"):
        assert logged(trainer, key) == [0.0]
    assert logged(trainer, "loss")[0] == pytest.approx(0.693147, abs=1e-6)


def test_reference_columns_of_policy_and_reference(folder, tmp_path):
    trainer = make(folder, tmp_path, peft_config=LORA)
    move(trainer.model)
    by_policy = trainer.compute_reference_columns(trainer.train_dataset, "policy")
    by_reference = trainer.compute_reference_columns(by_policy, "reference")  # replaces the columns
    assert by_reference.column_names.count("ref_chosen_logps") == 1
    base = reference_model(folder)
    with torch.no_grad():
        rows = list(trainer.train_dataset)
        difference, _ = pair_log_ratios(trainer.model, base, rows)
    computed = torch.tensor(by_policy["ref_chosen_logps"][:]) - torch.tensor(by_reference["ref_chosen_logps"][:])
    torch.testing.assert_close(computed, difference, rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match="must be 'policy' or 'reference'"):
        trainer.compute_reference_columns(by_policy, "base")


def test_sync_ref_model(folder, tmp_path):
    trainer = make(folder, tmp_path, sync_ref_model=True, ref_model_sync_steps=1, ref_model_mixup_alpha=1.0)
    trainer.train()
    for ours, reference in zip(trainer.model.parameters(), trainer.ref_model.parameters(), strict=True):
        assert torch.equal(ours, reference)
    assert batch_loss(trainer).item() == pytest.approx(0.693147, abs=1e-6)


# Adapters


def test_new_adapter(folder, tmp_path):
    trainer = make(folder, tmp_path, peft_config=LORA)
    assert trainer.ref_model is None
    assert_matches(trainer, reference_model(folder))
    before = {n: p.clone() for n, p in trainer.model.named_parameters()}
    trainer.train()
    changed = {n for n, p in trainer.model.named_parameters() if not torch.equal(p, before[n])}
    assert changed and all("lora" in name for name in changed)


def test_existing_adapter_is_its_own_reference(folder, tmp_path):
    torch.manual_seed(3)
    adapted = get_peft_model(reference_model(folder), LORA)
    args = dpo_config(tmp_path)
    trainer = MultiTurnDPOTrainer(
        adapted, args=args, train_dataset=preference_dataset(), processing_class=byte_tokenizer()
    )
    assert "ref" in trainer.model.peft_config
    with torch.no_grad():
        assert batch_loss(trainer).item() == pytest.approx(0.693147, abs=1e-6)
    reference = get_peft_model(reference_model(folder), LORA)
    reference.load_state_dict({k: v for k, v in trainer.model.state_dict().items() if ".ref." not in k})
    with torch.no_grad():
        for name, parameter in trainer.model.named_parameters():
            if ".default." in name:
                parameter.add_(0.05)
    assert_matches(trainer, reference)


def test_quantized_path_keeps_adapters_in_bfloat16(folder, tmp_path):
    """What QLoRA changes in the trainer, without the GPU kernels: a model that says it is quantized."""
    model = reference_model(folder).to(torch.bfloat16)
    model.is_loaded_in_4bit = True
    trainer = MultiTurnDPOTrainer(
        model, args=dpo_config(tmp_path), train_dataset=preference_dataset(), processing_class=byte_tokenizer(),
        peft_config=LORA,
    )  # fmt: skip
    assert {p.dtype for p in trainer.model.parameters() if p.requires_grad} == {torch.bfloat16}
    assert batch_loss(trainer).isfinite()


# The rest of the parent


def test_constructor_and_config_are_the_parents(folder, tmp_path):
    assert inspect.signature(MultiTurnDPOTrainer) == inspect.signature(DPOTrainer)
    tokenizer = byte_tokenizer()
    model, ref_model = tiny_model(tokenizer), tiny_model(tokenizer)
    args = dpo_config(tmp_path, DPOConfig)  # plain config, everything positional
    trainer = MultiTurnDPOTrainer(model, ref_model, args, None, preference_dataset(), None, tokenizer)
    assert type(trainer.args) is DPOConfig and isinstance(trainer.data_collator, DataCollatorForPreference)
    trainer.train()
    assert logged(trainer, "loss")[0] == pytest.approx(0.693147, abs=1e-5)
    assert {"trl", "dpo"} <= set(trainer.model.model_tags)


def test_stock_collator_is_replaced_and_others_are_kept(folder, tmp_path):
    trainer = make(folder, tmp_path, data_collator=DataCollatorForPreference(pad_token_id=1, max_length=99))
    assert type(trainer.data_collator) is DataCollatorForMultiTurnPreference
    assert (trainer.data_collator.pad_token_id, trainer.data_collator.max_length) == (1, 99)

    class Mine(DataCollatorForMultiTurnPreference):
        pass

    collator = Mine(pad_token_id=1)
    assert make(folder, tmp_path, data_collator=collator).data_collator is collator


def test_users_tokenizer_keeps_its_template(tmp_path):
    path = save_tiny(tmp_path / "qwen3", byte_tokenizer("qwen3"))
    tokenizer = AutoTokenizer.from_pretrained(path)
    before = tokenizer.chat_template
    trainer = make(path, tmp_path, processing_class=tokenizer)
    assert "<think>" in tokenizer.decode(trainer.train_dataset[0]["chosen_ids"])
    trainer.save_model(str(tmp_path / "out"))
    assert tokenizer.chat_template == before
    assert AutoTokenizer.from_pretrained(tmp_path / "out").chat_template == before


def test_iterable_dataset_trains_like_a_map_style_one(folder, tmp_path):
    rows = preference_rows(4)
    # Streams have no types to fill with None; arguments keep their shape
    streamed = IterableDataset.from_generator(lambda: iter(rows))
    losses = []
    for dataset in (streamed, preference_dataset()):
        trainer = make(folder, tmp_path, dataset, train_sampling_strategy="sequential")
        trainer.train()
        losses.append(logged(trainer, "loss"))
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_dict_of_eval_sets_and_evaluate_on_new_rows(folder, tmp_path):
    evals = {"a": preference_dataset(3), "b": one_turn_dataset(3)}
    trainer = make(folder, tmp_path, eval_dataset=evals, eval_strategy="steps", eval_steps=1)
    trainer.train()
    assert len(logged(trainer, "eval_a_loss")) == 2 and len(logged(trainer, "eval_b_loss")) == 2
    move(trainer.model, scale=0.05)
    metrics = trainer.evaluate(preference_dataset(2))
    with torch.no_grad():
        prepared = trainer.prepare_rows(preference_dataset(2))
        chosen, rejected = pair_log_ratios(trainer.model, reference_model(folder), prepared)
    assert metrics["eval_loss"] == pytest.approx(-F.logsigmoid(0.1 * (chosen - rejected)).mean().item(), rel=1e-4)


def test_gradient_accumulation_equals_a_large_batch(folder, tmp_path):
    weights = []
    for batch, steps in ((4, 1), (1, 4)):
        trainer = make(
            folder, tmp_path, per_device_train_batch_size=batch, gradient_accumulation_steps=steps, max_steps=1,
            optim="sgd", max_grad_norm=0.0,
        )  # fmt: skip
        trainer.train()
        weights.append([p.detach().clone() for p in trainer.model.parameters()])
    for large, accumulated in zip(*weights, strict=True):
        torch.testing.assert_close(large, accumulated, rtol=1e-4, atol=1e-6)


def test_activation_checkpointing_changes_nothing(folder, tmp_path):
    losses = []
    for enabled in (False, True):
        trainer = make(folder, tmp_path, gradient_checkpointing=enabled)
        trainer.train()
        losses.append(logged(trainer, "loss"))
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)


def test_resume_from_checkpoint_continues_the_run(folder, tmp_path):
    straight = make(folder, tmp_path / "a", max_steps=4)
    straight.train()
    kwargs = {"save_strategy": "steps", "save_steps": 2, "max_steps": 4}
    make(folder, tmp_path / "b", **kwargs).train()
    resumed = make(folder, tmp_path / "b", **kwargs)
    resumed.train(resume_from_checkpoint=str(tmp_path / "b" / "checkpoint-2"))
    for one, other in zip(straight.model.parameters(), resumed.model.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


def test_saved_policy_is_a_plain_checkpoint(folder, tmp_path):
    trainer = make(folder, tmp_path)
    trainer.train()
    trainer.save_model(str(tmp_path / "out"))
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    for one, other in zip(trainer.model.parameters(), loaded.parameters(), strict=True):
        assert torch.equal(one, other)


def test_rows_mapped_by_several_processes(folder, tmp_path):
    one, two = (make(folder, tmp_path, preference_dataset(6), dataset_num_proc=n).train_dataset for n in (None, 2))
    assert one.select_columns(TOKEN_COLUMNS).to_dict() == two.select_columns(TOKEN_COLUMNS).to_dict()
