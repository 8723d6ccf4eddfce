"""Tokens of a conversation whose turns nobody tells apart."""

from __future__ import annotations

from collections.abc import Sequence
from os.path import commonprefix
from typing import Any

from transformers import PreTrainedTokenizerBase, ProcessorMixin

from ..errors import VanishedPartError
from ..images.vision import refuse_unseen_images, vision_of
from ..messages import Message
from ..messages.images import images_in
from ..messages.wording import AS_WRITTEN, RenderingSwitches, Wording
from .encoding import encode
from .grammar import Grammar
from .rendering import own_renderer, template_text


def tokenize_unproven(
    processing_class: PreTrainedTokenizerBase | ProcessorMixin,
    prompt: Sequence[Message],
    completion: Sequence[Message],
    tools: list | None = None,
    switches: RenderingSwitches = AS_WRITTEN,
    **chat_template_kwargs: Any,
) -> dict[str, list[int]]:
    """Tokenizes messages in TRL's form as TRL's trainers do: the completion begins where prompt and whole part.

    Every token of the completion has mask 1, whoever wrote it.

    Args:
        processing_class ([`~transformers.PreTrainedTokenizerBase`] or [`~transformers.ProcessorMixin`]):
            Tokenizer, or processor.
        prompt (`list[dict]`), completion (`list[dict]`), tools (`list`, *optional*):
            The conversation.
        switches ([`RenderingSwitches`], *optional*):
            What of it is written as text.
        **chat_template_kwargs:
            Passed on to the template.

    Raises:
        `ValueError`: if the template cannot render the messages.
        [`VanishedPartError`]: if it leaves a part of them out.
    """
    kwargs = dict(chat_template_kwargs)
    shown = tools if switches.tool_dialect is None else None
    own = kwargs.pop("chat_template", None) or template_text(processing_class, shown)
    grammar = Grammar(own_renderer(processing_class, own, shown, kwargs), processing_class)
    wording = Wording(grammar.form, tools, switches)
    prompt, completion = wording.written(prompt), wording.written(completion, opens=False)
    messages = [*prompt, *completion]
    refuse_unseen_images(messages, processing_class)
    try:
        text = _rendering(grammar, messages)
    except VanishedPartError as error:
        written = wording.with_thoughts(messages)
        if written is None:
            raise grammar.with_remedy(error, messages, len(prompt)) from error
        messages, prompt = written, written[: len(prompt)]
        text = _rendering(grammar, messages)
    header = grammar.render(grammar.form.fit(prompt), generation_prompt=True)
    images, more = images_in(messages), {}
    if images:
        seen, vision = len(images_in(prompt)), vision_of(processing_class)
        expansion = vision.expand([text], images)
        header, text = "".join(vision.expand([header], images[:seen]).pieces), "".join(expansion.pieces)
        more = {
            "images": images[:seen],
            "completion_images": images[seen:],
            "completion_image_tokens": expansion.tokens[seen:],
        }
    prompt_ids, ids = (encode(grammar.render.tokenizer, each) for each in (header, text))
    start = len(commonprefix([prompt_ids, ids]))
    mask = [1] * (len(ids) - start)
    return {"prompt_ids": ids[:start], "completion_ids": ids[start:], "action_mask": mask, **more}


def _rendering(grammar: Grammar, messages: Sequence[Message]) -> str:
    """The text of messages, all parts of which it shows."""
    text = grammar.render(grammar.form.fit(messages))
    grammar.check_rendering(messages, text)
    return text
