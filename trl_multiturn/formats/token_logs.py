"""Logs that hold token ids, as token rows: what was sampled is used as it is and never rendered again."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from .columns import CONVERSATIONS, is_conversation, load_json
from .rows import find_reward


_IDS = ("token_ids", "input_ids", "tokens")
_LOGPS = ("generation_logprobs", "completion_logprobs", "generation_log_probs", "logprobs", "logps")
_PROMPTS = ("prompt_ids", "prompt_token_ids")
_COMPLETIONS = (
    *("completion_ids", "completion_token_ids", "response_ids", "response_token_ids", "generation_token_ids"),
    *("output_token_ids", "output_ids", "token_ids"),
)
_MASKS = ("action_mask", "completion_mask", "response_mask", "env_mask", "tool_mask", "loss_mask")
_SEQUENCE_MASKS = ("loss_mask", "action_mask", "assistant_masks", "assistant_mask", "labels")
_IGNORED = -100


def token_source(row: Mapping[str, Any]) -> str | None:
    """Where a row that is no token row of this package holds token ids: the name of a reader, `None` for nowhere."""
    return next((name for name, (finds, _) in _READERS.items() if finds(row) is not None), None)


def read_token_log(row: Mapping[str, Any]) -> dict[str, Any]:
    """A row with token ids as a token row.

    Args:
        row (`Mapping[str, Any]`):
            With messages that hold their ids (`token_ids`, and `generation_logprobs` for what was sampled), with steps
            that hold prompt and completion ids (each prompt goes on from the step before), with ids of prompt and
            completion and a mask, or with the ids of the whole and a mask or labels.

    Returns:
        `dict`: `prompt_ids`, `completion_ids`, `action_mask`, `behavior_logps` where all sampled tokens have one, and
        `reward` where the row has one.

    Raises:
        `ValueError`: if the ids are not those of one conversation, or nothing says which tokens were sampled.
    """
    source = token_source(row)
    if source is None:
        raise ValueError("no column holds the token ids of a whole conversation. Convert it as messages.")
    finds, read = _READERS[source]
    segments = read(finds(row))
    first = next((i for i, (_, sampled, _) in enumerate(segments) if sampled), None)
    if first is None:
        raise ValueError(
            "no token is marked as sampled by the policy, so there is nothing to learn from. Drop the row."
        )
    prompt_ids = [token for ids, _, _ in segments[:first] for token in ids]
    if not prompt_ids:
        raise ValueError("no token stands before the first that was sampled, so it has no prompt. Drop the row.")
    output: dict[str, Any] = {"prompt_ids": prompt_ids, "completion_ids": [], "action_mask": []}
    logps: list[float] | None = []
    for ids, sampled, scores in segments[first:]:
        output["completion_ids"] += ids
        output["action_mask"] += [int(sampled)] * len(ids)
        if sampled and scores is None:
            logps = None
        if logps is not None:
            logps += (scores or []) if sampled else [0.0] * len(ids)
    if logps is not None:
        output["behavior_logps"] = logps
    if (reward := find_reward(row)) is not None:
        output["reward"] = reward
    return output


# Consecutive tokens, whether the policy sampled them, and their log-probabilities
_Segment = tuple[list[int], bool, list[float] | None]


def _first(row: Mapping[str, Any], names: Sequence[str]) -> Any:
    return next((row[name] for name in names if _is_numbers(row.get(name))), None)


def _is_numbers(value: Any) -> bool:
    return isinstance(value, (list, tuple)) and bool(value) and isinstance(value[0], (int, float))


def _scores(row: Mapping[str, Any], count: int, what: str) -> list[float] | None:
    scores = _first(row, _LOGPS)
    if scores is not None and len(scores) != count:
        raise ValueError(
            f"{what} has {count} sampled tokens but {len(scores)} log-probabilities, so nobody knows whose they are. "
            f"Drop "
            "the row, or remove them."
        )
    return None if scores is None else list(scores)


# Messages that hold their ids


def _find_messages(row: Mapping[str, Any]) -> Any:
    for name in CONVERSATIONS:
        messages = load_json(row.get(name))
        if is_conversation(messages) and all(isinstance(m, Mapping) and _first(m, _IDS) for m in messages):
            return messages
    return None


def _read_messages(messages: Sequence[Mapping[str, Any]]) -> list[_Segment]:
    scored = any(_first(message, _LOGPS) is not None for message in messages)
    segments: list[_Segment] = []
    for number, message in enumerate(messages):
        ids = _first(message, _IDS)
        mask = message.get("token_loss_mask")
        sampled = message.get("role", message.get("from")) in ("assistant", "gpt")
        if sampled and scored and _first(message, _LOGPS) is None:
            sampled = False  # history that the dataset brought
        if _is_numbers(mask):
            segments += _by_mask(ids, mask, _first(message, _LOGPS), f"message {number}: `token_loss_mask`")
        else:
            segments.append((list(ids), sampled, _scores(message, len(ids), f"message {number}") if sampled else None))
    return segments


# Steps that hold what the policy read and what it sampled


def _step_tokens(step: Any) -> Mapping[str, Any] | None:
    for tokens in (step.get("tokens"), step) if isinstance(step, Mapping) else ():
        if isinstance(tokens, Mapping) and _first(tokens, _PROMPTS) and _first(tokens, _COMPLETIONS):
            return tokens
    return None


def _find_steps(row: Mapping[str, Any]) -> Any:
    response = row.get("response")
    nested = response.get("output") if isinstance(response, Mapping) else None
    for steps in (*(load_json(row.get(name)) for name in (*CONVERSATIONS, "steps", "turns")), nested):
        found = [tokens for tokens in map(_step_tokens, steps) if tokens] if isinstance(steps, (list, tuple)) else []
        if found:
            return found
    return None


def _read_steps(steps: Sequence[Mapping[str, Any]]) -> list[_Segment]:
    segments: list[_Segment] = []
    before: list[int] = []
    for number, step in enumerate(steps):
        prompt, completion = list(_first(step, _PROMPTS)), list(_first(step, _COMPLETIONS))
        if prompt[: len(before)] != before:
            raise ValueError(
                f"the prompt of step {number} does not begin with what step {number - 1} read and sampled: the "
                "conversation was rewritten in between, so it is no one sequence. Write a row for each step."
            )
        segments.append((prompt[len(before) :], False, None))
        scores = _scores(step, len(completion), f"step {number}")
        mask = _first(step, ("completion_mask",))
        if mask is None:
            segments.append((completion, True, scores))
        else:
            segments += _by_mask(completion, mask, scores, f"step {number}: `completion_mask`")
        before = prompt + completion
    return segments


# Ids of prompt and completion, or of the whole


def _find_sides(row: Mapping[str, Any]) -> Any:
    return row if _first(row, _PROMPTS) and _first(row, _COMPLETIONS) else None


def _read_sides(row: Mapping[str, Any]) -> list[_Segment]:
    completion, mask = _first(row, _COMPLETIONS), _first(row, _MASKS)
    if mask is None:
        raise ValueError(
            "there are ids of the completion but no mask, so nothing says which of them the policy sampled and which "
            "are "
            "tool results. Add `action_mask`, 1 on what was sampled."
        )
    return [(list(_first(row, _PROMPTS)), False, None), *_by_mask(completion, mask, _first(row, _LOGPS), "the mask")]


def _find_whole(row: Mapping[str, Any]) -> Any:
    return row if _first(row, _IDS) and _first(row, _SEQUENCE_MASKS) else None


def _read_whole(row: Mapping[str, Any]) -> list[_Segment]:
    ids: Any = _first(row, _IDS)
    mask: Any = _first(row, _SEQUENCE_MASKS)
    if "labels" in row and mask is row["labels"]:
        mask = [int(label != _IGNORED) for label in mask]
    return _by_mask(ids, mask, _first(row, _LOGPS), "the mask")


def _by_mask(ids: Any, mask: Any, scores: Any, what: str) -> list[_Segment]:
    if len(mask) != len(ids) or (scores is not None and len(scores) != len(ids)):
        raise ValueError(
            f"{what} has {len(mask)} entries for {len(ids)} tokens"
            + (f" and {len(scores)} log-probabilities" if scores is not None else "")
            + ", so it is unknown which token each belongs to. Write one entry per token."
        )
    segments: list[_Segment] = []
    for position, (token, bit) in enumerate(zip(ids, mask, strict=True)):
        if not segments or segments[-1][1] != bool(bit):
            segments.append(([], bool(bit), [] if scores is not None else None))
        segments[-1][0].append(token)
        if scores is not None:
            segments[-1][2].append(scores[position])  # type: ignore[union-attr]
    return segments


_READERS: dict[str, tuple[Callable[[Mapping[str, Any]], Any], Callable[[Any], list[_Segment]]]] = {
    "steps": (_find_steps, _read_steps),
    "messages": (_find_messages, _read_messages),
    "sides": (_find_sides, _read_sides),
    "whole": (_find_whole, _read_whole),
}
