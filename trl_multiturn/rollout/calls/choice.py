"""Which reader reads a policy's calls: the one that gives back most of what the chat template prints."""

from __future__ import annotations

import json
import logging
import weakref
from collections.abc import Iterator, Mapping
from typing import Any

from ... import _upstream
from .harmony import HarmonyReader
from .learned import learned_readers
from .parsers import ToolParserLike, named_reader, resolve_tool_parser
from .reading import CallReader
from .response_template import ResponseTemplateReader
from .round_trip import TEXTS, ReaderFit, RoundTrip
from .samples import SAMPLE, Samples


_LOGGER = logging.getLogger(__name__)


class UnreadableTemplateError(ValueError):
    """The chat template prints no calls, or none that can be read."""


# By tokenizer; trying every reader costs about as much as rendering fifty conversations
_FITS: weakref.WeakKeyDictionary[Any, dict[str, ReaderFit]] = weakref.WeakKeyDictionary()


def choose_reader(
    processing_class: Any,
    chat_template_kwargs: Mapping[str, Any] | None = None,
    tool_parser: ToolParserLike = None,
) -> ReaderFit:
    """The reader that fits a chat template best.

    Readers are tried on what the template prints: calls with text, code, numbers, nothing, beside words and
    reasoning, several in one turn. The tokenizer's own `response_template` comes first, then the harmony format, TRL's
    response templates and the format learned from the template; a later one is taken only where it gives back more.

    Args:
        processing_class ([`~transformers.PreTrainedTokenizerBase`] or [`~transformers.ProcessorMixin`]):
            With the chat template.
        chat_template_kwargs (`dict`, *optional*):
            Keyword arguments of the template.
        tool_parser (`str` or `Callable`, *optional*):
            Reads calls instead: a name from vLLM's registry, a function `(text, tools)` or its dotted path.

    Raises:
        [`UnreadableTemplateError`]: if the template does not show calls and their results, or prints calls that no
            reader gives back.
        `ValueError`: if `tool_parser` does not read what the template prints.
    """
    kwargs = dict(chat_template_kwargs or {})
    if tool_parser is not None:
        return _named(processing_class, kwargs, tool_parser)
    tokenizer = getattr(processing_class, "tokenizer", processing_class)
    known = _FITS.setdefault(tokenizer, {})
    own = getattr(tokenizer, "response_template", None)
    key = json.dumps([processing_class.chat_template, own, kwargs], sort_keys=True, default=repr)
    if key not in known:
        known[key] = _best(processing_class, kwargs)
    return known[key]


def _best(processing_class: Any, kwargs: Mapping[str, Any]) -> ReaderFit:
    samples = show_calls(processing_class, kwargs)
    trip = RoundTrip(samples)
    best: ReaderFit | None = None
    for reader in _readers(samples) if trip.possible else ():
        fit = trip.fit(reader)
        if fit is not None and (best is None or len(fit.faults) < len(best.faults)):
            best = fit
        if best is not None and not best.faults:
            break
    if best is None:
        raise UnreadableTemplateError(
            "the chat template prints a tool call in a form that none of TRL's response templates reads and that "
            "could not be learned from it"
            if trip.possible
            else "the chat template prints tool calls in a way that a policy cannot sample in one turn"
        )
    return best


def _named(processing_class: Any, kwargs: Mapping[str, Any], tool_parser: ToolParserLike) -> ReaderFit:
    samples = show_calls(processing_class, kwargs)
    found = resolve_tool_parser(tool_parser)
    assert found is not None
    reader = named_reader(found, samples)
    fit = RoundTrip(samples).fit(reader)
    if fit is None:
        raise ValueError(
            f"`tool_parser={tool_parser!r}` does not read a tool call as the chat template prints it, which is "
            f"{samples.calls(SAMPLE)!r}. Leave `tool_parser` out, so that a reader is chosen that does, or pass "
            "another one."
        )
    changed = [name for name in fit.faults if name in TEXTS]
    if changed:
        _LOGGER.warning(
            "%s changes text arguments on the way to the tool (%s). Leave `tool_parser` out for a reader that does "
            "not, where there is one.",
            reader.name,
            ", ".join(changed),
        )
    return fit


def show_calls(processing_class: Any, kwargs: Mapping[str, Any]) -> Samples:
    """Samples of a template that shows calls and their results.

    Raises:
        [`UnreadableTemplateError`]: if it does not.
    """
    try:
        samples = Samples(processing_class, kwargs)
    except ValueError as error:
        raise UnreadableTemplateError(f"the chat template cannot be used with tools ({error})") from error
    if not samples.template.shows_tool_calls:
        raise UnreadableTemplateError(
            "the chat template leaves out tool calls or tool results when it renders a conversation"
        )
    return samples


def _readers(samples: Samples) -> Iterator[CallReader]:
    tokenizer = samples.tokenizer
    own = getattr(tokenizer, "response_template", None)
    if own is not None:
        yield ResponseTemplateReader(tokenizer, own, "the tokenizer's `response_template`")
    yield HarmonyReader(samples.reasoning_key)
    for family, template in _upstream.response_templates().items():
        if "tool_calls" in template["fields"]:
            yield ResponseTemplateReader(tokenizer, template, f"TRL's response template `{family}`")
    yield from learned_readers(samples)
