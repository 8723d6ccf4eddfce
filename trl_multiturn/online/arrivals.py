"""What several processes have rolled out, counted before any row is selected."""

from __future__ import annotations

import logging
import time
from collections import Counter

from ..errors import JournalError
from ..journal.journal import Journal, Places


logger = logging.getLogger(__name__)

_LONGEST_PAUSE_SECONDS = 10.0


def await_trajectories(journal: Journal, places: Places, processes: int, patience_seconds: float = 120.0) -> None:
    """Returns once a journal shows all trajectories of an iteration. A network's file system may show them late.

    Args:
        journal ([`Journal`]):
            Where all processes have written; all have finished.
        places ([`Places`]):
            Where they have written to.
        processes (`int`):
            How many they are; each has rolled out every so-manieth prompt.
        patience_seconds (`float`, *optional*, defaults to `120.0`):
            How long to look.

    Raises:
        [`JournalError`]: if some do not show; the message says whose.
    """
    end, pause = time.monotonic() + patience_seconds, 0.1
    while missing := journal.missing(places):
        if time.monotonic() >= end:
            raise JournalError(_those_of(missing, places, processes, journal))
        logger.warning("%d trajectories do not show in %s yet.", sum(missing.values()), journal.folder)
        time.sleep(min(pause, max(end - time.monotonic(), 0)))
        pause = min(2 * pause, _LONGEST_PAUSE_SECONDS)


def _those_of(missing: dict[int, int], places: Places, processes: int, journal: Journal) -> str:
    by_process: Counter[int] = Counter()
    for prompt, count in missing.items():
        by_process[prompt % processes] += count
    whose = ", ".join(f"{count} of process {process}" for process, count in sorted(by_process.items()))
    return (
        f"{journal.folder} shows {places.count - sum(missing.values())} of {places.count} trajectories; missing are "
        f"{whose}. Rows from a part of them would not be this iteration's, so none are written. See that the folder "
        "is one that all machines share, and start again with the same command: what is missing is rolled out."
    )
