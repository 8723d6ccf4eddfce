"""Files that are whole or not there, also after a power failure: on the disk first, then under their own name."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from secrets import token_hex


_OF_FILES = {OSError, PermissionError, FileNotFoundError, FileExistsError, NotADirectoryError, IsADirectoryError}


class _NotWritten(OSError):
    """Says which file it is about."""


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Has an operating system's error say which file it is about, and what to do.

    Raises:
        `OSError`: with the number of the one that the body raised. Errors of a network, which code of the user's that
            the body calls may raise, pass as they are.
    """
    try:
        yield
    except OSError as error:
        if type(error) not in _OF_FILES:
            raise
        what = (
            f"{path} cannot be written: {error.strerror or error}. What was written before is intact: free space or "
        )
        what += "make the folder writable, and start again with the same command."
        raise (_NotWritten(what) if error.errno is None else _NotWritten(error.errno, what)) from error


@contextmanager
def written_whole(path: Path, suffix: str = ".partial") -> Iterator[Path]:
    """Gives the body a name to write a file to. It gets its own at the end; where the body raises, it is deleted."""
    partial = path.with_name(path.name + suffix)
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            yield partial
            put_in_place(partial, path)
        except BaseException:
            partial.unlink(missing_ok=True)
            raise


def write_whole(path: Path, content: bytes) -> None:
    """Writes a file, and the folders above it, in place of what was there; several processes may write the same."""
    with written_whole(path, f".{token_hex(4)}.partial") as partial:
        partial.write_bytes(content)


def put_in_place(partial: Path, path: Path) -> None:
    """Gives what was written as `partial`, a file or a whole folder, its own name, once it is on the disk.

    A file takes the place of an older one. A folder's name must be free.
    """
    sync(partial)
    os.replace(partial, path)
    sync_entry(path.parent)


def sync(path: Path) -> None:
    """Waits until a file, or a folder with all that it holds, is on the disk."""
    for folder, _, files in os.walk(path):  # of a file, nothing
        for name in files:
            with suppress(FileNotFoundError):  # a link to nothing, or a passing file that is gone by now
                sync_entry(Path(folder, name))
        if Path(folder) != path:
            sync_entry(Path(folder))
    sync_entry(path)


def sync_entry(path: Path) -> None:
    """Waits until a file's content, or the names in a folder, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        # Some file systems cannot sync a folder, and keep its names in another way
        if error.errno not in (errno.EINVAL, errno.ENOTSUP) or not path.is_dir():
            raise
    finally:
        os.close(descriptor)
