"""Conversations to token ids and masks."""

from __future__ import annotations

import json
import logging
import weakref
from collections.abc import Callable, Mapping
from typing import Any

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase, ProcessorMixin

from .. import _upstream
from ..templates import TurnTemplate
from ..version import __version__
from .row_checks import check_messages, read_tools


logger = logging.getLogger(__name__)

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
    tools = read_tools(tools)
    kwargs = chat_template_kwargs or {}
    templates = _TEMPLATES.setdefault(processing_class, {})
    # The tokenizer's template is part of the key: a user may set another one on the same tokenizer
    key = json.dumps([processing_class.chat_template, tools, kwargs], sort_keys=True, default=repr)
    if key not in templates:
        if len(templates) >= _MAX_TEMPLATES:
            templates.clear()
        templates[key] = TurnTemplate(processing_class, tools, **kwargs)
    return templates[key]


def tokenize_completion(
    example: dict[str, Any], column: str, processing_class: PreTrainedTokenizerBase | ProcessorMixin
) -> dict[str, list[int]]:
    """Tokenizes `example["prompt"]` followed by `example[column]`, with the row's `tools` and `chat_template_kwargs`.

    As [`tokenize_trajectory`], but for one assistant turn without tool calls a template that proves nothing is no
    reason to refuse: such a row holds no observations, so it is tokenized as TRL's own trainers do, every token after
    the prompt trained, and the defect is logged.
    """
    for name in ("prompt", column):
        check_messages(example[name], name)
    prompt, completion = _without_nulls(example["prompt"]), _without_nulls(example[column])
    tools, kwargs = read_tools(example.get("tools")), example.get("chat_template_kwargs") or {}
    if not isinstance(kwargs, Mapping):
        raise ValueError(
            f"`chat_template_kwargs` is {kwargs!r}, but holds keyword arguments of the chat template. Write a mapping "
            "such as `{'enable_thinking': False}`."
        )
    try:
        return tokenize_trajectory(processing_class, prompt, completion, tools, **kwargs)
    except ValueError as error:
        single = len(completion) == 1 and completion[0].get("role") == "assistant"
        if not single or completion[0].get("tool_calls"):
            raise ValueError(f"`{column}`: {error}") from error
        try:
            output = _tokenize_as_upstream(processing_class, prompt, completion, tools, kwargs)
        except (TemplateError, TypeError, KeyError, IndexError):  # it cannot be rendered at all
            raise ValueError(f"`{column}`: {error}") from error
        _warn_once(
            "The tokenized prompt is not a prefix of the tokenized prompt+completion, or a turn has no end. One-turn "
            f"completions are then tokenized as TRL does, all of their tokens trained. {error}"
        )
        return output


def _without_nulls(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Arrow gives every message of a column the keys of all, filled with None; templates ask which keys are there."""
    return [{key: value for key, value in m.items() if value is not None or key == "content"} for m in messages]


def _tokenize_as_upstream(processing_class, prompt, completion, tools, kwargs) -> dict[str, list[int]]:
    if isinstance(processing_class, ProcessorMixin):
        prompt = _upstream.prepare_multimodal_messages(prompt)
        completion = _upstream.prepare_multimodal_messages(completion)
    tokenizer = getattr(processing_class, "tokenizer", processing_class)
    kwargs = {"tools": tools, "tokenize": False, **kwargs}
    header = processing_class.apply_chat_template(prompt, add_generation_prompt=True, **kwargs)
    text = processing_class.apply_chat_template(prompt + completion, **kwargs)
    prompt_ids = tokenizer(header, add_special_tokens=False)["input_ids"]
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    start = common_prefix_length(prompt_ids, ids)
    return {"prompt_ids": ids[:start], "completion_ids": ids[start:], "action_mask": [1] * (len(ids) - start)}


Tokenize = Callable[[dict[str, Any], PreTrainedTokenizerBase | ProcessorMixin], dict[str, list[int]]]


def row_tokenization_kwargs(
    processing_class: PreTrainedTokenizerBase | ProcessorMixin, tokenize: Tokenize, row_name: str = "Row"
) -> dict[str, Any]:
    """`fn_kwargs` for mapping [`tokenize_numbered_row`] over a dataset.

    They hold the package's version too: `datasets` caches what a function of a package returned under the function's
    name and arguments, and masks from another version must not come back.
    """
    return {
        "processing_class": processing_class,
        "tokenize": tokenize,
        "row_name": row_name,
        "version": __version__,
    }


def tokenize_numbered_row(
    example: dict[str, Any],
    index: int,
    processing_class: PreTrainedTokenizerBase | ProcessorMixin,
    tokenize: Tokenize,
    row_name: str,
    version: str,
) -> dict[str, list[int]]:
    """`tokenize(example, processing_class)`; what it refuses is refused with the row's number."""
    try:
        return tokenize(example, processing_class)
    except ValueError as error:
        raise ValueError(f"{row_name} {index}: {error}") from error


def tokenize_preference_row(
    example: dict[str, Any], processing_class: PreTrainedTokenizerBase | ProcessorMixin
) -> dict[str, list[int]]:
    """Token columns of a conversational preference row (`prompt`, `chosen`, `rejected`)."""
    chosen = tokenize_completion(example, "chosen", processing_class)
    rejected = tokenize_completion(example, "rejected", processing_class)
    # The sides share one prompt. Where theirs differ, what is left of each moves into its completion, untrained.
    shared = common_prefix_length(chosen["prompt_ids"], rejected["prompt_ids"])
    output = {"prompt_ids": chosen["prompt_ids"][:shared]}
    for name, side in (("chosen", chosen), ("rejected", rejected)):
        rest = side["prompt_ids"][shared:]
        output[f"{name}_ids"] = rest + side["completion_ids"]
        output[f"{name}_action_mask"] = [0] * len(rest) + side["action_mask"]
    return output


def tokenize_unpaired_row(
    example: dict[str, Any], processing_class: PreTrainedTokenizerBase | ProcessorMixin
) -> dict[str, list[int]]:
    """Token columns of a conversational row with one completion (`prompt`, `completion`)."""
    return tokenize_completion(example, "completion", processing_class)


def common_prefix_length(first: list[int], second: list[int]) -> int:
    """Number of leading tokens that two sequences share."""
    length = 0
    for a, b in zip(first, second, strict=False):
        if a != b:
            break
        length += 1
    return length


_warned: set[str] = set()


def _warn_once(message: str) -> None:
    if message not in _warned:
        _warned.add(message)
        logger.warning(message)
