"""Messages to text under one chat template."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase, ProcessorMixin

from .. import _upstream
from ..messages import Message
from .probes import USER


class Renderer:
    """Renders messages with one text of a template, one set of tools, and a copy of the user's tokenizer.

    Args:
        processing_class ([`~transformers.PreTrainedTokenizerBase`] or [`~transformers.ProcessorMixin`]):
            Never changed.
        template (`str`):
            The chat template.
        tools (`list[dict | Callable]`, *optional*):
            In the form `apply_chat_template` takes.
        kwargs (`dict`):
            Passed on to the template.
    """

    def __init__(
        self,
        processing_class: PreTrainedTokenizerBase | ProcessorMixin,
        template: str,
        tools: list[Any] | None,
        kwargs: Mapping[str, Any],
    ):
        self.processing_class = copy.copy(processing_class)
        self.processing_class.chat_template = template
        self.tokenizer: PreTrainedTokenizerBase = getattr(self.processing_class, "tokenizer", self.processing_class)
        self.template = template
        self.tools = tools
        self.kwargs = dict(kwargs)
        self._multimodal = isinstance(processing_class, ProcessorMixin)

    def with_tools(self, tools: list[Any] | None) -> Renderer:
        """The same for other tools."""
        return Renderer(self.processing_class, self.template, tools, self.kwargs)

    def with_kwargs(self, **kwargs: Any) -> Renderer:
        """The same with further keyword arguments of the template."""
        return Renderer(self.processing_class, self.template, self.tools, {**self.kwargs, **kwargs})

    def __call__(self, messages: Sequence[Message], generation_prompt: bool = False) -> str:
        """The text of `messages`.

        Raises:
            `ValueError`: if the template cannot render them, whatever its own error is.
        """
        try:
            shown = _upstream.prepare_multimodal_messages(list(messages)) if self._multimodal else list(messages)
            text = self.processing_class.apply_chat_template(
                shown, tools=self.tools, tokenize=False, add_generation_prompt=generation_prompt, **self.kwargs
            )
        except Exception as error:  # a template is a program of its author's, which may raise anything
            roles = [message.get("role") for message in messages]
            raise ValueError(
                f"The chat template cannot render a conversation of roles {roles}: {_reason(error)}"
            ) from error
        return text

    def attempt(self, messages: Sequence[Message], generation_prompt: bool = False) -> str | None:
        """The text of `messages`, `None` where the template cannot render them."""
        try:
            return self(messages, generation_prompt)
        except ValueError:
            return None


def own_renderer(
    processing_class: PreTrainedTokenizerBase | ProcessorMixin,
    template: str,
    tools: list[Any] | None,
    kwargs: Mapping[str, Any],
) -> Renderer:
    """The renderer of a user's own template."""
    render = Renderer(processing_class, template, tools, kwargs)
    if tools is not None or render.attempt([USER]) is not None:
        return render
    without_any = render.with_tools([])  # some templates go through the tools without a look
    return render if without_any.attempt([USER]) is None else without_any


def template_text(processing_class: PreTrainedTokenizerBase | ProcessorMixin, tools: list[Any] | None) -> str:
    """The tokenizer's own template; of several, the one for tools or the default one.

    Raises:
        `ValueError`: if there is none.
    """
    template = processing_class.chat_template
    if isinstance(template, dict):
        template = template["tool_use"] if tools and "tool_use" in template else template.get("default")
    if template is None:
        raise ValueError(
            f"`{type(processing_class).__name__}` has no chat template, so messages cannot be rendered. Set "
            "`processing_class.chat_template` (see `trl.clone_chat_template`), or use rows that carry token ids."
        )
    return template


def _reason(error: Exception) -> str:
    text = str(error).strip() or type(error).__name__
    return text if text.endswith((".", "!", "?")) else f"{text}."
