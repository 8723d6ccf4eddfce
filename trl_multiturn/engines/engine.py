"""The engine protocol: token ids in, token ids and log-probabilities out, many requests at once."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, Protocol, runtime_checkable

from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class SamplingParams:
    """How one turn is sampled.

    Args:
        max_new_tokens (`int`):
            Most tokens to sample in this turn.
        temperature (`float`, *optional*, defaults to `1.0`):
            Softmax temperature; 0 decodes greedily.
        top_p (`float`, *optional*, defaults to `1.0`):
            Only the most probable tokens that hold this mass together; 1 truncates nothing.
        top_k (`int`, *optional*, defaults to `0`):
            Only this many of the most probable tokens; 0 truncates nothing.
        min_p (`float`, *optional*, defaults to `0.0`):
            Only tokens at least this probable relative to the most probable one; 0 truncates nothing.
        stop_token_ids (`tuple[int, ...]`, *optional*):
            Ids that end the turn; the one sampled is part of the generation.
        stop_strings (`tuple[str, ...]`, *optional*):
            Strings that end the turn as soon as the decoded turn contains one; the tokens sampled so far are kept
            whole.
        seed (`int`, *optional*):
            Seed of this turn alone: the same seed, prompt and weights give the same tokens, whatever else runs.
    """

    max_new_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    stop_token_ids: tuple[int, ...] = ()
    stop_strings: tuple[str, ...] = ()
    seed: int | None = None

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise ValueError(f"`max_new_tokens` must be at least 1, got {self.max_new_tokens}.")
        if self.temperature < 0:
            raise ValueError(f"`temperature` must be at least 0 (0 decodes greedily), got {self.temperature}.")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"`top_p` must be in (0, 1], got {self.top_p}.")
        if self.top_k < 0:
            raise ValueError(f"`top_k` must be at least 0 (0 is off), got {self.top_k}.")
        if not 0 <= self.min_p <= 1:
            raise ValueError(f"`min_p` must be in [0, 1], got {self.min_p}.")
        if "" in self.stop_strings:
            raise ValueError("`stop_strings` holds an empty string, which every text contains. Leave it out.")


@dataclass(frozen=True)
class Generation:
    """One sampled turn.

    Attributes:
        token_ids (`list[int]`): sampled ids, the stop token included where one was sampled.
        logps (`list[float]`): log-probability (nats) of each id under the distribution it was drawn from (after
            temperature and truncation); at temperature 0, under the policy itself.
        finish_reason: `"stop"` (a stop token was sampled), `"stop_string"`, or `"length"`.
    """

    token_ids: list[int]
    logps: list[float]
    finish_reason: Literal["stop", "stop_string", "length"]


@runtime_checkable
class Engine(Protocol):
    """What the rollout loop needs of an inference engine.

    `generate` is awaited once per turn, by many trajectories at the same time; batching them is the engine's business.

    An engine may also have `fork(session, new_session)`, called where one trajectory goes on as several (a search):
    what is kept under `session` is then kept under `new_session`, too, so that the shared prefix is not read again.
    Without it, or where the cache was dropped meanwhile, it is read.

    An engine whose `sleeps_while_training` is true has `sleep()` and `wake_up()`: the online loop wakes it before it
    refreshes it, and lets it sleep while the policy is trained. Both may be called twice in a row.
    """

    processing_class: PreTrainedTokenizerBase

    async def generate(
        self, prompt_ids: list[int], sampling: SamplingParams, *, session: str | None = None
    ) -> Generation:
        """Samples one turn after `prompt_ids`.

        Args:
            prompt_ids (`list[int]`):
                Everything the policy reads, from the start of the conversation.
            sampling ([`SamplingParams`]):
                How to sample.
            session (`str`, *optional*):
                Name of the trajectory. An engine may keep its key-value cache under this name until
                `release(session)`.
        """
        ...

    def release(self, session: str) -> None:
        """Forgets what was kept for a trajectory."""
        ...

    def refresh(self, model_path: str | None = None) -> None:
        """Called whenever the policy's weights changed: caches are dropped; an engine with weights of its own loads
        them from the checkpoint folder `model_path`."""
        ...

    def describe(self) -> dict[str, Any]:
        """Name, version and settings, for provenance; JSON values."""
        ...
