r"""
Reward models of the M-DPO paper (https://huggingface.co/papers/2409.02392, examples 2 and 3), trained as token
classifiers by Transformers' own trainer.

A process reward model predicts the reward of every step at the step's last token, an outcome reward model whether the
trajectory is correct at the trajectory's last token. Both are one logit per token:

```python
labelled = estimate_step_rewards(trajectories, prompts, engine, tools, config, reward_funcs=math_reward)
trainer = Trainer(
    reward_model_from_policy("my-policy"),
    args,
    train_dataset=process_reward_rows(labelled),
    data_collator=DataCollatorForRewardModel(pad_token_id),
    compute_loss_func=step_reward_loss,
)
trainer.train()
reward_model = RewardModel(trainer.model)
best = max(candidates, key=reward_model.process_utility)  # min over steps
value_guided_search(prompts, engine, tools, reward_model.score, beam=4, score_at="action")
```
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset, Features, List, Value
from torch import Tensor
from transformers import AutoConfig, AutoModelForTokenClassification, PreTrainedModel

from ..images.vision import refuse_missing_images
from ..steps import StepDelimiter
from ..trajectory import Trajectory, Verdict
from ..verify.process_rewards import min_utility, segments


IGNORED = -100  # as Transformers counts labels: what `num_items_in_batch` leaves out

_FEATURES = Features({"input_ids": List(Value("int32")), "labels": List(Value("float32"))})


def process_reward_rows(trajectories: Sequence[Trajectory]) -> Dataset:
    """Rows of a process reward model: `labels` hold each step's reward at its last token, -100 elsewhere.

    Args:
        trajectories (`Sequence[Trajectory]`):
            With `info["step_rewards"]`, as [`estimate_step_rewards`] leaves them. Steps without a reward are not
            trained on, trajectories without any are left out.

    Raises:
        `ValueError`: if a trajectory has no step rewards, or none is left.
    """
    rows = []
    for index, trajectory in enumerate(trajectories):
        rewards = trajectory.info.get("step_rewards")
        if rewards is None:
            raise ValueError(
                f"Trajectory {index} has no `info['step_rewards']`, so there is nothing to predict at its steps. Pass "
                "what `estimate_step_rewards` returns."
            )
        known = {end - 1: value for end, value in zip(rewards["ends"], rewards["values"], strict=True)}
        rows.append(_row(trajectory, {at: value for at, value in known.items() if value is not None}))
    return _dataset(rows)


def outcome_reward_rows(trajectories: Sequence[Trajectory]) -> Dataset:
    """Rows of an outcome reward model: 1 or 0 at the last token that the policy sampled, -100 elsewhere.

    Trajectories without a verdict are left out: they are no failures.
    """
    rows = []
    for trajectory in trajectories:
        spans = list(trajectory.turn_spans())
        if trajectory.verdict is not Verdict.UNDECIDED and spans:
            rows.append(_row(trajectory, {spans[-1][1] - 1: float(trajectory.verdict is Verdict.CORRECT)}))
    return _dataset(rows)


def reward_model_from_policy(policy: str | Path, **kwargs: Any) -> PreTrainedModel:
    """A token classifier with one label that starts from a policy's weights, without dropout before its head.

    Args:
        policy (`str` or `Path`):
            Checkpoint of a causal language model.
        **kwargs:
            For `AutoModelForTokenClassification.from_pretrained`, e.g. `dtype`.
    """
    config = AutoConfig.from_pretrained(policy, num_labels=1)
    config.classifier_dropout = 0.0
    return AutoModelForTokenClassification.from_pretrained(policy, config=config, **kwargs)


def step_reward_loss(outputs: Any, labels: Tensor, num_items_in_batch: Tensor | int | None = None) -> Tensor:
    r"""
    Cross-entropy with the steps' rewards, mean over the steps of the (whole, accumulated) batch: M-DPO, eq. 4,

    $$ -\sum_h r(s_h, a_h) \log r_\theta + (1 - r(s_h, a_h)) \log(1 - r_\theta) $$

    whose printed form lacks the minus sign. Every step weighs the same, as in the paper's sum.

    Args:
        outputs: with `logits` `(B, L, 1)`; those of unlabelled tokens may hold anything.
        labels (`Tensor`): `(B, L)`, rewards in [0, 1], -100 where there is none.
        num_items_in_batch (`Tensor` or `int`, *optional*): labels of the whole batch, as [`~transformers.Trainer`]
            counts them over accumulation steps and processes; by default those given.
    """
    logits = outputs.logits.squeeze(-1).float()
    labelled = labels != IGNORED
    total = torch.nn.functional.binary_cross_entropy_with_logits(
        logits[labelled], labels[labelled].to(logits.dtype), reduction="sum"
    )
    return total / (labelled.sum().clamp(min=1) if num_items_in_batch is None else num_items_in_batch)


@dataclass
class DataCollatorForRewardModel:
    """
    Pads rows on the right.

    ```python
    >>> collator = DataCollatorForRewardModel(pad_token_id=0)
    >>> collator([{"input_ids": [5, 6], "labels": [-100.0, 0.5]}, {"input_ids": [7], "labels": [1.0]}])
    {'input_ids': tensor([[5, 6], [7, 0]]),
     'attention_mask': tensor([[1, 1], [1, 0]]),
     'labels': tensor([[-100.0000, 0.5000], [1.0000, -100.0000]])}
    ```

    Args:
        pad_token_id (`int`):
            Fills `input_ids`.
    """

    pad_token_id: int

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, Tensor]:
        def padded(name: str, value: float, dtype: torch.dtype) -> Tensor:
            tensors = [torch.tensor(row[name], dtype=dtype) for row in rows]
            return torch.nn.utils.rnn.pad_sequence(tensors, batch_first=True, padding_value=value)

        lengths = torch.tensor([len(row["input_ids"]) for row in rows])
        return {
            "input_ids": padded("input_ids", self.pad_token_id, torch.int64),
            "attention_mask": (torch.arange(int(lengths.max())) < lengths.unsqueeze(1)).long(),
            "labels": padded("labels", IGNORED, torch.float32),
        }


class RewardModel:
    """Reads rewards off a trained token classifier.

    Args:
        model ([`~transformers.PreTrainedModel`]):
            From [`reward_model_from_policy`], trained with [`step_reward_loss`].
        batch_size (`int`, *optional*, defaults to `8`):
            Sequences of one forward pass.

    Raises:
        `ValueError`: if the model has another number of labels.
    """

    def __init__(self, model: PreTrainedModel, batch_size: int = 8):
        if model.config.num_labels != 1:
            raise ValueError(
                f"The model has {model.config.num_labels} labels per token, but a reward is one number. Load it with "
                "`num_labels=1`."
            )
        self.model, self.batch_size = model, batch_size

    def score(self, sequences: Sequence[list[int]]) -> list[float]:
        """The reward in [0, 1] at the last token of each sequence. A search with it needs `score_at="action"`, to hand
        over what the model was trained on."""
        return [rewards[-1] for rewards in self._rewards(sequences)]

    def outcome_utilities(self, trajectories: Sequence[Trajectory]) -> list[float]:
        """The reward at the last sampled token of each trajectory: an outcome reward model's (example 2)."""
        ends = [max((stop for _, stop in t.turn_spans()), default=0) for t in trajectories]
        return self.score([t.prompt_ids + t.completion_ids[:end] for t, end in zip(trajectories, ends, strict=True)])

    def step_rewards(
        self, trajectory: Trajectory, delimiter: StepDelimiter = "turn", tokenizer: Any = None
    ) -> list[float]:
        """The reward of each step of a trajectory; steps as in [`segments`]."""
        (rewards,) = self._rewards([trajectory.prompt_ids + trajectory.completion_ids])
        offset = len(trajectory.prompt_ids) - 1
        return [rewards[offset + step.stop] for step in segments(trajectory, delimiter, tokenizer)]

    def process_utility(
        self, trajectory: Trajectory, delimiter: StepDelimiter = "turn", tokenizer: Any = None
    ) -> float:
        """The least reward of a trajectory's steps: a process reward model's utility (example 3)."""
        return min_utility(self.step_rewards(trajectory, delimiter, tokenizer))

    @torch.no_grad()
    def _rewards(self, sequences: Sequence[list[int]]) -> list[list[float]]:
        """The reward at every token of each sequence."""
        if not all(sequences):
            raise ValueError("A sequence has no token, so there is nothing to reward. Pass the prompt's at least.")
        refuse_missing_images(self.model.config, sequences)
        was_training = self.model.training
        self.model.eval()
        collator = DataCollatorForRewardModel(pad_token_id=0)  # hidden by the attention mask
        rewards: list[list[float]] = [[] for _ in sequences]
        order = sorted(range(len(sequences)), key=lambda i: len(sequences[i]))
        for start in range(0, len(order), self.batch_size):
            places = order[start : start + self.batch_size]
            batch = collator([{"input_ids": sequences[i], "labels": []} for i in places])
            batch = {name: batch[name].to(self.model.device) for name in ("input_ids", "attention_mask")}
            predicted = self.model(**batch).logits.squeeze(-1).float().sigmoid().tolist()
            for place, row in zip(places, predicted, strict=True):
                rewards[place] = row[: len(sequences[place])]
        self.model.train(was_training)
        return rewards


def _row(trajectory: Trajectory, rewards: dict[int, float]) -> dict[str, Any]:
    labels = [float(IGNORED)] * (len(trajectory.prompt_ids) + len(trajectory.completion_ids))
    for position, reward in rewards.items():
        labels[len(trajectory.prompt_ids) + position] = reward
    return {"input_ids": trajectory.prompt_ids + trajectory.completion_ids, "labels": labels}


def _dataset(rows: list[dict[str, Any]]) -> Dataset:
    rows = [row for row in rows if any(label != IGNORED for label in row["labels"])]
    if not rows:
        raise ValueError(
            "No trajectory has a reward to learn from: none was decided. Judge them first, with a verifier that "
            "answers in time."
        )
    return Dataset.from_dict({name: [row[name] for row in rows] for name in _FEATURES}, _FEATURES)
