"""One of two processes that must agree on what to resume from and on what failed; writes what each step ended with."""

from __future__ import annotations

import errno
import json
import sys
from pathlib import Path
from typing import Any

from accelerate import PartialState

from trl_multiturn.distributed.main_process import on_main
from trl_multiturn.rollout import JournalError
from trl_multiturn.trainer.loop.checkpoints import checkpoint_to_resume


class Unpicklable(Exception):
    def __init__(self, message: str) -> None:
        super().__init__(message)
        self.held = lambda: None


def outcome(do: Any) -> Any:
    try:
        return do()
    except Exception as error:
        return [type(error).__name__, str(error)]


def fail(error: Exception) -> Any:
    def do() -> None:
        raise error

    return outcome(lambda: on_main(do))


def main(folder: Path) -> None:
    rank = PartialState(cpu=True).process_index
    own = folder / f"machine{rank}"
    found = {
        "same": outcome(lambda: checkpoint_to_resume(True, str(folder / "same"))),
        "empty": outcome(lambda: checkpoint_to_resume(True, str(folder / "empty"))),
        "only on one": outcome(lambda: checkpoint_to_resume(True, str(own / "one"))),
        "disjoint": outcome(lambda: checkpoint_to_resume(True, str(own / "disjoint"))),
        "one ahead": outcome(lambda: checkpoint_to_resume(True, str(own / "ahead"))),
        "named": outcome(lambda: checkpoint_to_resume(str(own / "one" / "checkpoint-4"), "")),
        "result": on_main(lambda: {"rank": rank}),
        "disk full": fail(OSError(errno.ENOSPC, "No space left on device", "report.json")),
        "mistake": fail(ValueError("other settings")),
        "journal": fail(JournalError("a shard is damaged")),
        "unpicklable": fail(Unpicklable("held")),
        "after": on_main(lambda: "still in step"),
    }
    (folder / f"rank{rank}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
