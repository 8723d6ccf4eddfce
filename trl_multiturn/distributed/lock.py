"""One run, one folder: a lock that says who holds it and that is released when its holder dies."""

from __future__ import annotations

import json
import logging
import os
import socket
import threading
import time
from dataclasses import asdict, dataclass
from pathlib import Path

from .durable import write_whole, writing


logger = logging.getLogger(__name__)

_HEARTBEAT_SECONDS = 5.0
_SILENCE_SECONDS = 30.0


class FolderInUseError(ValueError):
    """Another process works in the folder."""


@dataclass(frozen=True)
class Holder:
    """Who holds a lock.

    Attributes:
        host (`str`): name of the machine.
        process (`int`): its number there.
        started (`str`): when the run began, in local time.
        machine (`str`): what tells one running system from another: the boot, and the namespace of process numbers.
        process_start (`str`): when the process began, by the system's own count; the number alone may be used again.
        beat (`int`): rises as long as the holder lives.
    """

    host: str
    process: int
    started: str
    machine: str
    process_start: str
    beat: int = 0

    @classmethod
    def here(cls) -> Holder:
        """This process."""
        started = time.strftime("%Y-%m-%d %H:%M:%S")
        return cls(socket.gethostname(), os.getpid(), started, _machine(), _process_start(os.getpid()))

    def __str__(self) -> str:
        return f"process {self.process} on {self.host}, started {self.started}"


class FolderLock:
    """Held from [`acquire`] to [`release`]; a holder that died is replaced.

    On the same machine a holder is dead when its process is gone. On another machine it is when it has not shown a
    sign of life for a while, for which the lock then waits.

    Args:
        path (`Path`):
            The lock's file; its folder is made where it is missing.
        silence_seconds (`float`, *optional*, defaults to `30.0`):
            How long a holder on another machine is watched before it counts as dead.

    Raises:
        [`FolderInUseError`]: on acquiring, if another process holds it.
    """

    def __init__(self, path: Path, silence_seconds: float = _SILENCE_SECONDS):
        self._path, self._silence = path, silence_seconds
        self._me = Holder.here()
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._show_life, name="trl-multiturn-lock", daemon=True)

    def acquire(self) -> None:
        """Takes the lock."""
        with writing(self._path):
            self._path.parent.mkdir(parents=True, exist_ok=True)
            while not self._create():
                self._refuse_or_remove()
        self._thread.start()

    def release(self) -> None:
        """Gives the lock back."""
        self._over.set()
        self._thread.join()
        holder = _read(self._path)
        if holder is not None and _same_process(holder, self._me):
            self._path.unlink(missing_ok=True)

    def _create(self) -> bool:
        try:
            descriptor = os.open(self._path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
        except FileExistsError:
            return False
        with os.fdopen(descriptor, "w") as file:
            json.dump(asdict(self._me), file)
        return True

    def _refuse_or_remove(self) -> None:
        holder = _read(self._path)
        if holder is not None and self._is_alive(holder):
            raise FolderInUseError(
                f"{self._path.parent} is in use by {holder}. Two runs in one folder would mix their rows. Wait for "
                f"it, stop it, or use another `output_dir`. If it no longer runs, delete {self._path}."
            )
        logger.warning("%s was left behind by %s, which runs no longer: taken over.", self._path, holder or "a run")
        self._path.unlink(missing_ok=True)

    def _is_alive(self, holder: Holder) -> bool:
        if holder.machine == self._me.machine:
            return _process_start(holder.process) == holder.process_start
        logger.warning("%s is held by %s. Waiting up to %.0f s for a sign of life.", self._path, holder, self._silence)
        end = time.monotonic() + self._silence
        while time.monotonic() < end:
            time.sleep(min(1.0, self._silence / 10))
            if (now := _read(self._path)) is None:
                return False
            if now != holder:
                return True
        return False

    def _show_life(self) -> None:
        beat = 0
        while not self._over.wait(_HEARTBEAT_SECONDS):
            beat += 1
            try:
                write_whole(self._path, json.dumps(asdict(self._me) | {"beat": beat}).encode())
            except OSError as error:  # a full disk ends the run elsewhere, in words
                logger.warning("The lock could not be renewed: %s", error)


def _read(path: Path) -> Holder | None:
    """Who holds the lock; `None` where nobody does, or where the file was never written to its end."""
    try:
        return Holder(**json.loads(path.read_text()))
    except (OSError, TypeError, ValueError):
        return None


def _same_process(one: Holder, other: Holder) -> bool:
    return (one.machine, one.process, one.process_start) == (other.machine, other.process, other.process_start)


def _machine() -> str:
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {os.stat('/proc/self/ns/pid').st_ino}"
    except OSError:  # not Linux: the name has to do
        return socket.gethostname()


def _process_start(process: int) -> str:
    """When a process began; empty where it is gone (or, away from Linux, `running`)."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[19]
    except (OSError, IndexError):
        pass
    if Path("/proc/self/stat").exists():
        return ""
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return ""
    except PermissionError:
        pass
    return "running"
