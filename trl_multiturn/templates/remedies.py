"""What a user can do about a conversation that a template does not show: only what was tried and works."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import lru_cache
from itertools import islice
from typing import Any

import jinja2
import jinja2.meta
import jinja2.sandbox

from ..messages import REASONING, Message


# What `apply_chat_template` hands to every template: no switches of the user's
_GIVEN = {"messages", "tools", "documents", "add_generation_prompt", "raise_exception", "strftime_now", "tojson"}
_MOST_SWITCHES = 8

Trial = Callable[[list[Message], int, dict[str, Any]], bool]
"""Whether messages, trained from a place on, can be measured with further keyword arguments of the template."""


def find_remedies(
    messages: Sequence[Message],
    first: int,
    template: str,
    works: Trial,
    further: Callable[[], Iterable[str]] = tuple,
) -> str:
    """Sentences that name what makes a refused conversation trainable, each of them tried.

    Args:
        messages (`list[dict]`), first (`int`): the conversation, trained from message `first` on.
        template (`str`): the chat template.
        works ([`Trial`]): tries a conversation.
        further (`Callable`, *optional*): finds remedies of other kinds, which it tries itself.
    """
    found = list(_switches(messages, first, template, works))
    found += further() if first < len(messages) else ()
    found += (words for words, other, at in _rewritten(messages, first) if works(other, at, {}))
    if not found and _each_turn_works(messages, first, works):
        found.append("make a row of each assistant turn, with all before it as its prompt")
    found.append("use another chat template" if first == len(messages) else "use rows that carry token ids and masks")
    return "You can " + ", or ".join(found) + "."


def _switches(messages: Sequence[Message], first: int, template: str, works: Trial) -> Iterator[str]:
    """Variables of the template that make the difference, such as a switch for thinking."""
    tried = ((name, value) for name in switch_names(template) for value in (False, True))
    working = (pair for pair in tried if works(list(messages), first, dict([pair])))
    for name, value in islice(working, 2):
        yield f"render with `{name}={value}` (`chat_template_kwargs`)"


@lru_cache(maxsize=64)
def switch_names(template: str) -> tuple[str, ...]:
    """Variables of a chat template that only a user can set."""
    source = re.sub(r"\{%-?\s*(?:end)?generation\s*-?%\}", "", template)
    environment = jinja2.sandbox.SandboxedEnvironment(extensions=["jinja2.ext.loopcontrols"])
    try:
        names = jinja2.meta.find_undeclared_variables(environment.parse(source))
    except jinja2.TemplateError:
        return ()
    return tuple(sorted(name for name in names - _GIVEN if not name.endswith("_token")))[:_MOST_SWITCHES]


def _rewritten(messages: Sequence[Message], first: int) -> Iterator[tuple[str, list[Message], int]]:
    """Conversations that say the same otherwise: the remedy in words, the messages, where the completion begins."""
    thinking = [any(message.get(key) for key in REASONING) for message in messages]
    if any(thinking):
        without = [{k: v for k, v in message.items() if k not in REASONING} for message in messages]
        yield "train without the reasoning, knowingly, with `drop_reasoning=True`", without, first
    if any(len(message.get("tool_calls") or ()) > 1 for message in messages):
        split, at = _one_call_a_turn(messages, first)
        yield "write one call per turn, each followed by its result", split, at
    words = all(isinstance(message.get("content"), str) for message in messages[:2])
    if words and messages[0]["role"] in ("system", "developer") and len(messages) > 1 and first > 1:
        joined = f"{messages[0]['content']}\n\n{messages[1].get('content') or ''}"
        yield (
            f"write the {messages[0]['role']} message into the first user message",
            [{**messages[1], "content": joined}, *messages[2:]],
            first - 1,
        )
    if any(message.get("tool_calls") and str(message.get("content") or "").strip() for message in messages):
        silent = [{**message, "content": ""} if message.get("tool_calls") else message for message in messages]
        yield "leave out the words beside tool calls", silent, first


def _one_call_a_turn(messages: Sequence[Message], first: int) -> tuple[list[Message], int]:
    """Parallel calls one after another, each with the result that answers it."""
    split: list[Message] = []
    start, place = first, 0
    while place < len(messages):
        if place == first:
            start = len(split)
        message = messages[place]
        calls = message.get("tool_calls") or ()
        if len(calls) < 2:
            split.append(message)
            place += 1
            continue
        results = [other for other in messages[place + 1 : place + 1 + len(calls)] if other["role"] == "tool"]
        for number, call in enumerate(calls):
            split.append(
                {**message, "content": message.get("content", "") if not number else "", "tool_calls": [call]}
            )
            split += results[number : number + 1]
        place += 1 + len(results)
    return split, start


def _each_turn_works(messages: Sequence[Message], first: int, works: Trial) -> bool:
    places = [i for i in range(first, len(messages)) if messages[i]["role"] == "assistant"]
    return len(places) > 1 and all(works(list(messages[: i + 1]), i, {}) for i in places)
