"""Calls read by TRL's `parse_response` with a response template."""

from __future__ import annotations

import copy
import re
from collections.abc import Mapping
from typing import Any

from transformers import PreTrainedTokenizerBase

from ... import _upstream
from .reading import Reading, Sampled, UnreadableCallError


class ResponseTemplateReader:
    """Reads turns with TRL's `parse_response`.

    Args:
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            Never changed.
        response_template (`dict`):
            Which fields a turn has and what stands around them, as transformers describes it.
        name (`str`):
            What the reader is called.

    Raises:
        `ValueError`: if the template has no field `tool_calls`.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, response_template: Mapping[str, Any], name: str):
        self.name = name
        self._tokenizer = copy.copy(tokenizer)
        self._tokenizer.response_template = dict(response_template)
        self._opening = _call_opening(self._tokenizer)

    def read(self, turn: Sampled) -> Reading:
        try:
            parsed = _upstream.parse_response(
                self._tokenizer, list(turn.ids), prefix=list(turn.prefix_ids), tools=list(turn.tools)
            )
        except RecursionError:  # a policy that degenerates writes brackets in brackets
            parsed = {"content": turn.text}
        # Some parsers leave the end of a tool call's turn in the content
        content = parsed["content"].removesuffix(self._tokenizer.decode(list(turn.ids))[len(turn.text) :])
        calls, opened = parsed.get("tool_calls") or [], self._opening in turn.text
        if opened and not calls:
            raise UnreadableCallError("A call was begun and cannot be read.")
        if calls and not opened:  # some response patterns also match prose, such as `, f(` for `[f(`
            return Reading(turn.text)
        key = next((key for key in parsed if key not in ("role", "content", "tool_calls")), "reasoning_content")
        return Reading(content, calls, parsed.get(key) or "", key)


def _call_opening(tokenizer: PreTrainedTokenizerBase) -> str:
    """The literal text that begins a tool call in this tokenizer's response template."""
    field = (tokenizer.response_template or {}).get("fields", {}).get("tool_calls")
    if not field:
        raise ValueError(
            "The tokenizer's `response_template` has no field `tool_calls`, so no call could ever be read. Add the "
            "field, or use `dialect='fenced'`."
        )
    if "open" in field:
        return str(field["open"])
    pattern = field["open_pattern"]
    match = re.match(r"(?:\\\W|[^\\()\[\]{}.*+?|^$])*", pattern)
    literal = match[0] if match else ""
    unescaped = re.sub(r"\\(\W)", r"\1", literal or pattern)
    if literal:
        return unescaped
    # A pattern that begins with a choice: the special token in it, for its other branches may match prose
    return next((token for token in tokenizer.get_added_vocab() if token in unescaped), "\0")
