"""Calls in the harmony format of gpt-oss: messages with a channel and, for a call, a recipient."""

from __future__ import annotations

import re

from .reading import Reading, Sampled, UnreadableCallError, call_of
from .values import DECODER


_MESSAGE = re.compile(
    r"(?P<header>[^<]*(?:<\|(?:channel|constrain)\|>[^<]*)*)<\|message\|>(?P<words>.*?)"
    r"(?P<end><\|(?:end|call|return)\|>|(?=<\|start\|>)|\Z)",
    re.DOTALL,
)
_ROLE = re.compile(r"<\|start\|>assistant")
_CHANNEL = re.compile(r"<\|channel\|>\s*(\w+)")
_RECIPIENT = re.compile(r"\bto=(?:functions\.)?([\w.\-]+)")


class HarmonyReader:
    """Reads harmony messages, whichever of channel and recipient stands first.

    Chat templates print `to=functions.add<|channel|>commentary json<|message|>`, policies also write
    `<|channel|>commentary to=functions.add <|constrain|>json<|message|>`.

    Args:
        reasoning_key (`str`): the key under which the chat template shows the channel `analysis`.
    """

    name = "the harmony format"

    def __init__(self, reasoning_key: str = "thinking"):
        self._key = reasoning_key

    def read(self, turn: Sampled) -> Reading:
        said: list[str] = []
        thought: list[str] = []
        calls = []
        at = 0
        while (message := _MESSAGE.match(turn.text, _behind_role(turn.text, at))) is not None:
            at = message.end()
            recipient, channel = _RECIPIENT.search(message["header"]), _CHANNEL.search(message["header"])
            if recipient is not None:
                calls.append(call_of(recipient[1], _arguments(message["words"])))
            else:
                (thought if channel is not None and channel[1] == "analysis" else said).append(message["words"])
        rest = turn.text[at:]
        if _RECIPIENT.search(rest) and "<|" in rest:
            raise UnreadableCallError("A call was begun with a recipient and has no `<|message|>`.")
        if not said and not thought and not calls:
            return Reading(turn.text)
        content = "\n".join([*said, *([rest] if rest.strip() else [])])
        return Reading(content, calls, "\n".join(thought), self._key)


def _behind_role(text: str, at: int) -> int:
    role = _ROLE.match(text, at)
    return role.end() if role is not None else at


def _arguments(words: str) -> object:
    try:
        return DECODER.decode(words.strip() or "{}")
    except (ValueError, RecursionError) as error:
        raise UnreadableCallError(f"The arguments are no JSON: {error}") from error
