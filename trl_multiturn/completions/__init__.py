"""A few trajectories where people look for them: the terminal, W&B, trackio, TensorBoard. Nothing rests on it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .._lazy import attach


if TYPE_CHECKING:
    from .choice import CompletionPicker as CompletionPicker, PickedCompletion as PickedCompletion
    from .logger import log_completions as log_completions
    from .table import completions_table as completions_table
else:
    __getattr__, __dir__, __all__ = attach(
        __name__,
        {
            ".choice": ["CompletionPicker", "PickedCompletion"],
            ".logger": ["log_completions"],
            ".table": ["completions_table"],
        },
    )
