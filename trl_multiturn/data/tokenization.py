"""Conversations to token ids and masks."""

from __future__ import annotations

import json
import logging
import weakref
from collections.abc import Callable, Mapping
from typing import Any

from datasets import Dataset, IterableDataset
from transformers import PreTrainedTokenizerBase, ProcessorMixin

from ..errors import VanishedPartError
from ..formats import Shapes, column_shapes, place_images, read_row
from ..messages import normalize_tools, without_flags, without_reasoning
from ..messages.wording import AS_WRITTEN, RenderingSwitches
from ..templates import TurnTemplate, tokenize_unproven
from ..version import __version__
from .turns import TURN_COLUMNS, turn_spans


logger = logging.getLogger(__name__)

# Rows of a dataset share a handful of tool sets; probing a template anew for each row would cost more than the row
_TEMPLATES: weakref.WeakKeyDictionary[Any, dict[str, TurnTemplate]] = weakref.WeakKeyDictionary()
_MAX_TEMPLATES = 64

# With which the branches of tokenized rows begin: a column of empty lists only would have no type
FIRST_SEGMENT = [[0, -1]]


def tokenize_trajectory(
    processing_class: PreTrainedTokenizerBase | ProcessorMixin,
    prompt: list[dict[str, Any]],
    completion: list[dict[str, Any]],
    tools: list | str | None = None,
    drop_reasoning: bool = False,
    training_template: bool = False,
    tool_dialect: str | None = None,
    write_reasoning: bool = False,
    **chat_template_kwargs: Any,
) -> dict[str, list[Any]]:
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
        drop_reasoning (`bool`, *optional*, defaults to `False`):
            Leave out the reasoning of assistant turns. Reasoning that the template does not show is an error
            otherwise.
        training_template (`bool`, *optional*, defaults to `False`):
            Where the chat template rewrites earlier turns, render with TRL's training template of its family, if there
            is one, instead of the sequences that the policy saw.
        tool_dialect (`str`, *optional*):
            `"hermes"` or `"fenced"`: render calls and results as text and tell of the tools in the system message, as
            rollouts in this dialect do; for chat templates that show no calls.
        write_reasoning (`bool`, *optional*, defaults to `False`):
            Write reasoning as `<think>…</think>` before the words of its turn, where the template cannot show any.
        **chat_template_kwargs:
            Passed on to the chat template.

    Returns:
        `dict[str, list]`: `prompt_ids`, `completion_ids`, and `action_mask` aligned with `completion_ids`; and
        `branches`, where the template rewrites earlier turns, so that the trajectory is more than one token sequence
        (see `trl_multiturn.segments`).

    Raises:
        `ValueError`: where the template does not show what the policy sampled; the message names its defect and
            remedies that were tried.
        [`VanishedPartError`]: where it leaves out a part of a message.

    Example:

    ```python
    >>> row = tokenize_trajectory(tokenizer, prompt, completion, tools=[add])
    >>> tokenizer.decode([t for t, m in zip(row["completion_ids"], row["action_mask"]) if m])
    '<tool_call>\\n{"name": "add", ...}\\n</tool_call><|im_end|>The sum is 4.<|im_end|>'
    ```
    """
    switches = RenderingSwitches(drop_reasoning, training_template, tool_dialect, write_reasoning)
    template = turn_template(processing_class, tools, {**switches.arguments(), **chat_template_kwargs})
    return template.tokenize(prompt, completion)


def turn_template(
    processing_class: PreTrainedTokenizerBase | ProcessorMixin,
    tools: list | str | None = None,
    chat_template_kwargs: dict[str, Any] | None = None,
) -> TurnTemplate:
    """The [`TurnTemplate`] for these arguments, built once per tokenizer, template, tool set and keyword arguments."""
    tools = normalize_tools(tools)
    kwargs = dict(chat_template_kwargs or {})
    templates = _TEMPLATES.setdefault(processing_class, {})
    # The tokenizer's template is part of the key: a user may set another one on the same tokenizer
    key = json.dumps([processing_class.chat_template, tools, kwargs], sort_keys=True, default=repr)
    if key not in templates:
        if len(templates) >= _MAX_TEMPLATES:
            templates.clear()
        try:
            templates[key] = TurnTemplate(processing_class, tools, **kwargs)
        except ValueError as error:
            raise _with_dialect(error, processing_class, tools, kwargs) from error
    return templates[key]


def _with_dialect(
    error: ValueError,
    processing_class: PreTrainedTokenizerBase | ProcessorMixin,
    tools: list[Any] | None,
    kwargs: dict[str, Any],
) -> ValueError:
    """The error of a template that cannot even render tools, with the switch that goes without, where that works."""
    if not tools or kwargs.get("tool_dialect"):
        return error
    try:
        TurnTemplate(processing_class, tools, **{**kwargs, "tool_dialect": "hermes"})
    except ValueError:
        return error
    return ValueError(
        f"{error} You can set `tool_dialect='hermes'` (tools, calls and results are written as text), or use another "
        "chat template."
    )


def read_messages(
    example: Mapping[str, Any],
    processing_class: PreTrainedTokenizerBase | ProcessorMixin,
    shapes: Shapes | None = None,
    rendering: RenderingSwitches = AS_WRITTEN,
) -> dict[str, Any]:
    """The conversation of a row in TRL's form (see [`formats.read_row`]), with its `chat_template_kwargs`."""
    kwargs = example.get("chat_template_kwargs") or {}
    if not isinstance(kwargs, Mapping):
        raise ValueError(
            f"`chat_template_kwargs` is {kwargs!r}, but holds keyword arguments of the chat template. Write a mapping "
            "such as `{'enable_thinking': False}`."
        )
    template = str(kwargs.get("chat_template") or processing_class.chat_template)
    row = place_images(read_row(example, shapes=shapes, template=template), example)
    if rendering.drop_reasoning:
        row |= {
            side: without_reasoning(row[side])
            for side in ("prompt", "chosen", "rejected", "completion")
            if side in row
        }
    return {**row, "chat_template_kwargs": kwargs, "rendering": rendering}


def _read_answers(
    example: Mapping[str, Any],
    processing_class: PreTrainedTokenizerBase | ProcessorMixin,
    shapes: Shapes | None,
    rendering: RenderingSwitches,
) -> dict[str, Any]:
    row = read_messages(example, processing_class, shapes, rendering)
    if not row["prompt"]:
        raise ValueError("`prompt` holds no message, so there is nothing to answer. Give it a user's turn.")
    return row


def tokenize_side(
    row: Mapping[str, Any],
    side: str,
    processing_class: PreTrainedTokenizerBase | ProcessorMixin,
    all_tokens: bool = False,
) -> dict[str, Any]:
    """Tokenizes `row["prompt"]` followed by `row[side]`, of what [`read_messages`] returned.

    As [`tokenize_trajectory`], but for one assistant turn without tool calls a template that proves nothing is no
    reason to refuse: such a row holds no observations, so it is tokenized as TRL's own trainers do, every token after
    the prompt trained, and the defect is logged.

    Args:
        row (`Mapping[str, Any]`):
            Messages in TRL's form, `tools` and `chat_template_kwargs`.
        side (`str`):
            `"completion"`, `"chosen"` or `"rejected"`.
        processing_class ([`~transformers.PreTrainedTokenizerBase`] or [`~transformers.ProcessorMixin`]):
            Tokenizer.
        all_tokens (`bool`, *optional*, defaults to `False`):
            Every token of the completion trains, so where turns begin and end needs no proof, unless flags of the
            messages ask for it.

    Returns:
        `dict`: `prompt_ids`, `completion_ids`, `action_mask` (1 on all that the policy sampled, whatever the flags),
        `turn_weights` and `turn_calls` (per assistant turn whether it trains and whether it calls a tool; `None` where
        turns are not told apart).
    """
    prompt, tools, kwargs = row["prompt"], row["tools"], row["chat_template_kwargs"]
    plain_prompt, _ = without_flags(prompt)
    completion, flags = without_flags(row[side])
    turns = [(flag, m) for flag, m in zip(flags, completion, strict=True) if m.get("role") == "assistant"]
    switches = row.get("rendering", AS_WRITTEN)
    try:
        if all_tokens and completion and all(flags):
            return _untold(tokenize_unproven(processing_class, plain_prompt, completion, tools, switches, **kwargs))
        template = turn_template(processing_class, tools, {**switches.arguments(), **kwargs})
        output: dict[str, Any] = template.tokenize(plain_prompt, completion, with_turns=True)
    except VanishedPartError as error:
        raise VanishedPartError(f"`{side}`: {error}") from error
    except ValueError as error:
        if len(completion) != 1 or not turns or completion[0].get("tool_calls"):
            raise ValueError(f"`{side}`: {error}") from error
        output = _tokenize_one_turn(row, plain_prompt, completion, processing_class, f"`{side}`: {error}")
    output.pop("turn_ids", None)
    output["branches"] = FIRST_SEGMENT + output.get("branches", [])
    if len(turn_spans(output["action_mask"])) != len(turns):
        if not all(flags):
            raise ValueError(
                f"`{side}`: the chat template prints nothing between two assistant turns, so it cannot be told which "
                "tokens belong to the one that must not train. Join the two, or drop the row."
            )
        return _untold(output)
    output["turn_weights"] = [int(flag) for flag, _ in turns]
    output["turn_calls"] = [int(bool(message.get("tool_calls"))) for _, message in turns]
    return output


def _tokenize_one_turn(
    row: Mapping[str, Any],
    prompt: list[dict[str, Any]],
    completion: list[dict[str, Any]],
    processing_class: PreTrainedTokenizerBase | ProcessorMixin,
    refusal: str,
) -> dict[str, Any]:
    """As TRL does, with the reason in the log."""
    try:
        switches, kwargs = row.get("rendering", AS_WRITTEN), row["chat_template_kwargs"]
        output = tokenize_unproven(processing_class, prompt, completion, row["tools"], switches, **kwargs)
    except VanishedPartError:
        raise
    except ValueError as error:  # it cannot be rendered at all
        raise ValueError(refusal) from error
    _warn_once(
        "The tokenized prompt is not a prefix of the tokenized prompt+completion, or a turn has no end. One-turn "
        f"completions are then tokenized as TRL does, all of their tokens trained. {refusal}"
    )
    return _untold(output)


def _untold(output: dict[str, list[int]]) -> dict[str, Any]:
    """Tokens whose turns are not told apart."""
    return {"branches": FIRST_SEGMENT, **output, **dict.fromkeys(TURN_COLUMNS)}


# What rows of messages become, given a row, `processing_class`, `shapes`, `all_tokens` and `rendering`
Tokenize = Callable[..., dict[str, Any]]


def row_tokenization_kwargs(
    dataset: Dataset | IterableDataset,
    processing_class: PreTrainedTokenizerBase | ProcessorMixin,
    tokenize: Tokenize,
    all_tokens: bool = False,
    rendering: RenderingSwitches = AS_WRITTEN,
) -> dict[str, Any]:
    """`fn_kwargs` for mapping [`tokenize_numbered_row`] over a dataset.

    They hold the package's version too: `datasets` caches what a function of a package returned under the function's
    name and arguments, and masks from another version must not come back.
    """
    return {
        "processing_class": processing_class,
        "tokenize": tokenize,
        "shapes": column_shapes(dataset),
        "all_tokens": all_tokens,
        "rendering": rendering,
        "version": __version__,
    }


def tokenize_numbered_row(
    example: dict[str, Any],
    index: int,
    processing_class: PreTrainedTokenizerBase | ProcessorMixin,
    tokenize: Tokenize,
    shapes: Shapes,
    all_tokens: bool,
    rendering: RenderingSwitches,
    version: str,
) -> dict[str, Any]:
    """`tokenize(example, …)`; what it refuses is refused with the row's number."""
    try:
        return tokenize(example, processing_class, shapes, all_tokens, rendering)
    except VanishedPartError as error:
        raise VanishedPartError(f"Row {index}: {error}") from error
    except ValueError as error:
        raise ValueError(f"Row {index}: {error}") from error


def tokenize_preference_row(
    example: dict[str, Any],
    processing_class: PreTrainedTokenizerBase | ProcessorMixin,
    shapes: Shapes | None = None,
    all_tokens: bool = False,
    rendering: RenderingSwitches = AS_WRITTEN,
) -> dict[str, Any]:
    """Token columns of a conversational preference row (`prompt`, `chosen`, `rejected`), with those of its turns."""
    row = _read_answers(example, processing_class, shapes, rendering)
    sides = {side: tokenize_side(row, side, processing_class, all_tokens) for side in ("chosen", "rejected")}
    # The sides share one prompt. Where theirs differ, what is left of each moves into its completion, untrained.
    shared = common_prefix_length(sides["chosen"]["prompt_ids"], sides["rejected"]["prompt_ids"])
    output = {"prompt_ids": sides["chosen"]["prompt_ids"][:shared]}
    for name, side in sides.items():
        rest = side["prompt_ids"][shared:]
        output[f"{name}_ids"] = rest + side["completion_ids"]
        output[f"{name}_action_mask"] = [0] * len(rest) + side["action_mask"]
        output |= {f"{name}_{column}": side[column] for column in (*TURN_COLUMNS, "branches")}
        if "images" in side:
            output["images"] = side["images"]
            output |= {f"{name}_{kind}": side[f"completion_{kind}"] for kind in ("images", "image_tokens")}
    return output


def tokenize_unpaired_row(
    example: dict[str, Any],
    processing_class: PreTrainedTokenizerBase | ProcessorMixin,
    shapes: Shapes | None = None,
    all_tokens: bool = False,
    rendering: RenderingSwitches = AS_WRITTEN,
) -> dict[str, Any]:
    """Token columns of a conversational row with one completion, with those of its turns, and with its `reward` where
    that stands under another name."""
    row = _read_answers(example, processing_class, shapes, rendering)
    output = tokenize_side(row, "completion", processing_class, all_tokens)
    return {**output, "reward": row["reward"]} if "reward" in row else output


def tokenize_pair_apart(
    example: dict[str, Any],
    processing_class: PreTrainedTokenizerBase | ProcessorMixin,
    shapes: Shapes | None = None,
    all_tokens: bool = False,
    rendering: RenderingSwitches = AS_WRITTEN,
) -> dict[str, dict[str, Any]]:
    """The two sides of a conversational preference row, each with the columns of [`tokenize_unpaired_row`]."""
    row = _read_answers(example, processing_class, shapes, rendering)
    return {side: tokenize_side(row, side, processing_class, all_tokens) for side in ("chosen", "rejected")}


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
