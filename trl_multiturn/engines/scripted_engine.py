"""An engine that says what it is told: for tests of whatever stands on engines, yours included."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from transformers import PreTrainedTokenizerBase

from .engine import FinishReason, Generation, SamplingParams


Turn = str | Sequence[int]
Script = Callable[[str, SamplingParams, str | None], Turn] | Sequence[Turn] | Mapping[str | None, Sequence[Turn]]


@dataclass(frozen=True)
class ScriptedCall:
    """One call of [`ScriptedEngine.generate`], for assertions.

    Attributes:
        prompt_ids (`list[int]`), prompt_text (`str`): what the policy was given to read, special tokens included.
        sampling ([`SamplingParams`]): how it was to sample.
        session (`str`, *optional*): the trajectory.
        generation ([`Generation`]): what was answered.
    """

    prompt_ids: list[int]
    prompt_text: str
    sampling: SamplingParams
    session: str | None
    generation: Generation


class ScriptedEngine:
    """Plays turns from a script instead of sampling them. Shipped for tests, like httpx's `MockTransport`.

    A turn is text, which is tokenized (special tokens in it are recognized), or token ids, which are used as they are.
    After text the end-of-turn token, the first of `stop_token_ids`, is appended unless the text already ends in one of
    them. A turn longer than `max_new_tokens` is cut there and finishes with `"length"`; one that contains a stop token
    or a stop string ends at the token that completes it.

    Args:
        script (callable, sequence or mapping):
            A callable `(prompt_text, sampling, session) -> turn`, called for every turn; or a list of turns that every
            session plays from its start; or such a list per session. Calls without a session share one place in the
            script.
        processing_class ([`~transformers.PreTrainedTokenizerBase`]):
            Tokenizer of the conversation.
        end_turns (`bool`, *optional*, defaults to `True`):
            Whether the end-of-turn token is appended to text.
        logp (`float`, *optional*, defaults to `0.0`):
            Log-probability reported for every token.
        latency_seconds (`float`, *optional*, defaults to `0.0`):
            How long each call takes, without blocking the others.

    Attributes:
        calls (`list[ScriptedCall]`): every answered call, in the order of the answers.
        released (`list[str]`): sessions that were released.
        refreshes (`list[str | None]`): the `model_path` of every refresh.

    Example:

    ```python
    >>> engine = ScriptedEngine(["```python\\nprint(6 * 7)\\n```", "It is \\\\boxed{42}."], tokenizer)
    >>> trajectories = generate_trajectories(prompts, engine, [PythonTool()], RolloutConfig(dialect="fenced"))
    >>> "42" in engine.calls[-1].prompt_text  # what the policy read after the tool had answered
    True
    ```
    """

    weights: Literal["shared", "own"] = "shared"

    def __init__(
        self,
        script: Script,
        processing_class: PreTrainedTokenizerBase,
        end_turns: bool = True,
        logp: float = 0.0,
        latency_seconds: float = 0.0,
    ) -> None:
        if isinstance(script, str):
            raise TypeError("`script` is a string, which would be played letter by letter. Pass `[script]`.")
        self.script = script
        self.processing_class = processing_class
        self.end_turns = end_turns
        self.logp = logp
        self.latency_seconds = latency_seconds
        self.calls: list[ScriptedCall] = []
        self.released: list[str] = []
        self.refreshes: list[str | None] = []
        self._places: dict[str | None, int] = {}

    async def generate(
        self, prompt_ids: list[int], sampling: SamplingParams, *, session: str | None = None
    ) -> Generation:
        """Plays the next turn of `session`; see [`Engine.generate`].

        Raises:
            LookupError: if the script has no (more) turns for this session.
        """
        prompt_text = self._decode(prompt_ids)
        turn = self._next_turn(prompt_text, sampling, session)
        if self.latency_seconds:
            await asyncio.sleep(self.latency_seconds)
        token_ids, finish_reason = self._play(turn, sampling)
        generation = Generation(token_ids, [self.logp] * len(token_ids), finish_reason)
        self.calls.append(ScriptedCall(list(prompt_ids), prompt_text, sampling, session, generation))
        return generation

    def release(self, session: str) -> None:
        """Records the release; the session would start its script anew."""
        self.released.append(session)
        self._places.pop(session, None)

    def refresh(self, model_path: str | None = None) -> None:
        """Records the refresh."""
        self.refreshes.append(model_path)

    def over(self, model: Any) -> ScriptedEngine:
        """Itself: a script has no weights. See [`SamplesFromCopies`]."""
        return self

    def describe(self) -> dict[str, Any]:
        """Name and settings."""
        return {"engine": "scripted", "end_turns": self.end_turns, "latency_seconds": self.latency_seconds}

    def _next_turn(self, prompt_text: str, sampling: SamplingParams, session: str | None) -> Turn:
        if callable(self.script):
            return self.script(prompt_text, sampling, session)
        if isinstance(self.script, Mapping):
            if session not in self.script:
                raise LookupError(f"The script has no session {session!r}, only {sorted(map(str, self.script))}.")
            turns = self.script[session]
        else:
            turns = self.script
        place = self._places.get(session, 0)
        if place >= len(turns):
            raise LookupError(
                f"Session {session!r} asked for turn {place + 1}, but its script has {len(turns)}. Script more turns, "
                "or lower the limit on turns."
            )
        self._places[session] = place + 1
        return turns[place]

    def _play(self, turn: Turn, sampling: SamplingParams) -> tuple[list[int], FinishReason]:
        if isinstance(turn, str):
            planned = self.processing_class.encode(turn, add_special_tokens=False)
            stops = sampling.stop_token_ids
            if self.end_turns and stops and (not planned or planned[-1] not in stops):
                planned.append(stops[0])
        else:
            planned = list(turn)
        token_ids: list[int] = []
        for token_id in planned[: sampling.max_new_tokens]:
            token_ids.append(token_id)
            if token_id in sampling.stop_token_ids:
                return token_ids, "stop"
            if sampling.stop_strings and any(s in self._decode(token_ids) for s in sampling.stop_strings):
                return token_ids, "stop_string"
        # A turn that merely runs out of script has no stop token either: to the caller it was cut.
        return token_ids, "length"

    def _decode(self, token_ids: Sequence[int]) -> str:
        text = self.processing_class.decode(
            list(token_ids), skip_special_tokens=False, clean_up_tokenization_spaces=False
        )
        return str(text)
