"""The engine protocol: token ids in, token ids and log-probabilities out, many requests at once."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol, runtime_checkable

from transformers import PreTrainedTokenizerBase


FinishReason = Literal["stop", "stop_string", "length"]


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
    finish_reason: FinishReason


@runtime_checkable
class Engine(Protocol):
    """What the rollout loop needs of an inference engine.

    `generate` is awaited once per turn, by many trajectories at the same time; batching them is the engine's business.
    What an engine can do beyond this is said by optional protocols: [`Forks`], [`Sleeps`], [`SamplesFromCopies`]
    and [`SamplesBeside`].

    Attributes:
        weights (`str`): whose weights the engine samples with. `"shared"`: those of the model that is being trained.
            `"own"`: a copy of its own, so the online loop writes a checkpoint and hands its folder to `refresh`. An
            engine that does not say is refused, for one with a copy would sample from an old policy.
        processing_class ([`~transformers.PreTrainedTokenizerBase`]): the tokenizer of the model.
    """

    weights: Literal["shared", "own"]
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
        """Called whenever the policy's weights changed: caches are dropped. With `weights = "own"`, the weights are
        loaded from the checkpoint folder `model_path`; else it is `None`."""
        ...

    def describe(self) -> dict[str, Any]:
        """Name, version and settings, for provenance; JSON values."""
        ...


@runtime_checkable
class Forks(Protocol):
    """An engine that lets one trajectory go on as several (a search) without reading their shared prefix again."""

    def fork(self, session: str, new_session: str) -> None:
        """Keeps under `new_session`, too, what is kept under `session`. Nothing, if the cache was dropped meanwhile:
        then the prefix is read."""
        ...


@runtime_checkable
class ReadsImages(Protocol):
    """An engine that can sample after images."""

    async def generate_with_images(
        self, prompt_ids: list[int], images: Sequence[Any], sampling: SamplingParams
    ) -> Generation:
        """[`Engine.generate`] after `prompt_ids` that hold the tokens of `images` (PIL images, paths, data URLs)."""
        ...


@runtime_checkable
class Sleeps(Protocol):
    """An engine that can free its device while the policy is trained.

    The online loop wakes it before it refreshes it, and lets it sleep afterwards. Both may be called twice in a row.

    Attributes:
        sleeps_while_training (`bool`): whether the loop is to let it sleep.
    """

    sleeps_while_training: bool

    def sleep(self) -> None:
        """Frees the device."""
        ...

    def wake_up(self) -> None:
        """Takes the device back."""
        ...


@runtime_checkable
class Shares(Protocol):
    """An engine with `weights = "shared"` that knows whose weights these are."""

    def shares_weights_with(self, model: Any) -> bool:
        """Whether it samples with the weights of `model`, which may be wrapped."""
        ...


@runtime_checkable
class SamplesFromCopies(Protocol):
    """An engine with `weights = "shared"` that can be built once more over a copy of its model, which then samples
    while the model itself is trained (`max_policy_lag`)."""

    def over(self, model: Any) -> Engine:
        """An engine with the same settings that samples with `model`, and shares no state with this one."""
        ...


@runtime_checkable
class SamplesBeside(Protocol):
    """An engine with `weights = "own"` that can sample from a second policy at the same time: one more adapter.

    Attributes:
        samples_beside (`bool`): whether it can, as it was started.
    """

    samples_beside: bool

    def beside(self, model_path: str) -> Engine:
        """An engine of the adapter in the folder `model_path`, to be used until the next `refresh`."""
        ...


def is_engine_factory(engine: Any) -> bool:
    """Whether `engine` is a function (or a class) that builds one, rather than an engine."""
    return inspect.isclass(engine) or (callable(engine) and not hasattr(engine, "generate"))


def check_engine(engine: Any, model: Any = None) -> Engine:
    """The engine, if it is one.

    Args:
        engine:
            What was passed as one.
        model ([`~torch.nn.Module`], *optional*):
            The model that is being trained, where there is one.

    Raises:
        `TypeError`: if it lacks what [`Engine`] asks for, or does not say whose weights it samples with.
        `ValueError`: if it shares its weights with another model than the one that is being trained.
    """
    missing = [name for name in _METHODS if not callable(getattr(engine, name, None))]
    if missing or inspect.isclass(engine):
        what = f"the class {engine.__name__}" if inspect.isclass(engine) else f"a {type(engine).__name__}"
        lacks = f", which lacks {', '.join(f'`{name}`' for name in missing)}" if missing else ", not an object of it"
        raise TypeError(
            f"`engine` is {what}{lacks}, so nothing can be sampled from it. Pass a `TransformersEngine`, a "
            "`VLLMEngine`, or an object with what `trl_multiturn.Engine` describes."
        )
    weights = getattr(engine, "weights", None)
    if weights not in ("shared", "own"):
        raise TypeError(
            f"The engine {type(engine).__name__} has `weights={weights!r}` and so does not say whose weights it "
            "samples with: it might sample from an old policy for a whole run. Give its class "
            '`weights = "own"` if it loads checkpoints (`refresh(model_path)` then gets a folder), or '
            '`weights = "shared"` if it samples with the model that is being trained.'
        )
    if model is not None and isinstance(engine, Shares) and weights == "shared":
        if not engine.shares_weights_with(model):
            raise ValueError(
                f"The engine {type(engine).__name__} samples with another model than the one that is being trained, "
                "so every iteration would sample from the same old policy. Leave `engine` out, or pass a function of "
                "the model and the tokenizer that builds it."
            )
    return engine


_METHODS = ("generate", "release", "refresh", "describe")
