"""Completions in trackers, each in the form that the tracker shows best: a table, traces, text."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import Any

from ..messages import arguments_as_strings
from ..messages.terminal import visible
from ..trajectory import Trajectory
from .choice import PickedCompletion
from .table import message_text, outcome


_COLUMNS = ("step", "reason", "prompt", "completion", "verdict", "reward", "stop_reason", "turns", "tools", "id")
_PROVENANCE = ("iteration", "policy", "seed", "rewards", "tool_statuses")


def log_to_wandb(picks: Sequence[PickedCompletion], name: str, step: int) -> None:
    """A table in the run that is under way, under TRL's key; nothing where there is none."""
    import wandb

    if wandb.run is None:
        return
    table = wandb.Table(columns=list(_COLUMNS), data=[_row(pick, step) for pick in picks])
    wandb.log({name: table, "train/global_step": step})


def log_to_trackio(picks: Sequence[PickedCompletion], name: str, step: int) -> None:
    """A trace for each: its messages, calls and results, with verdict and reward as metadata."""
    import trackio

    if trackio.context_vars.current_run.get() is None:
        return
    trackio.log({name: [trackio.Trace(_messages(p.trajectory), _metadata(p)) for p in picks]}, step=step)


def log_to_tensorboard(writer: Any, picks: Sequence[PickedCompletion], name: str, step: int) -> None:
    """A text, in which what a model wrote stands in blocks that are not read as Markdown."""
    writer.add_text(name, "\n\n".join(_markdown(pick) for pick in picks), step)


def tensorboard_writer(callbacks: Iterable[Any]) -> Any:
    """The writer of the trainer's TensorBoard callback, or `None`."""
    return next((writer for callback in callbacks if (writer := getattr(callback, "tb_writer", None))), None)


def _row(pick: PickedCompletion, step: int) -> list[Any]:
    trajectory = pick.trajectory
    statuses = " ".join(trajectory.info.get("tool_statuses", []))
    texts = ["\n\n".join(map(_said, part)) for part in (trajectory.prompt, trajectory.completion)]
    ends = [trajectory.verdict.value, trajectory.reward, trajectory.stop_reason.value, trajectory.num_turns, statuses]
    return [step, pick.reason, *texts, *ends, _name(trajectory)]


def _said(message: dict[str, Any]) -> str:
    return f"{message['role']}: {visible(message_text(message))}"


def _messages(trajectory: Trajectory) -> list[dict[str, Any]]:
    """In OpenAI's form: arguments as strings, and ids by which the dashboard finds the result of a call."""
    messages = arguments_as_strings([*trajectory.prompt, *trajectory.completion])
    waiting: list[str] = []
    for number, message in enumerate(messages):
        if message.get("tool_calls"):
            calls = [{"id": f"call_{number}_{k}", **call} for k, call in enumerate(message["tool_calls"])]
            message["tool_calls"], waiting = calls, [call["id"] for call in calls]
        elif message["role"] == "tool" and waiting:
            message.setdefault("tool_call_id", waiting.pop(0))
    return messages


def _metadata(pick: PickedCompletion) -> dict[str, Any]:
    trajectory, info = pick.trajectory, pick.trajectory.info
    known: dict[str, Any] = {name: info[name] for name in _PROVENANCE if name in info}
    seconds = info.get("timing", {}).get("seconds")
    return {
        "id": _name(trajectory),
        "reason": pick.reason,
        "verdict": trajectory.verdict.value,
        "reward": trajectory.reward,
        "stop_reason": trajectory.stop_reason.value,
        "turns": trajectory.num_turns,
        "sampled_tokens": trajectory.num_sampled_tokens,
        **known,
        **({} if seconds is None else {"duration_ms": round(1000 * seconds)}),
    }


def _markdown(pick: PickedCompletion) -> str:
    trajectory = pick.trajectory
    parts = [f"#### {pick.reason}: {', '.join(outcome(trajectory).splitlines())}"]
    for message in [*trajectory.prompt[-1:], *trajectory.completion]:
        parts.append(f"**{message['role']}**\n\n{_block(visible(message_text(message)))}")
    return "\n\n".join(parts)


def _block(text: str) -> str:
    """A block of Markdown around any text: with a longer fence than any in it."""
    fence = "`" * max(3, *(len(run) + 1 for run in re.findall("`+", text)), 3)
    return f"{fence}text\n{text}\n{fence}"


def _name(trajectory: Trajectory) -> str:
    return str(trajectory.info.get("trajectory_id", ""))
