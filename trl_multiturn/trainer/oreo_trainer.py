from __future__ import annotations

import textwrap
from typing import Any, Literal

from accelerate.logging import get_logger
from torch import Tensor

from ..losses import kl_loss, oreo_policy_loss, oreo_value_loss, turn_ids
from .oreo_config import OREOConfig
from .values.trajectory_batch import TrajectoryBatch
from .values.value_based import ValueBasedTrainer


logger = get_logger(__name__)


class OREOTrainer(ValueBasedTrainer):
    """
    Trainer for Offline Reasoning Optimization (OREO).

    The method of [Offline Reinforcement Learning for LLM Multi-Step
    Reasoning](https://huggingface.co/papers/2412.16145): policy and value model are trained together towards the soft
    Bellman equation on trajectories with an outcome, at the level of tokens (eq. 9), steps or responses (eq. 10), with
    an exact KL to the reference. Only tokens that the policy sampled count; time jumps over tool results.

    Tools whose answers are not certain (a search index that changes, another model, a user, a game of chance) are
    harmless at the token and step levels: the residual of each action is right on average over what comes back. At
    `level="response"` they are not. Its one residual holds the luck of every observation, as M-DPO's does without a
    `margin`, and training converges to the same wrong policy as M-DPO: 0.17 in total variation at the worst state of
    the exactly solved agent of `tests/test_tabular_optimum.py`, where the other levels reach the optimum.

    Arguments, their order and the rows are those of [`~trl.KTOTrainer`]; `args` is an [`OREOConfig`]. A row has a
    `reward` or a `label` (1 and 0), and instead of text it may carry `prompt_ids`, `completion_ids`, `action_mask`.
    A column `ref_logps` (aligned with `completion_ids`) replaces the reference's log-probabilities. Process rewards
    (`turn_rewards`, `process_rewards`) are not read, as the method knows one outcome per trajectory: [`DQOTrainer`]
    learns from them.

    Checkpoints are the policy's own; the value model lies in their folder `value_model` and loads with
    `ValueModel.from_pretrained`.

    Example:

    ```python
    >>> from trl_multiturn import OREOConfig, OREOTrainer

    >>> trainer = OREOTrainer(
    ...     model="Qwen/Qwen2.5-Math-1.5B",
    ...     args=OREOConfig(output_dir="oreo", value_model="full"),
    ...     train_dataset=trajectories,
    ... )
    >>> trainer.train()
    ```
    """

    args: OREOConfig
    _config_class = OREOConfig
    _tag_names = ["trl", "oreo", "multi-turn"]
    _name = "OREO"
    _paper = {
        "title": "Offline Reinforcement Learning for LLM Multi-Step Reasoning",
        "id": "2412.16145",
        # docstyle-ignore
        "citation": textwrap.dedent("""\
            @article{wang2024oreo,
                title        = {{Offline Reinforcement Learning for LLM Multi-Step Reasoning}},
                author       = {Huaijie Wang and Shibo Hao and Hanze Dong and Shenao Zhang and Yilin Bao and
                    Ziran Yang and Yi Wu},
                year         = 2024,
                eprint       = {arXiv:2412.16145},
            }"""),
    }

    def _prepare_dataset(self, dataset, processing_class, args, dataset_name):
        first: dict[str, Any] = next(iter(dataset))
        unread = [name for name in ("turn_rewards", "process_rewards") if first.get(name) is not None]
        if unread:
            logger.warning(
                f"The {dataset_name} dataset has the columns {unread}, which OREO does not read: it learns from the "
                "outcome alone. Use `DQOTrainer`, or add them to `reward`."
            )
        return super()._prepare_dataset(dataset, processing_class, args, dataset_name)

    @property
    def _needs_reference_distributions(self) -> bool:
        return bool(self.args.kl_coef)

    @staticmethod
    def _step_delimiter(args: OREOConfig) -> Literal["turn", "line", "sentence"] | None:
        return args.step_delimiter if args.level == "step" and args.step_delimiter != "turn" else None

    def losses(self, batch: TrajectoryBatch) -> tuple[Tensor, Tensor, dict[str, float | Tensor]]:
        arguments = (batch.values, batch.log_ratios, batch.rewards, batch.action_mask, self.beta)
        step_ids = batch.step_ids
        if self.args.level == "step" and step_ids is None:
            step_ids = turn_ids(batch.action_mask)
        value_loss = oreo_value_loss(*arguments)
        policy_loss = oreo_policy_loss(*arguments, level=self.args.level, step_ids=step_ids)
        if batch.kl is None:
            return value_loss, policy_loss, {}
        kl = kl_loss(batch.kl, batch.action_mask)
        return value_loss, policy_loss + (self.args.kl_coef or 0.0) * kl, {"kl": kl}
