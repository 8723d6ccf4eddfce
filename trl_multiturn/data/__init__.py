from .tokenization import tokenize_trajectory, turn_template


__all__ = ["tokenize_trajectory", "turn_template"]
