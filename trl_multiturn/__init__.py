"""Multi-turn, tool-using agents on Hugging Face TRL.

Public names are loaded on first use, so that `import trl_multiturn` stays quick and offline training never imports an
interpreter or an engine.
"""

from __future__ import annotations

import importlib
from typing import Any

from .version import __version__ as __version__


# public name -> module that defines it
_MODULES = {
    "callbacks": ["ToolRolloutGenerator"],
    "data.pairing": ["PairingConfig", "UnpairedConfig", "build_preference_dataset", "build_unpaired_dataset"],
    "data.preview": ["preview_masks"],
    "data.tokenization": ["tokenize_trajectory"],
    "data.value_preview": ["preview_values"],
    "evaluation": ["EvaluationResult", "evaluate_policy"],
    "modeling": ["ValueModel"],
    "report": ["IterationReport"],
    "reward_model": ["RewardModel", "reward_model_from_policy"],
    "rollout.config": ["RolloutConfig"],
    "rollout.engine": ["Engine", "Generation", "SamplingParams"],
    "rollout.journal": ["Journal"],
    "rollout.loop": ["TooManyToolFailures", "agenerate_trajectories", "generate_trajectories"],
    "rollout.margins": ["observation_margins"],
    "rollout.prefix_completion": ["complete_prefixes", "estimate_step_rewards", "reward_longest_good_prefix"],
    "rollout.scripted_engine": ["ScriptedEngine"],
    "rollout.search": ["value_guided_search"],
    "rollout.transformers_engine": ["TransformersEngine"],
    "rollout.vllm_engine": ["VLLMEngine"],
    "rollout.vllm_server": ["VLLMServerEngine"],
    "tabular": ["TabularToolMDP"],
    "templates": ["TurnTemplate"],
    "tools.base": ["current_rollout"],
    "tools.python_tool": ["PythonTool"],
    "tools.result": ["ToolFailure", "ToolResult"],
    "tools.sandbox": ["Sandbox", "SandboxConfig"],
    "trainer.dqo_config": ["DQOConfig"],
    "trainer.dqo_trainer": ["DQOTrainer"],
    "trainer.multi_turn_dpo_config": ["MultiTurnDPOConfig"],
    "trainer.multi_turn_dpo_trainer": ["MultiTurnDPOTrainer"],
    "trainer.multi_turn_kto_config": ["MultiTurnKTOConfig"],
    "trainer.multi_turn_kto_trainer": ["MultiTurnKTOTrainer"],
    "trainer.oreo_config": ["OREOConfig"],
    "trainer.oreo_trainer": ["OREOTrainer"],
    "trajectory": ["StopReason", "Trajectory", "Verdict"],
    "verify.mathematics": ["math_reward"],
}
_HOME = {name: module for module, names in _MODULES.items() for name in names}

__all__ = sorted(["__version__", *_HOME])


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_HOME[name]}", __name__), name)


def __dir__() -> list[str]:
    return __all__
