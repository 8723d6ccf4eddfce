"""SIGTERM, which clusters send some 30 seconds before they kill: the run ends cleanly, to be taken up again."""

from __future__ import annotations

import logging
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any


logger = logging.getLogger(__name__)


class Preempted(SystemExit):
    """The process got SIGTERM. Sessions are closed and the journal is synced on its way up; the exit status is 143."""

    def __init__(self) -> None:
        super().__init__(128 + signal.SIGTERM)


class Preemption:
    """Turns SIGTERM into [`Preempted`]: at once, or at the end of the optimizer step under way.

    Attributes:
        arrived (`bool`): whether the signal came.
    """

    def __init__(self) -> None:
        self.arrived = False
        self._deferred = False

    @contextmanager
    def watched(self) -> Iterator[None]:
        """Watches for the signal inside the body, if this is the main thread and nobody else watches for it."""
        mine = threading.current_thread() is threading.main_thread()
        if not mine or signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL:
            yield
            return
        signal.signal(signal.SIGTERM, self._on_signal)
        try:
            yield
        finally:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)

    @contextmanager
    def deferred(self) -> Iterator[None]:
        """Inside the body the signal is kept until [`Preemption.raise_if_arrived`]."""
        self._deferred = True
        try:
            yield
        finally:
            self._deferred = False

    def raise_if_arrived(self) -> None:
        """Raises [`Preempted`] if the signal came."""
        if self.arrived:
            raise Preempted

    def _on_signal(self, number: int, frame: FrameType | None) -> Any:
        self.arrived = True
        logger.warning("SIGTERM: the run stops. Start it again with the same command, and it goes on from here.")
        if not self._deferred:
            raise Preempted
