"""Environments by TRL's `environment_factory` protocol: one object per trajectory, whose public methods are tools.

```python
class Counter:
    def reset(self, **row) -> str | None: ...  # gets the row's columns; text joins the last user message
    def increment(self, step: int) -> str: ...  # a tool: type hints and a Google-style docstring
    def get_reward(self) -> float: ...  # optional: the environment owns (a part of) the reward
```

The same class works in [`~trl.GRPOTrainer`]. Beyond TRL, an environment may have

- a data attribute or property `done`; where it is true after a turn's calls, the episode is over and the trajectory
  stops;
- a method `close`, which frees what the environment holds and is no tool;
- class attributes `reusable` (an instance is as good as new after `reset`), `max_environments` (most instances at a
  time), `isolation` (`"process"` where it is not thread-safe) and `preload` (modules to import before processes are
  forked); see [`EnvironmentPool`].
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from ..errors import ToolFailure
from ..messages.images import as_blocks, is_image_part, read_image_part
from .environment_hosts import Host
from .environment_pool import EnvironmentPool


class EnvironmentLost(ToolFailure):
    """An environment that was played is gone, and with it the episode: what it was asked is not asked again."""


class EnvironmentType:
    """One factory: the tools that its environments offer, and the pool that they come from.

    Args:
        factory (`Callable`):
            Makes an environment; called without arguments. Or an [`EnvironmentPool`], which its owner closes.

    Raises:
        `TypeError`: if the factory is not callable, or an environment has no `reset` method.
        `ValueError`: if a public method has no usable schema.
    """

    def __init__(self, factory: Callable[[], Any]):
        self._owned = not isinstance(factory, EnvironmentPool)
        self.pool = factory if isinstance(factory, EnvironmentPool) else EnvironmentPool(factory)
        methods = self.pool.methods
        self.name, self.version, self.has_reward = methods.name, methods.version, methods.has_reward
        self.tool_names = list(methods.schemas)
        self.schemas = list(methods.schemas.values())

    def make(self) -> Environment:
        """An environment for one trajectory; it takes its place in the pool when it is opened."""
        return Environment(self)

    def close(self) -> None:
        """Closes the pool, if it is not another's."""
        if self._owned:
            self.pool.close()


class Environment:
    """One trajectory's environment; nothing of it runs on the event loop."""

    def __init__(self, kind: EnvironmentType):
        self.kind = kind
        self._host: Host | None = None
        self._sound = True

    async def open(self) -> None:
        """Takes an environment from the pool, or waits for one.

        Raises:
            [`ToolFailure`]: if it could not be made.
        """
        self._host = await self.kind.pool.acquire()

    async def reset(self, row: Mapping[str, Any]) -> str | list[dict[str, Any]] | None:
        """Starts the episode; what it returns is appended to the last user message.

        Raises:
            `TypeError`: if it returns something that is no text, picture, content blocks or `None`.
            `ValueError`: if it returns an image that cannot be read.
        """
        if self._host is None:
            await self.open()
        observation = as_blocks(await self._named("reset", dict(row)))
        if observation is None or isinstance(observation, str):
            return observation
        if isinstance(observation, list):
            where = f"`reset` of the environment `{self.kind.name}`"
            return [read_image_part(block, where) if is_image_part(block) else block for block in observation]
        raise TypeError(
            f"`reset` of the environment `{self.kind.name}` returned {observation!r:.80}, which cannot join the "
            "prompt. Return a text, a PIL image, a list of content blocks, or `None`."
        )

    async def call(self, tool: str, arguments: dict[str, Any]) -> Any:
        """Calls a tool.

        Raises:
            [`EnvironmentLost`]: if the environment's process ended.
            Whatever the tool raises.
        """
        host = self._opened()
        try:
            return await host.call(tool, arguments)
        except ToolFailure as failure:
            self._sound = False
            if host.usable:
                raise
            raise EnvironmentLost(str(failure)) from failure

    async def reward(self) -> float | None:
        """The environment's own reward, or `None` where it has none.

        Raises:
            `TypeError`: if it returns something that is no number.
        """
        if not self.kind.has_reward:
            return None
        reward = await self._named("get_reward", {})
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
        return self._host is not None and self._host.done

    async def close(self) -> None:
        """Gives the environment back to the pool."""
        host, self._host = self._host, None
        if host is not None:
            await self.kind.pool.release(host, self._sound)

    def _opened(self) -> Host:
        if self._host is None:
            raise RuntimeError("The environment was called before it was opened.")
        return self._host

    async def _named(self, method: str, arguments: dict[str, Any]) -> Any:
        """Calls a method of the protocol; an error of it carries a note that says which it was."""
        try:
            return await self._opened().call(method, arguments)
        except Exception as error:
            self._sound = False
            error.add_note(f"It was raised by `{method}` of the environment `{self.kind.name}`.")
            raise


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

    def close(self) -> None:
        """Closes the pools that nobody else owns."""
        for kind in self.types.values():
            kind.close()

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
