"""Token layers that a run did not record, computed: log-probabilities under models, values."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..data.columns import in_batches
from ..models.value_model import ValueModel
from ..packing.sequences import Sequences
from .record import Record


# (ids, padding mask) -> a number for every position
Forward = Callable[[Tensor, Tensor], Tensor]

_TOKENS_PER_BATCH = 8192


def load_scorers(
    model: str | None = None, reference: str | None = None, value_model: str | None = None
) -> dict[str, Forward]:
    """
    What computes the layers, by their names.

    Args:
        model (`str`, *optional*):
            Policy for `policy_logps`: a folder (adapters too) or a name on the Hub.
        reference (`str`, *optional*):
            Policy for `ref_logps`, in place of those that the run recorded.
        value_model (`str`, *optional*):
            A folder that [`ValueModel.from_pretrained`] loads, for `values`.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    scorers: dict[str, Forward] = {}
    for layer, name in (("policy_logps", model), ("ref_logps", reference)):
        if name is not None:
            scorers[layer] = _LogProbs(_load_policy(name).to(device).eval())
    if value_model is not None:
        values = ValueModel.from_pretrained(value_model).to(device).eval()
        scorers["values"] = lambda ids, mask: values(ids.to(device), mask.to(device))
    return scorers


def with_scores(records: Iterable[Record], scorers: dict[str, Forward]) -> Iterator[Record]:
    """The records in their order, with the layers; those without tokens as they are."""
    for group in in_batches(records):
        rows = sorted((r for r in group if r.completion_ids and r.prompt_ids), key=_length)
        for batch in _by_tokens(rows):
            _score(batch, scorers)
        yield from group


@torch.no_grad()
def _score(records: list[Record], scorers: dict[str, Forward]) -> None:
    length = max(map(_length, records))
    ids = torch.zeros(len(records), length, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for row, record in enumerate(records):
        ids[row, : _length(record)] = torch.tensor(record.prompt_ids + record.completion_ids)
        mask[row, : _length(record)] = 1
    sequences = _sequences(records, ids, mask)
    for layer, forward in scorers.items():
        if sequences is None:
            numbers = forward(ids, mask).float().cpu()
        else:
            read = forward(sequences.input_ids, sequences.attention_mask).float().cpu()
            numbers = sequences.unpack(read[..., None])[..., 0]
        for row, record in enumerate(records):
            record.layers[layer] = numbers[row, len(record.prompt_ids) : _length(record)].tolist()


def _sequences(records: list[Record], ids: Tensor, mask: Tensor) -> Sequences | None:
    """The token sequences of records of which some are more than one; `None` where none is."""
    if not any(record.branches for record in records):
        return None
    parents = torch.arange(-1, ids.shape[1] - 1).repeat(len(ids), 1)
    for row, record in enumerate(records):
        for start, parent in record.branches:
            parents[row, start] = parent
    return Sequences(ids, mask, parents)


class _LogProbs:
    """The log-probability of each token, given those before it; 0 for the first."""

    def __init__(self, model: Any):
        self.model = model

    def __call__(self, ids: Tensor, mask: Tensor) -> Tensor:
        size = self.model.get_input_embeddings().num_embeddings
        if int(ids.max()) >= size:
            raise ValueError(
                f"The trajectories hold the token id {int(ids.max())}, but the model knows {size} ids only, so it is "
                "of another tokenizer. Pass a model of the run's own."
            )
        ids, mask = ids.to(self.model.device), mask.to(self.model.device)
        logits = self.model(input_ids=ids, attention_mask=mask).logits
        logps = torch.zeros(ids.shape, device=ids.device)
        for row in range(len(ids)):  # one row's distributions in float32 at a time
            scored = logits[row, :-1].float().log_softmax(-1)
            logps[row, 1:] = scored.gather(1, ids[row, 1:, None]).squeeze(1)
        return logps


def _load_policy(name: str) -> Any:
    from peft import AutoPeftModelForCausalLM
    from transformers import AutoModelForCausalLM

    adapter = Path(name, "adapter_config.json").exists()
    return (AutoPeftModelForCausalLM if adapter else AutoModelForCausalLM).from_pretrained(name, dtype="auto")


def _by_tokens(rows: list[Record]) -> Iterator[list[Record]]:
    """Rows of rising length in batches of a bounded number of tokens, padding included."""
    batch: list[Record] = []
    for record in rows:
        if batch and (len(batch) + 1) * _length(record) > _TOKENS_PER_BATCH:
            yield batch
            batch = []
        batch.append(record)
    if batch:
        yield batch


def _length(record: Record) -> int:
    return len(record.prompt_ids) + len(record.completion_ids)
