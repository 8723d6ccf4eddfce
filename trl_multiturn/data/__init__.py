from .loading import choose_split, load_rows, load_split
from .supervised import supervised_rows
from .tokenization import tokenize_trajectory, turn_template


__all__ = ["choose_split", "load_rows", "load_split", "supervised_rows", "tokenize_trajectory", "turn_template"]
