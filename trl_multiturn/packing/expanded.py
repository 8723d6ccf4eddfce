"""
Models that read a branching batch segment by segment, where the packed path does not.

The packed path reads the segments of a batch as paths of one row. Everywhere else (`packed=False`, sharded weights, an
architecture that is not proven) each segment is a padded sequence, which is exact for every model: a batch of `B`
trajectories goes in as its `S` sequences, and what comes out is put back into the columns of the batch.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast
from weakref import WeakSet

from torch import nn
from transformers import PreTrainedModel

from .decoder import ROWS_IN_FLIGHT, without_adapters
from .scored_head import FIELDS
from .sequences import Sequences, sequences_of


_EXPANDING: WeakSet[nn.Module] = WeakSet()


def expand_calls(model: nn.Module, scores: bool = True) -> None:
    """
    Hooks that let a model read branching batches; harmless to repeat, and without effect on any other batch.

    Args:
        model (`nn.Module`): a causal LM that went through TRL's `add_fused_lm_head`, whose calls for scores are meant;
            or a decoder, whose hidden states are.
        scores (`bool`, *optional*, defaults to `True`): which of the two it is.
    """
    if model in _EXPANDING:
        return
    _EXPANDING.add(model)
    running: list[Sequences | None] = [None]

    def before(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]] | None:
        sequences = sequences_of(kwargs.get("input_ids"))
        running[0] = sequences if bool(kwargs.get("fused_lm_head")) is scores else None
        if running[0] is None:
            return None
        if scores:
            ROWS_IN_FLIGHT[backbone_of(module)] = running[0]
        return args, expanded_arguments(running[0], kwargs)

    def after(module: nn.Module, args: tuple, output: Any) -> None:
        sequences, running[0] = running[0], None
        if sequences is None:
            return
        if scores:
            ROWS_IN_FLIGHT.pop(backbone_of(module), None)
        if output is not None:
            gather_output(sequences, output)

    model.register_forward_pre_hook(before, with_kwargs=True)
    model.register_forward_hook(after, always_call=True)


@contextmanager
def states_of(sequences: Sequences, model: nn.Module) -> Iterator[None]:
    """Hidden states that are captured of a model's decoder inside are those of the batch that branches."""
    ROWS_IN_FLIGHT[backbone_of(model)] = sequences
    try:
        yield
    finally:
        ROWS_IN_FLIGHT.pop(backbone_of(model), None)


def expanded_arguments(sequences: Sequences, kwargs: dict[str, Any]) -> dict[str, Any]:
    """A model's arguments with the batch replaced by its sequences."""
    sequences.are_read = True
    labels = {"labels": sequences.spread(kwargs["labels"])} if kwargs.get("labels") is not None else {}
    return {**kwargs, "input_ids": sequences.input_ids, "attention_mask": sequences.attention_mask, **labels}


def gather_output(sequences: Sequences, output: Any) -> Any:
    """What a model returned for the sequences, in place, as it belongs to the columns of the batch."""
    for name in ("log_probs", *FIELDS, "label_mask"):
        if getattr(output, name, None) is not None:
            setattr(output, name, sequences.gather(getattr(output, name)))
    if getattr(output, "last_hidden_state", None) is not None:
        output.last_hidden_state = sequences.unpack(output.last_hidden_state)
    return output


def backbone_of(model: nn.Module) -> nn.Module:
    """The decoder below a causal LM's head."""
    return cast(PreTrainedModel, without_adapters(model)).base_model
