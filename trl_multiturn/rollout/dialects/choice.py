"""Which dialect a rollout speaks: one of the table, the user's own, or the one that fits the chat template."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ..._lazy import load_path
from ...tools.base import tool_version
from .action import ActionDialect
from .dialect import Dialect, DialectFactory, DialectLike, DialectSettings, FromConfig, text_parameter
from .fenced import FencedDialect
from .hermes import HermesDialect
from .native import NativeCallsImpossible, NativeDialect


@dataclass(frozen=True)
class _Defaults:
    answer_pattern: str | None = None
    action_prefix: str = "Action:"
    chat_template_kwargs: Any = None
    tool_parser: Any = None


def _auto(processing_class: Any, schemas: Sequence[dict[str, Any]], config: DialectSettings) -> Dialect:
    """Native where the chat template can render and parse tool calls, else fenced."""
    try:
        return NativeDialect.from_config(processing_class, schemas, config)
    except NativeCallsImpossible:
        if config.tool_parser is not None or not all(text_parameter(schema) for schema in schemas):
            raise
        return FencedDialect.from_config(processing_class, schemas, config)


DIALECTS: dict[str, DialectFactory] = {
    "auto": _auto,
    "native": NativeDialect.from_config,
    "hermes": HermesDialect.from_config,
    "fenced": FencedDialect.from_config,
    "action": ActionDialect.from_config,
}
"""Every dialect that has a name of its own; `RolloutConfig.dialect` takes any other by dotted path or as an object."""


def resolve_dialect(dialect: DialectLike) -> DialectFactory:
    """The factory that `RolloutConfig.dialect` stands for.

    Args:
        dialect ([`Dialect`], `Callable` or `str`, *optional*, defaults to `"auto"`):
            A name from `DIALECTS`; the dotted path of a dialect's class, of another factory or of a dialect; or one
            of these objects.

    Raises:
        `TypeError`: for what is none of these.
        `ValueError`: if a name is unknown, or a path leads nowhere.
    """
    found = _found(dialect)
    if isinstance(found, Dialect) and not inspect.isclass(found):
        return lambda *_: found
    if inspect.isclass(found) and isinstance(found, FromConfig):
        return found.from_config
    if not callable(found):
        raise TypeError(
            f"`dialect={dialect!r}` is a {type(found).__name__}, which can neither read a turn nor make a dialect "
            f"that does. Pass {_CHOICES}."
        )
    try:
        inspect.signature(found).bind(None, None, None)
    except (TypeError, ValueError) as error:
        raise TypeError(
            f"`dialect={dialect!r}` makes no dialect of the three arguments `processing_class`, `schemas` and "
            f"`config` ({error}). Give it these three, or a class method `from_config` that takes them."
        ) from None
    return found


def choose_dialect(
    dialect: DialectLike,
    processing_class: Any,
    schemas: Sequence[dict[str, Any]],
    config: DialectSettings | None = None,
) -> Dialect:
    """The dialect that `RolloutConfig.dialect` stands for, checked against chat template and tools.

    Args:
        dialect ([`Dialect`], `Callable` or `str`, *optional*, defaults to `"auto"`):
            As in [`resolve_dialect`].
        processing_class ([`~transformers.PreTrainedTokenizerBase`]):
            The policy's tokenizer or processor.
        schemas (`list[dict]`):
            JSON schemas of the tools.
        config ([`RolloutConfig`], *optional*):
            Answer pattern and action prefix; a factory is handed the whole.

    Raises:
        `TypeError`: if `dialect` is no dialect and makes none.
        `ValueError`: if dialect, chat template and tools do not fit together.
    """
    made = resolve_dialect(dialect)(processing_class, schemas, config or _Defaults())
    missing = [name for name in _MEMBERS if not hasattr(made, name)]
    if missing:
        raise TypeError(
            f"`dialect={dialect!r}` made a {type(made).__name__}, which lacks {', '.join(missing)} and so cannot read "
            "turns. Give it what `trl_multiturn.rollout.dialects.Dialect` describes."
        )
    return made


def describe_dialect(dialect: DialectLike) -> str:
    """What identifies a dialect: the name of one of ours, or where another comes from, with its version."""
    if dialect is None or dialect in list(DIALECTS):
        return str(dialect or "auto")
    found = _found(dialect)
    named = found if hasattr(found, "__qualname__") else type(found)
    return f"{named.__module__}.{named.__qualname__} {tool_version(found)}"


_MEMBERS = ("name", "stop_strings", "template_tools", "read", "observe")
_CHOICES = (
    ", ".join(map(repr, DIALECTS)) + ", the dotted path of a dialect's class (`'my_package.MyDialect'`), the class, "
    "or a dialect itself"
)


def _found(dialect: DialectLike) -> Any:
    if dialect is None or not isinstance(dialect, str):
        return dialect or _auto
    if dialect in DIALECTS:
        return DIALECTS[dialect]
    try:
        return load_path(dialect)
    except ValueError as error:
        why = f"could not be loaded ({error})" if "." in dialect else "is unknown"
        raise ValueError(f"`dialect={dialect!r}` {why}. Use one of {_CHOICES}.") from error
