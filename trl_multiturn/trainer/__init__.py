from .dqo_config import DQOConfig
from .dqo_trainer import DQOTrainer
from .multi_turn_dpo_config import MultiTurnDPOConfig
from .multi_turn_dpo_trainer import MultiTurnDPOTrainer
from .multi_turn_kto_config import MultiTurnKTOConfig
from .multi_turn_kto_trainer import MultiTurnKTOTrainer
from .oreo_config import OREOConfig
from .oreo_trainer import OREOTrainer


__all__ = [
    "DQOConfig",
    "DQOTrainer",
    "MultiTurnDPOConfig",
    "MultiTurnDPOTrainer",
    "MultiTurnKTOConfig",
    "MultiTurnKTOTrainer",
    "OREOConfig",
    "OREOTrainer",
]
