from .dqo_config import DQOConfig
from .dqo_trainer import DQOTrainer
from .multi_turn_dpo_config import MultiTurnDPOConfig
from .multi_turn_dpo_trainer import MultiTurnDPOTrainer
from .multi_turn_kto_config import MultiTurnKTOConfig
from .multi_turn_kto_trainer import MultiTurnKTOTrainer
from .oreo_config import OREOConfig
from .oreo_trainer import OREOTrainer
from .outcomes.group_regression_config import GroupRegressionConfig
from .outcomes.group_regression_trainer import GroupRegressionTrainer
from .outcomes.step_regression_trainer import StepRegressionTrainer
from .outcomes.turn_rewards import implicit_turn_rewards
from .values.value_model_config import ValueModelConfig
from .values.value_model_trainer import ValueModelTrainer, train_value_model


__all__ = [
    "StepRegressionTrainer",
    "implicit_turn_rewards",
    "DQOConfig",
    "DQOTrainer",
    "GroupRegressionConfig",
    "GroupRegressionTrainer",
    "MultiTurnDPOConfig",
    "MultiTurnDPOTrainer",
    "MultiTurnKTOConfig",
    "MultiTurnKTOTrainer",
    "OREOConfig",
    "OREOTrainer",
    "ValueModelConfig",
    "ValueModelTrainer",
    "train_value_model",
]
