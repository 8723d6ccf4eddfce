"""What is kept of a run: every finished trajectory, at once, in files that survive a kill. Knows no loop."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .._lazy import attach


if TYPE_CHECKING:
    from .export import export_trajectories as export_trajectories, run_trajectories as run_trajectories
    from .journal import Journal as Journal, JournalError as JournalError, read_dataset as read_dataset
else:
    __getattr__, __dir__, __all__ = attach(
        __name__,
        {
            ".export": ["export_trajectories", "run_trajectories"],
            ".journal": ["Journal", "JournalError", "read_dataset"],
        },
    )
