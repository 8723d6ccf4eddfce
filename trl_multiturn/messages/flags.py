"""Which turns train: `train`, or as other tools say it `weight`, `loss` or `training`, on an assistant's message."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from .text import brief


FLAGS = ("train", "weight", "loss", "training")


def read_flag(message: Mapping[str, Any], role: str, where: str) -> bool:
    """Whether a message trains, as far as its flags say.

    Raises:
        `ValueError`: if a flag is neither true nor false, if two differ, or if one is on what is not the policy's.
    """
    found = {key: message[key] for key in FLAGS if message.get(key) is not None}
    for key, value in found.items():
        if isinstance(value, str) or value not in (0, 1):
            raise ValueError(
                f"{where}: `{key}` is {brief(value)}, but a turn is trained (1, True) or not (0, False): there are no "
                "weights between. Write one of these, or leave the key out."
            )
        if value and role != "assistant":
            raise ValueError(
                f"{where}: `{key}` is {brief(value)}, but only what the policy says can be trained, and that is the "
                "assistant's turns. Remove the flag, or give the message the role 'assistant'."
            )
    if len(set(map(bool, found.values()))) > 1:
        raise ValueError(f"{where}: its flags contradict each other ({found}). Keep one of them.")
    return all(found.values())


def without_flags(messages: Sequence[Mapping[str, Any]]) -> tuple[list[dict[str, Any]], list[bool]]:
    """Messages in TRL's form as chat templates take them, and whether each may be trained."""
    flags = [message.get("train", True) for message in messages]
    if all("train" not in message for message in messages):
        return list(messages), flags  # type: ignore[arg-type]
    return [{key: value for key, value in message.items() if key != "train"} for message in messages], flags
