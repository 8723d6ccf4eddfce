"""TRL's own trainers with and without the packed path: the same loss, gradients and metrics, option by option."""

from __future__ import annotations

import logging
import random

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, TaskType, get_peft_model
from trl import DPOConfig, DPOTrainer, KTOConfig, KTOTrainer

from tests.packing.families import tiny
from tests.support import byte_tokenizer
from trl_multiturn.trainer.packed import PackedTrainerMixin


class PackedDPOTrainer(PackedTrainerMixin, DPOTrainer):
    pass


class PackedKTOTrainer(PackedTrainerMixin, KTOTrainer):
    pass


LORA = LoraConfig(task_type=TaskType.CAUSAL_LM, r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
PLAIN = dict(
    per_device_train_batch_size=4, report_to="none", use_cpu=True, bf16=False, gradient_checkpointing=False,
    learning_rate=1e-3, max_length=None, save_strategy="no", disable_tqdm=True, max_steps=3, logging_steps=1, seed=1,
)  # fmt: skip


def text(rng, n):
    return "".join(rng.choice("abcdefgh ") for _ in range(n))


def preference_rows(n=8):
    """Pairs of two prompts; some sides go a long way together, and each prompt's pairs reuse trajectories."""
    rng = random.Random(0)
    rows = []
    for _ in range(n // 4):
        prompt, stem = text(rng, 20), text(rng, 15)
        good, bad = [stem + text(rng, m) for m in (5, 18)], [stem + text(rng, 11), text(rng, 30)]
        rows += [{"prompt": prompt, "chosen": c, "rejected": r} for c in good for r in bad]
    return Dataset.from_list(rows)


def unpaired_rows():
    rows = preference_rows()
    return Dataset.from_list(
        [{"prompt": r["prompt"], "completion": r[side], "label": side == "chosen"} for r in rows for side in
         (("chosen", "rejected") if r["chosen"] > r["rejected"] else ("rejected",))]
    )  # fmt: skip


@pytest.fixture(scope="module")
def tokenizer():
    return byte_tokenizer()


def policy(tokenizer, seed=0):
    return tiny("llama", seed=seed, vocab_size=len(tokenizer), num_hidden_layers=2).train()


def build(kind, tokenizer, tmp_path, packed, model=None, peft_config=None, eval_rows=False, with_reference=True, **kw):
    """A trainer whose policy has moved away from its reference, so that no log-ratio is zero."""
    if kind == "dpo":
        config, rows = DPOConfig, preference_rows()
        stock, ours = DPOTrainer, PackedDPOTrainer
    else:
        config, rows = KTOConfig, unpaired_rows()
        stock, ours = KTOTrainer, PackedKTOTrainer
    args = config(output_dir=str(tmp_path), **{**PLAIN, **kw})
    args.packed = packed
    reference = policy(tokenizer, seed=1) if with_reference and peft_config is None and model is None else None
    return (ours if packed else stock)(
        model=model or policy(tokenizer),
        ref_model=reference,
        args=args,
        train_dataset=rows,
        eval_dataset=rows if eval_rows else None,
        processing_class=tokenizer,
        peft_config=peft_config,
    )


def one_step(trainer):
    """Loss, gradients and metrics of the first batch."""
    batch = next(iter(trainer.get_train_dataloader()))
    trainer.model.train()
    with trainer.compute_loss_context_manager():
        loss = trainer.compute_loss(trainer.model, batch)
    loss.backward()
    gradients = {n: p.grad for n, p in trainer.model.named_parameters() if p.grad is not None}
    return loss.detach(), gradients, {k: v[-1] for k, v in trainer._metrics["train"].items()}


def assert_equal_steps(ours, stock, loss=1e-5, gradient=1e-4, metric=1e-4):
    torch.testing.assert_close(ours[0], stock[0], atol=loss, rtol=loss)
    assert ours[1].keys() == stock[1].keys()
    norm = torch.stack([g.norm() for g in stock[1].values()]).norm()
    assert norm > 1e-4
    for name, expected in stock[1].items():
        assert (ours[1][name] - expected).norm() <= gradient * norm, name
    assert ours[2].keys() == stock[2].keys()
    for name, expected in stock[2].items():
        assert ours[2][name] == pytest.approx(expected, abs=metric, rel=metric), name


def assert_packed(trainer, packed=1):
    for forward in trainer._packed_forwards:
        assert forward.calls["packed"] >= packed, forward.calls
        assert forward.calls["padded"] == 0


DPO_OPTIONS = {
    **{loss: dict(loss_type=[loss]) for loss in (
        "sigmoid", "hinge", "ipo", "nca_pair", "robust", "bco_pair", "sppo_hard", "aot", "aot_unpaired", "apo_zero",
        "apo_down", "discopop", "sft", "sigmoid_norm",
    )},
    "exo_pair": dict(loss_type=["exo_pair"], label_smoothing=1e-3),
    "rpo": dict(loss_type=["sigmoid", "sft"], loss_weights=[1.0, 0.3]),
    "ld_alpha": dict(ld_alpha=0.4),
    "wpo": dict(use_weighting=True),
    "js": dict(f_divergence_type="js_divergence"),
}  # fmt: skip


QUICK = {"sigmoid", "aot", "ld_alpha", "wpo"}


@pytest.mark.parametrize(
    "option", [pytest.param(o, marks=() if o in QUICK else pytest.mark.slow) for o in DPO_OPTIONS]
)
def test_dpo_losses(option, tokenizer, tmp_path):
    steps = []
    for packed in (True, False):
        trainer = build("dpo", tokenizer, tmp_path, packed, **DPO_OPTIONS[option])
        steps.append(one_step(trainer))
        if packed:
            assert len(trainer._packed_forwards) == 2
            assert_packed(trainer)
    assert_equal_steps(*steps)


@pytest.mark.parametrize("kw", [{}, {"loss_type": "apo_zero_unpaired"}], ids=["kto", "apo_zero_unpaired"])
def test_kto_losses(kw, tokenizer, tmp_path):
    steps = []
    for packed in (True, False):
        trainer = build("kto", tokenizer, tmp_path, packed, **kw)
        steps.append(one_step(trainer))
        if packed:
            assert_packed(trainer, packed=1 if kw else 2)  # the KL's rows too
    assert_equal_steps(*steps)


@pytest.mark.parametrize("kind", ["dpo", "kto"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_adapters_share_the_policys_seat(kind, checkpointing, tokenizer, tmp_path):
    steps = []
    for packed in (True, False):
        trainer = build(kind, tokenizer, tmp_path, packed, peft_config=LORA, gradient_checkpointing=checkpointing)
        steps.append(one_step(trainer))
        if packed:
            assert len(trainer._packed_forwards) == 1
            assert_packed(trainer, packed=2)
    assert_equal_steps(*steps)


def test_an_existing_adapter_is_its_own_reference(tokenizer, tmp_path):
    steps = []
    for packed in (True, False):
        torch.manual_seed(3)
        model = get_peft_model(policy(tokenizer), LORA)
        trainer = build("dpo", tokenizer, tmp_path, packed, model=model)
        with torch.no_grad():
            for name, parameter in trainer.model.named_parameters():
                if "lora_A.default" in name:
                    parameter.mul_(1.5)
        steps.append(one_step(trainer))
    assert_equal_steps(*steps)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["dpo", "kto"])
@pytest.mark.parametrize("kwargs", [{}, {"use_reentrant": True}], ids=["default", "reentrant"])
def test_gradient_checkpointing(kind, kwargs, tokenizer, tmp_path):
    steps = []
    for packed in (True, False):
        trainer = build(
            kind, tokenizer, tmp_path, packed, gradient_checkpointing=True, gradient_checkpointing_kwargs=kwargs
        )
        if kwargs:
            trainer.model.enable_input_require_grads()
        trainer.model.gradient_checkpointing_enable(kwargs or None)
        steps.append(one_step(trainer))
        if packed:
            assert_packed(trainer)
    assert_equal_steps(*steps)


def test_bfloat16(tokenizer, tmp_path):
    steps = []
    for packed in (True, False):
        trainer = build("dpo", tokenizer, tmp_path, packed, bf16=True, beta=0.01)
        steps.append(one_step(trainer))
        if packed:
            assert_packed(trainer)
    assert_equal_steps(*steps, loss=5e-3, gradient=5e-2, metric=5e-2)


def train(trainer):
    trainer.train()
    logs = [entry for entry in trainer.state.log_history if "loss" in entry or "eval_loss" in entry]
    timing = ("runtime", "samples_per_second", "steps_per_second")
    return [{k: v for k, v in entry.items() if not k.endswith(timing)} for entry in logs], {
        n: p.detach().clone() for n, p in trainer.model.named_parameters()
    }


@pytest.mark.slow
@pytest.mark.parametrize(
    "kw",
    [
        dict(),
        dict(precompute_ref_log_probs=True, with_reference=False),
        dict(gradient_accumulation_steps=2, per_device_train_batch_size=2),
        dict(sync_ref_model=True, ref_model_sync_steps=1),
        dict(eval_rows=True, eval_strategy="steps", eval_steps=1),
    ],
    ids=["online", "precomputed", "accumulation", "moving_reference", "evaluation"],
)
@pytest.mark.parametrize("kind", ["dpo", "kto"])
def test_whole_training_runs(kind, kw, tokenizer, tmp_path):
    if kind == "kto" and "sync_ref_model" in kw:
        pytest.skip("KTOTrainer has no moving reference")
    runs = []
    for packed in (True, False):
        trainer = build(kind, tokenizer, tmp_path / str(packed), packed, **kw)
        runs.append(train(trainer))
        if packed:
            assert_packed(trainer)
    for ours, stock in zip(runs[0][0], runs[1][0], strict=True):
        assert ours.keys() == stock.keys()
        for name, expected in stock.items():
            assert ours[name] == pytest.approx(expected, abs=2e-3, rel=2e-3), name
    # Adam turns rounding into steps where a gradient is almost zero, so most weights, not all, must agree closely
    for name, expected in runs[1][1].items():
        difference = (runs[0][1][name] - expected).abs()
        assert difference.mean() < 2e-5, name


def test_ordinary_calls_are_unchanged_and_removal_leaves_no_trace(tokenizer, tmp_path):
    model = policy(tokenizer).eval()
    ids = torch.tensor([[5, 6, 7, 8], [9, 10, 11, 12]])
    mask = torch.tensor([[1, 1, 1, 0], [1, 1, 1, 1]])
    before = model(input_ids=ids, attention_mask=mask).logits, model.generate(ids[1:], max_new_tokens=5)
    trainer = build("dpo", tokenizer, tmp_path, True, model=model, precompute_ref_log_probs=True)
    one_step(trainer)
    model.eval()
    after = model(input_ids=ids, attention_mask=mask).logits, model.generate(ids[1:], max_new_tokens=5)
    assert torch.equal(before[0], after[0]) and torch.equal(before[1], after[1])
    model.save_pretrained(tmp_path / "saved")
    assert "packed" not in (tmp_path / "saved" / "config.json").read_text()
    for forward in trainer._packed_forwards:
        forward.remove()
    assert model.config._attn_implementation == "sdpa"
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def refused_model(tokenizer):
    """A model that is not packed: its config states a dropout, which its layers, built before, do not have."""
    model = policy(tokenizer)
    model.config.attention_dropout = 0.1
    return model


def test_auto_falls_back_with_one_logged_reason_and_is_still_equal(tokenizer, tmp_path, caplog):
    steps = []
    for packed in ("auto", False):
        with caplog.at_level(logging.WARNING):
            trainer = build("dpo", tokenizer, tmp_path, packed, model=refused_model(tokenizer), peft_config=LORA)
            steps.append(one_step(trainer))
            trainer.compute_loss(trainer.model, next(iter(trainer.get_train_dataloader())))
        if packed:
            assert trainer._packed_forwards[0].calls == {"packed": 0, "padded": 4}
    reasons = [record.message for record in caplog.records if "stay padded" in record.message]
    assert len(reasons) == 1 and "attention_dropout" in reasons[0]
    assert_equal_steps(*steps)


def test_packed_true_says_why_it_cannot(tokenizer, tmp_path):
    trainer = build("dpo", tokenizer, tmp_path, True, model=refused_model(tokenizer), peft_config=LORA)
    with pytest.raises(ValueError, match="attention_dropout"):
        one_step(trainer)


def test_noise_on_embeddings_keeps_batches_padded(tokenizer, tmp_path, caplog):
    """NEFTune's noise shrinks with the length of the row: all of a batch in one row would get less than TRL's."""
    with caplog.at_level(logging.WARNING):
        trainer = build("dpo", tokenizer, tmp_path, "auto", neftune_noise_alpha=5.0, max_steps=1)
        trainer.train()
    assert trainer._packed_forwards[0].calls == {"packed": 0, "padded": 1}
    assert any("neftune_noise_alpha" in record.message for record in caplog.records)
    with pytest.raises(ValueError, match="neftune_noise_alpha"):
        one_step(build("dpo", tokenizer, tmp_path, True, neftune_noise_alpha=5.0))
