"""Filters: which judged trajectories never become training data, each named, counted and switchable.

The defaults are those of the M-DPO paper (arXiv:2409.02392, section 3.1, "Data Annotation"); the others are those that
the authors' released scripts add. A filter reads messages and token counts, in both dialects: fenced code blocks whose
output comes back as a user turn, and native tool calls whose output comes back under the role `tool`.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from .._lazy import load_path
from ..trajectory import StopReason, Trajectory, Verdict
from .answers import canonical_answer, final_answer, last_boxed, message_text
from .fences import FenceReader


Side = Literal["winners", "losers", "both"]

_ERROR = re.compile(
    r"""(?mx)
      # NameError: …
      ^[ \t]* (?:\w+\.)* [A-Z]\w*(?:Error|Exception|Interrupt|Exit|Timeout|Iteration) (?: :\s | :?[ \t]*$ )
    | ^[ \t]* Error:\s+ (?![-+.\d])                                # not the value of an error
    | ^[ \t]* (?i:execution|timeout|undefined)\ (?i:error)\b        # the authors' executor
    | ^\s* \{ \s* ['"]error['"] \s* :                              # TRL's tool loop
    | ^[ \t]* Traceback\ \(most\ recent\ call\ last\)
    """
)
_CODE = FenceReader(["python"])
_OUTPUT_FENCE = re.compile(r"^\s*```output[ \t]*\n(.*?)\n?```\s*$", re.DOTALL)


@dataclass(frozen=True)
class Filter:
    """One reason to leave a trajectory out.

    Args:
        name (`str`):
            The name under which it is counted.
        description (`str`):
            What it drops, in one line.
        drops (`Callable[[Trajectory], bool]`):
            Whether a trajectory is dropped.
        applies_to (`str`, *optional*, defaults to `"both"`):
            `"winners"` (verdict `CORRECT`), `"losers"` (`INCORRECT`) or `"both"`.
    """

    name: str
    description: str
    drops: Callable[[Trajectory], bool]
    applies_to: Side = "both"

    def __post_init__(self) -> None:
        if self.applies_to not in ("winners", "losers", "both"):
            raise ValueError(f"`applies_to={self.applies_to!r}` is unknown. Use 'winners', 'losers' or 'both'.")

    def on(self, side: Side) -> Filter:
        """The same filter for another side."""
        return replace(self, applies_to=side)

    def __call__(self, trajectory: Trajectory) -> bool:
        sides = {"winners": (Verdict.CORRECT,), "losers": (Verdict.INCORRECT,)}
        return trajectory.verdict in sides.get(self.applies_to, tuple(Verdict)) and self.drops(trajectory)


@dataclass(frozen=True)
class FilterResult:
    """What [`apply_filters`] decided.

    Attributes:
        kept (`list[Trajectory]`): those that passed, in order.
        dropped (`Counter`): number of trajectories by the name of what dropped them; kept and dropped add up.
        reasons (`list[str | None]`): for each input trajectory the name of what dropped it, `None` where kept.
    """

    kept: list[Trajectory]
    dropped: Counter[str] = field(default_factory=Counter)
    reasons: list[str | None] = field(default_factory=list)


def is_observation(message: dict[str, Any]) -> bool:
    """Whether a message of a completion came from a tool, an environment or a user: not from the policy."""
    return message["role"] != "assistant"


def observation_text(message: dict[str, Any]) -> str:
    """The text of an observation, without the fence of a fenced `output` block."""
    text = message_text(message)
    match = _OUTPUT_FENCE.match(text)
    return match[1] if match else text


def is_error(observation: str) -> bool:
    """Whether an observation reads as an error: a line `NameError: …`, or TRL's `{'error': …}`.

    For texts whose status nobody has recorded. A rollout records it, and [`apply_filters`] goes by that.
    """
    return _ERROR.search(observation) is not None


def writes_code(message: dict[str, Any]) -> bool:
    """Whether an assistant turn acts: a tool call, or a fenced Python block."""
    return bool(message.get("tool_calls")) or next(_CODE.blocks(message_text(message)), None) is not None


def turns(trajectory: Trajectory) -> list[tuple[dict[str, Any], list[str]]]:
    """The assistant turns of a trajectory, each with the texts of the observations that followed it."""
    found: list[tuple[dict[str, Any], list[str]]] = []
    for message in trajectory.completion:
        if not is_observation(message):
            found.append((message, []))
        elif found:
            found[-1][1].append(observation_text(message))
    return found


def turns_with_errors(trajectory: Trajectory) -> list[bool]:
    """Of each assistant turn, whether an error answered it.

    By the recorded status of its calls, where there is one: a printed `error: 0` is a value, and a message may look
    like anything. Where no call of a turn is recorded, the observations' texts decide: in rows that were not rolled
    out here, in turns that a trajectory was given, and after a call that could not be read.
    """
    steps = turns(trajectory)
    statuses = _statuses(trajectory, len(steps))
    return [
        any(status != "ok" for status in of_turn) if of_turn else any(map(is_error, texts))
        for of_turn, (_, texts) in zip(statuses, steps, strict=True)
    ]


def _statuses(trajectory: Trajectory, num_turns: int) -> list[list[str]]:
    """Of each turn, the recorded statuses of its calls; none where the record is of another conversation."""
    found: list[list[str]] = [[] for _ in range(num_turns)]
    info = trajectory.info
    if info.get("turns") == num_turns and "tool_turns" in info:
        for status, place in zip(info["tool_statuses"], info["tool_turns"], strict=True):
            found[place].append(status)
    return found


def _before_last_turn(trajectory: Trajectory) -> list[str]:
    return turns(trajectory)[-2][1] if trajectory.num_turns > 1 else []


def _error_before_answer(trajectory: Trajectory) -> bool:
    return any(turns_with_errors(trajectory)[-2:-1])


def _turn_without_code(trajectory: Trajectory) -> bool:
    return not all(writes_code(turn) for turn, _ in turns(trajectory)[:-1])


def _no_tool_call(trajectory: Trajectory) -> bool:
    return not any(observations for _, observations in turns(trajectory))


def _boxed_after_error(trajectory: Trajectory) -> bool:
    answers = [last_boxed(message_text(turn)) is not None for turn, _ in turns(trajectory)]
    return any(error and answer for error, answer in zip(turns_with_errors(trajectory), answers[1:], strict=False))


def _empty_output_before_answer(trajectory: Trajectory) -> bool:
    return any(text.strip() in ("", "[]", "None") for text in _before_last_turn(trajectory))


def _answer_not_in_output(trajectory: Trajectory) -> bool:
    answer = final_answer(trajectory.completion)
    if answer is None:
        return False
    key = canonical_answer(answer)
    words = (word.strip("[](){},;:'\"") for _, texts in turns(trajectory) for text in texts for word in text.split())
    return all(canonical_answer(word) != key for word in words if word)


def over_length(max_tokens: int = 2048) -> Filter:
    """Trajectories (prompt included) over `max_tokens` tokens."""
    return Filter(
        "over_length",
        f"longer than {max_tokens} tokens, prompt included",
        lambda t: len(t.prompt_ids) + len(t.completion_ids) > max_tokens,
    )


def long_answer(max_characters: int = 20) -> Filter:
    """Final answers over `max_characters` characters, which are rarely answers."""
    return Filter(
        "long_answer",
        f"final answer longer than {max_characters} characters",
        lambda t: len(final_answer(t.completion) or "") > max_characters,
    )


_ALL = (
    Filter(
        "error_before_answer",
        "the last observation before the final turn is an error, which the policy ignored",
        _error_before_answer,
        "winners",
    ),
    over_length(),
    Filter("turn_without_code", "a turn before the last neither writes code nor calls a tool", _turn_without_code),
    Filter("no_tool_call", "no observation at all: the policy answered by itself", _no_tool_call),
    Filter("boxed_after_error", "a turn right after an error gives an answer", _boxed_after_error),
    Filter(
        "empty_output_before_answer",
        "the last observation before the final turn is empty, `[]` or `None`",
        _empty_output_before_answer,
        "winners",
    ),
    Filter("answer_not_in_output", "the final answer appears in no observation", _answer_not_in_output, "winners"),
    Filter(
        "call_limit", "stopped at the limit on tool-calling turns", lambda t: t.stop_reason is StopReason.MAX_TURNS
    ),
    Filter("not_answered", "stopped without a final answer", lambda t: t.stop_reason is not StopReason.ANSWERED),
    long_answer(),
)

FILTERS: dict[str, Filter] = {filter.name: filter for filter in _ALL}
"""Every filter by name, with its default limits and side."""

PAPER_FILTERS = ("error_before_answer", "over_length", "turn_without_code")
"""The paper's two (section 3.1) and the one that its released pairing script applies to both sides."""

AUTHORS_FILTERS = ("no_tool_call", "error_before_answer", "over_length", "turn_without_code", "boxed_after_error",
                   "empty_output_before_answer", "call_limit", "long_answer")  # fmt: skip
"""What the authors' scripts drop in addition (their environment's own failures are `TOOL_FAILED` here)."""

CODE_FILTERS = ("error_before_answer", "turn_without_code")
"""The paper's filters that are about code: with ordinary functions a turn of plain words is no fault."""


def default_filters(interpreter: bool) -> tuple[str, ...]:
    """The paper's filters; those about code only where the tools include an interpreter."""
    return tuple(name for name in PAPER_FILTERS if interpreter or name not in CODE_FILTERS)


def used_interpreter(trajectories: Iterable[Trajectory]) -> bool:
    """Whether any of the trajectories could write programs: by the tools it records, or by what it wrote."""
    return any(
        "python" in trajectory.info.get("tools", ()) or any(map(_writes_program, trajectory.completion))
        for trajectory in trajectories
    )


def _writes_program(message: dict[str, Any]) -> bool:
    if is_observation(message):
        return False
    calls = [call.get("function", call) for call in message.get("tool_calls") or ()]
    if any(call.get("name") == "python" or "code" in (call.get("arguments") or ()) for call in calls):
        return True
    return next(_CODE.blocks(message_text(message)), None) is not None


def resolve_filters(filters: Iterable[str | Filter | Callable[[Trajectory], bool]]) -> tuple[Filter, ...]:
    """Filters from names, dotted paths, filters and functions that say whether a trajectory is dropped.

    Raises:
        `TypeError`: for what is none of these.
        `ValueError`: if a name is unknown, or a path leads nowhere.
    """
    if isinstance(filters, str):
        raise TypeError(f"`filters={filters!r}` is a string. Pass a list: `filters=[{filters!r}]`.")
    return tuple(map(_resolved, filters))


def _resolved(item: Any) -> Filter:
    found = FILTERS.get(item, item) if isinstance(item, str) else item
    if isinstance(found, str):
        try:
            found = load_path(found)
        except ValueError as error:
            raise ValueError(
                f"There is no filter {item!r} ({error}). Use one of {', '.join(sorted(FILTERS))}, a dotted path, a "
                "`Filter` or a function."
            ) from error
    if isinstance(found, Filter):
        return found
    name = getattr(found, "__name__", None)
    if not callable(found) or name is None:
        raise TypeError(
            f"`filters` holds a {type(found).__name__}, which cannot tell what is dropped. Use the name of a filter, "
            "a `Filter`, or a function `(trajectory) -> bool`."
        )
    return Filter(name, (found.__doc__ or name).strip().partition("\n")[0], found)


def apply_filters(trajectories: Iterable[Trajectory], filters: Iterable[str | Filter] = PAPER_FILTERS) -> FilterResult:
    """Drops what must not be trained on, and counts why.

    A trajectory whose tools failed (`"tool_failed"`) or that has no verdict (`"undecided"`) is dropped whatever the
    filters are: neither says anything about the policy. Each dropped trajectory counts once, for the first filter that
    dropped it.

    Args:
        trajectories (`Iterable[Trajectory]`):
            Judged trajectories.
        filters (`Iterable[str | Filter]`, *optional*):
            Names from `FILTERS`, or filters of your own; the paper's by default.
    """
    trajectories, chosen = list(trajectories), resolve_filters(filters)
    reasons: list[str | None] = []
    for trajectory in trajectories:
        if trajectory.stop_reason is StopReason.TOOL_FAILED:
            reasons.append("tool_failed")
        elif trajectory.verdict is Verdict.UNDECIDED:
            reasons.append("undecided")
        else:
            reasons.append(next((filter.name for filter in chosen if filter(trajectory)), None))
    kept = [trajectory for trajectory, reason in zip(trajectories, reasons, strict=True) if reason is None]
    return FilterResult(kept, Counter(reason for reason in reasons if reason is not None), reasons)
