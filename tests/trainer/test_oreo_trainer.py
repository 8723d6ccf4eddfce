from __future__ import annotations

import inspect
import math

import pytest
import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, TrainerCallback
from trl import KTOConfig, KTOTrainer

from tests.support import byte_tokenizer
from trl_multiturn.models.value_model import ValueModel
from trl_multiturn.trainer import DQOTrainer, OREOConfig, OREOTrainer

from .helpers import unpaired_dataset
from .value_helpers import BETA, make_trainer, metrics_of, parameters, plain_forward, split, token_rows, whole_batch


def reference_losses(trainer, level: str) -> tuple[float, float, float]:
    """Value loss, policy loss and KL of the whole training set, in plain Python."""
    totals = [0.0, 0.0, 0.0]
    for row in trainer.train_dataset:
        forward = plain_forward(trainer, row)
        lr = [(a - b).item() for a, b in zip(forward["logps"], forward["ref_logps"], strict=True)]
        values, n = [v.item() for v in forward["values"]], len(lr)
        residual = [values[t] - row["reward"] + BETA * sum(lr[t:]) for t in range(n)]
        starts = {
            "token": range(n),
            "step": [t for t in range(n) if t == 0 or forward["turns"][t] != forward["turns"][t - 1]],
            "response": [0],
        }[level]
        totals[0] += sum(r**2 for r in residual) / n
        totals[1] += sum(residual[t] ** 2 for t in starts) / len(starts)
        totals[2] += sum(kl.item() for kl in forward["kl"]) / n
    return tuple(total / len(trainer.train_dataset) for total in totals)


def test_batches_can_be_grouped_by_length(tmp_path):
    """Every strategy that the config offers works; this one reads a column of the rows."""
    trainer = make_trainer(
        tmp_path, train_sampling_strategy="group_by_length", per_device_train_batch_size=2, dataset=token_rows(8)
    )
    lengths = [len(row["prompt_ids"]) + len(row["completion_ids"]) for row in trainer.train_dataset]
    assert trainer.train_dataset["length"] == lengths
    widths = [batch["attention_mask"].sum(dim=1).tolist() for batch in trainer.get_train_dataloader()]
    assert sorted(sum(widths, [])) == sorted(lengths)
    assert widths[0][0] == max(lengths)  # the longest row comes first, and its neighbours are long


class TestLoss:
    @pytest.mark.parametrize("level", ["token", "step", "response"])
    @pytest.mark.parametrize(("value_model", "lora"), [("full", False), ("adapter", True), ("head", False)])
    def test_equals_the_equations_on_whole_logits(self, tmp_path, level, value_model, lora):
        trainer = make_trainer(tmp_path, level=level, value_model=value_model, lora=lora, kl_coef=0.7)
        loss = trainer.compute_loss(trainer.model, whole_batch(trainer))
        value_loss, policy_loss, kl = reference_losses(trainer, level)
        assert min(value_loss, policy_loss, kl) > 1e-3
        assert loss.item() == pytest.approx(value_loss + policy_loss + 0.7 * kl, rel=1e-4)
        metrics = metrics_of(trainer)
        assert metrics["loss/value"] == pytest.approx(value_loss, rel=1e-4)
        assert metrics["kl"] == pytest.approx(kl, rel=1e-4)

    def test_the_reference_of_a_trained_head_is_the_untrained_one(self, tmp_path):
        """An adapter that also trains the LM head: the KL is to the head below it."""
        trainer = make_trainer(tmp_path, lora=True, modules_to_save=["lm_head"], kl_coef=0.7)
        assert any("lm_head" in name and p.requires_grad for name, p in trainer.model.named_parameters())
        trainer.compute_loss(trainer.model, whole_batch(trainer))
        assert metrics_of(trainer)["kl"] == pytest.approx(reference_losses(trainer, "token")[2], rel=1e-4)

    @pytest.mark.parametrize("value_model", ["adapter", "full", "head"])
    @pytest.mark.parametrize("lora", [False, True])
    def test_each_loss_trains_its_own_model_only(self, tmp_path, value_model, lora):
        trainer = make_trainer(tmp_path, value_model=value_model, lora=lora)
        batch = whole_batch(trainer)
        losses = {}

        def keep(tensors):
            losses["value"], losses["policy"], metrics = OREOTrainer.losses(trainer, tensors)
            return losses["value"], losses["policy"], metrics

        trainer.losses = keep
        trainer.compute_loss(trainer.model, batch)
        trained = {name: p for name, p in trainer.model.named_parameters() if p.requires_grad}
        for kind, loss in losses.items():
            gradients = torch.autograd.grad(loss, list(trained.values()), allow_unused=True, retain_graph=True)
            moved = {n for n, g in zip(trained, gradients, strict=True) if g is not None and g.abs().max() > 0}
            assert moved and all(name.startswith("value_model.") == (kind == "value") for name in moved)
            if kind == "value":
                assert "value_model.head.weight" in moved
        # nothing that is trained is left out
        everything = torch.autograd.grad(sum(losses.values()), list(trained.values()), allow_unused=True)
        assert all(gradient is not None for gradient in everything)

    def test_gradient_checkpointing_changes_nothing(self, tmp_path):
        """Layers run twice then; a value adapter switched by a global flag would see the wrong state."""
        gradients = []
        for checkpointing in (False, True):
            settings = {"value_model": "adapter", "lora": True, "gradient_checkpointing": checkpointing}
            trainer = make_trainer(tmp_path / str(checkpointing), **settings)
            if checkpointing:
                trainer.model.activation_checkpointing_enable()
                assert trainer.value_model.backbone.is_activation_checkpointing
            trainer.model.train()
            trainer.compute_loss(trainer.model, whole_batch(trainer)).backward()
            gradients.append({n: p.grad for n, p in trainer.model.named_parameters() if p.grad is not None})
        assert gradients[0].keys() == gradients[1].keys()
        for name in gradients[0]:
            torch.testing.assert_close(gradients[0][name], gradients[1][name])

    @pytest.mark.parametrize(("value_model", "lora"), [("full", False), ("adapter", True), ("head", False)])
    def test_packed_rows_give_the_same_loss_and_gradients(self, tmp_path, value_model, lora):
        losses, gradients = [], []
        for packed in (False, True):
            settings = {"value_model": value_model, "lora": lora, "packed": packed, "kl_coef": 0.5}
            trainer = make_trainer(tmp_path / str(packed), **settings)
            trainer.model.train()
            loss = trainer.compute_loss(trainer.model, whole_batch(trainer))
            loss.backward()
            losses.append(loss.item())
            gradients.append({n: p.grad for n, p in trainer.model.named_parameters() if p.grad is not None})
            calls = [forward.calls["packed"] for forward in trainer._packed_forwards]
            assert bool(calls) == packed and all(calls)
        assert losses[0] == pytest.approx(losses[1], rel=1e-5)
        for name in gradients[0]:
            torch.testing.assert_close(gradients[0][name], gradients[1][name], rtol=1e-3, atol=1e-5)

    def test_without_kl_coef_no_distribution_is_computed(self, tmp_path):
        trainer = make_trainer(tmp_path, kl_coef=0.0)
        _, hidden, head = trainer._reference(whole_batch(trainer))
        assert hidden is None and head is None
        loss = trainer.compute_loss(trainer.model, whole_batch(trainer)).item()
        value_loss, policy_loss, _ = reference_losses(trainer, "token")
        assert loss == pytest.approx(value_loss + policy_loss, rel=1e-4)

    def test_compiled_models_train_as_others_do(self, tmp_path):
        """A compiled reference is a wrapper that has no truth value."""
        losses = []
        settings = {"kl_coef": 0.5, "max_steps": 2, "per_device_train_batch_size": 4}  # batches of one shape
        for compiled in ({}, {"torch_compile": True, "torch_compile_backend": "eager"}):
            trainer = make_trainer(tmp_path / str(len(compiled)), **settings, **compiled)
            trainer.train()
            losses.append([entry["loss"] for entry in trainer.state.log_history if "loss" in entry])
        assert len(losses[0]) == 2
        assert losses[0] == pytest.approx(losses[1], rel=1e-4)

    def test_lines_as_steps(self, tmp_path):
        newline = byte_tokenizer()("\n", add_special_tokens=False).input_ids[0]
        rows = token_rows(2)
        ids = [row[:1] + [newline] + row[2:] for row in rows["completion_ids"]]
        rows = rows.remove_columns("completion_ids").add_column("completion_ids", ids)
        trainer = make_trainer(tmp_path, dataset=rows, level="step", step_delimiter="line")
        assert trainer.train_dataset["step_ids"][0] == [0, 0, 1, 1, 1, 2, 2, 2, 2]
        step_losses = trainer.losses  # the column reaches the loss, one token early like every target
        seen = []
        trainer.losses = lambda batch: seen.append(batch.step_ids) or step_losses(batch)
        trainer.compute_loss(trainer.model, whole_batch(trainer))
        start = len(rows[0]["prompt_ids"]) - 1
        assert seen[0][0, start : start + 9].tolist() == [0, 0, 1, 1, 1, 2, 2, 2, 2]


class TestTraining:
    def test_accumulated_batches_of_one_equal_a_batch_of_four(self, tmp_path):
        weights = []
        for size, accumulation in ((4, 1), (1, 4)):
            trainer = make_trainer(
                tmp_path / str(size),
                value_model="full",
                optim="sgd",
                max_steps=2,
                max_grad_norm=0.0,
                value_learning_rate=1e-2,
                per_device_train_batch_size=size,
                gradient_accumulation_steps=accumulation,
                train_sampling_strategy="sequential",
            )
            trainer.train()
            weights.append(parameters(trainer.model))
        for name in weights[0]:
            torch.testing.assert_close(weights[0][name], weights[1][name], rtol=1e-4, atol=1e-6)

    def test_a_token_budget_computes_batches_in_parts(self, tmp_path):
        weights = []
        for budget in (None, 30):
            settings = {"value_model": "full", "optim": "sgd", "max_steps": 2, "max_grad_norm": 0.0}
            settings |= {"per_device_train_batch_size": 4, "max_tokens_per_batch": budget, "value_learning_rate": 1e-2}
            trainer = make_trainer(tmp_path / str(budget), **settings)
            trainer.train()
            weights.append(parameters(trainer.model))
        for name in weights[0]:
            torch.testing.assert_close(weights[0][name], weights[1][name], rtol=1e-4, atol=1e-6)

    def test_two_learning_rates_in_one_optimizer(self, tmp_path):
        settings = {"learning_rate": 1e-3, "value_learning_rate": 1e-1, "optim": "sgd", "max_grad_norm": 1e9}
        trainer = make_trainer(tmp_path, value_model="full", max_steps=1, **settings)
        gradients = {}

        class Keep(TrainerCallback):
            def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
                gradients.update({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})

        trainer.add_callback(Keep())
        before = parameters(trainer.model)
        trainer.train()
        for name, after in parameters(trainer.model).items():
            rate = 1e-1 if name.startswith("value_model.") else 1e-3
            torch.testing.assert_close(after, before[name] - rate * gradients[name], rtol=1e-4, atol=1e-7)

    def test_norms_are_clipped_apart(self, tmp_path):
        trainer = make_trainer(tmp_path, value_model="full", max_grad_norm=0.01, value_max_grad_norm=0.02)
        trainer.compute_loss(trainer.model, whole_batch(trainer)).backward()
        trainer._clip_grad_norm(trainer.model)
        norms = {True: 0.0, False: 0.0}
        for name, p in trainer.model.named_parameters():
            norms[name.startswith("value_model.")] += p.grad.square().sum().item() if p.grad is not None else 0.0
        assert math.sqrt(norms[False]) == pytest.approx(0.01, rel=1e-3)
        assert math.sqrt(norms[True]) == pytest.approx(0.02, rel=1e-3)

    def test_only_the_value_model_learns_during_its_warm_up(self, tmp_path):
        trainer = make_trainer(tmp_path, value_model="full", value_warmup_steps=2, max_steps=2, weight_decay=0.5)
        policy, values = split(trainer)
        trainer.train()
        policy_after, values_after = split(trainer)
        assert all(torch.equal(policy[name], policy_after[name]) for name in policy)
        assert any(not torch.equal(values[name], values_after[name]) for name in values)
        trainer.args.max_steps = 3
        trainer.train()
        trainer = make_trainer(tmp_path, value_model="full", value_warmup_steps=2, max_steps=3)
        policy, _ = split(trainer)
        trainer.train()
        assert any(not torch.equal(policy[name], after) for name, after in split(trainer)[0].items())

    def test_a_warm_up_that_deepspeed_would_ignore_is_refused(self, tmp_path):
        trainer = make_trainer(tmp_path, value_model="full", value_warmup_steps=2)
        trainer.is_deepspeed_enabled = True
        with pytest.raises(ValueError, match="`value_warmup_steps=2`.*DeepSpeed"):
            trainer._build_value_model()

    def test_values_learn_which_trajectories_succeed(self, tmp_path):
        """Completions of two letters, one of which is right: values must come apart, and so must likelihoods."""
        rows = [
            {"prompt_ids": [70, 71], "completion_ids": [80 + side] * 4, "action_mask": [1] * 4, "label": side == 1}
            for side in (0, 1)
        ] * 2
        settings = {"max_steps": 40, "per_device_train_batch_size": 4, "learning_rate": 2e-3, "logging_steps": 5}
        settings |= {"value_model": "full", "value_learning_rate": 5e-3, "beta": 0.05}
        trainer = make_trainer(tmp_path, dataset=Dataset.from_list(rows), **settings)
        torch.nn.init.zeros_(trainer.value_model.head.weight)
        trainer.train()
        logs = [entry for entry in trainer.state.log_history if "value/final_chosen" in entry]
        assert logs[-1]["value/final_chosen"] - logs[-1]["value/final_rejected"] > 0.5
        assert logs[-1]["value/explained_variance"] > 0.5 > logs[0]["value/explained_variance"]
        assert logs[-1]["rewards/margins"] > logs[0]["rewards/margins"]
        assert logs[-1]["loss/value"] < 0.1 * logs[0]["loss/value"]

    def test_conversations_and_evaluation(self, tmp_path):
        trainer = make_trainer(
            tmp_path, dataset=unpaired_dataset(4), eval_dataset={"a": unpaired_dataset(3), "b": token_rows(2)}
        )
        trainer.train()
        metrics = trainer.evaluate()
        assert metrics["eval_a_loss"] > 0 and metrics["eval_b_loss"] > 0
        logged = [entry for entry in trainer.state.log_history if "eval_b_loss" in entry][-1]
        assert logged["eval_kl"] > 0 and "eval_value/mean" in logged
        with torch.no_grad():
            by_hand = trainer.compute_loss(
                trainer.model, trainer.data_collator([trainer.eval_dataset["b"][i] for i in range(2)])
            )
        assert metrics["eval_b_loss"] == pytest.approx(by_hand.item(), rel=1e-4)

    def test_streamed_rows(self, tmp_path):
        trainer = make_trainer(tmp_path, dataset=unpaired_dataset(4).to_iterable_dataset())
        trainer.train()
        assert trainer.state.global_step == 2


class TestCheckpoints:
    @pytest.mark.parametrize("value_model", ["adapter", "full", "head"])
    @pytest.mark.parametrize("lora", [False, True])
    def test_the_policy_is_plain_and_the_value_model_loads_with_one_call(self, tmp_path, value_model, lora):
        trainer = make_trainer(tmp_path, value_model=value_model, lora=lora)
        trainer.train()
        trainer.save_model(str(tmp_path / "saved"))
        ids = torch.tensor([[70, 71, 72, 73]])
        policy = AutoModelForCausalLM.from_pretrained(tmp_path / "saved", dtype=torch.float32)
        assert not [name for name in policy.state_dict() if "value_model" in name]
        torch.testing.assert_close(policy(ids).logits, trainer.model(ids).logits)

        value_model = ValueModel.from_pretrained(tmp_path / "saved" / "value_model", dtype=torch.float32)
        expected = trainer.model(
            input_ids=ids, attention_mask=torch.ones_like(ids), labels=ids, values=True
        ).state_values.squeeze(0)
        assert expected.abs().min() > 0
        scores = value_model.score([ids[0, :k].tolist() for k in (3, 1, 2)])
        assert scores == pytest.approx(expected[[2, 0, 1]].tolist(), rel=1e-4)
        assert not any(p.requires_grad for p in value_model.parameters() if value_model.kind != "head")

    @pytest.mark.parametrize(("value_model", "lora"), [("adapter", False), ("adapter", True), ("full", True)])
    def test_resuming_restores_both_models_and_both_optimizer_states(self, tmp_path, value_model, lora):
        settings = {"value_model": value_model, "lora": lora, "save_strategy": "steps", "save_steps": 2}
        straight = make_trainer(tmp_path / "a", max_steps=4, **settings)
        straight.train()
        resumed = make_trainer(tmp_path / "b", max_steps=4, **settings)
        resumed.train(resume_from_checkpoint=str(tmp_path / "a" / "out" / "checkpoint-2"))
        expected = parameters(straight.model)
        for name, weight in parameters(resumed.model).items():
            torch.testing.assert_close(weight, expected[name], rtol=1e-5, atol=1e-7)
        assert resumed.state.global_step == 4

    def test_the_best_checkpoint_brings_its_value_model(self, tmp_path):
        settings = {"save_strategy": "steps", "eval_strategy": "steps", "save_steps": 1, "eval_steps": 1}
        settings |= {"load_best_model_at_end": True, "max_steps": 3, "learning_rate": 1.0, "value_learning_rate": 1.0}
        trainer = make_trainer(tmp_path, value_model="full", eval_dataset=token_rows(2), **settings)
        trainer.train()
        best = ValueModel.from_pretrained(f"{trainer.state.best_model_checkpoint}/value_model")
        for name, weight in best.named_parameters():
            torch.testing.assert_close(weight, trainer.value_model.get_parameter(name))
        last = ValueModel.from_pretrained(f"{tmp_path}/out/checkpoint-3/value_model")
        assert trainer.state.best_model_checkpoint.endswith("-3") or not torch.equal(
            last.head.weight, best.head.weight
        )


class TestReference:
    @pytest.mark.parametrize("lora", [False, True])
    def test_precomputed_log_probabilities_equal_those_on_the_fly(self, tmp_path, lora):
        settings = {"lora": lora, "value_model": "head"}  # an adapter would start from other random numbers
        fly = make_trainer(tmp_path / "a", **settings)
        settings |= {"precompute_ref_log_probs": True, "precompute_ref_batch_size": 3}
        rows = make_trainer(tmp_path / "b", **settings)
        batch = whole_batch(rows)
        for row in rows.train_dataset:
            assert len(row["ref_logps"]) == len(row["completion_ids"])
            assert all(
                (logp == 0) == (not action) for logp, action in zip(row["ref_logps"], row["action_mask"], strict=True)
            )
        expected, _, _ = fly._reference(whole_batch(fly))
        torch.testing.assert_close(rows._reference(batch)[0], expected, rtol=1e-4, atol=1e-5)
        assert rows.compute_loss(rows.model, batch).item() == pytest.approx(
            fly.compute_loss(fly.model, whole_batch(fly)).item(), rel=1e-4
        )

    def test_rows_may_bring_their_own(self, tmp_path):
        mine = [[-float(i + 1)] * len(ids) for i, ids in enumerate(token_rows()["completion_ids"])]
        trainer = make_trainer(tmp_path, dataset=token_rows(ref_logps=mine), kl_coef=0.0)
        logps, _, _ = trainer._reference(whole_batch(trainer))
        start = len(trainer.train_dataset[1]["prompt_ids"]) - 1
        assert logps[1, start : start + len(mine[1])].tolist() == mine[1]

    @pytest.mark.parametrize("lora", [False, True])
    @pytest.mark.parametrize("value_model", ["adapter", "full"])
    def test_refreshing_restarts_ratios_and_leaves_the_value_model_alone(self, tmp_path, lora, value_model):
        trainer = make_trainer(tmp_path, lora=lora, value_model=value_model)
        batch = whole_batch(trainer)
        labels = batch["input_ids"].masked_fill(batch["completion_mask"] == 0, -100)
        call = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"], "labels": labels}
        before = trainer.model(**call, values=True)
        trainer.compute_loss(trainer.model, batch)
        metrics = metrics_of(trainer)
        assert metrics["kl"] > 1e-3 and abs(metrics["rewards/chosen"]) > 1e-3
        trainer.refresh_reference()
        trainer.compute_loss(trainer.model, batch)
        metrics = metrics_of(trainer)
        assert metrics["kl"] == pytest.approx(0, abs=1e-6) and metrics["rewards/chosen"] == pytest.approx(0, abs=1e-5)
        after = trainer.model(**call, values=True)
        mask = labels[:, 1:] != -100
        torch.testing.assert_close(before.state_values[mask], after.state_values[mask])
        torch.testing.assert_close(before.log_probs, after.log_probs)
        policy, values = split(trainer)
        trainer.train()  # gradients still reach both models after adapters were switched
        policy_after, values_after = split(trainer)
        assert policy.keys() == policy_after.keys() and values.keys() == values_after.keys()
        for before, after in ((policy, policy_after), (values, values_after)):
            assert any(not torch.equal(before[name], after[name]) for name in before)

    @pytest.mark.parametrize("lora", [False, True])
    def test_columns_of_the_present_policy_bring_the_kl_reference_along(self, tmp_path, lora):
        trainer = make_trainer(tmp_path, lora=lora, precompute_ref_log_probs=True)
        trainer.train_dataset = trainer.compute_reference_columns(trainer.train_dataset, "policy")
        trainer.compute_loss(trainer.model, whole_batch(trainer))
        metrics = metrics_of(trainer)
        assert metrics["kl"] == pytest.approx(0, abs=1e-6) and metrics["rewards/chosen"] == pytest.approx(0, abs=1e-5)

    @pytest.mark.parametrize("lora", [False, True])
    def test_resuming_restores_a_refreshed_reference(self, tmp_path, lora):
        class Refresh(TrainerCallback):
            trainer = None

            def on_step_end(self, args, state, control, **kwargs):
                if state.global_step == 1:
                    self.trainer.refresh_reference()

        settings = {"lora": lora, "max_steps": 3, "save_strategy": "steps", "save_steps": 2, "value_model": "adapter"}
        results = []
        for name, checkpoint in (("a", None), ("b", f"{tmp_path}/a/out/checkpoint-2")):
            trainer = make_trainer(tmp_path / name, callbacks=[Refresh()], **settings)
            Refresh.trainer = trainer
            trainer.train(resume_from_checkpoint=checkpoint)
            results.append(parameters(trainer.model))
        for name, weight in results[0].items():
            torch.testing.assert_close(results[1][name], weight, rtol=1e-5, atol=1e-7)

    def test_an_adapter_beside_a_lora_policy_needs_no_second_backbone(self, tmp_path):
        trainer = make_trainer(tmp_path, lora=True, value_model="adapter")
        assert trainer.ref_model is None
        shared = {
            p.data_ptr() for n, p in trainer.model.named_parameters(remove_duplicate=False) if "value_model" not in n
        }
        own = [n for n, p in trainer.value_model.named_parameters() if p.data_ptr() not in shared]
        assert own and all("lora_" in name or name == "head.weight" for name in own)


class TestRows:
    def test_turns_of_the_policy_only(self, tmp_path):
        trainer = make_trainer(tmp_path, dataset=unpaired_dataset(2))
        batch = whole_batch(trainer)
        text = trainer.processing_class.decode(batch["input_ids"][0][batch["completion_mask"][0].bool()])
        assert "<tool_call>" in text and "tool_response" not in text
        assert batch["reward"].tolist() == [1.0, 0.0]

    def test_long_rows_are_dropped_whole_and_counted(self, tmp_path, caplog):
        longest = max(len(row["prompt_ids"]) + len(row["completion_ids"]) for row in token_rows())
        trainer = make_trainer(tmp_path, max_length=longest - 1)
        assert len(trainer.train_dataset) == 3
        assert trainer.row_statistics == {
            "data/rows": 3,
            "data/rows_dropped_too_long": 1,
            "data/rows_dropped_untrained": 0,
        }
        with pytest.raises(ValueError, match="No row is left to train on"):
            make_trainer(tmp_path, max_length=3)

    def test_rows_without_an_action_are_dropped(self, tmp_path):
        rows = token_rows().remove_columns("action_mask")
        masks = [row["action_mask"] for row in token_rows()]
        masks[1] = [0] * len(masks[1])
        trainer = make_trainer(tmp_path, dataset=rows.add_column("action_mask", masks))
        assert len(trainer.train_dataset) == 3

    def test_process_rewards_are_not_read_and_the_log_says_so(self, tmp_path, caplog):
        trainer = make_trainer(tmp_path, dataset=token_rows(turn_rewards=[[5.0, 5.0]] * 4))
        assert "['turn_rewards'], which OREO does not read" in caplog.text
        loss = trainer.compute_loss(trainer.model, whole_batch(trainer)).item()
        caplog.clear()
        plain = make_trainer(tmp_path)
        assert not caplog.text and plain.compute_loss(plain.model, whole_batch(plain)).item() == loss

    @pytest.mark.parametrize(
        ("rows", "message"),
        [
            (token_rows().remove_columns("reward"), "Row 0: neither `reward` nor `label`"),
            (token_rows().remove_columns("reward").add_column("reward", [1.0, None, 0.0, 0.0]), "Row 1: neither"),
            (token_rows().remove_columns("reward").add_column("reward", [1.0, math.nan, 0.0, 0.0]), "reward is nan"),
            (token_rows(behavior_logps=[[0.0]] * 4), "`behavior_logps` has 1 entries but `completion_ids` has 9"),
            (token_rows(turn_rewards=[[1.0]] * 4), "`turn_rewards` has 1 entries, but the mask shows 2 turns"),
            (token_rows(turn_rewards=[[1.0, None]] * 4), "Row 0: `turn_rewards` holds None at position 1"),
            (token_rows().remove_columns("action_mask"), r"`completion_ids` but no \['action_mask'\]"),
        ],
    )
    def test_wrong_rows_are_refused(self, tmp_path, rows, message):
        with pytest.raises(ValueError, match=message):
            make_trainer(tmp_path, dataset=rows)


class TestFace:
    def test_the_constructor_is_the_parents(self):
        assert list(inspect.signature(OREOTrainer).parameters) == list(inspect.signature(KTOTrainer).parameters)
        assert issubclass(OREOTrainer, KTOTrainer) and issubclass(OREOConfig, KTOConfig)

    def test_defaults_are_the_papers(self, tmp_path):
        def config(**kwargs):
            return OREOConfig(output_dir=str(tmp_path), bf16=False, use_cpu=True, **kwargs)

        assert (config().beta, config().learning_rate, config().kl_coef) == (0.03, 5e-6, 0.01)
        assert config(level="step").kl_coef == 0.1 and config(level="response").kl_coef == 0.3
        assert config(value_model="full").value_learning_rate == 5e-6
        assert config(value_model="adapter").value_learning_rate == 1e-4
        assert config(kl_coef=0.0).kl_coef == 0.0

    @pytest.mark.parametrize(
        ("kwargs", "message"),
        [
            ({"level": "turn"}, "`level`"),
            ({"value_model": "separate"}, "`value_model`"),
            ({"loss_type": "kto"}, "`loss_type='kto'`"),
            ({"sync_ref_model": True}, "`sync_ref_model=True`"),
            ({"step_delimiter": "word"}, "`step_delimiter`"),
            ({"beta": 0.0}, "`beta=0.0` must be above 0"),
            ({"beta": math.nan}, "`beta=nan`"),
            ({"kl_coef": -0.1}, "`kl_coef=-0.1` must be at least 0"),
            ({"kl_chunk_size": 0}, "`kl_chunk_size=0`"),
            ({"value_lora_rank": 0}, "`value_lora_rank=0`"),
            ({"value_learning_rate": -1e-3}, "`value_learning_rate=-0.001`"),
            ({"value_warmup_steps": 0.5}, "`value_warmup_steps=0.5` must be a whole number"),
            ({"value_max_grad_norm": -1.0}, "`value_max_grad_norm=-1.0`"),
        ],
    )
    def test_wrong_settings_are_refused(self, tmp_path, kwargs, message):
        with pytest.raises(ValueError, match=message):
            OREOConfig(output_dir=str(tmp_path), bf16=False, **kwargs)

    def test_what_cannot_work_is_refused_at_once(self, tmp_path):
        arguments = {"model": "unused", "train_dataset": token_rows()}
        with pytest.raises(TypeError, match="OREOConfig"):
            OREOTrainer(args=KTOConfig(output_dir=str(tmp_path), bf16=False), **arguments)
        args = OREOConfig(output_dir=str(tmp_path), bf16=False)
        with pytest.raises(ValueError, match="compute_metrics"):
            OREOTrainer(args=args, compute_metrics=lambda _: {}, **arguments)
        with pytest.raises(ValueError, match="optimizers"):
            OREOTrainer(args=args, optimizers=(object(), None), **arguments)


class Rounds(TrainerCallback):
    """Supplies the rows of each epoch, as `ToolRolloutGenerator` does."""

    lr_schedule = "run"

    def __init__(self, rounds: list[Dataset]):
        self.rounds, self.first_steps, self.starts = rounds, [], []

    def attach(self, trainer):
        self.trainer = trainer

    def position(self, global_step):
        return max((pair for pair in enumerate(self.first_steps) if pair[1] <= global_step), default=(0, 0))

    def begin_iteration(self, iteration, resumed_inside):
        rows = self.trainer.prepare_rows(self.rounds[iteration])
        self.first_steps.append(self.trainer.state.global_step)
        self.trainer.train_dataset = self.trainer.compute_reference_columns(rows, reference="policy")
        with torch.no_grad():
            self.trainer.model.eval()
            self.trainer.compute_loss(self.trainer.model, whole_batch(self.trainer))
        self.starts.append(metrics_of(self.trainer))
        self.trainer.model.train()
        return self.trainer.train_dataset


@pytest.mark.parametrize("lora", [False, True])
@pytest.mark.parametrize("cls", [OREOTrainer, DQOTrainer])
def test_iterations_restart_at_the_reference(tmp_path, lora, cls):
    """Each round's reference is the policy that starts it: log-ratios and KL begin at zero, values go on."""
    rounds = Rounds([token_rows(4), token_rows(3), token_rows(2)])
    settings = {"max_steps": -1, "num_train_epochs": 3, "value_learning_rate": 1e-3}
    trainer = make_trainer(tmp_path, cls=cls, dataset="rounds", callbacks=[rounds], lora=lora, **settings)
    trainer.train()
    assert rounds.first_steps == [0, 2, 4] and trainer.state.global_step == 5
    for start in rounds.starts:
        assert start["rewards/chosen"] == pytest.approx(0, abs=1e-4)
        assert start.get("kl", 0) == pytest.approx(0, abs=1e-5)
    assert len({start["value/mean"] for start in rounds.starts}) == 3
    trained = [entry for entry in trainer.state.log_history if "rewards/chosen" in entry]
    assert abs(trained[1]["rewards/chosen"]) > 1e-3
