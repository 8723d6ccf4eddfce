"""Environments by TRL's `environment_factory` protocol: one object per trajectory, whose public methods are tools.

```python
class Counter:
    def reset(self, **row) -> str | None: ...  # gets the row's columns; text joins the last user message
    def increment(self, step: int) -> str: ...  # a tool: type hints and a Google-style docstring
    def get_reward(self) -> float: ...  # optional: the environment owns (a part of) the reward
```

The same class works in [`~trl.GRPOTrainer`]. Beyond TRL, an environment may have a data attribute or property `done`;
where it is true after a turn's calls, the episode is over and the trajectory stops.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

from ..concurrency import run_in_thread
from .base import tool_schema, tool_version


_PROTOCOL = ("reset", "get_reward")


class EnvironmentType:
    """One factory, probed once: the tools that its environments offer.

    Args:
        factory (`Callable`):
            Called without arguments, once per trajectory.

    Raises:
        `TypeError`: if the factory is not callable, or an environment has no `reset` method.
        `ValueError`: if a public method has no usable schema.
    """

    def __init__(self, factory: Callable[[], Any]):
        if not callable(factory):
            raise TypeError(
                f"`environment_factory` must be callable without arguments, got {type(factory).__name__}. Pass the "
                "environment's class or a function that returns a new environment."
            )
        self.factory = factory
        probe = factory()
        methods = _methods(probe)
        if "reset" not in methods:
            raise TypeError(
                f"`{type(probe).__name__}` has no `reset` method, so a trajectory could not start from a clean state. "
                "Define `reset(self, **row) -> str | None`."
            )
        self.name = type(probe).__name__
        self.has_reward = "get_reward" in methods
        self.version = tool_version(type(probe))
        self.tool_names = [name for name in methods if name not in _PROTOCOL]
        self.schemas = [tool_schema(methods[name]) for name in self.tool_names]

    def make(self) -> Environment:
        """A new environment for one trajectory."""
        return Environment(self.factory(), self)


class Environment:
    """One trajectory's environment; synchronous methods run off the event loop."""

    def __init__(self, instance: Any, kind: EnvironmentType):
        self.instance = instance
        self.kind = kind
        self.methods = {name: getattr(instance, name) for name in kind.tool_names}

    async def reset(self, row: Mapping[str, Any]) -> str | list[dict[str, Any]] | None:
        """Starts the episode; what it returns is appended to the last user message.

        Raises:
            `TypeError`: if it returns something that is no text, content blocks or `None`.
        """
        observation = await self._named(self.instance.reset, **row)
        if observation is None or isinstance(observation, str | list):
            return observation
        raise TypeError(
            f"`reset` of the environment `{self.kind.name}` returned {observation!r:.80}, which cannot join the "
            "prompt. Return a text, a list of content blocks, or `None`."
        )

    async def reward(self) -> float | None:
        """The environment's own reward, or `None` where it has none.

        Raises:
            `TypeError`: if it returns something that is no number.
        """
        if not self.kind.has_reward:
            return None
        reward = await self._named(self.instance.get_reward)
        try:
            return None if reward is None else float(reward)
        except (TypeError, ValueError) as error:
            raise TypeError(
                f"`get_reward` of the environment `{self.kind.name}` returned {reward!r:.80}, which is not a number. "
                "Return a number, or `None` for no verdict."
            ) from error

    @property
    def done(self) -> bool:
        """Whether the environment says that the episode is over."""
        done = getattr(self.instance, "done", False)
        return bool(done) and not callable(done)

    async def _named(self, method: Callable[..., Any], /, **kwargs: Any) -> Any:
        """Calls a method of the protocol; an error of it carries a note that says which it was."""
        try:
            return await self._call(method, **kwargs)
        except Exception as error:
            error.add_note(f"It was raised by `{method.__name__}` of the environment `{self.kind.name}`.")
            raise

    async def _call(self, method: Callable[..., Any], /, **kwargs: Any) -> Any:
        if inspect.iscoroutinefunction(method):
            return await method(**kwargs)
        return await run_in_thread(method, **kwargs)


class EnvironmentSet:
    """What `environment_factory` may be: one factory for all rows, or a dictionary chosen from by the `environment`
    column of each row."""

    def __init__(self, factory: Callable[[], Any] | Mapping[str, Callable[[], Any]] | None):
        self.by_column = isinstance(factory, Mapping)
        if factory is None:
            self.types: dict[str | None, EnvironmentType] = {}
        elif isinstance(factory, Mapping):
            self.types = {name: EnvironmentType(each) for name, each in factory.items()}
        else:
            self.types = {None: EnvironmentType(factory)}

    def for_row(self, row: Mapping[str, Any]) -> EnvironmentType | None:
        """The environment that a row asks for.

        Raises:
            `ValueError`: if the row names an environment that was not passed.
        """
        if not self.types:
            return None
        name = row.get("environment") if self.by_column else None
        if name not in self.types:
            raise ValueError(
                f"A row has `environment={name!r}`, which is not among the environments passed "
                f"({', '.join(map(repr, self.types))}). Fix the column or pass that environment."
            )
        return self.types[name]

    def reset_arguments(self, row: Mapping[str, Any]) -> dict[str, Any]:
        """The row's columns, without the one that only chooses the environment."""
        return {name: value for name, value in row.items() if not (self.by_column and name == "environment")}


def owns_reward(factory: Callable[[], Any] | Mapping[str, Callable[[], Any]] | None) -> bool:
    """Whether an `environment_factory` makes environments with a `get_reward`."""
    return any(kind.has_reward for kind in EnvironmentSet(factory).types.values())


def append_observation(messages: list[dict[str, Any]], observation: str | list | None) -> list[dict[str, Any]]:
    """`messages` with what `reset` returned appended to the last message, as [`~trl.GRPOTrainer`] does it."""
    if observation is None:
        return messages
    content = messages[-1]["content"]
    if isinstance(observation, list) and isinstance(content, str):
        content = [{"type": "text", "text": content}]
    elif isinstance(observation, str) and isinstance(content, list):
        observation = [{"type": "text", "text": observation}]
    return [*messages[:-1], {**messages[-1], "content": content + observation}]


def _methods(instance: Any) -> dict[str, Callable[..., Any]]:
    # Listed on the class: `getmembers` on the instance evaluates properties
    names = [name for name, _ in inspect.getmembers(type(instance), predicate=inspect.isfunction)]
    return {name: getattr(instance, name) for name in names if not name.startswith("_")}
