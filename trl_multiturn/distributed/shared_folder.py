"""Whether all processes see one folder: told before anything is rolled out, not by rows that are missing later."""

from __future__ import annotations

import os
import socket
import time
from dataclasses import dataclass
from pathlib import Path
from secrets import token_hex

from accelerate import PartialState
from accelerate.utils import broadcast_object_list, gather_object

from .durable import write_whole


@dataclass(frozen=True)
class _View:
    """What a process sees of the token that the main process wrote."""

    rank: int
    host: str
    folder: str
    sees_it: bool


def refuse_unshared_folder(folder: Path, patience_seconds: float = 20.0) -> None:
    """The main process writes a token into a folder, and every process reads it. All processes call this together.

    Args:
        folder (`Path`):
            What all must share; it is made where it is missing.
        patience_seconds (`float`, *optional*, defaults to `20.0`):
            How long a process looks for the token: a network's file system may show it late.

    Raises:
        `ValueError`: on all processes, if one of them does not see the token.
    """
    state = PartialState()
    if state.num_processes == 1:
        return
    message = [token_hex(8)]
    broadcast_object_list(message)
    token = folder / f".shared-{message[0]}"
    failure = ""
    if state.is_main_process:
        try:
            write_whole(token, message[0].encode())
        except OSError as error:
            failure = str(error)
    told = [failure]
    broadcast_object_list(told)
    if told[0]:
        raise ValueError(told[0])
    sees_it = _appears(token, message[0], patience_seconds)
    views = gather_object([_View(state.process_index, socket.gethostname(), os.path.abspath(folder), sees_it)])
    if state.is_main_process:
        token.unlink(missing_ok=True)
    blind = [view for view in views if not view.sees_it]
    if blind:
        raise ValueError(_not_shared(views[0], blind))


def _appears(token: Path, text: str, patience_seconds: float) -> bool:
    end = time.monotonic() + patience_seconds
    while True:
        try:
            if token.read_text() == text:
                return True
        except OSError:
            pass
        if time.monotonic() >= end:
            return False
        time.sleep(min(0.2, patience_seconds))


def _not_shared(writer: _View, blind: list[_View]) -> str:
    others = ", ".join(f"process {view.rank} on {view.host} (in {view.folder})" for view in blind[:8])
    others += " and others" if blind[8:] else ""
    return (
        f"Process 0 on {writer.host} wrote a file to {writer.folder}, and {others} cannot "
        " see it, so the folder is not shared. Each process writes its rollouts there, and the rows come from "
        "those of all: without a shared folder a part of them would be missing. Set `output_dir` (or the generator's "
        "`run_folder`) to a folder on a disk that all machines share, under the same name."
    )
