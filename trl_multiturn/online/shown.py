"""What the loop logs of its trajectories: a few per iteration and per evaluation."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ..completions.choice import CompletionPicker
from ..completions.logger import log_completions
from ..trajectory import Trajectory


class ShownCompletions:
    """
    Picks trajectories of the iteration under way, and logs them once its rows are found; so with an evaluation's.

    Args:
        count (`int`):
            Most trajectories per iteration and per evaluation.
    """

    def __init__(self, count: int):
        self.count = count
        self._picker = CompletionPicker(count)

    def see(self, trajectory: Trajectory, dropped: str | None) -> None:
        """Takes a trajectory of the iteration under way into account. Only the main process sees any."""
        self._picker.see(trajectory, dropped)

    def log_iteration(self, trainer: Any, iteration: int) -> None:
        """Logs those of an iteration (0-based), and begins the next one."""
        picker, self._picker = self._picker, CompletionPicker(self.count)
        self._log(trainer, picker, f"Rollouts of iteration {iteration + 1}", "completions")

    def log_evaluation(self, trainer: Any, iterations: int, trajectories: Sequence[Trajectory]) -> None:
        """Logs those of an evaluation after so many iterations."""
        title = f"Held-out prompts after iteration {iterations}" if iterations else "Held-out prompts at the start"
        self._log(trainer, CompletionPicker(self.count).see_all(trajectories), title, "eval_completions")

    def _log(self, trainer: Any, picker: CompletionPicker, title: str, name: str) -> None:
        if trainer.accelerator.is_main_process:
            step, trackers = trainer.state.global_step, trainer.args.report_to or ()
            log_completions(picker.picks(), title, step, trackers, name, trainer.callback_handler.callbacks)
