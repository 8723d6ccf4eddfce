"""Checksums beside files, so that bits that flipped on a disk are told by the file's name and are not trained on."""

from __future__ import annotations

import json
import zlib
from pathlib import Path


CHECKSUM_FILE = "checksums.json"
_CHUNK_BYTES = 1 << 24


class DamagedFileError(ValueError):
    """A file is not what was written."""


def write_checksums(folder: Path) -> None:
    """Writes the CRC-32 of every file in a folder to `checksums.json` in it."""
    sums = {str(path.relative_to(folder)): _crc(path) for path in _files(folder)}
    (folder / CHECKSUM_FILE).write_text(json.dumps(sums, indent=1, sort_keys=True))


def find_damage(folder: Path) -> str | None:
    """What is wrong with a folder that [`write_checksums`] has seen; `None` where nothing is, or no sums are there."""
    path = folder / CHECKSUM_FILE
    if not path.exists():  # written by an earlier release
        return None
    try:
        sums = {str(name): int(value) for name, value in json.loads(path.read_text()).items()}
    except (AttributeError, OSError, TypeError, ValueError) as error:
        return f"{path} cannot be read ({error})"
    for name, expected in sums.items():
        file = folder / name
        try:
            if _crc(file) != expected:
                return f"{file} is not what was written (its checksum differs)"
        except OSError as error:
            return f"{file} cannot be read ({error.strerror or error})"
    return None


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file() and path.name != CHECKSUM_FILE)


def _crc(path: Path) -> int:
    value = 0
    with open(path, "rb") as file:
        while chunk := file.read(_CHUNK_BYTES):
            value = zlib.crc32(chunk, value)
    return value
