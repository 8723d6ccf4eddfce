from __future__ import annotations

import textwrap
from dataclasses import dataclass
from typing import Any, Literal

import torch
from accelerate.logging import get_logger
from datasets import Dataset, IterableDataset
from torch import Tensor

from ...losses import adjusted_returns, group_means, group_regression_loss, group_soft_means, group_variance_loss
from .group_regression_config import GroupRegressionConfig
from .group_rows import ROW_COLUMNS, DataCollatorForGroups, with_groups
from .outcome_based import OutcomeBasedTrainer
from .outcome_batch import OutcomeBatch


logger = get_logger(__name__)


@dataclass(kw_only=True)
class GroupBatch(OutcomeBatch):
    """
    An [`OutcomeBatch`] of trajectories in groups. All `(B,)`.

    Args:
        returns (`Tensor`): what each trajectory earned, less the luck of its observations (`margin`).
        reward_std (`Tensor`): standard deviation of the returns in the trajectory's group.
        group (`Tensor`): int64, equal for the trajectories of one prompt.
        baseline (`Tensor`, *optional*): of the group; absent for `baseline="variance"`.
    """

    returns: Tensor
    reward_std: Tensor
    group: Tensor
    baseline: Tensor | None = None


class GroupRegressionTrainer(OutcomeBasedTrainer):
    """
    Trainer for regression of log-ratios on group-relative returns, without a value model.

    The loss is the mean over trajectories of `(β Σ log-ratio − (R − b))²`, with one baseline `b` for all trajectories
    of a prompt: such that the variance within the group is the loss
    ([AGRO](https://huggingface.co/papers/2503.19612)), the group's soft mean
    ([A*-PO](https://huggingface.co/papers/2505.20686), [OAPL](https://huggingface.co/papers/2602.19362)), or its mean
    ([Kimi k1.5](https://huggingface.co/papers/2501.12599)). Unlike a policy gradient it needs no rows of the present
    policy, and no importance weights. Only tokens that the policy sampled count.

    That is for tools whose answers are certain. Where they are not, a trajectory's one residual holds the luck of all
    its observations, and training converges to another policy than the optimum, as M-DPO does without a `margin`. A
    column `margin` (see [`observation_margins`]), which is taken from the returns, mends that: `docs/objectives.md`
    has the sizes.

    Arguments, their order and the rows are those of [`~trl.KTOTrainer`]; `args` is a [`GroupRegressionConfig`]. A row
    has a `reward` or a `label` (1 and 0) and a `prompt_id` (or the `prompt_index` that rollouts write); rows without
    either are grouped by their prompt. Process rewards (`turn_rewards`, `process_rewards`) are added to the outcome.
    Instead of text a row may carry `prompt_ids`, `completion_ids`, `action_mask`, and `ref_logps` in place of a
    reference.

    Choose `per_device_train_batch_size` as a multiple of the group's size: a group that is packed costs little more
    than its unique tokens. With `baseline="variance"` the rows of a group are compared within a step, over all
    processes; a group that is spread over steps is compared in parts, with the same expected gradient.

    Example:

    ```python
    >>> from trl_multiturn import GroupRegressionConfig, GroupRegressionTrainer

    >>> trainer = GroupRegressionTrainer(
    ...     model="Qwen/Qwen3-0.6B",
    ...     args=GroupRegressionConfig(output_dir="agro", per_device_train_batch_size=12),
    ...     callbacks=[ToolRolloutGenerator(prompts, tools, reward_funcs)],
    ... )
    >>> trainer.train()
    ```
    """

    args: GroupRegressionConfig
    _config_class = GroupRegressionConfig
    _collator_class = DataCollatorForGroups
    _batch_class = GroupBatch
    _extra_signature_columns = (*OutcomeBasedTrainer._extra_signature_columns, *ROW_COLUMNS)

    # A baseline over a part of what was sampled would be another prompt's: nothing is balanced, copies count
    default_sampling = {"strategy": "all", "deduplicate": False}

    _tag_names = ["trl", "group-regression", "multi-turn"]
    _name = "Group Regression"
    _paper = {
        "title": "RL-finetuning LLMs from on- and off-policy data with a single algorithm",
        "id": "2503.19612",
        # docstyle-ignore
        "citation": textwrap.dedent("""\
            @article{tang2025rlfinetuning,
                title        = {{RL-finetuning LLMs from on- and off-policy data with a single algorithm}},
                author       = {Yunhao Tang and Taco Cohen and David W. Zhang and Michal Valko and R{\\'e}mi Munos},
                year         = 2025,
                eprint       = {arXiv:2503.19612},
            }"""),
    }

    # Rows

    def _fit(self, dataset: Dataset | IterableDataset, args: Any, dataset_name: str) -> Dataset | IterableDataset:
        if isinstance(dataset, IterableDataset):
            raise ValueError(
                f"The {dataset_name} dataset is streamed, so it is unknown which rows belong to one prompt before all "
                "are read. Pass a map-style Dataset."
            )
        dataset = super()._fit(dataset, args, dataset_name)
        if args.behavior_reference:
            dataset = self._with_sampling_reference(dataset, dataset_name)
        dataset, statistics = with_groups(dataset)
        if dataset_name == "train" and self.row_statistics is not None:
            self.row_statistics = self.row_statistics | statistics
        if not self._holds_placeholder:
            self._check_groups(len(dataset), statistics, args, dataset_name)
        if args.baseline == "variance":
            return dataset
        returns, groups = (torch.tensor(dataset[name][:]) for name in ("returns", "group"))
        if args.baseline == "mean":
            baselines = group_means(returns, groups)
        else:
            baselines = group_soft_means(returns, groups, args.baseline_beta)
        return dataset.add_column("baseline", baselines.numpy())

    @property
    def needs_reference_samples(self) -> bool:
        return self.args.baseline != "variance" and not self.args.behavior_reference

    @property
    def _holds_placeholder(self) -> bool:
        return self._rows_come_later and self._row_source is None

    def _with_sampling_reference(self, dataset: Dataset, dataset_name: str) -> Dataset:
        if self._holds_placeholder:
            return dataset
        if "behavior_logps" not in dataset.column_names:
            raise ValueError(
                f"`behavior_reference=True`, but the rows of the {dataset_name} dataset have no `behavior_logps`: the "
                "log-probabilities under the policy that sampled them are unknown. Add the column (rollouts write "
                "it), or leave the setting off."
            )
        if "ref_logps" in dataset.column_names:
            dataset = dataset.remove_columns("ref_logps")
        return dataset.rename_column("behavior_logps", "ref_logps")

    def _check_groups(self, rows: int, statistics: dict[str, float], args: Any, dataset_name: str) -> None:
        alone, largest = statistics["data/rows_alone_in_group"], statistics["data/largest_group"]
        if alone == rows:
            raise ValueError(
                f"Each of the {rows} rows of the {dataset_name} dataset is alone in its group, so nothing tells its "
                "return from what was to be expected. Sample several trajectories per prompt, and give those of one "
                "prompt the same `prompt_id`."
            )
        if alone:
            logger.warning(
                f"{alone} of {rows} rows of the {dataset_name} dataset are alone in their group and teach nothing "
                "about their return. Rows of a group have the same `prompt_id` and the same prompt."
            )
        together = args.per_device_train_batch_size * args.world_size
        if dataset_name == "train" and args.baseline == "variance" and together < largest:
            logger.warning(
                f"Groups have up to {largest} rows, but a step compares at most {together}: the variance is one of "
                "parts of a group, and noisier. Raise `per_device_train_batch_size` (rows of one prompt are cheap "
                "where they are packed), or use `baseline='soft_mean'`."
            )

    def compute_reference_columns(
        self,
        dataset: Dataset,
        reference: Literal["policy", "reference"] = "policy",
        batch_size: int | None = None,
        desc: str = "Computing reference log-probabilities",
    ) -> Dataset:
        if self.args.behavior_reference and "ref_logps" in dataset.column_names:
            return dataset
        return super().compute_reference_columns(dataset, reference, batch_size, desc)

    def _prompt_keys(self, dataset: Dataset) -> list[Any]:
        return [(number,) for number in dataset["group"]]

    # Loss

    def _batch_tensors(self, inputs: dict[str, Tensor], outputs: Any) -> dict[str, Any]:
        rows = {name: inputs[name] for name in ROW_COLUMNS if name in inputs}
        return super()._batch_tensors(inputs, outputs) | rows

    def loss(self, batch: GroupBatch) -> tuple[Tensor, dict[str, float | Tensor]]:
        metrics: dict[str, float | Tensor] = {
            "reward": batch.returns.mean(),
            "reward_std": batch.reward_std.mean(),
            "frac_reward_zero_std": (batch.reward_std == 0).float().mean(),
            "log_ratio": batch.log_ratios.detach().masked_fill(~batch.action_mask, 0.0).sum(dim=1).mean(),
        }
        arguments = batch.log_ratios, batch.returns
        if batch.baseline is None:
            everywhere = self._of_all_processes(batch)
            return group_variance_loss(*arguments, batch.group, batch.action_mask, self.beta, *everywhere), metrics
        metrics["baseline"] = batch.baseline.mean()
        return group_regression_loss(*arguments, batch.baseline, batch.action_mask, self.beta), metrics

    @torch.no_grad()
    def _of_all_processes(self, batch: GroupBatch) -> tuple[Tensor, Tensor]:
        """Adjusted returns and groups of the rows of all processes, which may hold parts of one group."""
        own = adjusted_returns(batch.log_ratios, batch.returns, batch.action_mask, self.beta)
        everywhere = (
            self.accelerator.pad_across_processes(own, dim=0),
            self.accelerator.pad_across_processes(batch.group, dim=0, pad_index=-1),
        )
        returns, groups = self.accelerator.gather(everywhere)
        return returns, groups
