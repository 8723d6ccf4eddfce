"""What an environment's class offers: its tools, its reward, and what it says about being kept and shared."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from types import MethodType
from typing import Any

from .base import tool_schema, tool_version


# Methods that are no tools
PROTOCOL = ("reset", "get_reward", "close")


@dataclass(frozen=True)
class EnvironmentMethods:
    """What the environments of one class offer.

    Attributes:
        name (`str`): of the class.
        version (`str`): see [`tool_version`].
        schemas (`dict[str, dict]`): name to JSON schema of every tool.
        has_reward (`bool`): whether there is a `get_reward`.
    """

    name: str
    version: str
    schemas: dict[str, dict[str, Any]]
    has_reward: bool

    @classmethod
    def of(cls, kind: type) -> EnvironmentMethods:
        """What a class offers; nothing of it is called.

        Raises:
            `TypeError`: if it has no `reset`.
            `ValueError`: if a public method has no usable schema.
        """
        methods = _public_functions(kind)
        if "reset" not in methods:
            raise TypeError(
                f"`{kind.__name__}` has no `reset` method, so a trajectory could not start from a clean state. "
                "Define `reset(self, **row) -> str | None`."
            )
        tools = {name: method for name, method in methods.items() if name not in PROTOCOL}
        schemas = {name: _schema(kind, method) for name, method in tools.items()}
        return cls(kind.__name__, tool_version(kind), schemas, "get_reward" in methods)


def class_of(factory: Callable[[], Any]) -> type | None:
    """The class of the environments that a factory makes, where it can be known without making one."""
    while isinstance(factory, functools.partial):
        factory = factory.func
    return factory if inspect.isclass(factory) else None


def _public_functions(kind: type) -> dict[str, Callable[..., Any]]:
    members = inspect.getmembers(kind, predicate=inspect.isfunction)
    return {name: function for name, function in members if not name.startswith("_")}


def _schema(kind: type, function: Callable[..., Any]) -> dict[str, Any]:
    static = isinstance(inspect.getattr_static(kind, function.__name__, None), staticmethod)
    try:
        return tool_schema(function if static else MethodType(function, kind))  # bound, so that `self` is no argument
    except ValueError as error:
        raise ValueError(
            f"`{kind.__name__}.{function.__name__}` is public, so the policy is offered it as a tool, but it cannot "
            f"be one. {error} If it is a helper that the policy is not to call, let its name begin with an underscore."
        ) from error
