"""What the policy reads of a conversation: all of it, or what a function of the user's makes of it."""

from __future__ import annotations

import copy
import importlib
from collections.abc import Callable
from typing import Any

from .conversation import Message


HistoryRewriter = Callable[[list[Message]], list[Message]]
"""Given all that the policy is about to read, in TRL's form; returns what it reads instead."""


def resolve_rewriter(function: Any) -> HistoryRewriter | None:
    """The function that `RolloutConfig.rewrite_history` stands for.

    Raises:
        `TypeError`: if it is no function.
        `ValueError`: if a dotted path leads nowhere.
    """
    if isinstance(function, str):
        module, _, name = function.rpartition(".")
        try:
            function = getattr(importlib.import_module(module), name)
        except (ImportError, AttributeError, ValueError) as error:
            raise ValueError(
                f"`rewrite_history={function!r}` leads nowhere ({error}). Pass a function, or a path such as "
                "`my_package.summarize`."
            ) from error
    if function is not None and not callable(function):
        raise TypeError(
            f"`rewrite_history` is a {type(function).__name__}. Pass a function of the messages that returns messages."
        )
    return function


def rewritten(function: HistoryRewriter | None, history: list[Message]) -> list[Message] | None:
    """What the policy reads instead of a history; `None` where it reads the history.

    Raises:
        `TypeError`: if the function returns anything but messages.
    """
    if function is None:
        return None
    messages = function(copy.deepcopy(history))
    if not isinstance(messages, list) or not messages or not all(isinstance(each, dict) for each in messages):
        raise TypeError(
            f"`rewrite_history` returned {messages!r:.80}, which is no list of messages, so there is nothing to read. "
            "Return the messages that the policy is to read; those it was given, where nothing is to change."
        )
    return None if messages == history else messages
