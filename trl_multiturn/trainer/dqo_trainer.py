from __future__ import annotations

import textwrap

import torch
from accelerate.logging import get_logger
from torch import Tensor

from ..data.row_checks import first_row
from ..losses import dqo_policy_loss, dqo_value_loss, importance_weights, merge_segments, turn_ids
from .dqo_config import DQOConfig
from .values.trajectory_batch import TrajectoryBatch
from .values.value_based import ValueBasedTrainer


logger = get_logger(__name__)


class DQOTrainer(ValueBasedTrainer):
    """
    Trainer for Direct Q-function Optimization (DQO), and for DRO as its one-action case.

    The method of [Enhancing Multi-Step Reasoning Abilities of Language Models through Direct Q-Function
    Optimization](https://huggingface.co/papers/2410.09302): soft actor-critic on offline trajectories, with the
    Q-function given by the policy and the value model, λ-returns and importance weights. Losses are *sums* over a
    trajectory's actions, so that the effective step grows with its length (OREO's are means).

    Arguments, their order and the rows are those of [`~trl.KTOTrainer`]; `args` is a [`DQOConfig`]. A row has a
    `reward` or a `label` (1 and 0), optionally process rewards on top of the outcome (`turn_rewards`, one per
    assistant turn, or `process_rewards`, aligned with `completion_ids`) and `behavior_logps` (of the policy that
    sampled it, aligned likewise). Instead of text it may carry `prompt_ids`, `completion_ids`, `action_mask`.

    With `horizon="response"` the whole response is one action: [DRO](https://huggingface.co/papers/2405.19107). That
    is for tools whose answers are certain. Where they are not, its one residual holds the luck of every observation,
    as M-DPO's does without a `margin`, and training converges to the same wrong policy as M-DPO: 0.17 in total
    variation at the worst state of the exactly solved agent of `tests/test_tabular_optimum.py`, where tokens and turns
    reach the optimum.

    Checkpoints are the policy's own; the value model lies in their folder `value_model` and loads with
    `ValueModel.from_pretrained`.

    Example:

    ```python
    >>> from trl_multiturn import DQOConfig, DQOTrainer

    >>> trainer = DQOTrainer(
    ...     model="Qwen/Qwen2-7B-Instruct",
    ...     args=DQOConfig(output_dir="dqo", lam=1.0),
    ...     train_dataset=trajectories,
    ...     peft_config=LoraConfig(),
    ... )
    >>> trainer.train()
    ```
    """

    args: DQOConfig
    _config_class = DQOConfig
    _tag_names = ["trl", "dqo", "multi-turn"]
    _name = "DQO"
    _paper = {
        "title": "Enhancing Multi-Step Reasoning Abilities of Language Models through Direct Q-Function Optimization",
        "id": "2410.09302",
        # docstyle-ignore
        "citation": textwrap.dedent("""\
            @article{liu2024dqo,
                title        = {{Enhancing Multi-Step Reasoning Abilities of Language Models through Direct Q-Function
                    Optimization}},
                author       = {Guanlin Liu and Kaixuan Ji and Renjie Zheng and Zheng Wu and Chen Dun and Quanquan Gu
                    and Lin Yan},
                year         = 2024,
                eprint       = {arXiv:2410.09302},
            }"""),
    }

    def _prepare_dataset(self, dataset, processing_class, args, dataset_name):
        first = first_row(dataset, dataset_name)
        paid = [name for name in ("turn_rewards", "process_rewards") if first.get(name) is not None]
        if paid and args.value_objective == "classification":
            raise ValueError(
                f"The {dataset_name} dataset has the columns {paid}, but a value learned by classification knows the "
                "outcome alone, so what is paid on the way would count as unexpected. Remove the columns, or use "
                "`value_objective='regression'`."
            )
        return super()._prepare_dataset(dataset, processing_class, args, dataset_name)

    def losses(self, batch: TrajectoryBatch) -> tuple[Tensor, Tensor, dict[str, float | Tensor]]:
        weights, metrics = self._weights(batch)
        tensors = (batch.values, batch.log_ratios, batch.token_rewards, batch.action_mask)
        if self.args.horizon != "token":
            whole = torch.zeros_like(batch.action_mask, dtype=torch.long)
            ids = turn_ids(batch.action_mask) if self.args.horizon == "turn" else whole
            tensors = merge_segments(*tensors, ids)
        arguments = (*tensors, self.beta, self.args.lam, weights)
        return dqo_value_loss(*arguments), dqo_policy_loss(*arguments), metrics

    def _weights(self, batch: TrajectoryBatch) -> tuple[Tensor | None, dict[str, float | Tensor]]:
        if not self.args.importance_weights:
            return None, {}
        behavior_logps = batch.behavior_logps
        if behavior_logps is None:
            logger.warning_once(
                "Rows carry no `behavior_logps`, so the reference stands in for the policy that sampled them in the "
                "importance weights. Where another policy did, add the column or set `importance_weights=False`."
            )
            behavior_logps = batch.ref_logps
        cap = self.args.importance_log_cap
        weights = importance_weights(batch.logps, behavior_logps, batch.action_mask, cap)
        capped = weights >= torch.as_tensor(cap).exp() * (1 - 1e-6)
        return weights, {"importance/weight": weights.mean(), "importance/capped": capped.float().mean()}
