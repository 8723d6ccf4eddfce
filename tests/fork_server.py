"""
A process that has imported what every training script imports, and forks for each run: `tests/launch.py` starts it.

Those imports take 7 s of a processor, which is most of what a small run takes. A forked run has arguments,
environment, folder, standard streams, globals and an end of its own, as one that a command starts. All share the order
of imports and the seed of hashes, so each way to start a run also has a test with the real command.

`python -m tests.fork_server` reads a JSON line per request (`ForkServer.run` writes it) and answers with the exit
codes, or the negated signals, of the processes that it forked.
"""

from __future__ import annotations

import gc
import json
import os
import runpy
import signal
import sys
from pathlib import Path
from typing import Any


def import_libraries() -> None:
    """What takes long to import; nothing here may start a thread, which a fork would lose."""
    import datasets  # noqa: F401
    import peft  # noqa: F401
    import torch
    import trl.trainer.dpo_trainer
    import trl.trainer.kto_trainer
    import trl.trainer.sft_trainer  # noqa: F401
    from transformers import (  # noqa: F401
        AutoModelForCausalLM,
        AutoTokenizer,
        LlamaForCausalLM,
        PreTrainedTokenizerFast,
        Qwen2ForCausalLM,
    )

    torch.set_num_threads(1)
    gc.collect()
    gc.freeze()


def forked(request: dict[str, Any], environment: dict[str, str]) -> bool | int:
    """Whether this is the new process, prepared for its run; else the new process's id."""
    process = os.fork()
    if process:
        return process
    streams = ((os.devnull, os.O_RDONLY), *((request[name], os.O_WRONLY | os.O_APPEND) for name in ("out", "err")))
    for number, (path, mode) in enumerate(streams):
        descriptor = os.open(path, mode)
        os.dup2(descriptor, number)
        os.close(descriptor)
    os.environ.clear()
    os.environ.update(request["environment"], **environment)
    os.chdir(request["folder"])
    return True


def ended(processes: set[int]) -> list[int]:
    """Waits for the processes, whose others are killed when one fails, as a launcher does; how each ended."""
    codes: dict[int, int] = {}
    while len(codes) < len(processes):
        process, status = os.wait()
        codes[process] = os.waitstatus_to_exitcode(status)
        if codes[process]:
            for other in processes - set(codes):
                os.kill(other, signal.SIGKILL)
    return list(codes.values())


def serve() -> dict[str, Any] | None:
    """Answers requests until there are no more; in a process forked for one, returns that request at once."""
    for line in sys.stdin:
        request = json.loads(line)
        processes = set()
        for environment in request["ranks"]:
            process = forked(request, environment)
            if process is True:
                return request
            processes.add(process)
        print(json.dumps(ended(processes)), flush=True)
    return None


def main() -> None:
    import_libraries()
    request = serve()
    if request is None:
        return
    target = request["target"]
    sys.argv = [target, *request["arguments"]]
    if target.endswith(".py"):
        sys.path[0] = str(Path(target).resolve().parent)
        runpy.run_path(target, run_name="__main__")
    else:
        runpy.run_module(target, run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
