"""The verifier's process: reads JSON lines, compares two LaTeX answers with math-verify, writes JSON lines.

Run as a script by `workers.WorkerPool`, never imported: it loads neither torch nor the package nor the user's program.
Its first line of input is a list of folders to import from; its first line of output says whether it is ready.
"""

import json
import os
import sys


def _load():
    import logging

    from math_verify import LatexExtractionConfig, parse, verify

    logging.disable(logging.CRITICAL)  # math-verify warns that its own timeouts are off, which is what we want
    config = [LatexExtractionConfig(boxed_match_priority=0, try_extract_without_anchor=False)]

    def read(text):
        return parse(rf"\boxed{{{text}}}", config, extraction_mode="first_match", parsing_timeout=None)

    def equal(gold, answer):
        gold = read(gold)
        if not gold:
            raise ValueError("the gold answer cannot be parsed")
        return verify(gold, read(answer), timeout_seconds=None, raise_on_error=True)

    equal("2x", "x+x")  # what is only imported now would be on the first answer's time
    return equal


def main():
    import signal

    requests = sys.stdin
    replies = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # a library that prints must not write into the protocol

    start = json.loads(requests.readline())
    sys.path.extend(folder for folder in start["path"] if folder not in sys.path)
    try:
        equal = _load()
    except Exception as error:
        replies.write(json.dumps({"ready": False, "error": f"{type(error).__name__}: {error}"}) + "\n")
        return
    replies.write('{"ready": true}\n')

    # The pool kills a worker that is late. Should the trainer itself be gone by then, the default action of the alarm
    # ends the process, even inside a C function that holds the interpreter's lock.
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    for line in requests:
        job = json.loads(line)
        signal.setitimer(signal.ITIMER_REAL, job["seconds"] + 1.0)
        try:
            reply = {"equal": bool(equal(job["gold"], job["answer"]))}
        except Exception as error:  # RecursionError among them: no verdict
            reply = {"equal": None, "error": type(error).__name__}
        signal.setitimer(signal.ITIMER_REAL, 0.0)
        replies.write(json.dumps(reply) + "\n")


if __name__ == "__main__":
    main()
