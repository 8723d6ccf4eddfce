from __future__ import annotations

import math
import textwrap
from typing import Any

from datasets import Dataset, IterableDataset
from torch import Tensor

from ...data.row_checks import first_row
from ...losses import first_turn_log_ratios, step_regression_loss
from ..multi_turn_dpo_trainer import MultiTurnDPOTrainer
from ..pair_batch import PairBatch


class StepRegressionTrainer(MultiTurnDPOTrainer):
    """
    Trainer for regression on step pairs: two turns taken in one state, and what their trajectories earned.

    The method of [Regressing the Relative Future](https://huggingface.co/papers/2410.04612) (REFUEL): β times the
    difference of the two turns' log-ratios is regressed on the difference of the returns that followed. Only the turn
    at which the sides part learns, so that what tools answered afterwards is noise that averages out, not a bias as
    in M-DPO. Returns are those of the KL-regularized reward: β times the later turns' log-ratios is taken from them.

    Rows, arguments and their order are those of [`MultiTurnDPOTrainer`], whose [`MultiTurnDPOConfig`] is `args`, of
    which `beta` is read (reward per nat) and `loss_type` is not. The sides begin with the turn that is compared: the
    common turns belong to the prompt, as [`build_preference_dataset`] writes them for `strategy="siblings"` and
    `"step"`. A row has `chosen_reward` and `rejected_reward`, which may be equal.

    The pairs must not be chosen by their outcomes: of `"step"` pairs every chosen side earned more, and what is
    regressed on is what this choice put in. `"siblings"` pairs any two trajectories that part.

    Example:

    ```python
    >>> from trl_multiturn import MultiTurnDPOConfig, PairingConfig, StepRegressionTrainer, build_preference_dataset

    >>> pairs = build_preference_dataset(trajectories, PairingConfig(strategy="siblings", max_pairs_per_prompt=4))
    >>> trainer = StepRegressionTrainer(
    ...     model="Qwen/Qwen3-0.6B",
    ...     args=MultiTurnDPOConfig(output_dir="refuel", beta=0.03),
    ...     train_dataset=pairs,
    ... )
    >>> trainer.train()
    ```
    """

    _tag_names = ["trl", "refuel", "multi-turn"]
    _name = "Step Regression"
    _paper = {
        "title": "Regressing the Relative Future: Efficient Policy Optimization for Multi-turn RLHF",
        "id": "2410.04612",
        # docstyle-ignore
        "citation": textwrap.dedent("""\
            @article{gao2024regressing,
                title        = {{Regressing the Relative Future: Efficient Policy Optimization for Multi-turn RLHF}},
                author       = {Zhaolin Gao and Wenhao Zhan and Jonathan D. Chang and Gokul Swamy and
                    Kiant{\\'e} Brantley and Jason D. Lee and Wen Sun},
                year         = 2024,
                eprint       = {arXiv:2410.04612},
            }"""),
    }

    def _prepare_dataset(
        self, dataset: Dataset | IterableDataset, processing_class: Any, args: Any, dataset_name: str
    ) -> Dataset | IterableDataset:
        first = first_row(dataset, dataset_name)
        if not self._rows_come_later or "chosen_reward" in first:
            missing = [name for name in ("chosen_reward", "rejected_reward") if name not in first]
            if missing:
                raise ValueError(
                    f"The rows of the {dataset_name} dataset have no {missing}, so there is no return to regress on. "
                    "Add the columns; `build_preference_dataset` writes them."
                )
            # The collator's column for a number per pair
            dataset = dataset.map(_add_reward_gap, with_indices=True)
        return super()._prepare_dataset(dataset, processing_class, args, dataset_name)

    def loss(self, batch: PairBatch) -> Tensor:
        assert batch.margin is not None
        chosen = first_turn_log_ratios(batch.chosen_logps, batch.ref_chosen_logps, batch.chosen_mask)
        rejected = first_turn_log_ratios(batch.rejected_logps, batch.ref_rejected_logps, batch.rejected_mask)
        return step_regression_loss(chosen, rejected, batch.margin, batch.beta)


def _add_reward_gap(row: dict[str, Any], index: int) -> dict[str, float]:
    rewards = row["chosen_reward"], row["rejected_reward"]
    if any(reward is None or not math.isfinite(reward) for reward in rewards):
        raise ValueError(
            f"Row {index}: the rewards are {rewards[0]} and {rewards[1]}, but a return is one finite number. Mend or "
            "drop the row."
        )
    return {"margin": rewards[0] - rewards[1]}
