"""Multi-turn, tool-using agents on Hugging Face TRL.

Public names load on first use, so that `import trl_multiturn` stays quick and offline training never imports an
interpreter or an engine.
"""

from __future__ import annotations

from ._lazy import attach
from .version import __version__ as __version__


TYPE_CHECKING = False  # true for type checkers, as that of `typing`, whose import takes half of this one's time

if TYPE_CHECKING:
    from .callbacks import ToolRolloutGenerator as ToolRolloutGenerator
    from .conversion.convert import convert_rows as convert_rows
    from .conversion.report import ConversionReport as ConversionReport
    from .data.preview import preview_masks as preview_masks
    from .data.tokenization import tokenize_trajectory as tokenize_trajectory
    from .data.value_preview import preview_values as preview_values
    from .engines.engine import Engine as Engine, Generation as Generation, SamplingParams as SamplingParams
    from .engines.scripted_engine import ScriptedEngine as ScriptedEngine
    from .engines.transformers.engine import TransformersEngine as TransformersEngine
    from .engines.vllm.engine import VLLMEngine as VLLMEngine
    from .engines.vllm.server import VLLMServerEngine as VLLMServerEngine
    from .errors import TRLMultiturnError as TRLMultiturnError
    from .evaluation import EvaluationResult as EvaluationResult, evaluate_policy as evaluate_policy
    from .journal.journal import Journal as Journal
    from .models.reward_model import RewardModel as RewardModel, reward_model_from_policy as reward_model_from_policy
    from .models.value_model import ValueModel as ValueModel
    from .online.distillation import distilled_rows as distilled_rows
    from .online.report import IterationReport as IterationReport
    from .rollout.config import RolloutConfig as RolloutConfig
    from .rollout.guided.search_comparison import SearchComparison as SearchComparison
    from .rollout.loop import (
        TooManyToolFailures as TooManyToolFailures,
        agenerate_trajectories as agenerate_trajectories,
        generate_trajectories as generate_trajectories,
    )
    from .rollout.margins import observation_margins as observation_margins
    from .rollout.prefix_completion import (
        complete_prefixes as complete_prefixes,
        estimate_step_rewards as estimate_step_rewards,
        reward_longest_good_prefix as reward_longest_good_prefix,
    )
    from .rollout.search import value_guided_search as value_guided_search
    from .rows.pairing import (
        build_preference_dataset as build_preference_dataset,
        build_unpaired_dataset as build_unpaired_dataset,
    )
    from .rows.selection import PairingConfig as PairingConfig, UnpairedConfig as UnpairedConfig
    from .sandbox.config import SandboxConfig as SandboxConfig
    from .sandbox.result import ToolFailure as ToolFailure, ToolResult as ToolResult
    from .sandbox.sandbox import Sandbox as Sandbox
    from .tabular import TabularToolMDP as TabularToolMDP
    from .templates import TurnTemplate as TurnTemplate
    from .tools.base import current_rollout as current_rollout
    from .tools.environment_pool import EnvironmentPool as EnvironmentPool
    from .tools.python_tool import PythonTool as PythonTool
    from .trainer.dqo_config import DQOConfig as DQOConfig
    from .trainer.dqo_trainer import DQOTrainer as DQOTrainer
    from .trainer.multi_turn_dpo_config import MultiTurnDPOConfig as MultiTurnDPOConfig
    from .trainer.multi_turn_dpo_trainer import MultiTurnDPOTrainer as MultiTurnDPOTrainer
    from .trainer.multi_turn_kto_config import MultiTurnKTOConfig as MultiTurnKTOConfig
    from .trainer.multi_turn_kto_trainer import MultiTurnKTOTrainer as MultiTurnKTOTrainer
    from .trainer.oreo_config import OREOConfig as OREOConfig
    from .trainer.oreo_trainer import OREOTrainer as OREOTrainer
    from .trainer.outcomes.group_regression_config import GroupRegressionConfig as GroupRegressionConfig
    from .trainer.outcomes.group_regression_trainer import GroupRegressionTrainer as GroupRegressionTrainer
    from .trainer.outcomes.step_regression_trainer import StepRegressionTrainer as StepRegressionTrainer
    from .trainer.outcomes.turn_rewards import implicit_turn_rewards as implicit_turn_rewards
    from .trainer.values.value_model_config import ValueModelConfig as ValueModelConfig
    from .trainer.values.value_model_trainer import (
        ValueModelTrainer as ValueModelTrainer,
        train_value_model as train_value_model,
    )
    from .trajectory import StopReason as StopReason, Trajectory as Trajectory, Verdict as Verdict
    from .verify.mathematics import math_reward as math_reward
    from .viewer.viewing import view as view
else:
    __getattr__, __dir__, __all__ = attach(
        __name__,
        {
            ".callbacks": ["ToolRolloutGenerator"],
            ".conversion.convert": ["convert_rows"],
            ".conversion.report": ["ConversionReport"],
            ".data.preview": ["preview_masks"],
            ".data.tokenization": ["tokenize_trajectory"],
            ".data.value_preview": ["preview_values"],
            ".online.distillation": ["distilled_rows"],
            ".engines.engine": ["Engine", "Generation", "SamplingParams"],
            ".engines.scripted_engine": ["ScriptedEngine"],
            ".engines.transformers.engine": ["TransformersEngine"],
            ".engines.vllm.engine": ["VLLMEngine"],
            ".engines.vllm.server": ["VLLMServerEngine"],
            ".errors": ["TRLMultiturnError"],
            ".evaluation": ["EvaluationResult", "evaluate_policy"],
            ".journal.journal": ["Journal"],
            ".models.reward_model": ["RewardModel", "reward_model_from_policy"],
            ".models.value_model": ["ValueModel"],
            ".online.report": ["IterationReport"],
            ".rollout.config": ["RolloutConfig"],
            ".rollout.loop": ["TooManyToolFailures", "agenerate_trajectories", "generate_trajectories"],
            ".rollout.margins": ["observation_margins"],
            ".rollout.prefix_completion": ["complete_prefixes", "estimate_step_rewards", "reward_longest_good_prefix"],
            ".rollout.search": ["value_guided_search"],
            ".rows.pairing": ["build_preference_dataset", "build_unpaired_dataset"],
            ".rows.selection": ["PairingConfig", "UnpairedConfig"],
            ".sandbox.config": ["SandboxConfig"],
            ".sandbox.result": ["ToolFailure", "ToolResult"],
            ".sandbox.sandbox": ["Sandbox"],
            ".rollout.guided.search_comparison": ["SearchComparison"],
            ".tabular": ["TabularToolMDP"],
            ".templates": ["TurnTemplate"],
            ".tools.base": ["current_rollout"],
            ".tools.environment_pool": ["EnvironmentPool"],
            ".tools.python_tool": ["PythonTool"],
            ".trainer.dqo_config": ["DQOConfig"],
            ".trainer.dqo_trainer": ["DQOTrainer"],
            ".trainer.multi_turn_dpo_config": ["MultiTurnDPOConfig"],
            ".trainer.multi_turn_dpo_trainer": ["MultiTurnDPOTrainer"],
            ".trainer.multi_turn_kto_config": ["MultiTurnKTOConfig"],
            ".trainer.multi_turn_kto_trainer": ["MultiTurnKTOTrainer"],
            ".trainer.oreo_config": ["OREOConfig"],
            ".trainer.oreo_trainer": ["OREOTrainer"],
            ".trainer.outcomes.group_regression_config": ["GroupRegressionConfig"],
            ".trainer.outcomes.group_regression_trainer": ["GroupRegressionTrainer"],
            ".trainer.outcomes.step_regression_trainer": ["StepRegressionTrainer"],
            ".trainer.outcomes.turn_rewards": ["implicit_turn_rewards"],
            ".trainer.values.value_model_config": ["ValueModelConfig"],
            ".trainer.values.value_model_trainer": ["ValueModelTrainer", "train_value_model"],
            ".trajectory": ["StopReason", "Trajectory", "Verdict"],
            ".verify.mathematics": ["math_reward"],
            ".viewer.viewing": ["view"],
        },
        present=["__version__"],
    )
