from .loading import load_rows
from .supervised import supervised_rows
from .tokenization import tokenize_trajectory, turn_template


__all__ = ["load_rows", "supervised_rows", "tokenize_trajectory", "turn_template"]
