"""What a guided search is told, checked before anything is sampled."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from ..config import RolloutConfig


Step = Literal["turn", "line", "sentence"] | int
Vote = Literal["none", "plain", "weighted"]

# What ends a step inside a turn: the OREO paper's delimiters for GSM8K and for MATH
STEP_STOPS: dict[str, tuple[str, ...]] = {"turn": (), "line": ("\n",), "sentence": ("\n", ". ", ".$ ")}
_CHOICES = {
    "finished": ("rank", "pool"),
    "score_at": ("state", "action"),
    "vote": ("none", "plain", "weighted"),
}


@dataclass(frozen=True)
class SearchSettings:
    """The arguments of [`value_guided_search`] that say how to search; `rewindable` is false in an environment."""

    beam: int
    candidates: int
    step: Step
    finished: str
    score_at: str
    vote: str
    max_sampled_tokens: int | None
    keep_candidates: bool
    rewindable: bool

    @property
    def block(self) -> int | None:
        """Tokens of a step that is a block."""
        return self.step if isinstance(self.step, int) else None

    @property
    def stops(self) -> tuple[str, ...]:
        """Strings that end a step."""
        return () if isinstance(self.step, int) else STEP_STOPS[self.step]

    def check(self, score: Any, config: RolloutConfig) -> None:
        """
        Raises:
            `TypeError`: if `score` cannot be called.
            `ValueError`: for arguments that allow no search.
        """
        if not callable(score):
            raise TypeError(
                f"`score` is a {type(score).__name__}, which cannot be called. Pass e.g. `value_model.score`."
            )
        if self.beam < 1 or self.candidates < 1:
            raise ValueError(f"`beam` and `candidates` must be at least 1, got {self.beam} and {self.candidates}.")
        self._check_choices()
        if self.candidates > 1 and config.temperature == 0 and not any(config.temperature_variants):
            raise ValueError(
                f"At `temperature=0` all {self.candidates} candidates of a step are the same, so there is nothing to "
                "choose. Raise the temperature, or draw one candidate."
            )
        if not self.rewindable and (self.beam > 1 or self.step != "turn"):
            raise ValueError(
                f"An environment cannot be taken back, so `beam={self.beam}` trajectories with `step={self.step!r}` "
                "cannot be tried in it. Use `beam=1, step='turn'` with `candidates=K`: the best of K actions."
            )
        if not self.rewindable and self.max_sampled_tokens is not None:
            raise ValueError(
                "An environment is played once, so `max_sampled_tokens` cannot be spent on further searches. Leave it "
                "out, and choose `candidates`."
            )

    def _check_choices(self) -> None:
        if isinstance(self.step, int):
            if self.step < 1:
                raise ValueError(f"`step={self.step}` is a block without a token. Pass 1 or more.")
        elif self.step not in STEP_STOPS:
            raise ValueError(f"`step={self.step!r}` is none of {', '.join(map(repr, STEP_STOPS))}, and no number.")
        for name, known in _CHOICES.items():
            if getattr(self, name) not in known:
                raise ValueError(f"`{name}={getattr(self, name)!r}` is none of {', '.join(map(repr, known))}.")
        if self.max_sampled_tokens is not None and self.max_sampled_tokens < 1:
            raise ValueError(f"`max_sampled_tokens={self.max_sampled_tokens}` allows no search. Pass 1 or more.")
