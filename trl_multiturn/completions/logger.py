"""`log_completions`: to the terminal and to every tracker that a run reports to."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from transformers.integrations import is_trackio_available, is_wandb_available

from .choice import PickedCompletion
from .table import print_completions
from .trackers import log_to_tensorboard, log_to_trackio, log_to_wandb, tensorboard_writer


logger = logging.getLogger(__name__)


def log_completions(
    picks: Sequence[PickedCompletion],
    title: str,
    step: int = 0,
    report_to: Iterable[str] | str = (),
    name: str = "completions",
    callbacks: Iterable[Any] = (),
) -> None:
    """
    Prints completions, and logs them as a table to W&B, as traces to trackio and as text to TensorBoard.

    A tracker that fails is warned of and stops nothing: a run is worth more than a look at it.

    Args:
        picks (`Sequence[PickedCompletion]`):
            What [`CompletionPicker`] picked.
        title (`str`):
            Of the printed table.
        step (`int`, *optional*, defaults to `0`):
            The trainer's.
        report_to (`str` or `list[str]`, *optional*):
            The trainer's; `"all"` means every tracker with a run under way in this process.
        name (`str`, *optional*, defaults to `"completions"`):
            Key under which the trackers show them.
        callbacks (`Iterable`, *optional*):
            The trainer's, among which is TensorBoard's writer.
    """
    if not picks:
        return
    print_completions(picks, title)
    trackers: dict[str, Callable[[], None]] = {
        "wandb": lambda: log_to_wandb(picks, name, step),
        "trackio": lambda: log_to_trackio(picks, name, step),
    }
    installed = {"wandb": is_wandb_available, "trackio": is_trackio_available}
    wanted = [report_to] if isinstance(report_to, str) else list(report_to)
    for tracker, log in trackers.items():
        if (tracker in wanted or "all" in wanted) and installed[tracker]():
            _try(tracker, log)
    writer = tensorboard_writer(callbacks)
    if writer is not None:
        _try("tensorboard", lambda: log_to_tensorboard(writer, picks, name, step))


def _try(tracker: str, log: Callable[[], None]) -> None:
    try:
        log()
    except Exception as error:
        logger.warning("Completions were not logged to %s: %s: %s", tracker, type(error).__name__, error)
