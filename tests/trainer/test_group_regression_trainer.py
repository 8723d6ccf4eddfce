"""Group regression on tiny models: its loss on whole logits, its groups, its references, and what is refused."""

from __future__ import annotations

import inspect
import logging
import math

import pytest
import torch
from datasets import Dataset
from trl import KTOConfig, KTOTrainer

from trl_multiturn.packing.batching import PromptGroupedSampler
from trl_multiturn.trainer import GroupRegressionConfig, GroupRegressionTrainer

from .helpers import log_ratio, logged
from .value_helpers import BETA, group_rows, make_trainer, metrics_of, parameters, whole_batch


def make(folder, dataset=None, **settings):
    settings = {"per_device_train_batch_size": 8, **settings}
    return make_trainer(folder, GroupRegressionTrainer, group_rows() if dataset is None else dataset, **settings)


def residuals(trainer, baseline, returns=None):
    """β Σ ℓ − (R − b) of every row, in plain floats, from whole logits."""
    rows = list(trainer.train_dataset)
    columns = [(row["prompt_ids"], row["completion_ids"], row["action_mask"]) for row in rows]
    scaled = [BETA * log_ratio(trainer.model, trainer.ref_model, *row).item() for row in columns]
    returns = [row["reward"] for row in rows] if returns is None else returns
    output = []
    for i in range(len(rows)):
        group = [j for j in range(len(rows)) if rows[j]["prompt_id"] == rows[i]["prompt_id"]]
        if baseline == "variance":
            b = sum(returns[j] - scaled[j] for j in group) / len(group)
        elif baseline == "mean":
            b = sum(returns[j] for j in group) / len(group)
        else:
            b = BETA * math.log(sum(math.exp(returns[j] / BETA) for j in group) / len(group))
        output.append(scaled[i] - (returns[i] - b))
    return output


def loss_of(trainer):
    return trainer.compute_loss(trainer.model, whole_batch(trainer)).item()


def mean_square(numbers):
    return sum(x**2 for x in numbers) / len(numbers)


@pytest.mark.parametrize(("baseline", "correction"), [("variance", 4 / 3), ("soft_mean", 1), ("mean", 1)])
def test_loss_equals_the_equations_on_whole_logits(tmp_path, baseline, correction):
    trainer = make(tmp_path, baseline=baseline)
    assert loss_of(trainer) == pytest.approx(correction * mean_square(residuals(trainer, baseline)), rel=1e-4)
    metrics = metrics_of(trainer)
    assert metrics["reward"] == pytest.approx(0.3125) and metrics["frac_reward_zero_std"] == 0
    assert metrics["rewards/margins"] == pytest.approx(metrics["rewards/chosen"] - metrics["rewards/rejected"])


def test_margins_and_process_rewards_are_part_of_the_return(tmp_path):
    margins = [0.1, -0.2, None, 0.0, 0.3, 0.0, 0.0, 0.5]
    trainer = make(tmp_path, group_rows(margin=margins, turn_rewards=[[0.5, 0.25]] * 8), baseline="mean")
    returns = [r + 0.75 - (m or 0) for r, m in zip(group_rows()["reward"], margins, strict=True)]
    assert trainer.train_dataset["returns"] == pytest.approx(returns)
    assert loss_of(trainer) == pytest.approx(mean_square(residuals(trainer, "mean", returns)), rel=1e-4)


def test_the_soft_mean_may_have_a_temperature_of_its_own(tmp_path):
    trainer = make(tmp_path, baseline="soft_mean", baseline_beta=100.0)
    assert trainer.train_dataset["baseline"] == pytest.approx([0.3125] * 8, abs=2e-3)  # nearly the mean


class TestGroups:
    def test_rows_of_a_group_have_the_same_id_and_the_same_prompt(self, tmp_path):
        """Two questions with the same words and other answers are two groups."""
        rows = group_rows(1, 8).remove_columns("prompt_id")
        assert set(make(tmp_path, rows).train_dataset["group"]) == {0}
        trainer = make(tmp_path, rows.add_column("prompt_index", [4, 4, 4, 4, 9, 9, 9, 9]), max_steps=1)
        assert trainer.train_dataset["group"][:] == [0, 0, 0, 0, 1, 1, 1, 1]
        trainer.train()
        (metrics,) = (entry for entry in trainer.state.log_history if "data/groups" in entry)
        assert (metrics["data/groups"], metrics["data/largest_group"], metrics["data/rows_alone_in_group"]) == (
            2,
            4,
            0,
        )

    def test_a_group_is_in_one_batch(self, tmp_path):
        trainer = make(tmp_path, group_rows(6, 4), per_device_train_batch_size=4)
        sampler = trainer._get_train_sampler()
        assert isinstance(sampler, PromptGroupedSampler)
        order = [trainer.train_dataset["group"][i] for i in sampler]
        assert sorted(order) != order or order[0]  # shuffled
        assert all(len(set(order[i : i + 4])) == 1 for i in range(0, 24, 4))

    def test_rows_alone_are_told_and_where_all_are_it_is_refused(self, tmp_path, caplog):
        with caplog.at_level(logging.WARNING):
            make(tmp_path, group_rows().select([0, 1, 2, 5]))
        assert "1 of 4 rows of the train dataset are alone in their group" in caplog.text
        with pytest.raises(ValueError, match="Each of the 2 rows of the train dataset is alone in its group"):
            make(tmp_path, group_rows().select([0, 5]))

    def test_a_batch_smaller_than_a_group_is_told_where_that_matters(self, tmp_path, caplog):
        with caplog.at_level(logging.WARNING):
            make(tmp_path, per_device_train_batch_size=2, baseline="soft_mean")
            assert "Groups have up to" not in caplog.text
            make(tmp_path, per_device_train_batch_size=2)
        assert "Groups have up to 4 rows, but a step compares at most 2" in caplog.text

    def test_streamed_rows_are_refused(self, tmp_path):
        with pytest.raises(ValueError, match="is streamed"):
            make(tmp_path, group_rows().to_iterable_dataset())


class TestBehaviorReference:
    def test_the_rows_log_probabilities_are_the_reference(self, tmp_path):
        generator = torch.Generator().manual_seed(2)
        logps = [(-4 - torch.rand(len(ids), generator=generator)).tolist() for ids in group_rows()["completion_ids"]]
        sampled = make(tmp_path, group_rows(behavior_logps=logps), behavior_reference=True)
        assert sampled.ref_model is None
        given = make(tmp_path, group_rows(ref_logps=logps))
        assert loss_of(sampled) == pytest.approx(loss_of(given), rel=1e-6)

    def test_rows_without_them_are_refused(self, tmp_path):
        with pytest.raises(ValueError, match="have no `behavior_logps`"):
            make(tmp_path, behavior_reference=True)


@pytest.mark.parametrize("lora", [False, True])
def test_training_raises_what_earns_more(tmp_path, lora):
    trainer = make(tmp_path, lora=lora, learning_rate=1e-2, max_steps=10, beta=0.1, eval_dataset=group_rows(1))
    trainer.train()
    assert logged(trainer, "rewards/margins")[-1] > logged(trainer, "rewards/margins")[0] + 0.2
    assert logged(trainer, "loss")[-1] < 0.5 * logged(trainer, "loss")[0]
    assert trainer.evaluate()["eval_reward"] == pytest.approx(0.3125)


def one_step(trainer):
    trainer.compute_loss(trainer.model, whole_batch(trainer)).backward()
    return {name: p.grad for name, p in trainer.model.named_parameters() if p.grad is not None}


def test_a_packed_group_has_the_gradient_of_a_padded_one(tmp_path):
    packed, padded = (one_step(make(tmp_path, packed=packed)) for packed in (True, False))
    assert packed.keys() == padded.keys()
    for name, expected in padded.items():
        torch.testing.assert_close(packed[name], expected, atol=1e-6, rtol=1e-3, msg=name)


def test_parts_of_a_batch_have_its_gradient(tmp_path):
    weights = []
    for budget in (None, 30):
        trainer = make(tmp_path, baseline="soft_mean", max_tokens_per_batch=budget, max_steps=1, optim="sgd")
        trainer.train()
        weights.append(parameters(trainer.model))
    for name, expected in weights[0].items():
        torch.testing.assert_close(weights[1][name], expected, atol=2e-6, rtol=1e-4, msg=name)


class TestFace:
    def test_the_constructor_is_the_parents(self):
        parents = inspect.signature(KTOTrainer).parameters
        assert list(inspect.signature(GroupRegressionTrainer).parameters) == list(parents)
        assert issubclass(GroupRegressionTrainer, KTOTrainer) and issubclass(GroupRegressionConfig, KTOConfig)

    @pytest.mark.parametrize(
        ("kwargs", "word"),
        [
            ({"baseline": "median"}, "`baseline`"),
            ({"baseline_beta": 0.0}, "`baseline_beta"),
            ({"max_tokens_per_batch": 64}, "`max_tokens_per_batch`"),
        ],
    )
    def test_wrong_settings_are_refused(self, tmp_path, kwargs, word):
        with pytest.raises(ValueError, match=word):
            GroupRegressionConfig(output_dir=str(tmp_path), bf16=False, **kwargs)

    def test_text_rows_with_a_prompt_id(self, tmp_path):
        rows = [
            {
                "prompt": [{"role": "user", "content": "1 + 1"}],
                "completion": [{"role": "assistant", "content": text}],
                "reward": reward,
                "prompt_id": 5,
            }
            for text, reward in (("2", 1.0), ("3", 0.0))
        ]
        trainer = make(tmp_path, Dataset.from_list(rows), max_steps=1)
        assert trainer.train_dataset["group"][:] == [0, 0]
        trainer.train()
