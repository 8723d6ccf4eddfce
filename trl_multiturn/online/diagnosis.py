"""Why an iteration found no row to train on: what stopped the trajectories, one of them, and the remedy that fits."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from ..messages.images import text_in
from ..messages.terminal import visible
from ..rollout.config import RolloutConfig
from ..trajectory import StopReason, Trajectory, Verdict
from .report import IterationReport


LONGEST_MESSAGE = 400  # characters of a message that are shown

# What stopped an incorrect trajectory, in words, and what helps where it is the rule
_NO_CALL, _TURN, _TRAJECTORY, _ROUNDS, _SILENT, _WRONG = range(6)
_WORDS = {
    _NO_CALL: "called no tool",
    _TURN: "were cut at the limit of a turn (`max_turn_tokens={max_turn_tokens}`)",
    _TRAJECTORY: "were cut at the limit of a trajectory (`max_trajectory_tokens={max_trajectory_tokens}`)",
    _ROUNDS: "called tools after the last round (`max_tool_calling_iterations={max_tool_calling_iterations}`)",
    _SILENT: "ended without an answer",
    _WRONG: "gave a wrong answer",
}
_TEACH = (
    "a warm start on conversations or on its own verified rollouts (`--warm_start` of the example scripts), worked "
    "examples in the prompt (`--num_shots`)"
)
_REMEDIES = {
    _NO_CALL: f"The policy does not speak the tools' format. Teach it: {_TEACH}, or another `dialect`.",
    _TURN: f"Raise `max_turn_tokens`; where the turn below rambles on, longer ones will not help, but {_TEACH} will.",
    _TRAJECTORY: "Raise `max_trajectory_tokens` (and the trainer's `max_length`), or lower what tools may print.",
    _ROUNDS: "Raise `max_tool_calling_iterations`; where the calls below repeat themselves, help with " + _TEACH + ".",
    _SILENT: f"Say in the `system_prompt` how to answer (`\\boxed{{}}` for `math_reward`), or teach it: {_TEACH}.",
    _WRONG: f"The prompts are too hard for this policy. Use easier ones, more `num_generations`, or {_TEACH}.",
}


@dataclass(frozen=True)
class Diagnosis:
    """
    Why there are no rows.

    Attributes:
        finding (`str`): what became of the trajectories, counted.
        remedy (`str`): what to change.
        example ([`Trajectory`], *optional*): a trajectory of the most frequent kind.
    """

    finding: str
    remedy: str
    example: Trajectory | None = None

    def __str__(self) -> str:
        shown = f"\nA typical trajectory:\n{transcript(self.example)}" if self.example else ""
        return f"{self.finding}\n{self.remedy}{shown}"


def diagnose(
    groups: Iterable[Sequence[Trajectory]], report: IterationReport, config: RolloutConfig, has_tools: bool = True
) -> Diagnosis:
    """
    Explains an iteration without rows.

    Args:
        groups (`Iterable[Sequence[Trajectory]]`):
            Its judged trajectories, prompt by prompt; one prompt's are in memory at a time.
        report ([`IterationReport`]):
            Its counts.
        config ([`RolloutConfig`]):
            The limits that the trajectories ran under.
        has_tools (`bool`, *optional*, defaults to `True`):
            Whether the policy could call anything.

    Returns:
        [`Diagnosis`]
    """
    kinds: Counter[int] = Counter()
    examples: dict[int | Verdict, Trajectory] = {}
    mixed = 0  # prompts with correct and incorrect trajectories
    for group in groups:
        mixed += {Verdict.CORRECT, Verdict.INCORRECT} <= {trajectory.verdict for trajectory in group}
        for trajectory in group:
            examples.setdefault(trajectory.verdict, trajectory)
            if trajectory.verdict is Verdict.INCORRECT:
                kind = _kind(trajectory, config, has_tools)
                kinds[kind] += 1
                examples.setdefault(kind, trajectory)
    finding = _finding(kinds, report, config)
    if report.rows:
        return Diagnosis(
            finding,
            f"{report.rows} rows were found, but none fits the trainer's `max_length` and trains something. Raise "
            "`max_length`, or lower `max_trajectory_tokens`.",
        )
    if report.undecided > report.correct + report.incorrect:
        return Diagnosis(
            finding,
            "Most trajectories have no verdict: a tool's machine or the verifier failed, or the gold answers cannot "
            "be read. Look at the warnings above and at the column `answer`; `trl-multiturn doctor` tests the "
            "interpreter.",
            examples.get(Verdict.UNDECIDED),
        )
    if mixed:
        return Diagnosis(
            finding,
            f"{mixed} prompts had correct and incorrect trajectories, until filters and duplicates took them away "
            f"({_counted(report.dropped)}). Change `filters`, or raise `num_generations`.",
            examples.get(Verdict.INCORRECT),
        )
    if not report.incorrect:
        return Diagnosis(
            finding,
            "The prompts are too easy for this policy. Use harder ones, or raise the temperature.",
            examples.get(Verdict.CORRECT),
        )
    if report.correct:
        return Diagnosis(
            finding,
            "No prompt had both correct and incorrect trajectories, which is where rows come from. Raise "
            "`num_generations` or the temperature.",
            examples.get(Verdict.INCORRECT),
        )
    most = kinds.most_common(1)[0][0]
    return Diagnosis(finding, _REMEDIES[most], examples[most])


def _kind(trajectory: Trajectory, config: RolloutConfig, has_tools: bool) -> int:
    """What stopped an incorrect trajectory."""
    if has_tools and not trajectory.info.get("tool_calls") and trajectory.stop_reason is not StopReason.MAX_TURNS:
        return _NO_CALL
    if trajectory.stop_reason is StopReason.MAX_TOKENS:
        last = max((stop - start for start, stop in list(trajectory.turn_spans())[-1:]), default=0)
        return _TURN if last >= config.max_turn_tokens else _TRAJECTORY
    return {StopReason.MAX_TURNS: _ROUNDS, StopReason.ENDED: _SILENT}.get(trajectory.stop_reason, _WRONG)


def _finding(kinds: Counter[int], report: IterationReport, config: RolloutConfig) -> str:
    counts = f"{report.correct} correct, {report.incorrect} incorrect, {report.undecided} undecided"
    why = ", ".join(f"{count} {_WORDS[kind].format(**vars(config))}" for kind, count in kinds.most_common())
    stops = f" Stopped by: {_counted(report.stop_reasons)}."
    calls = f" {report.tool_calls} tool calls, {report.tool_failures} of them with an error."
    return (
        f"Iteration {report.iteration + 1} found no row to train on. Of {report.trajectories} trajectories: {counts}."
        + (f" Of the incorrect ones {why}." if why else "")
        + stops
        + calls
    )


def _counted(counts: dict[str, int]) -> str:
    return ", ".join(f"{name} {count}" for name, count in counts.items() if count) or "nothing"


def transcript(trajectory: Trajectory) -> str:
    """A trajectory to read: its last question, what the policy and the tools said, and how it ended."""
    messages = [*trajectory.prompt[-1:], *trajectory.completion]
    lines = [f"  [{message['role']}] {_shortened(_said(message))}" for message in messages]
    return "\n".join([*lines, f"  [stopped: {trajectory.stop_reason.value}; {trajectory.verdict.value}]"])


def _said(message: dict[str, Any]) -> str:
    calls = [json.dumps(call.get("function", call), ensure_ascii=False) for call in message.get("tool_calls") or []]
    content = message.get("content")
    text = text_in(message, "[image]") or ("" if isinstance(content, (str, list)) else json.dumps(content or ""))
    return "\n".join(part for part in (text, *calls) if part)


def _shortened(text: str) -> str:
    text = visible(text if len(text) <= LONGEST_MESSAGE else text[:LONGEST_MESSAGE] + " …")
    return text.replace("\n", "\n    ")
