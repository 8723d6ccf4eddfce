from .multi_turn_dpo_config import MultiTurnDPOConfig
from .multi_turn_dpo_trainer import MultiTurnDPOTrainer
from .multi_turn_kto_config import MultiTurnKTOConfig
from .multi_turn_kto_trainer import MultiTurnKTOTrainer


__all__ = ["MultiTurnDPOConfig", "MultiTurnDPOTrainer", "MultiTurnKTOConfig", "MultiTurnKTOTrainer"]
