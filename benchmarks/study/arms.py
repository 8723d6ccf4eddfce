"""The arms: which shipped trainer, with which overrides. Everything else is equal.

An offline arm trains on rows of the same trajectories of the starting policy, for the same number of optimizer steps
of the same number of trajectories. An online arm runs [`ToolRolloutGenerator`] with the same number of rollouts per
iteration; its steps are one pass over the rows found. Learning rates are those of `examples/configs` and, for DQO,
OREO's; none was tuned on a seed that is reported.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Arm:
    """One method with its switches.

    Attributes:
        method (`str`): `"none"`, `"sft"`, `"dpo"`, `"kto"`, `"oreo"`, `"dqo"` or `"group"` (group regression).
        args (`dict`): over the trainer's configuration.
        rollout (`dict`): over [`RolloutConfig`]; online arms only.
        loop (`dict`): over [`ToolRolloutGenerator`]'s arguments; online arms only.
        online (`bool`): whether the arm rolls out itself, in several iterations.
        process (`int`): completions per prefix for DQO's process rewards; 0 for none.
        samples (`int`): samples per problem of the evaluation for pass@n, beside greedy decoding; 0 for none.
        widths (`tuple[int, ...]`): of searches guided by the arm's values: beams or, where an environment cannot be
            taken back, actions to choose from.
    """

    method: str
    args: dict[str, Any] = field(default_factory=dict)
    rollout: dict[str, Any] = field(default_factory=dict)
    loop: dict[str, Any] = field(default_factory=dict)
    online: bool = False
    process: int = 0
    samples: int = 0
    widths: tuple[int, ...] = ()


# What arms of one method share
METHOD_ARGS: dict[str, dict[str, Any]] = {
    "sft": {"learning_rate": 5e-4},
    "dpo": {"learning_rate": 3e-4, "beta": 0.5, "precompute_ref_log_probs": True},
    "kto": {"learning_rate": 3e-4, "beta": 0.5, "precompute_ref_log_probs": True},
    "oreo": {"learning_rate": 2e-4, "beta": 0.03, "value_model": "full", "value_learning_rate": 1e-3},
    "dqo": {"learning_rate": 2e-4, "beta": 0.03, "value_model": "full", "value_learning_rate": 1e-3},
    "group": {"learning_rate": 2e-4, "beta": 0.3, "per_device_train_batch_size": 12},  # a whole group, not 16
}

OFFLINE = {
    "start": Arm("none"),
    "m-dpo": Arm("dpo"),
    "dpo": Arm("dpo", {"mask_observations": False}),
    "raft": Arm("sft"),
    "m-kto": Arm("kto"),
    "kto": Arm("kto", {"mask_observations": False}),
    "oreo": Arm("oreo"),
    "oreo-response": Arm("oreo", {"level": "response"}),
    "oreo-step": Arm("oreo", {"level": "step"}),
    "dqo": Arm("dqo"),
    "dqo-lam0.95": Arm("dqo", {"lam": 0.95}),
    "dro": Arm("dqo", {"horizon": "response"}),
    "dqo-unweighted": Arm("dqo", {"importance_weights": False}),
    "dqo-process": Arm("dqo", process=8),  # 20 in the paper
    "oreo-classes": Arm("oreo", {"value_objective": "classification"}),
    "group": Arm("group"),
    "m-dpo-lr1e-4": Arm("dpo", {"learning_rate": 1e-4}),
    "dpo-lr1e-4": Arm("dpo", {"learning_rate": 1e-4, "mask_observations": False}),
    "m-dpo-nll": Arm("dpo", {"loss_type": ["sigmoid", "sft"], "loss_weights": [1.0, 1.0]}),
    "m-dpo-beta0.1": Arm("dpo", {"beta": 0.1}),
    "m-dpo-beta2": Arm("dpo", {"beta": 2.0}),
}

ONLINE = {
    "online": Arm("dpo", online=True),
    "online-initial": Arm("dpo", loop={"reference": "initial"}, online=True),
    "online-current": Arm("dpo", rollout={"previous_policy_generations": 0}, online=True),
    "online-n4": Arm("dpo", rollout={"num_generations": 4, "previous_policy_generations": 1}, online=True),
    "online-beta0.05": Arm("dpo", {"beta": 0.05}, online=True),
    "online-beta2": Arm("dpo", {"beta": 2.0}, online=True),
    "online-nll": Arm("dpo", {"loss_type": ["sigmoid", "sft"], "loss_weights": [1.0, 1.0]}, online=True),
    "online-all": Arm("dpo", loop={"history": "all"}, online=True),
    "online-kto": Arm("kto", online=True),
    "online-oreo": Arm("oreo", online=True),
}

MEASURED = {
    "start-samples": Arm("none", samples=64),
    "m-dpo-samples": Arm("dpo", samples=64),
    "oreo-search": Arm("oreo", widths=(2, 4, 7)),
}

ARMS = {**OFFLINE, **ONLINE, **MEASURED}
