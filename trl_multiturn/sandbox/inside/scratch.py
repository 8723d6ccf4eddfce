"""Folders that model-written code fills: how much is in one, and removing one whatever is in it.

Standard library only: the warm interpreter loads this file on its own.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import stat
from collections import deque


_DEEPEST = 100


def over_quota(folder: str, limit_mb: int, max_files: int) -> str | None:
    """Says which limit the folder exceeds, or `None`. Looks at no more than `max_files` entries.

    Safe while the code runs: links are not followed, and whatever cannot be looked into counts as exceeding.
    """
    pending, files, size = [(folder, 0)], 0, 0
    while pending:
        path, depth = pending.pop()
        try:
            with os.scandir(path) as entries:
                for entry in entries:
                    files += 1
                    if files > max_files:
                        return f"more than {max_files} files"
                    with contextlib.suppress(FileNotFoundError):
                        info = entry.stat(follow_symlinks=False)
                        size += info.st_blocks * 512
                        if stat.S_ISDIR(info.st_mode):
                            pending.append((entry.path, depth + 1))
                    if size > limit_mb << 20:
                        return f"more than {limit_mb} MB"
        except FileNotFoundError:
            continue
        except OSError:
            return "a folder that cannot be read"
        if depth > _DEEPEST:
            return f"folders more than {_DEEPEST} deep"
    return None


def remove(folder: str) -> None:
    """Removes a folder with everything in it, also unreadable folders and trees deeper than any path or recursion.

    Nested folders are moved to the top first, so that no path grows. Nobody may be writing any more.
    """
    with contextlib.suppress(OSError):
        os.rmdir(folder)  # the usual case: nothing was written
        return
    token, number, pending, emptied = secrets.token_hex(8), 0, deque([folder]), []
    while pending:
        directory = pending.popleft()
        try:
            descriptor = _open(directory)
        except OSError:
            continue
        try:
            with os.scandir(descriptor) as entries:
                names = [(entry.name, entry.is_dir(follow_symlinks=False)) for entry in entries]
            for name, is_directory in names:
                with contextlib.suppress(OSError):
                    if is_directory:
                        number += 1
                        moved = f"{folder}/{token}{number}"
                        os.close(_open(name, descriptor))  # moving a folder needs permission to write in it
                        os.rename(name, moved, src_dir_fd=descriptor)
                        pending.append(moved)
                    else:
                        os.unlink(name, dir_fd=descriptor)
        finally:
            os.close(descriptor)
        emptied.append(directory)
    for directory in reversed(emptied):
        with contextlib.suppress(OSError):
            os.rmdir(directory)


def _open(path: str, parent: int | None = None) -> int:
    """Opens a folder for listing, after granting that right to its owner where it was taken away."""
    handle = os.open(path, os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=parent)
    try:
        if stat.S_IMODE(os.fstat(handle).st_mode) & 0o700 != 0o700:
            os.chmod(f"/proc/self/fd/{handle}", 0o700)
        return os.open(".", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC, dir_fd=handle)
    finally:
        os.close(handle)
