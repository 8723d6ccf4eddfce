"""Written lines reach the disk soon, whether or not another one follows, and nobody waits for a busy disk."""

from __future__ import annotations

import os
import threading


class BackgroundSync:
    """
    Syncs a file to disk at most `seconds` (and the disk's own time) after each write, in a thread.

    The thread lives as long as something is unsynced, so that the last line of a burst is synced like any other.

    Args:
        descriptor (`int`):
            The open file.
        seconds (`float`):
            Longest wait before a sync; 0 syncs in [`BackgroundSync.written`], before it returns.
    """

    def __init__(self, descriptor: int, seconds: float):
        self._descriptor, self._seconds = descriptor, seconds
        self._lock = threading.Lock()
        self._hurry = threading.Event()
        self._unsynced = False
        self._thread: threading.Thread | None = None
        self._error: OSError | None = None

    def written(self) -> None:
        """
        Says that something was written.

        Raises:
            `OSError`: if a sync failed, this one or one since the last call.
        """
        self._raise_error()
        if self._seconds == 0:
            os.fsync(self._descriptor)
            return
        with self._lock:
            self._unsynced = True
            if self._thread is None:
                self._thread = threading.Thread(target=self._work, name="trl-multiturn-journal")
                self._thread.start()

    def finish(self) -> None:
        """
        Returns when all that was written is on the disk and no thread is left.

        Raises:
            `OSError`: if a sync failed, this one or one since the last call.
        """
        with self._lock:
            thread = self._thread
        if thread is not None:
            self._hurry.set()
            thread.join()
            self._hurry.clear()
        self._raise_error()
        os.fsync(self._descriptor)

    def _work(self) -> None:
        while True:
            self._hurry.wait(self._seconds)
            with self._lock:
                if not self._unsynced:
                    self._thread = None
                    return
                self._unsynced = False
            try:
                os.fsync(self._descriptor)
            except OSError as error:
                self._error = error

    def _raise_error(self) -> None:
        error, self._error = self._error, None
        if error is not None:
            raise error
