"""Frames between a session's process and its client. A fixed header and UTF-8 text: nothing is ever unpickled.

Standard library only: the warm interpreter loads this file on its own.
"""

from __future__ import annotations

import struct


# cell: nonce, seconds (negative: acknowledge it before running it), bytes of code
# reply: the nonce of its cell, status, flags, characters dropped, bytes of text
REQUEST = struct.Struct("!8sdI")
REPLY = struct.Struct("!8sBBQI")

OK, ERROR, TIMEOUT, MEMORY, READY, FAILED = range(6)
STATUS = {OK: "ok", ERROR: "error", TIMEOUT: "timeout", MEMORY: "memory"}

# flags
THREADS_LEFT = 1  # threads that the cell started are still alive
SPOILED = 2  # the shell itself failed, after the cell had run: this process must not run another
NOT_RUN = 4  # the shell failed before the cell ran: an earlier cell broke it
NO_NONCE = bytes(8)  # of the first frame, by which a new process reports


def largest_reply(output_limit_chars: int) -> int:
    """Bytes of text that an honest reply can have: head and tail of the output, four bytes a character."""
    return 8 * output_limit_chars + 4096
