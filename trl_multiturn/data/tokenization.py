"""Conversations to token ids and masks."""

from __future__ import annotations

import json
import weakref
from typing import Any

from transformers import PreTrainedTokenizerBase, ProcessorMixin

from ..templates import TurnTemplate


# Rows of a dataset share a handful of tool sets; probing a template anew for each row would cost more than the row
_TEMPLATES: weakref.WeakKeyDictionary[Any, dict[str, TurnTemplate]] = weakref.WeakKeyDictionary()
_MAX_TEMPLATES = 64


def tokenize_trajectory(
    processing_class: PreTrainedTokenizerBase | ProcessorMixin,
    prompt: list[dict[str, Any]],
    completion: list[dict[str, Any]],
    tools: list | str | None = None,
    **chat_template_kwargs: Any,
) -> dict[str, list[int]]:
    """Tokenizes one trajectory; the mask is 1 exactly on tokens that the policy would have sampled.

    Args:
        processing_class ([`~transformers.PreTrainedTokenizerBase`] or [`~transformers.ProcessorMixin`]):
            Tokenizer, never changed. See [`TurnTemplate`] for the template that is used.
        prompt (`list[dict]`):
            Messages before the completion.
        completion (`list[dict]`):
            Assistant turns and the tool or user turns between them.
        tools (`list` or `str`, *optional*):
            Tools as `apply_chat_template` takes them, or a JSON string of their schemas.
        **chat_template_kwargs:
            Passed on to the chat template.

    Returns:
        `dict[str, list[int]]`: `prompt_ids`, `completion_ids`, and `action_mask` aligned with `completion_ids`.

    Raises:
        `ValueError`: where the template does not show what the policy sampled; the message names its defect and a
            remedy.

    Example:

    ```python
    >>> row = tokenize_trajectory(tokenizer, prompt, completion, tools=[add])
    >>> tokenizer.decode([t for t, m in zip(row["completion_ids"], row["action_mask"]) if m])
    '<tool_call>\\n{"name": "add", ...}\\n</tool_call><|im_end|>The sum is 4.<|im_end|>'
    ```
    """
    return turn_template(processing_class, tools, chat_template_kwargs).tokenize(prompt, completion)


def turn_template(
    processing_class: PreTrainedTokenizerBase | ProcessorMixin,
    tools: list | str | None = None,
    chat_template_kwargs: dict[str, Any] | None = None,
) -> TurnTemplate:
    """The [`TurnTemplate`] for these arguments, built once per tokenizer, template, tool set and keyword arguments."""
    tools = json.loads(tools) if isinstance(tools, str) else tools
    kwargs = chat_template_kwargs or {}
    templates = _TEMPLATES.setdefault(processing_class, {})
    # The tokenizer's template is part of the key: a user may set another one on the same tokenizer
    key = json.dumps([processing_class.chat_template, tools, kwargs], sort_keys=True, default=repr)
    if key not in templates:
        if len(templates) >= _MAX_TEMPLATES:
            templates.clear()
        templates[key] = TurnTemplate(processing_class, tools, **kwargs)
    return templates[key]
