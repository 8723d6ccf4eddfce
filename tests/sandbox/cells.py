"""Cells that say when they run, and that wait to be told: a test that needs a cell to be somewhere asks, and does not
guess by the clock, which is wrong on a busy machine."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from typing import TYPE_CHECKING


if TYPE_CHECKING:
    from trl_multiturn.sandbox.session import Session

PATIENCE_SECONDS = 20.0
BEGIN = "open('begun', 'w').close()\n"
WAIT = "import os, time\nwhile not os.path.exists('go'): time.sleep(0.002)\n"  # until [`let_go`]


def eventually(condition: Callable[[], bool]) -> bool:
    """Whether a condition comes to hold."""
    deadline = time.monotonic() + PATIENCE_SECONDS
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.002)
    return True


def has_begun(session: Session) -> bool:
    """Whether the session's present process has come past a [`BEGIN`]."""
    interpreter = session._interpreter
    return interpreter is not None and os.path.exists(os.path.join(interpreter.folder, "begun"))


def let_go(session: Session) -> None:
    """Ends a [`WAIT`] of the session's present process."""
    with open(os.path.join(session._interpreter.folder, "go"), "w"):
        pass
