"""Multi-turn, tool-using agents on Hugging Face TRL.

Public names are loaded on first use, so that `import trl_multiturn` stays quick and offline training never imports an
interpreter or an engine.
"""

from __future__ import annotations

import importlib
from typing import Any

from .version import __version__ as __version__


# public name -> module that defines it
_MODULES = {
    "trajectory": ["StopReason", "Trajectory", "Verdict"],
}
_HOME = {name: module for module, names in _MODULES.items() for name in names}

__all__ = sorted(["__version__", *_HOME])


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_HOME[name]}", __name__), name)


def __dir__() -> list[str]:
    return __all__
