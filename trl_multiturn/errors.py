"""What can fail, whose failure it is, and what becomes of it.

Three kinds of failure never mix:

- **The user's mistake raises**, before training or the first rollout: in a constructor, or while rows are prepared. It
  is a `ValueError` or a `TypeError` that says what was passed, why it cannot work, and what to do. Whoever catches
  `TRLMultiturnError` catches those that have a class of their own.
- **The model's mistake is data.** Code that raises, a call of a tool that does not exist, broken JSON, a turn without
  an end: the policy reads what was wrong as an observation ([`ToolResult`] with a `status`), or the trajectory ends
  with a [`StopReason`] (`ENDED`, `MAX_TOKENS`, `MAX_TURNS`). Nothing raises, and the trajectory is judged and trained
  on as any other.
- **The machine's failure is recorded and kept out of training.** An interpreter that does not start, an environment
  that hangs: a [`ToolFailure`] is tried again, then ends its trajectory with `StopReason.TOOL_FAILED`. A verifier that
  dies or times out decides nothing. Both leave the verdict `UNDECIDED`, which never becomes a rejected row. Too many
  of them, an engine that fails, or a disk that refuses to be written end the run; what has finished is in the journal.

```
Exception
└── TRLMultiturnError
    ├── NoRowsLeftError (ValueError)             user     no row fits `max_length` and trains something
    ├── VanishedPartError (ValueError)           user     a chat template leaves out a part of a row
    ├── UnsupportedOutput (TypeError)            user     a tool returned what a rollout cannot carry
    ├── JournalError (RuntimeError)              user     the journal is another run's, or
    │                                            machine  it is damaged, or cannot be written
    ├── DivergedError (RuntimeError)             user     training diverged: weights are NaN or infinite
    ├── ToolFailure                              machine  a tool could not do its work
    │   └── IsolationError                       machine  a layer of isolation is not granted here
    ├── TooManyToolFailures (RuntimeError)       machine  tools failed so often that the run ended
    ├── TooManyRewardErrors (RuntimeError)       user     reward functions raised so often that the run ended
    └── EngineError (RuntimeError)               machine  the model could not generate
```

Errors of libraries and of the user's own functions pass as they are, with a note that names the function. A reward
function that raises on single trajectories leaves those undecided, and counts like a failure of the machine.
"""

from __future__ import annotations


class TRLMultiturnError(Exception):
    """Base of all exceptions of this package that a caller may want to tell apart."""


class NoRowsLeftError(TRLMultiturnError, ValueError):
    """No row of a dataset fits `max_length` and trains something."""


class VanishedPartError(TRLMultiturnError, ValueError):
    """A chat template leaves out a part of a message, which training would then never see."""


class UnsupportedOutput(TRLMultiturnError, TypeError):
    """A tool returned what a rollout cannot carry: the user's mistake, which stops the run."""


class JournalError(TRLMultiturnError, RuntimeError):
    """The journal cannot be read or written; nothing in it was overwritten."""


class DivergedError(TRLMultiturnError, RuntimeError):
    """The weights that are trained are not finite; nothing of them was saved."""


class ToolFailure(TRLMultiturnError):
    """The machine failed, not the policy: an interpreter cannot start, or does not answer even after a replacement.

    A rollout that meets it stops with `StopReason.TOOL_FAILED` and never becomes training data.
    """


class IsolationError(ToolFailure):
    """This machine does not grant a layer of isolation that the configuration insists on."""


class TooManyToolFailures(TRLMultiturnError, RuntimeError):
    """The machine failed so often that going on would waste the run; what finished is in the journal."""


class TooManyRewardErrors(TRLMultiturnError, RuntimeError):
    """Reward functions raised on so many trajectories that the rows would say little; the last error is the cause."""


class EngineError(TRLMultiturnError, RuntimeError):
    """Generation failed inside the model; the cause is attached. The requests in flight are lost, not the engine."""
