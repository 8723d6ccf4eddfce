"""What a row is: whose tool wrote it, told by its columns and by the roles of its messages."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from .columns import SIDES, conversation_column, is_conversation, is_message, load_json
from .nested import unfolded
from .rows import find_reward
from .token_logs import token_source


@dataclass(frozen=True)
class Format:
    """A way to write rows.

    Attributes:
        name (`str`): for `trl-multiturn convert --from`.
        description (`str`): what such rows are, for people.
    """

    name: str
    description: str


FORMATS = {
    format.name: format
    for format in (
        Format("trl", "rows with TRL's columns"),
        Format("text", "rows of text"),
        Format("tokens", "token rows of this package"),
        Format("openai", "messages of an OpenAI-compatible API"),
        Format("function-call", "messages with `function_call` and the role 'function', OpenAI's first form"),
        Format("tool-roles", "messages with roles for calls and results ('tool_call', 'tool_response')"),
        Format("sharegpt", "ShareGPT conversations (`from`, `value`)"),
        Format("episodes", "a benchmark's records of episodes"),
        Format("rollouts", "an environment library's saved rollouts"),
        Format("logs", "message logs with token ids"),
    )
}

_ROLLOUT_COLUMNS = {"example_id", "metrics", "is_completed", "is_truncated", "stop_condition", "rollout_id", "state"}
_EPISODE_COLUMNS = {"task_id", "trial", "episode_id", "instance_id", "reward_info", "traj", "simulation_id"}
_TEXT_COLUMNS = ("prompt", "completion")
_CALL_ROLES = {"tool_call", "tool_calls", "function_call", "tool_response", "tool_result", "observation"}


def recognize(row: Mapping[str, Any]) -> str | None:
    """The name of a row's format, `None` where it holds no conversation."""
    if row.keys() >= {"prompt_ids", "completion_ids", "action_mask"} or row.keys() >= {"prompt_ids", "chosen_ids"}:
        return "tokens"
    if token_source(row) is not None:
        return "logs"
    if all(isinstance(row.get(n), str) for n in SIDES) or all(isinstance(row.get(n), str) for n in _TEXT_COLUMNS):
        return "text"
    inner = unfolded(row)
    column = conversation_column(inner)
    single = any(is_message(inner.get(name)) for name in (*SIDES, "completion"))
    if column is None and not single and not any(is_conversation(inner.get(n)) for n in ("completion", *SIDES)):
        return None
    messages = list(_messages(inner))
    if any("from" in message and "role" not in message for message in messages):
        return "sharegpt"
    if row is not inner:
        return "openai" if "chosen" in inner else "rollouts"
    return _by_columns(row, column) or _by_roles(messages) or ("openai" if _is_whole(row, column) else "trl")


def _by_columns(row: Mapping[str, Any], column: str | None) -> str | None:
    if "completion" in row and row.keys() & _ROLLOUT_COLUMNS:
        return "rollouts"
    judged = column is not None and find_reward(row) is not None
    return "episodes" if judged and row.keys() & _EPISODE_COLUMNS else None


def _by_roles(messages: list[Mapping[str, Any]]) -> str | None:
    roles = {str(message.get("role")).lower() for message in messages}
    if roles & _CALL_ROLES:
        return "tool-roles"
    return "function-call" if "function" in roles or any(m.get("function_call") for m in messages) else None


def _is_whole(row: Mapping[str, Any], column: str | None) -> bool:
    return column is not None and not {"completion", "chosen"} & row.keys()


def describe(name: str) -> str:
    """What rows of a format are, and the command that writes them in TRL's form."""
    return f"{FORMATS[name].description} (`--from {name}`)"


def _messages(row: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    column = conversation_column(row) or "prompt"
    for value in (load_json(row.get(column)), *(row.get(name) for name in ("prompt", "completion", *SIDES))):
        value = [value] if is_message(value) else value
        if is_conversation(value) and value is not None:
            yield from (message for message in value if isinstance(message, Mapping))
