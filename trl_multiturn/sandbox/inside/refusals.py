"""Says in words what the walls only refuse by a number: that no program, and no other process, can be started here.

Nothing is protected by this: what a cell gets past it, it still has the walls before it. Standard library only.
"""

from __future__ import annotations

import sys
from typing import Any, NoReturn


PROGRAMS = "no program can be started here"
PROCESSES = "no other process can be started here: use ThreadPoolExecutor, or a plain loop"

_REFUSED = {
    "os.exec": PROGRAMS,
    "os.fork": PROCESSES,
    "os.forkpty": PROCESSES,
    "os.posix_spawn": PROGRAMS,
    "os.spawn": PROGRAMS,
    "os.system": PROGRAMS,
    "pty.spawn": PROGRAMS,
    "subprocess.Popen": PROGRAMS,
}


def install() -> None:
    """For this process and all its forks; `sys.addaudithook` itself is not for cells (see `child`)."""
    import _multiprocessing

    class SemLock(_multiprocessing.SemLock):
        """What pools, queues and locks of `multiprocessing` begin with."""

        def __new__(cls, *args: Any, **kwargs: Any) -> NoReturn:
            raise PermissionError(PROCESSES)

    _multiprocessing.SemLock = SemLock
    refused = _REFUSED

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if event in refused:
            raise PermissionError(refused[event])

    sys.addaudithook(hook)
