"""Pairs from several episodes of one task, chosen as the loop chooses among its trajectories."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from itertools import takewhile
from typing import Any

from ..messages import Message
from ..rows.pairing import preference_row
from ..rows.selection import Pair, PairingConfig, select
from ..trajectory import StopReason, Trajectory, Verdict
from .report import ConversionReport


TASKS = ("task_id", "example_id", "instance_id", "problem_id", "question_id", "item_id", "prompt_id")


class EpisodePairs:
    """Collects the episodes of each task, and pairs them by [`select`].

    Args:
        pairing ([`PairingConfig`]): how to pair. Filters read what only rollouts of this package say.
        correct_above (`float`): an episode is correct where its reward is above it.
        task_column (`str`, *optional*): says which episodes are of one task; by default the first of `TASKS` that a
            row has, else its prompt.
    """

    def __init__(self, pairing: PairingConfig, correct_above: float, task_column: str | None = None):
        self._pairing = pairing
        self._correct_above = correct_above
        self._task_column = task_column
        self._tasks: dict[str, int] = {}
        self._trajectories: list[Trajectory] = []
        self._rows: dict[int, dict[str, Any]] = {}

    def add(self, number: int, row: dict[str, Any]) -> None:
        """Adds an episode.

        Raises:
            `ValueError`: if it has no reward, or is a pair already.
        """
        if row.get("reward") is None or not {"completion", "completion_ids"} & row.keys():
            raise ValueError("it has no completion with a reward, so it cannot be paired with another.")
        task = self._tasks.setdefault(self._task(row), len(self._tasks))
        self._rows[number] = row
        verdict = Verdict.CORRECT if row["reward"] > self._correct_above else Verdict.INCORRECT
        parts = _tokens(row, task) if "completion_ids" in row else _messages(row, task)
        info = {"prompt_index": task, "row": number, "prompt_messages": len(row.get("prompt", ()))}
        self._trajectories.append(
            Trajectory(**parts, stop_reason=StopReason.ANSWERED, reward=row["reward"], verdict=verdict, info=info)
        )

    def rows(self, report: ConversionReport) -> Iterator[dict[str, Any]]:
        """The rows of the pairs."""
        selection = select(self._trajectories, self._pairing)
        found: set[int] = set()
        for pair in selection.pairs:
            row = self._row(pair, report)
            if row is not None:
                found.add(pair.chosen.info["prompt_index"])
                yield row
        if lonely := len(self._tasks) - len(found):
            report.unpaired.append(f"not paired: {lonely} of {len(self._tasks)} tasks, whose episodes make no pair")
        for reason, count in selection.dropped.items():
            report.unpaired.append(f"not paired: {count} episodes, {reason}")

    def _task(self, row: Mapping[str, Any]) -> str:
        columns = (self._task_column,) if self._task_column else TASKS
        column = next((name for name in columns if row.get(name) is not None), None)
        if column is None and self._task_column:
            raise ValueError(f"there is no `{self._task_column}`, so nobody knows its task.")
        task = row[column] if column else row.get("prompt", row.get("prompt_ids"))
        return json.dumps([column, row.get("task"), task], sort_keys=True, default=str)

    def _row(self, pair: Pair, report: ConversionReport) -> dict[str, Any] | None:
        numbers = [side.info["row"] for side in (pair.chosen, pair.rejected)]
        chosen, rejected = (self._rows[number] for number in numbers)
        provenance = {
            "chosen_reward": pair.chosen.reward,
            "rejected_reward": pair.rejected.reward,
            "chosen_row": numbers[0],
            "rejected_row": numbers[1],
        }
        provenance |= {name: chosen[name] for name in (*TASKS, "task") if name in chosen}
        if "completion_ids" in chosen:
            tokens = preference_row(pair)
            return {k: tokens[k] for k in tokens if k.endswith(("_ids", "_mask"))} | provenance
        shared = _shared_messages(pair)
        if not shared or chosen.get("tools") != rejected.get("tools"):
            report.unpaired.append(
                f"not paired: rows {numbers[0]} and {numbers[1]}, of one task but with "
                + ("other tools" if shared else "no message in common before the policy's first turn")
            )
            return None
        row = {"prompt": shared, **_rest(pair, len(shared))}
        return {**row, **({"tools": chosen["tools"]} if "tools" in chosen else {}), **provenance}


def _messages(row: Mapping[str, Any], task: int) -> dict[str, Any]:
    """A trajectory that is compared by its messages: what stands for their tokens tells the same apart."""
    messages = row["prompt"] + row["completion"]
    ids: list[int] = []
    mask: list[int] = []
    for number, message in enumerate(messages):
        text = json.dumps(message, sort_keys=True).encode()
        ids += [*text, 256]  # which stands between messages
        mask += [int(number >= len(row["prompt"]) and _acts(message))] * len(text) + [0]
    return {"prompt": [], "completion": messages, "prompt_ids": [task], "completion_ids": ids, "action_mask": mask}


def _tokens(row: Mapping[str, Any], task: int) -> dict[str, Any]:
    columns = {name: list(row[name]) for name in ("prompt_ids", "completion_ids", "action_mask")}
    return {"prompt": [], "completion": [], **columns}


def _shared_messages(pair: Pair) -> list[Message]:
    """What both sides begin with, up to the turn in which the pair parts."""
    sides = [_until_turn(side, pair.shared_turns) for side in (pair.chosen, pair.rejected)]
    return [one for one, other in takewhile(lambda both: both[0] == both[1], zip(*sides, strict=False))]


def _until_turn(side: Trajectory, turns: int) -> Sequence[Message]:
    first = side.info["prompt_messages"]
    starts = [number for number, message in enumerate(side.completion) if number >= first and _acts(message)]
    return side.completion[: starts[turns]]


def _acts(message: Message) -> bool:
    return message["role"] == "assistant" and message.get("train", True)


def _rest(pair: Pair, shared: int) -> dict[str, list[Message]]:
    return {"chosen": pair.chosen.completion[shared:], "rejected": pair.rejected.completion[shared:]}
