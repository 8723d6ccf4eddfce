"""
Losses as functions of tensors: nothing here knows a model, a tokenizer or a trainer.

Column `t` of a `(B, T)` tensor scores token `t + 1`; `action_mask` is 1 where the policy sampled that token. Entries
outside the mask may hold anything, NaN included. `log_ratios` are in nats, `beta` turns nats into reward.
"""

from ._masking import terminal_rewards
from .dqo import dqo_policy_loss, dqo_value_loss, importance_weights
from .dro import dro_policy_loss, dro_value_loss
from .group_regression import (
    adjusted_returns,
    group_means,
    group_regression_loss,
    group_soft_means,
    group_variance_loss,
)
from .kl import LMHead, full_vocab_kl, kl_loss
from .oreo import oreo_policy_loss, oreo_value_loss
from .outcomes import outcome_classification_loss, soft_value
from .returns import lambda_returns
from .segments import Segments, merge_segments, turn_ids
from .step_regression import first_turn_log_ratios, step_regression_loss


__all__ = [
    "LMHead",
    "Segments",
    "adjusted_returns",
    "dqo_policy_loss",
    "dqo_value_loss",
    "dro_policy_loss",
    "dro_value_loss",
    "first_turn_log_ratios",
    "full_vocab_kl",
    "group_means",
    "group_regression_loss",
    "group_soft_means",
    "group_variance_loss",
    "importance_weights",
    "kl_loss",
    "lambda_returns",
    "merge_segments",
    "oreo_policy_loss",
    "oreo_value_loss",
    "outcome_classification_loss",
    "soft_value",
    "step_regression_loss",
    "terminal_rewards",
    "turn_ids",
]
