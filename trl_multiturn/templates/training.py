"""TRL's training templates, found by what templates do and not by their text."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

from transformers import PreTrainedTokenizerBase, ProcessorMixin

from .. import _upstream
from ..messages import Message
from .probes import ANSWER, USER, call_turn, result, tool_name
from .rendering import Renderer


def training_template(render: Renderer) -> str | None:
    """TRL's training template for a chat template, `None` where there is none.

    TRL knows its originals by their text. An original that renders the same is as good: an older text, or one with
    another line break, is the same template.
    """
    exact = _exact(render.processing_class)
    if exact is not None:
        return exact
    texts = None
    for original, training in _upstream.training_template_pairs():
        if not _speaks_alike(original, render):
            continue
        texts = texts or _renderings(render)
        other = Renderer(render.processing_class, original, render.tools, render.kwargs)
        if _same(texts, other):
            return training
    return None


def _exact(processing_class: PreTrainedTokenizerBase | ProcessorMixin) -> str | None:
    try:
        return _upstream.get_training_chat_template(processing_class)
    except Exception:  # none for this template, or its probes do not render
        return None


def _speaks_alike(original: str, render: Renderer) -> bool:
    """Whether a template's text holds the special tokens that a turn is rendered with; compiling it costs far more."""
    text = render.attempt([USER, ANSWER])
    if text is None:
        return False
    specials = set(re.findall(r"<[^<>\s]+>|\[[A-Z_/]+\]", text)) - {render.tokenizer.bos_token}
    return bool(specials) and all(token in original for token in specials)


def _probes(name: str) -> Iterator[tuple[list[Message], bool]]:
    call, answered = call_turn(name, {"value": "1"}), result(name)
    yield [USER], True
    yield [{"role": "system", "content": "rules"}, USER, ANSWER], False
    yield [USER, ANSWER, USER], True
    yield [USER, call, answered], True
    yield [USER, call, answered, ANSWER, USER, ANSWER], False
    yield [USER, {**ANSWER, "reasoning_content": "thought"}], False


def _renderings(render: Renderer) -> list[str | None]:
    return [render.attempt(*probe) for probe in _probes(tool_name(render.tools))]


def _same(texts: Sequence[str | None], render: Renderer) -> bool:
    probes = _probes(tool_name(render.tools))
    return all(text == render.attempt(*probe) for text, probe in zip(texts, probes, strict=True))
