from .loading import load_rows
from .tokenization import tokenize_trajectory, turn_template


__all__ = ["load_rows", "tokenize_trajectory", "turn_template"]
