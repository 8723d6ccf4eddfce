"""A second policy of an engine: another adapter over the same weights."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from typing import Any, Literal

from .engine import Engine, Generation, SamplingParams


class PolicyBeside:
    """
    An engine that samples with another adapter of an engine with weights of its own; see [`SamplesBeside`].

    Args:
        engine ([`Engine`]): whose weights it shares, and to which everything but sampling is left.
        generate (`Callable`): samples one turn with the adapter: `(prompt_ids, sampling, session) -> Generation`.
    """

    weights: Literal["shared", "own"] = "own"

    def __init__(
        self, engine: Engine, generate: Callable[[list[int], SamplingParams, str | None], Awaitable[Generation]]
    ) -> None:
        self.processing_class = engine.processing_class
        self._engine, self._generate = engine, generate

    async def generate(
        self, prompt_ids: list[int], sampling: SamplingParams, *, session: str | None = None
    ) -> Generation:
        """Samples one turn with the adapter; see [`Engine.generate`]."""
        return await self._generate(prompt_ids, sampling, session)

    def release(self, session: str) -> None:
        """Forgets what the engine kept for a trajectory."""
        self._engine.release(session)

    def refresh(self, model_path: str | None = None) -> None:
        """Refused: this policy does not change."""
        raise RuntimeError("This is an earlier policy, which does not change. Refresh the engine that it came from.")

    def describe(self) -> dict[str, Any]:
        """As the engine's."""
        return self._engine.describe()


class SeeingPolicyBeside(PolicyBeside):
    """
    [`PolicyBeside`] of an engine that reads images, too; see [`ReadsImages`].

    Args:
        engine, generate: as there.
        generate_with_images (`Callable`): the same after images: `(prompt_ids, images, sampling) -> Generation`.
    """

    def __init__(
        self,
        engine: Engine,
        generate: Callable[[list[int], SamplingParams, str | None], Awaitable[Generation]],
        generate_with_images: Callable[[list[int], Sequence[Any], SamplingParams], Awaitable[Generation]],
    ) -> None:
        super().__init__(engine, generate)
        self._generate_with_images = generate_with_images

    async def generate_with_images(
        self, prompt_ids: list[int], images: Sequence[Any], sampling: SamplingParams
    ) -> Generation:
        """Samples one turn with the adapter after images."""
        return await self._generate_with_images(prompt_ids, images, sampling)
