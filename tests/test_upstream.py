"""What we rely on in TRL although nobody promises it. A failure here says which of our files to look at again."""

from __future__ import annotations

import ast
import inspect
from pathlib import Path

import pytest
import torch
from transformers import Trainer
from trl import DPOTrainer, KTOTrainer

import trl_multiturn
from tests.support import byte_tokenizer, tiny_model
from trl_multiturn import _upstream


PACKAGE = Path(trl_multiturn.__file__).parent


@pytest.mark.parametrize("name", sorted(set(_upstream.__all__) - {"VLLMGeneration"}))
def test_every_name_is_there(name):
    assert getattr(_upstream, name) is not None, f"look at every use of `_upstream.{name}`"


def test_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="has no attribute 'nonsense'"):
        _upstream.nonsense  # noqa: B018


def test_a_name_that_moved_says_what_to_do(monkeypatch):
    monkeypatch.setitem(_upstream._HOME, "moved", "trl.data_utils")
    with pytest.raises(ImportError, match="no longer has `moved`.*constraints.txt"):
        _upstream.moved  # noqa: B018


PUBLIC = {  # exported from `trl`, or of its documented `trl.rewards`
    "trl",
    "trl.rewards",
}


def test_no_other_module_imports_a_private_name():
    found = []
    for path in PACKAGE.rglob("*.py"):
        if path.name == "_upstream.py":
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            modules = []
            if isinstance(node, ast.ImportFrom) and node.level == 0:
                modules = [node.module]
            elif isinstance(node, ast.Import):
                modules = [alias.name for alias in node.names]
            found += [f"{path.name}: {m}" for m in modules if m.split(".")[0] == "trl" and m not in PUBLIC]
    assert not found, f"import these through `_upstream`: {found}"


@pytest.mark.parametrize("trainer", [DPOTrainer, KTOTrainer])
def test_overridden_methods_keep_their_signatures(trainer):
    """`trainer/token_rows.py` and the two trainers override these."""
    expected = {
        "_prepare_dataset": ["self", "dataset", "processing_class", "args", "dataset_name"],
        "_precompute_ref_logps": ["self", "dataset", "name", "batch_size"],
        "_set_signature_columns_if_needed": ["self"],
        "compute_ref_log_probs": ["self", "model", "inputs"],
        "compute_loss": ["self", "model", "inputs", "return_outputs", "num_items_in_batch"],
        "log": ["self", "logs", "start_time"],
    }
    for name, parameters in expected.items():
        assert list(inspect.signature(getattr(trainer, name)).parameters) == parameters, name


def test_collators_batch_keys():
    """`data/collators.py` replaces the values of `completion_mask` and `KL_completion_mask`, and adds to the rest."""
    preference = _upstream.DataCollatorForPreference(pad_token_id=0)
    assert set(vars(preference)) == {
        "pad_token_id", "max_length", "truncation_mode", "pad_to_multiple_of", "return_tensors",
    }  # fmt: skip
    row = {"prompt_ids": [1], "chosen_ids": [2], "rejected_ids": [3, 4]}
    assert set(preference([row])) == {"input_ids", "attention_mask", "completion_mask"}
    unpaired = _upstream.DataCollatorForUnpairedPreference(pad_token_id=0)
    assert set(vars(unpaired)) == {"pad_token_id", "max_length", "pad_to_multiple_of", "return_tensors"}
    row = {"prompt_ids": [1], "completion_ids": [2], "KL_completion_ids": [3], "label": True}
    sequence = {"input_ids", "attention_mask", "completion_mask"}
    assert set(unpaired([row])) == sequence | {f"KL_{key}" for key in sequence} | {"label"}


def test_fused_head_scores_labels_and_skips_minus_100():
    """Every trainer: `model(..., labels=…, fused_lm_head=True).log_probs`, `(B, T - 1)`, 0 where the label is -100."""
    tokenizer = byte_tokenizer()
    model = tiny_model(tokenizer)
    ids = torch.tensor([[5, 6, 7, 8]])
    with torch.no_grad():
        expected = model(input_ids=ids).logits[:, :-1].log_softmax(-1).gather(-1, ids[:, 1:, None])[..., 0]
        _upstream.add_fused_lm_head(model)
        labels = torch.tensor([[5, -100, 7, 8]])
        logps = model(input_ids=ids, labels=labels, fused_lm_head=True).log_probs
    torch.testing.assert_close(logps, expected * torch.tensor([[0.0, 1.0, 1.0]]), rtol=1e-5, atol=1e-5)
    assert model(input_ids=ids).logits is not None  # without the flag the model is as it was


def test_a_flipped_mask_bit_reaches_the_reference(tmp_path):
    """The parent's loss and reference read one mask, and accept one with holes."""
    from tests.trainer.helpers import batch_of, dpo_config, preference_dataset
    from trl_multiturn.trainer import MultiTurnDPOTrainer

    tokenizer = byte_tokenizer()
    trainer = MultiTurnDPOTrainer(
        tiny_model(tokenizer), tiny_model(tokenizer), dpo_config(tmp_path), None, preference_dataset(2),
        processing_class=tokenizer,
    )  # fmt: skip
    batch = batch_of(trainer)
    before = trainer.compute_ref_log_probs(trainer.ref_model, batch)[0]
    batch["completion_mask"][0, batch["completion_mask"][0].nonzero()[0]] = 0
    after = trainer.compute_ref_log_probs(trainer.ref_model, batch)[0]
    assert before[0] != after[0] and before[1] == after[1]


@pytest.mark.parametrize("trainer", [DPOTrainer, KTOTrainer])
def test_rows_with_images_and_models_that_read_them_are_told_by_two_attributes(trainer):
    """`ImageRowsMixin` answers the first itself, so that rows are prepared; `packed.py` reads the other."""
    source = inspect.getsource(trainer.__init__)
    assert all(f"self.{name} = " in source for name in ("_is_vision_dataset", "_is_vlm"))
    assert "self._is_vision_dataset" in inspect.getsource(trainer._set_signature_columns_if_needed)


def test_trainer_assigns_its_collator_once():
    """`TokenRowsMixin.data_collator` is a property: the assignment must happen in `Trainer.__init__`, by that name."""
    assert "self.data_collator = " in inspect.getsource(Trainer.__init__)
    assert "data_collator" not in vars(Trainer)


def test_training_template_is_none_a_text_or_a_value_error():
    """`templates.py` takes None for "none needed" and ValueError for "none known"."""
    assert _upstream.get_training_chat_template(byte_tokenizer("lfm2_2_5")) is None
    assert "generation" in _upstream.get_training_chat_template(byte_tokenizer("qwen3"))
    with pytest.raises(ValueError, match="patching is not supported"):
        _upstream.get_training_chat_template(byte_tokenizer("llama3_1"))


def test_tool_support_is_seen():
    assert _upstream.supports_tool_calling(byte_tokenizer("qwen2_5"))
    assert not _upstream.supports_tool_calling(byte_tokenizer("llama3"))


def test_cache_key_of_precomputed_references_is_an_attribute(tmp_path):
    """`_precompute_ref_logps` hashes `_precompute_model_hash`; we widen it by what else decides the values."""
    for trainer in (DPOTrainer, KTOTrainer):
        assert "self._precompute_model_hash" in inspect.getsource(trainer._precompute_ref_logps)
